"""Run a network on labels instead of numbers (see `mtz_core.network.ties`), operator by operator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from mtz_core.errors import UnsupportedModule
from mtz_core.network.graph import FIXED, GETITEM, INPUT, OUTPUTS, Inputs, Node, blank_values, operator, resolve
from mtz_core.network.layers import LAYERS, Convolution
from mtz_core.network.operations import CREATION, MixesNeurons, NotUnderstood, Value, operation_of
from mtz_core.network.ties import THE_INPUT, THE_KERNEL, Ties, compress, varying


@dataclass
class Labelling:
    """The labels of everything, as far as the network has been run.

    Attributes:
        ties: The labels and which of them are tied.
        values: What is known of every value, a `Value` or several, by the node's name.
        rows: The label of every row of each matrix, by the node's name.
        columns: The label of every column of each matrix, by the node's name.
        constants: What is known of stored tensors that are no layer's weights, by the tensor's name.
        reasons: Why rows and columns belong to no neuron, in words, by the node's name.
    """

    ties: Ties = field(default_factory=Ties)
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Int64[Tensor, " _out"]] = field(default_factory=dict)
    columns: dict[str, Int64[Tensor, " _columns"]] = field(default_factory=dict)
    constants: dict[str, Value] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def label_network(
    nodes: Sequence[Node],
    state: Mapping[str, Tensor],
    trainable: frozenset[str],
    inputs: Inputs,
) -> Labelling:
    """Label all values of a network, for a batch of one example.

    Args:
        nodes: The nodes, in an order in which they can run.
        state: The stored tensors by name.
        trainable: The names of the tensors that are parameters.
        inputs: What the network is given.

    Returns:
        The labels.

    Raises:
        UnsupportedModule: If there is no rule for an operator, or if its rule does not cover how it is used. Nodes that
            are kept separate need no rule.
    """
    found = Labelling()
    for name, entry in blank_values(inputs, 1).items():
        found.values[name] = Value(entry, torch.full([1] * entry.ndim, _input_label(found.ties, name, entry)))
    for node in nodes:
        if node.kind == OUTPUTS:
            found.values[node.name] = [found.values[source] for source in node.sources]
            continue
        try:
            read = _opaque(found, node, state) if node.opaque else _label(found, node, state, trainable)
            found.values[node.name] = read
        except (NotUnderstood, RuntimeError, ValueError, IndexError) as error:
            if not node.separate and not isinstance(error, MixesNeurons):
                where, reason = node.module or "the network itself", str(error).strip().splitlines()[0]
                raise UnsupportedModule(
                    f"{where!r}: operator {node.kind} cannot be zipped: {reason}. {_remedy(node, trainable)}"
                ) from error
            found.values[node.name] = _opaque(found, node, state)
    return found


def _input_label(ties: Ties, name: str, entry: Tensor) -> int:
    """The label of an input. Of those with names, whole numbers (tokens, masks) belong to no neuron."""
    if name == INPUT:
        return THE_INPUT
    if not entry.is_floating_point():
        return FIXED
    ties.inputs.append(int(ties.fresh(1)))
    return ties.inputs[-1]


def _remedy(node: Node, trainable: frozenset[str]) -> str:
    """The ways out for an operator that is not understood. Weights cannot be left to a rule, nor chance to anything."""
    if _is_random(node):
        return "Its outputs are left to chance: leave the network out."
    listed = f"the module, or {node.name!r} alone," if node.module else repr(node.name)
    separate = f"ist {listed} under `keep_separate` to leave it task-specific."
    if node.kind in LAYERS or trainable & {*node.state}:
        return f"L{separate}"
    return f"Register what it does to neurons (mtz_core.register_operation), or l{separate}"


def _label(found: Labelling, node: Node, state: Mapping[str, Tensor], trainable: frozenset[str]) -> Any:
    """Label the value of one node.

    Args:
        found: The labels so far.
        node: The node.
        state: The stored tensors by name.
        trainable: The names of the tensors that are parameters.

    Returns:
        What is known of the value, or of each value.

    Raises:
        NotUnderstood: If no rule covers the operator, or how it is used.
        UnsupportedModule: If there are fewer values for one example than for several.
    """
    if node.kind == GETITEM:
        parts, index = found.values[node.sources[0]], node.arguments["index"]
        if index >= len(parts):
            raise UnsupportedModule(
                f"{node.module or 'the network itself'!r}: the batch is split, and of one example there is no part "
                f"number {index}. Make the forward pass independent of the size of the batch."
            )
        return parts[index]
    if operator(node.kind)._schema.is_mutable:
        raise NotUnderstood("it writes into its operands")
    arguments = _given(found, node, state, trainable)
    values = [value for value in _flat(arguments) if isinstance(value, Value)]
    if all(value.actual is not None for value in values) and _makes_constants(node, values):
        out = _run_actual(node, arguments)
        constants = [Value(part.to("meta"), _nothing(part), True, part) for part in _listed(out)]
        return constants if isinstance(out, (list, tuple)) else constants[0]
    operation = operation_of(node.kind)
    is_matrix = operation is None and node.kind in LAYERS
    if operation is None and not is_matrix:
        raise NotUnderstood("zipping does not know this operator")
    out = _run_meta(node, arguments)
    if is_matrix:
        name = LAYERS[node.kind].weight
        if "state" not in node.arguments[name]:
            raise NotUnderstood("its weights are computed, not stored")
        return Value(out, _label_layer(found, node, arguments, out, arguments[name]))
    assert operation is not None
    labels: Any = operation.rule(found.ties, node, arguments, out)
    constant = all(value.constant for value in values)
    if isinstance(out, (list, tuple)):
        return [Value(o, part, constant) for o, part in zip(out, labels, strict=True)]
    return Value(out, labels, constant)


def _is_random(node: Node) -> bool:
    """Whether a node draws random numbers; dropout in evaluation mode does not."""
    evaluating = any(node.arguments.get(name) is False for name in ("train", "training"))
    return not evaluating and torch.Tag.nondeterministic_seeded in operator(node.kind).tags


def _makes_constants(node: Node, values: Sequence[Value]) -> bool:
    """Whether an operator is a function of tensors, or one that is known to do nothing but make constants."""
    returns = [str(value.type) for value in operator(node.kind)._schema.returns]
    function = bool(values) and bool(returns) and all("Tensor" in value for value in returns)
    return not _is_random(node) and (node.kind.partition(".")[0] in CREATION or function)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _flat(argument: Any) -> list[Any]:
    if isinstance(argument, Mapping):
        return [leaf for part in argument.values() for leaf in _flat(part)]
    if isinstance(argument, (list, tuple)):
        return [leaf for part in argument for leaf in _flat(part)]
    return [argument]


def _given(found: Labelling, node: Node, state: Mapping[str, Tensor], trainable: frozenset[str]) -> dict[str, Any]:
    """The arguments of a node for one example, tensors as `Value`."""
    weight = node.arguments.get(LAYERS[node.kind].weight) if node.kind in LAYERS else None
    for name in node.state:
        if name in found.constants:
            continue
        tensor = state[name]
        meta = tensor.to("meta")
        if (name in trainable and weight != {"state": name}) or _is_statistic(node, name):
            labels = found.ties.fresh(tensor.numel()).reshape(tensor.shape)
            found.constants[name] = Value(meta, labels, constant=True)
        elif name in trainable:
            continue
        else:
            found.constants[name] = Value(meta, _nothing(meta), constant=True, actual=tensor)
    given = dict(found.constants)
    if weight is not None and "state" in weight and weight["state"] not in given:
        meta = state[weight["state"]].to("meta")
        given[weight["state"]] = Value(meta, _nothing(meta), constant=True)
    return {name: resolve(value, found.values, given, 1) for name, value in node.arguments.items()}


def _is_statistic(node: Node, name: str) -> bool:
    """Whether a buffer holds one number per channel that belongs to the channel: a normalisation's statistics."""
    return any(node.arguments.get(key) == {"state": name} for key in ("running_mean", "running_var"))


