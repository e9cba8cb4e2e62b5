"""Trace any ``nn.Module`` into a `Network`: its operators, its tensors, and which neurons are tied.

Tracing goes through ``torch.export``: it sees the operators that really run, however the module spells them, knows
every shape, and needs no specification by hand. The module is exported for two batch sizes; numbers that differ between
the two are numbers that count examples. What the graph cannot express is refused, with the module's path and the
operator; nothing is guessed, and every graph is checked by permuting its neurons (see `mtz_core.selfcheck`).
"""

from __future__ import annotations

import keyword
import operator as python_operator
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy

from mtz_core.errors import InvalidCalibration, InvalidWeights, UnsupportedModule
from mtz_core.graph import GETITEM, INPUT, Network, Node, leaves, operator, run_node
from mtz_core.layers import LAYERS
from mtz_core.neurons import analyse
from mtz_core.operations import operation_of
from mtz_core.selfcheck import check

SIZES = (2, 3)
"""The batch sizes that a module is exported for."""

CHECKED_SIZE = 5
"""The one that the graph is checked with: on no straight line through the others by chance."""


def trace(module: nn.Module, example: Shaped[Tensor, "batch ..."], keep_separate: Sequence[str] = ()) -> Network:
    """The graph and tensors of a module, found by exporting it on an example input. The module is not modified.

    `keep_separate` are paths of submodules whose layers will not be shared and whose operators need not be understood.
    Raises `UnsupportedModule` for what cannot be zipped, `InvalidWeights` for weights that are not finite,
    `InvalidCalibration` if the module does not accept the example.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModule(f"{module!r} is not a torch.nn.Module.")
    if example.ndim < 2:
        raise InvalidCalibration(
            f"an example of shape {list(example.shape[1:])} has no features for a network to read."
        )
    _check_names(module)
    _check_paths(module, keep_separate)
    _check_weights(module)
    examples = _generic(example, CHECKED_SIZE)
    with evaluation_mode(module), _buffers_kept(module), _plain_attention():
        expected = _output(module, examples)
        programs = [_export(module, examples[:size].clone()) for size in SIZES]
    reader = _Reader(module, programs)
    nodes, output = reader.nodes()
    nodes = _reachable(nodes, output)
    parameters = frozenset(dict(module.named_parameters()))
    nodes, state = _fold(nodes, output, reader.state(), parameters)
    used = {name for node in nodes for name in node.state}
    unused = sorted(parameters - used)
    if unused:
        raise UnsupportedModule(
            f"parameter {unused[0]!r} is never used when the network runs. Remove it, "
            "so that sizes before and after zipping speak of the same network."
        )
    state = {name: state[name] for name in state if name in used}
    trainable = parameters & used
    nodes = _mark_layers(nodes, trainable, keep_separate)
    analysis = analyse(nodes, output, state, trainable, tuple(example.shape[1:]), example.dtype)
    network = Network(analysis.graph, state, trainable, tuple(example.shape[1:]), example.dtype)
    check(network, analysis, examples, expected)
    if not network.graph.layers:
        raise UnsupportedModule(f"{type(module).__name__} has no layer with weights to share.")
    return network


def _generic(example: Shaped[Tensor, "batch ..."], count: int) -> Shaped[Tensor, "count ..."]:
    """The first example, and others near it: inputs that are all zero, or all alike, would prove little."""
    first, generator = example[:1].detach().cpu(), torch.Generator().manual_seed(0)
    shape = (count - 1, *example.shape[1:])
    if not example.is_floating_point():  # tokens: such as occur in the example
        drawn = torch.randint(first.numel(), shape, generator=generator)
        return torch.cat([first, first.flatten()[drawn]]).to(example.device)
    deviation = float(first.std()) if first.numel() > 1 else 0.0
    noise = torch.randn(shape, generator=generator, dtype=first.dtype)
    return torch.cat([first, first + noise * (deviation or 1.0)]).to(example.device)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back what a forward pass writes into buffers."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.copy_(value)


def _output(module: nn.Module, examples: Tensor) -> Tensor:
    try:
        output = module(examples.clone())
    except Exception as error:  # whatever a user's forward raises means the same: this input does not fit it
        raise InvalidCalibration(
            f"{type(module).__name__} does not accept an input of shape {list(examples.shape)} ({examples.dtype}): "
            f"{_first_line(error)} Check that the calibration data are meant for this network."
        ) from error
    if not isinstance(output, Tensor):
        raise UnsupportedModule(
            f"{type(module).__name__} does not return one tensor but {type(output).__name__}. Wrap it in a module that "
            "returns the logits alone."
        )
    return output


def _export(module: nn.Module, examples: Tensor) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, (examples,), strict=False)
    except Exception as error:
        raise UnsupportedModule(
            f"{type(module).__name__} cannot be exported by torch.export: {_first_line(error)} "
            "Control flow that depends on data cannot be zipped; make it independent of the data, or leave this "
            "network out of the group."
        ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


_RESERVED = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
"""Names of parts that modules which are built from graphs cannot have."""


def _check_names(module: nn.Module) -> None:
    for name, _ in (*module.named_parameters(), *module.named_buffers()):
        for part in name.split("."):
            if part in _RESERVED or keyword.iskeyword(part):
                raise UnsupportedModule(
                    f"{name!r}: {part!r} is a name that torch modules use themselves. Rename that part of the network."
                )


def _check_paths(module: nn.Module, keep_separate: Sequence[str]) -> None:
    known = dict(module.named_modules())
    for path in keep_separate:
        if path not in known:
            near = ", ".join(name for name in known if name) or "none"
            raise UnsupportedModule(f"keep_separate: there is no submodule {path!r}. Submodules: {near}.")


def _check_weights(module: nn.Module) -> None:
    for path, part in module.named_modules():
        if "quantized" in type(part).__module__:
            raise UnsupportedModule(f"{path!r} ({type(part).__name__}) is quantised. Zip the network before it is.")
    devices = set()
    for name, tensor in module.named_parameters():
        if is_lazy(tensor):
            raise UnsupportedModule(
                f"parameter {name!r} has no shape yet (a lazy module). Run the network once on an example first."
            )
        if tensor.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModule(
                f"parameter {name!r} has dtype {tensor.dtype}; zipping needs float32 or float64. "
                "Convert the network first, for example with `.float()`."
            )
        devices.add(tensor.device)
        if tensor.is_meta:
            raise UnsupportedModule(f"parameter {name!r} has no values (it is on the meta device). Load its weights.")
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidWeights(f"parameter {name!r} has NaN or infinite values. Train or export the network again.")
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and not buffer.is_meta and bool(torch.isnan(buffer).any()):
            raise InvalidWeights(f"buffer {name!r} has NaN values. Train or export the network again.")
    if len(devices) > 1:
        raise UnsupportedModule(
            f"the network is on several devices ({', '.join(sorted(map(str, devices)))}). Move it to one, with `.to()`."
        )


@contextmanager
def evaluation_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients, every submodule's own mode put back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused operators that torch's attention modules use in evaluation mode only."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


class _Reader:
    """Reads two exported programs of one module side by side."""

    def __init__(self, module: nn.Module, programs: Sequence[torch.export.ExportedProgram]) -> None:
        self.module = module
        self.programs = programs
        self.names: dict[str, str] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the module holds or its program carries along."""
        constants = {name: value for name, value in self.programs[0].constants.items() if isinstance(value, Tensor)}
        held = dict(self.module.named_parameters(remove_duplicate=False)) | dict(
            self.module.named_buffers(remove_duplicate=False)
        )
        return {name: tensor.detach().cpu() for name, tensor in (constants | held).items()}

    def nodes(self) -> tuple[list[Node], str]:
        """All operators in order, and the name of the output's value."""
        first, second = self.programs
        signature = first.graph_signature
        given = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        tied = self._tied()
        self.tensors = {name: tied.get(target, target) for name, target in given.items()}
        pairs = list(zip(first.graph.nodes, second.graph.nodes, strict=False))
        if len(first.graph.nodes) != len(second.graph.nodes) or any(a.target != b.target for a, b in pairs):
            raise UnsupportedModule(
                f"{type(self.module).__name__} runs other operators for {SIZES[0]} examples than for {SIZES[1]}. "
                "Make its forward pass independent of the size of the batch."
            )
        nodes: list[Node] = []
        for a, b in pairs:
            if a.op == "placeholder":
                self.names[a.name] = INPUT
            elif a.op == "call_function":
                nodes.append(self._node(a, b, len(nodes)))
                self.names[a.name] = nodes[-1].name
            elif a.op != "output":
                raise self._unsupported(a, f"it is a {a.op.replace('_', ' ')}")
        (result,) = (self._current(node) for node in first.graph.output_node().args[0] if node is not None)
        return nodes, self.names[result.name]

    def _tied(self) -> dict[str, str]:
        """One name for each parameter that goes by several."""
        named = {tensor: name for name, tensor in self.module.named_parameters()}
        return {
            name: named[tensor]
            for name, tensor in self.module.named_parameters(remove_duplicate=False)
            if named[tensor] != name
        }

    def _current(self, node: fx.Node) -> fx.Node:
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def _node(self, a: fx.Node, b: fx.Node, number: int) -> Node:
        path = self._path(a)
        if a.target is python_operator.getitem:
            source, index = a.args
            assert isinstance(source, fx.Node)
            return Node(f"getitem:{number}", GETITEM, {"value": self._reference(source), "index": index}, path)
        target: Any = a.target
        if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
            raise self._unsupported(a, "it is no operator of ATen")
        kind = target._schema.name.removeprefix("aten::")
        overload = target._schema.overload_name
        arguments = self._arguments(a, b)
        if target._schema.is_mutable:
            kind, overload = self._out_of_place(a, kind, overload)
            names = [argument.name for argument in operator(f"{kind}.{overload}".rstrip("."))._schema.arguments]
            renamed = dict(zip((argument.name for argument in target._schema.arguments), names, strict=False))
            arguments = {renamed[name]: value for name, value in arguments.items()}
        if (kind, overload) == ("to", "device"):
            overload = "dtype"  # where a tensor lies is the running network's business
        kind = f"{kind}.{overload}" if overload else kind
        name = f"{kind}:{number}"
        if kind in LAYERS:
            weight = arguments.get(LAYERS[kind].weight)
            if isinstance(weight, Mapping) and "state" in weight:
                name = self._layer_name(a, weight["state"])
        return Node(name, kind, arguments, path)

    def _layer_name(self, node: fx.Node, weight: str) -> str:
        name = weight.removesuffix("weight").rstrip("._") or node.name
        taken = set(self.names.values())
        return next(n for n in (name, *(f"{name}:{i}" for i in range(2, len(taken) + 3))) if n not in taken)

    def _out_of_place(self, node: fx.Node, kind: str, overload: str) -> tuple[str, str]:
        """An operator that writes into its operand, as the one that does not; later readers get the new value."""
        written = node.args[0]
        assert isinstance(written, fx.Node)
        plain = kind.removesuffix("_")
        if plain == kind or written.name in self.tensors or not hasattr(torch.ops.aten, plain):
            raise self._unsupported(node, "it changes a tensor in place")
        others = {other for other in self._aliases(written, node) if self._current(other) is not written}
        if any(node < user for other in others for user in other.users):
            raise self._unsupported(node, "it changes in place a tensor of which another view is read afterwards")
        self.replaced[written] = node
        packet = getattr(torch.ops.aten, plain)
        if overload not in [name if name != "default" else "" for name in packet.overloads()]:
            raise self._unsupported(node, "it changes a tensor in place")
        return plain, overload

    def _aliases(self, node: fx.Node, without: fx.Node) -> set[fx.Node]:
        """All nodes whose values may share memory with a node's, but those that come of another one."""
        root = node
        while (before := self._viewed(root)) is not None:
            root = before
        found, pending = {root}, [root]
        while pending:
            for user in pending.pop().users:
                if self._viewed(user) in found and user not in found and user is not without:
                    found.add(user)
                    pending.append(user)
        return found

    @staticmethod
    def _viewed(node: fx.Node) -> fx.Node | None:
        """The node that a view is a view of."""
        if node.op != "call_function":
            return None
        if node.target is python_operator.getitem:
            source = node.args[0]
        else:
            schema = getattr(node.target, "_schema", None)
            aliasing = schema is not None and any(a.alias_info is not None for a in schema.arguments)
            passing = schema is not None and schema.name.removeprefix("aten::") in _MAY_PASS
            source = node.args[0] if (aliasing or passing) and node.args else None
        return source if isinstance(source, fx.Node) else None

    def _arguments(self, a: fx.Node, b: fx.Node) -> dict[str, Any]:
        """The arguments by the names that the operator's schema gives them; defaults left out."""
        target: Any = a.target
        schema = target._schema.arguments
        names = [argument.name for argument in schema]
        both = [dict(zip(names, node.args, strict=False)) | dict(node.kwargs) for node in (a, b)]
        arguments: dict[str, Any] = {}
        for argument in schema:
            if argument.name not in both[0] or argument.name in _PLACES:
                continue
            first, second = both[0][argument.name], both[1][argument.name]
            same = not isinstance(first, fx.Node) and first == second == argument.default_value
            if same and argument.has_default_value() and argument.name not in _KEPT:
                continue
            arguments[argument.name] = self._argument(a, first, second)
        return arguments

    def _argument(self, node: fx.Node, a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node):
            return self._reference(a)
        if isinstance(a, (list, tuple)):
            return [self._argument(node, x, y) for x, y in zip(a, b, strict=True)]
        if isinstance(a, torch.dtype):
            return {"dtype": str(a).removeprefix("torch.")}
        if isinstance(a, bool) or not isinstance(a, (int, float, str, type(None))):
            if isinstance(a, bool):
                return a
            raise self._unsupported(node, f"an argument of type {type(a).__name__} cannot be stored")
        if a != b and not (a != a and b != b):
            if not isinstance(a, int):
                raise self._unsupported(node, "it computes with the size of the batch")
            slope = (b - a) // (SIZES[1] - SIZES[0])
            return {"batch": [slope, a - slope * SIZES[0]]}
        return a

    def _reference(self, node: fx.Node) -> dict[str, str]:
        node = self._current(node)
        if node.name in self.tensors:
            return {"state": self.tensors[node.name]}
        return {"value": self.names[node.name]}

    def _path(self, node: fx.Node) -> str:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        return str(stack[-1][0]) if stack else ""

    def _unsupported(self, node: fx.Node, why: str) -> UnsupportedModule:
        """A refusal that names the module's path, the operator, the reason and the way out."""
        path = self._path(node)
        part = dict(self.module.named_modules()).get(path, self.module)
        return UnsupportedModule(
            f"{path or 'the network itself'!r} ({type(part).__name__}): operator {node.target} cannot be zipped: "
            f"{why}. Write this part of the network differently, or leave the network out of the group."
        )


