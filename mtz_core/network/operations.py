"""Operators that zipping understands beside layers, and what each does to the neurons that its operands carry.

To teach zipping a new operator, give `register_operation` its ATen name and one of the rules below: `pointwise` for
what acts on every element alone, `movement` for what only moves elements, `reduction` and `along` for sums and soft-max
over axes, `window(n)` for what works on the last n axes of each channel.

A rule takes the labels that are tied so far, the node, its arguments (tensors as `Value`) and its output on the meta
device. It ties labels as far as the operator requires, and returns the labels of the output, or of each output. It
raises `NotUnderstood` for uses of the operator that it does not cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from mtz_core.network.graph import FIXED, Node, operator
from mtz_core.network.ties import Ties, compress, varying


@dataclass(frozen=True, eq=False)
class Value:
    """What is known of a value, for a batch of one example.

    Attributes:
        meta: A tensor of the value's shape and dtype, on the meta device.
        labels: The labels, with as many axes as the value, of size 1 where they do not change.
        constant: Whether the value is independent of the network's input.
        actual: The value itself, if it depends on neither input nor parameters; parameters may still learn.
    """

    meta: Shaped[Tensor, "..."]
    labels: Int64[Tensor, "..."]
    constant: bool = False
    actual: Shaped[Tensor, "..."] | None = None

    @property
    def everywhere(self) -> Int64[Tensor, "..."]:
        """The label of every element."""
        return self.labels.expand(self.meta.shape)


class NotUnderstood(Exception):
    """An operator treats neurons in a way that no rule covers. The message says which."""


class MixesNeurons(NotUnderstood):
    """An operator mixes neurons by their places, or every one with every other. It is taken as one without a rule."""


RuleArguments = Mapping[str, Any]
Rule = Callable[[Ties, Node, RuleArguments, Any], Int64[Tensor, "..."] | Sequence[Int64[Tensor, "..."]]]
"""Ties the labels of an operator's operands as far as required, and returns the labels of its output (or outputs)."""


@dataclass(frozen=True)
class Operation:
    """An operator.

    Attributes:
        rule: What the operator does to labels.
        floor: The value below which all inputs give the same output; 0 for a ReLU.
        keeps: Whether the operator acts on each channel alone and leaves it in its place.
    """

    rule: Rule
    floor: float = -math.inf
    keeps: bool = False

    @property
    def clips(self) -> bool:
        """Whether different inputs can give the same output."""
        return self.floor > -math.inf


def operands(arguments: Any) -> Iterable[Value]:
    """Iterate over all values among an operator's arguments.

    Args:
        arguments: The arguments, nested or not.

    Yields:
        The values.
    """
    if isinstance(arguments, Value):
        yield arguments
    elif isinstance(arguments, Mapping):
        for part in arguments.values():
            yield from operands(part)
    elif isinstance(arguments, (list, tuple)):
        for part in arguments:
            yield from operands(part)