def _nothing(meta: Tensor) -> Tensor:
    return torch.full([1] * meta.ndim, FIXED)


def _run_meta(node: Node, arguments: Mapping[str, Any]) -> Any:
    return operator(node.kind)(**{name: _map(value, lambda v: v.meta) for name, value in arguments.items()})


def _run_actual(node: Node, arguments: Mapping[str, Any]) -> Any:
    return operator(node.kind)(**{name: _map(value, lambda v: v.actual) for name, value in arguments.items()})


def _map(argument: Any, change: Any) -> Any:
    if isinstance(argument, Value):
        return change(argument)
    if isinstance(argument, (list, tuple)):
        return [_map(part, change) for part in argument]
    return argument


def _opaque(found: Labelling, node: Node, state: Mapping[str, Tensor]) -> Any:
    """Label a node without a rule: what it reads is pinned in its place, what it writes belongs to no neuron.

    Args:
        found: The labels so far.
        node: The node.
        state: The stored tensors by name.

    Returns:
        What is known of the value, or of each value.

    Raises:
        UnsupportedModule: If the operator is no function of tensors.
    """
    given = {name: Value(state[name].to("meta"), _nothing(state[name]), True) for name in node.state}
    arguments = {name: resolve(value, found.values, given, 1) for name, value in node.arguments.items()}
    for value in _flat(arguments):
        if isinstance(value, Value):
            found.ties.pin(value.labels, torch.arange(value.labels.numel()).reshape(value.labels.shape))
    schema = operator(node.kind)._schema
    if _is_random(node) or schema.is_mutable or not any(isinstance(value, Value) for value in _flat(arguments)):
        raise UnsupportedModule(
            f"{node.module!r}: operator {node.kind} is no function of tensors. Leave the network out."
        )
    out = _run_meta(node, arguments)
    parts = [Value(meta, _nothing(meta)) for meta in _listed(out)]
    return parts if isinstance(out, (list, tuple)) else parts[0]