_MAY_PASS = frozenset(
    {"reshape", "contiguous", "flatten", "reshape_as", "unflatten", "broadcast_to", "ravel", "type_as", "movedim"}
    | {"dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout"}
)
"""Operators whose schema does not say so, but which may give back their operand itself, or a view of it."""

_PLACES = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})
"""Arguments that say where and how a tensor lies, which is the running network's business."""

_KEPT = frozenset({"train", "training", "eps", "momentum", "p"})
"""Arguments that are stored even if they have their default value."""


def _reachable(nodes: list[Node], output: str) -> list[Node]:
    """The nodes that the output depends on."""
    wanted = {output}
    for node in reversed(nodes):
        if node.name in wanted:
            wanted |= set(node.sources)
    return [node for node in nodes if node.name in wanted]


def _has_batch(node: Node) -> bool:
    return any(
        isinstance(leaf, Mapping) and "batch" in leaf
        for argument in node.arguments.values()
        for leaf in leaves(argument)
    )


def _fold(
    nodes: list[Node], output: str, state: dict[str, Tensor], parameters: frozenset[str]
) -> tuple[list[Node], dict[str, Tensor]]:
    """Replace what depends on neither input, parameters nor the size of the batch by its value."""
    values: dict[str, Any] = {}
    kept: list[Node] = []
    for node in nodes:
        known = all(source in values for source in node.sources) and not parameters & set(node.state)
        if known and not _has_batch(node) and node.name != output:
            values[node.name] = run_node(node, values, state, batch=0)
        else:
            kept.append(node)
    folded = {source for node in kept for source in node.sources if source in values}
    names = {source: f"constant:{source}" for source in folded}
    for source, name in names.items():
        state[name] = values[source].clone()
    renamed = [
        replace(node, arguments={name: _renamed(argument, names) for name, argument in node.arguments.items()})
        for node in kept
    ]
    return renamed, state