def pointwise(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of what acts on every element alone: elements that meet are tied."""
    values = list(operands(arguments))
    met = [value for value in values if not value.constant] or values
    met = [value for value in met if not _acts_alike(ties, value, met)] or met
    labels = torch.full([1] * out.ndim, FIXED)
    for value in met:
        labels = _meet(ties, labels, value.labels)
    labels = compress(ties.resolve(labels))
    for value in met:
        _pin_by(ties, labels, value.labels, value.meta.shape)
    for value in values:
        if value.constant and value not in met:
            _meet_constant(ties, labels, value)
    return labels


def _acts_alike(ties: Ties, value: Value, others: Sequence[Value]) -> bool:
    """Whether a value is an input with a name, such as a mask, that meets all neurons of the other values alike."""
    named = ties.inputs[1:]
    if not named or value.labels.numel() > 1 or int(value.labels) not in named:
        return False
    axes = {axis for other in others for axis in varying(other.labels)}
    return bool(axes) and all(-axis > value.meta.ndim or value.meta.shape[axis] == 1 for axis in axes)


def _meet(ties: Ties, a: Tensor, b: Tensor) -> Tensor:
    ties.tie(a, b)
    a, b = torch.broadcast_tensors(a, b)
    return torch.where(a < 0, b, a)


def _pin_by(ties: Ties, labels: Tensor, other: Tensor, shape: Sequence[int]) -> None:
    """Pin neurons that meet something (of this shape, with labels `other`) that changes but belongs to no neuron."""
    axes = {axis for axis in varying(labels) if -axis <= len(shape) and shape[axis] > 1}
    if not axes or bool((other >= 0).all()):
        return
    size = [n if axis - len(shape) in axes else 1 for axis, n in enumerate(shape)]
    other = other.amax(dim=[a for a in range(other.ndim) if size[a] == 1], keepdim=True).expand(size)
    places = torch.arange(other.numel()).reshape(size)
    ties.pin(torch.where(other < 0, labels, FIXED), places)


def _meet_constant(ties: Ties, labels: Tensor, constant: Value) -> None:
    """Tie or pin neurons that meet a constant that changes from neuron to neuron.

    A parameter is tied to the neurons, to be permuted along. Where that would tie neurons that nothing else ties (a
    rotary position is the same in every head), or where the constant is no parameter, the neurons are pinned in their
    places. A constant that does not change from neuron to neuron is the same for all.
    """
    neurons = varying(labels)
    own = constant.labels if constant.actual is None else _distinct(constant.actual)
    shared = neurons & varying(own)
    if not shared:
        return
    if constant.actual is None and shared == neurons and bool((own >= 0).all()):
        ties.tie(labels, own)
        return
    for axis in range(own.ndim):
        if axis - own.ndim not in shared and own.shape[axis] > 1:
            own = own.amax(dim=axis, keepdim=True)
    places = torch.arange(own.numel()).reshape(own.shape)
    ties.pin(labels, places)


def _distinct(values: Tensor) -> Tensor:
    """Number the values so that equal ones have equal numbers, with size 1 along axes without change."""
    return compress(values.unique(return_inverse=True)[1]) if values.numel() > 1 else torch.zeros_like(values).long()


def movement(ties: Ties, node: Node, arguments: RuleArguments, out: Any) -> Any:
    """The rule of what moves elements: the operator is run on the labels. What it fills in belongs to no neuron."""
    moved = {name: _movable(argument) for name, argument in arguments.items()}
    if node.kind == "pad" and arguments.get("mode", "constant") != "constant":
        return compress(operator(node.kind)(**{**moved, "self": moved["self"].double()}).long())
    if node.kind in ("pad", "constant_pad_nd"):
        moved["value"] = FIXED
    result = operator(node.kind)(**moved)
    return [compress(part) for part in result] if isinstance(result, (list, tuple)) else compress(result)


def patches(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of what lays patches of images side by side: the operator is run on the labels. Padding is no neuron."""
    labels = arguments["self"].everywhere - FIXED  # padding is 0
    return compress(operator(node.kind)(**{**arguments, "self": labels.double()}).long() + FIXED)


def overlaid(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of what adds up patches to images: the values of one channel are tied, wherever they lie in patches."""
    channels = out.shape[-3]
    return compress(ties.uniform(arguments["self"].everywhere.unflatten(-2, (channels, -1)), [out.ndim - 3]))


def _movable(argument: Any) -> Any:
    if isinstance(argument, Value):
        index = not argument.meta.is_floating_point() and argument.actual is not None
        return argument.actual if index else argument.everywhere.contiguous()
    if isinstance(argument, (list, tuple)):
        return [_movable(part) for part in argument]
    return argument


def writing(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of what puts a value into another one: it is run on the labels. Numbers belong to no neuron."""
    given = {name: own.everywhere.contiguous() if isinstance(own, Value) else own for name, own in arguments.items()}
    if node.kind == "fill.Scalar":
        given["value"] = FIXED
    return compress(operator(node.kind)(**given))


def index_put(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of writing at constant places, or of one number wherever a mask says.

    Args:
        ties: The labels that are tied so far.
        node: The node.
        arguments: Its arguments.
        out: Its output.

    Returns:
        The labels of the output.

    Raises:
        NotUnderstood: If places depend on the data otherwise, or if something is added there.
    """
    value, put, indices = arguments["self"], arguments["values"], arguments["indices"]
    given = list(operands(indices))
    if not arguments.get("accumulate") and all(index.actual is not None for index in given):
        places = [None if index is None else index.actual for index in indices]
        return compress(torch.ops.aten.index_put(value.everywhere.contiguous(), places, put.everywhere))
    if arguments.get("accumulate") or put.meta.numel() > 1 or given[0].meta.shape != value.meta.shape:
        raise NotUnderstood("it writes where the data say")
    return pointwise(ties, node, arguments, out)


def _axes(arguments: RuleArguments, ndim: int) -> list[int]:
    given = arguments.get("dim")
    if given is None or given == []:
        return list(range(ndim))
    return [axis % ndim for axis in ([given] if isinstance(given, int) else given)]


def reduction(ties: Ties, node: Node, arguments: RuleArguments, out: Any) -> Any:
    """The rule of sums and the like over the axes `dim`, or over all."""
    value: Value = arguments["self"]
    axes = _axes(arguments, value.labels.ndim)
    labels = compress(ties.symmetric(value.labels, axes))
    parts = out if isinstance(out, (list, tuple)) else [out]
    if parts[0].ndim != labels.ndim:
        labels = labels.reshape([size for axis, size in enumerate(labels.shape) if axis not in axes])
    return [labels] * len(parts) if isinstance(out, (list, tuple)) else labels


def along(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of soft-max and the like: every element meets all others along an axis, but stays itself."""
    value: Value = arguments["self"]
    ties.symmetric(value.labels, _axes(arguments, value.labels.ndim))
    return ties.resolve(value.labels)


def gated(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of a gated linear unit: the second half of an axis gates the first."""
    first, second = arguments["self"].everywhere.chunk(2, dim=arguments.get("dim", -1))
    return compress(ties.resolve(_meet(ties, first, second)))


@dataclass(frozen=True)
class Window:
    """The rule of what works on the last axes of every channel.

    Attributes:
        axes: How many axes the window has.
    """

    axes: int

    def __call__(self, ties: Ties, node: Node, arguments: RuleArguments, out: Any) -> Any:
        """Label what the operator puts out."""
        (value,) = (v for v in operands(arguments) if v.meta.is_floating_point())
        labels = compress(ties.resolve(value.labels))
        if value.constant:  # a table of positions: those of one channel belong to one neuron
            labels = ties.uniform(labels, range(labels.ndim - self.axes))
        if any(size > 1 for size in labels.shape[-self.axes :]):
            raise MixesNeurons("its window runs over neurons")
        return [labels] * len(out) if isinstance(out, (list, tuple)) else labels


def window(axes: int) -> Rule:
    """Make the rule of what works on the last axes of every channel, such as pooling and interpolation.

    Args:
        axes: How many axes the window has.

    Returns:
        The rule. Where the window runs over neurons, these stay in their places.
    """
    return Window(axes)


def _normalise(ties: Ties, labels: Tensor, keep: Sequence[int], constants: Iterable[Value | None]) -> Tensor:
    """Tie the constants of a normalisation to the neurons along some axes; if none lie there, they act on all alike.

    Args:
        ties: The labels that are tied so far.
        labels: The labels of what is normalised.
        keep: The axes of the neurons.
        constants: The constants, None for those that are missing.

    Returns:
        The labels of the output.

    Raises:
        NotUnderstood: If a constant depends on the data.
    """
    given = [constant for constant in constants if constant is not None]
    if not all(constant.constant for constant in given):
        raise NotUnderstood("it normalises by what depends on the data")
    labels = ties.resolve(labels)
    shape = [labels.shape[axis] for axis in keep]
    if math.prod(shape) == 1 and any(constant.meta.numel() > 1 for constant in given):
        return labels
    labels = ties.uniform(labels, keep)
    for constant in given:
        ties.tie(labels.reshape(shape), constant.labels.reshape(constant.meta.shape))
    return ties.resolve(labels)


def batch_norm(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of batch normalisation: every channel (axis 1) has constants of its own.

    Args:
        ties: The labels that are tied so far.
        node: The node.
        arguments: Its arguments.
        out: Its output.

    Returns:
        The labels of the output.

    Raises:
        NotUnderstood: If the statistics are those of the batch.
    """
    if arguments.get("training") or arguments.get("use_input_stats"):
        raise NotUnderstood("it uses the statistics of the batch in evaluation mode")
    constants = (arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var"))
    return _normalise(ties, arguments["input"].labels, (1,), constants)


def instance_norm(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of instance normalisation: every channel of every example is normalised by itself."""
    constants = (arguments.get(name) for name in ("weight", "bias", "running_mean", "running_var"))
    return _normalise(ties, arguments["input"].labels, (1,), constants)


def layer_norm(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of layer and root-mean-square normalisation over the last axes."""
    value: Value = arguments["input"]
    ndim = value.labels.ndim
    keep = range(ndim - len(arguments["normalized_shape"]), ndim)
    constants = [arguments.get(name) for name in ("weight", "bias")]
    labels = _normalise(ties, value.labels, keep, constants) if any(constants) else value.labels
    ties.symmetric(labels, keep)
    return ties.resolve(labels)


def group_norm(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of group normalisation: channels stay in their group."""
    labels = _normalise(ties, arguments["input"].labels, (1,), (arguments.get(name) for name in ("weight", "bias")))
    groups = int(arguments["num_groups"])
    if labels.shape[1] > 1 and groups > 1:
        ties.pin(labels.flatten(), torch.arange(groups).repeat_interleave(labels.shape[1] // groups))
    return labels


def matmul(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of a product of two values, as in attention.

    Args:
        ties: The labels that are tied so far.
        node: The node.
        arguments: Its arguments.
        out: Its output.

    Returns:
        The labels of the output.

    Raises:
        NotUnderstood: If one of the values is a vector, or if every neuron is multiplied with every other.
    """
    first, second = operands(arguments)
    if min(first.meta.ndim, second.meta.ndim) < 2:
        raise NotUnderstood("it multiplies by a vector")
    return _contract(ties, first.labels, first.meta.shape, second.labels, second.meta.shape)


def _contract(
    ties: Ties,
    a: Int64[Tensor, "... _ _"],
    a_shape: Sequence[int],
    b: Int64[Tensor, "... _ _"],
    b_shape: Sequence[int],
) -> Int64[Tensor, "... _ _"]:
    """Label a matrix product.

    Args:
        ties: The labels that are tied so far.
        a: The labels of the first value.
        a_shape: The shape of the first value.
        b: The labels of the second value.
        b_shape: The shape of the second value.

    Returns:
        The labels of the product.

    Raises:
        MixesNeurons: If every neuron is multiplied with every other.
    """
    a, b = compress(ties.resolve(a)), compress(ties.resolve(b))
    if a.shape[-1] > 1 or b.shape[-2] > 1:  # the sum runs over neurons
        a, b = ties.uniform(a, _but(a, -2)), ties.uniform(b, _but(b, -1)).transpose(-1, -2)
        met = compress(ties.resolve(_meet(ties, a, b)))
        _pin_by(ties, met, a, [*a_shape[:-2], 1, a_shape[-1]])
        _pin_by(ties, met, b, [*b_shape[:-2], 1, b_shape[-2]])
        return compress(ties.symmetric(met, [met.ndim - 1]))
    if a.shape[-2] > 1 and b.shape[-1] > 1:
        raise MixesNeurons("it multiplies every neuron with every other")
    met = compress(ties.resolve(_meet(ties, a, b)))
    _pin_by(ties, met, a, [*a_shape[:-1], 1])
    _pin_by(ties, met, b, [*b_shape[:-2], 1, b_shape[-1]])
    return met


def _but(labels: Tensor, axis: int) -> list[int]:
    return [a for a in range(labels.ndim) if a != axis % labels.ndim]


def attention(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of scaled dot-product attention: query and key are tied within a head, the head to its values."""
    query, key, value = (arguments[name].labels for name in ("query", "key", "value"))
    if arguments.get("enable_gqa"):
        heads = arguments["query"].meta.shape[-3]
        key, value = (
            arguments[name].everywhere.repeat_interleave(heads // arguments[name].meta.shape[-3], dim=-3)
            for name in ("key", "value")
        )
        key, value = compress(key), compress(value)
    query_shape, key_shape, value_shape = (list(arguments[name].meta.shape) for name in ("query", "key", "value"))
    key_shape[:-2] = value_shape[:-2] = query_shape[:-2]
    key_shape[-2:] = reversed(key_shape[-2:])
    weights = _contract(ties, query, query_shape, key.transpose(-1, -2), key_shape)
    shape = [*query_shape[:-1], key_shape[-1]]
    mask = arguments.get("attn_mask")
    if mask is not None:
        meta = torch.empty(shape, device="meta")
        weights = pointwise(ties, node, {"weights": Value(meta, weights), "mask": mask}, meta)
    return _contract(ties, weights, shape, value, value_shape)


def nothing(ties: Ties, node: Node, arguments: RuleArguments, out: Shaped[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """The rule of what makes new values that come from no neuron."""
    return torch.full([1] * out.ndim, FIXED)


_POINTWISE = (
    *("relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus"),
    *("hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "log_sigmoid", "threshold", "prelu", "rrelu"),
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
    *(
        "add",
        "sub",
        "rsub",
        "mul",
        "div",
        "true_divide",
        "pow",
        "maximum",
        "minimum",
        "max.other",
        "min.other",
        "floor_divide",
        "fmod",
        "remainder",
        "atan2",
    ),
    *("neg", "abs", "sign", "exp", "exp2", "expm1", "log", "log1p", "log2", "sqrt", "rsqrt", "reciprocal", "square"),
    *("sin", "cos", "erf", "floor", "ceil", "round", "clamp", "clamp_min", "clamp_max", "clip", "addcmul", "addcdiv"),
    *("where", "masked_fill", "nan_to_num", "lerp", "contiguous", "clone", "detach", "alias", "type_as", "to"),
    *("_to_copy", "zeros_like", "ones_like", "full_like", "eq", "ne", "lt", "le", "gt", "ge"),
    *("logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not", "__and__", "__or__"),
)
_MOVEMENT = (
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "expand_as"),
    *("permute", "transpose", "t", "mT", "numpy_T", "movedim", "swapaxes", "select", "slice", "narrow", "split"),
    *("split_with_sizes", "chunk", "unbind", "cat", "concat", "stack", "hstack", "vstack", "repeat"),
    *("repeat_interleave", "roll", "flip", "tile", "index", "index_select", "gather", "pad", "constant_pad_nd"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "view_as", "reshape_as", "tensor_split", "unfold"),
    *("unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes", "hsplit", "vsplit", "dsplit", "diagonal"),
    *("concatenate", "dstack", "column_stack", "moveaxis", "swapdims", "adjoint", "ravel", "broadcast_to"),
    *("fliplr", "flipud", "take_along_dim"),
)
_REDUCTION = (
    "sum",
    "mean",
    "amax",
    "amin",
    "var",
    "std",
    "norm",
    "linalg_vector_norm",
    "logsumexp",
    "prod",
    "any",
    "all",
    "max.dim",
    "min.dim",
)

OPERATIONS: dict[str, Operation] = {
    **dict.fromkeys(_POINTWISE, Operation(pointwise, keeps=True)),
    **dict.fromkeys(_MOVEMENT, Operation(movement)),
    **dict.fromkeys(_REDUCTION, Operation(reduction)),
    **dict.fromkeys(("softmax", "log_softmax", "_softmax", "_log_softmax"), Operation(along)),
    "relu": Operation(pointwise, floor=0.0, keeps=True),
    **{f"{pool}{n}d": Operation(window(n), keeps=True) for n in (1, 2, 3) for pool in ("max_pool", "avg_pool")},
    **{
        f"adaptive_{pool}{n}d": Operation(window(n), keeps=True) for n in (1, 2, 3) for pool in ("max_pool", "avg_pool")
    },
    **{f"max_pool{n}d_with_indices": Operation(window(n), keeps=True) for n in (1, 2, 3)},
    "upsample_linear1d": Operation(window(1), keeps=True),
    "upsample_nearest1d": Operation(window(1), keeps=True),
    **{f"upsample_{mode}2d": Operation(window(2), keeps=True) for mode in ("nearest", "bilinear", "bicubic")},
    **{f"_upsample_{mode}2d_aa": Operation(window(2), keeps=True) for mode in ("bilinear", "bicubic")},
    **{
        f"{mode}_pad{n}d": Operation(window(n), keeps=True) for n in (1, 2, 3) for mode in ("reflection", "replication")
    },
    **dict.fromkeys(("new_zeros", "new_ones", "new_full", "new_empty", "zero"), Operation(nothing)),
    **{f"_upsample_nearest_exact{n}d": Operation(window(n), keeps=True) for n in (1, 2, 3)},
    **{f"upsample_{mode}3d": Operation(window(3), keeps=True) for mode in ("nearest", "trilinear")},
    **dict.fromkeys(("fill", "slice_scatter", "select_scatter"), Operation(writing)),
    "index_put": Operation(index_put),
    "im2col": Operation(patches),
    "col2im": Operation(overlaid),
    "glu": Operation(gated),
    "batch_norm": Operation(batch_norm),
    "instance_norm": Operation(instance_norm),
    "layer_norm": Operation(layer_norm),
    "rms_norm": Operation(layer_norm),
    "group_norm": Operation(group_norm),
    **dict.fromkeys(("matmul", "bmm", "mm"), Operation(matmul)),
    "scaled_dot_product_attention": Operation(attention),
}
"""Operators without a matrix to share, by their ATen name with or without the overload."""


CREATION = frozenset({"arange", "zeros", "ones", "full", "eye", "linspace", "scalar_tensor", "tril", "triu"})
"""Operators that make constants, which may depend on the size of the batch."""


def register_operation(kind: str, operation: Operation) -> None:
    """Teach zipping an ATen operator.

    Networks that use the operator can be loaded only where it is registered, too.

    Args:
        kind: The operator's name, as ``cumsum``, or ``cumsum.dim`` for one overload alone.
        operation: What the operator does to neurons.
    """
    OPERATIONS[kind] = operation


def operation_of(kind: str) -> Operation | None:
    """What zipping knows about an operator; None if nothing."""
    return OPERATIONS.get(kind) or OPERATIONS.get(kind.partition(".")[0])