def _label_layer(found: Labelling, node: Node, arguments: Mapping[str, Any], out: Tensor, weight: Value) -> Tensor:
    """Label a layer: its columns belong to the neurons that it reads, its rows are new neurons.

    The rows of a depthwise or grouped convolution belong to the neurons that their conv_group reads.

    Args:
        found: The labels so far.
        node: The layer.
        arguments: Its arguments.
        out: Its output, on the meta device.
        weight: What is known of its weight.

    Returns:
        The labels of the output.

    Raises:
        NotUnderstood: If the operator is not a plain layer.
        MixesNeurons: If its kernel runs over neurons.
    """
    layer, ties = LAYERS[node.kind], found.ties
    if {"alpha", "beta"} & node.arguments.keys():
        raise NotUnderstood("it scales what it adds")
    if isinstance(layer, Convolution) and layer.transposed and layer.conv_groups(node.arguments) > 1:
        raise NotUnderstood("it is a transposed convolution in groups")
    x: Value = arguments[layer.input]
    conv_groups = layer.conv_groups(node.arguments)
    columns, count = layer.matrix(weight.meta).shape[1], out.shape[layer.channel_axis(out.ndim)]
    if node.kind == "embedding":
        read = torch.tensor([THE_INPUT])
    else:
        axis = layer.channel_axis(x.labels.ndim)
        labels = compress(ties.resolve(x.labels))
        if labels.numel() > 1 and labels.shape[axis] == 1:
            found.rows[node.name] = torch.full((count,), FIXED)
            found.columns[node.name] = torch.full((columns,), FIXED)
            if isinstance(layer, Convolution) and not layer.is_pointwise(
                varying(labels), tuple(weight.meta.shape), node.arguments
            ):
                found.reasons[node.name] = "its kernel runs over neurons, which stay in their places"
                raise MixesNeurons("its kernel runs over neurons")
            found.reasons[node.name] = "it mixes positions, alike for every neuron"
            return labels
        read = ties.uniform(labels, (axis,)).flatten().expand(x.meta.shape[axis])
    if conv_groups == 1:
        rows = ties.fresh(count)
        per_channel = columns // len(read) if len(read) > 1 else columns
        found.columns[node.name] = read.repeat_interleave(per_channel) if len(read) > 1 else read.expand(columns)
    else:
        rows = _grouped(ties, read, conv_groups).repeat_interleave(count // conv_groups)
        found.columns[node.name] = torch.full((columns,), THE_KERNEL)
    found.rows[node.name] = rows
    bias = arguments.get(layer.bias) if layer.bias else None
    if bias is not None and bias.constant:
        ties.tie(rows, bias.labels.flatten())
    return rows.reshape([count if a == layer.channel_axis(out.ndim) else 1 for a in range(out.ndim)])


def _grouped(ties: Ties, read: Int64[Tensor, " channels"], conv_groups: int) -> Int64[Tensor, " groups"]:
    """The neuron of each conv_group of a convolution: the channels that the group reads, if those are neurons."""
    channels = read.reshape(conv_groups, -1)
    first = channels[:, :1]
    ties.tie(channels, first)
    neurons = ties.resolve(first[:, 0])
    own = ties.fresh(conv_groups)
    no_neuron = ties.are_inputs(neurons) | (neurons < 0)
    ties.pin(torch.where(no_neuron, own, FIXED), torch.arange(conv_groups))
    return torch.where(no_neuron, own, neurons)