def _renamed(argument: Any, names: Mapping[str, str]) -> Any:
    if isinstance(argument, list):
        return [_renamed(part, names) for part in argument]
    if isinstance(argument, Mapping) and argument.get("value") in names:
        return {"state": names[argument["value"]]}
    return argument


def _mark_layers(nodes: list[Node], trainable: frozenset[str], keep_separate: Sequence[str]) -> list[Node]:
    """Say which nodes are layers: those whose parameters nobody else reads, and which zipping can see as a matrix."""
    uses: dict[str, int] = {}
    for node in nodes:
        for name in node.state:
            uses[name] = uses.get(name, 0) + 1
    marked = []
    for node in nodes:
        separate = any(node.module == path or node.module.startswith(f"{path}.") for path in keep_separate)
        marked.append(replace(node, is_layer=_is_layer(node, trainable, uses), separate=separate))
    return marked


def _is_layer(node: Node, trainable: frozenset[str], uses: Mapping[str, int]) -> bool:
    if node.kind not in LAYERS:
        return False
    layer = LAYERS[node.kind]
    weight, bias = node.arguments.get(layer.weight), node.arguments.get(layer.bias or "")
    if not isinstance(node.arguments.get(layer.input), Mapping) or "value" not in node.arguments[layer.input]:
        return False  # a table that is read at constant places
    for tensor in (weight, bias):
        if tensor is not None and (tensor.get("state") not in trainable or uses[tensor["state"]] > 1):
            return False
    scaled = {"alpha", "beta"} & node.arguments.keys()  # factors of addmm that a matrix does not have
    return not scaled and operation_of(node.kind) is None
