"""Read what ``torch.export`` makes of a module: programs for one or two batch sizes become one list of nodes."""

from __future__ import annotations

import math
import operator as python_operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_aggregate

from mtz_core.batches import Form
from mtz_core.errors import UnsupportedModule
from mtz_core.network.graph import GETITEM, OUTPUTS, Node
from mtz_core.network.layers import LAYERS
from mtz_core.network.rewriting import path_of
from mtz_core.network.writing import seen_elsewhere, without_writing

SIZES = (109, 2)
"""The batch sizes that a module is exported for, the second only where it must be. Multiples of 109 are rare."""


def counts_examples(program: torch.export.ExportedProgram) -> bool:
    """Return whether a program for the first batch size may count its examples, or take some of them alone.

    It may if it has numbers near a multiple of that size, or constants of such a length, or if it computes something
    from its input that is not for all examples.

    Args:
        program: The program.

    Returns:
        Whether the program for another batch size may be another one.
    """
    numbers: list[float] = [size for constant in constants_of(program).values() for size in constant.shape]
    fed: set[fx.Node] = set()
    """The nodes that depend on the network's input."""

    def note(value: Any) -> Any:
        if isinstance(value, (int, float)) and abs(value) > 2:
            numbers.append(value)
        return value

    for node in program.graph.nodes:
        map_aggregate((node.args, node.kwargs), note)
        if node.name in program.graph_signature.user_inputs or any(source in fed for source in node.all_input_nodes):
            fed.add(node)
            if not _is_for_all(node.meta.get("val")):
                return True
        if node.op == "output":
            fx.map_arg(node.args, lambda result: numbers.extend(result.meta["val"].shape[1:]))
    return any((number + 1) % SIZES[0] <= 2 for number in numbers if math.isfinite(number))


def _is_for_all(value: Any) -> bool:
    """Whether values may have an entry for each example of the first batch size."""
    if isinstance(value, (list, tuple)):
        return all(_is_for_all(part) for part in value)
    return not isinstance(value, Tensor) or any(isinstance(size, int) and size % SIZES[0] == 0 for size in value.shape)


def constants_of(program: torch.export.ExportedProgram) -> dict[str, Tensor]:
    """The tensors that a program carries along, beside those of its module."""
    return {name: value for name, value in program.constants.items() if isinstance(value, Tensor)}


class ProgramReader:
    """Reads two exported programs of one module side by side.

    Attributes:
        module: The module.
        programs: Its programs, one for each of the batch sizes `SIZES`, or twice the first one.
        inputs: The names of the values that it is given, in its order.
        outputs: The names of its outputs, in the order of the programs, and what holds them.
        names: The name of every value, by the name of the node of the first program.
        replaced: Nodes whose values were changed in place, and the nodes that changed them.
        tensors: The stored tensor that each placeholder of the first program stands for, once `nodes` has run.
    """

    def __init__(
        self,
        module: nn.Module,
        programs: Sequence[torch.export.ExportedProgram],
        inputs: Sequence[str],
        outputs: tuple[Sequence[str], Form] = (("",), 0),
    ) -> None:
        self.module = module
        self.programs = programs
        self.inputs = inputs
        self.outputs = outputs
        self.names: dict[str, str] = {}
        self.replaced: dict[fx.Node, fx.Node] = {}

    def state(self) -> dict[str, Tensor]:
        """Every tensor that the module holds or that its program carries along."""
        constants = constants_of(self.programs[0])
        held = dict(self.module.named_parameters(remove_duplicate=False)) | dict(
            self.module.named_buffers(remove_duplicate=False)
        )
        return {name: tensor.detach().cpu() for name, tensor in (constants | held).items()}

    def nodes(self) -> tuple[list[Node], str]:
        """Read all operators in order.

        Returns:
            The nodes, and the name of the output's value.

        Raises:
            UnsupportedModule: If the programs differ in operators, or if an operator or an argument cannot be stored.
        """
        first, second = self.programs
        signature = first.graph_signature
        given = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }
        entry = dict(zip(signature.user_inputs, self.inputs, strict=True))
        tied = self._tied()
        self.tensors = {name: tied.get(target, target) for name, target in given.items()}
        pairs = list(zip(first.graph.nodes, second.graph.nodes, strict=False))
        if len(first.graph.nodes) != len(second.graph.nodes) or any(a.target != b.target for a, b in pairs):
            raise UnsupportedModule(
                f"{type(self.module).__name__} runs other operators for {SIZES[0]} examples than for {SIZES[1]}. "
                "Make its forward pass independent of the size of the batch."
            )
        constants = [constants_of(program) for program in self.programs]
        for name in constants[0].keys() & constants[1].keys():
            if not torch.equal(*(own[name] for own in constants)):
                raise UnsupportedModule(
                    f"{type(self.module).__name__} makes a tensor from Python numbers that depend on the size of the "
                    "batch. Make it of the input, as with `x.new_full((len(x),), 1.0)`."
                )
        nodes: list[Node] = []
        for a, b in pairs:
            if a.op == "placeholder":
                self.names[a.name] = entry.get(a.name, "")
            elif a.op == "call_function":
                nodes.append(self._node(a, b, len(nodes)))
                self.names[a.name] = nodes[-1].name
            elif a.op != "output":
                raise self._unsupported(a, f"it is a {a.op.replace('_', ' ')}")
        names, form = self.outputs
        results = self._results(first, len(names))
        for name, a, b in zip(names, results, self._results(second, len(names)), strict=True):
            shapes = [node.meta["val"].shape[1:] for node in (a, b) if "val" in node.meta]
            if len({*shapes}) > 1:
                raise UnsupportedModule(
                    f"the shape of {type(self.module).__name__}'s output{f' {name!r}' if name else ''} depends on the "
                    "number of examples. Wrap the network in a module that returns the same for each example, whatever "
                    "others are there."
                )
        if form == 0:
            return nodes, self.names[results[0].name]
        values = [self._reference(node) for node in results]
        for name, value in zip(names, values, strict=True):
            if "state" in value:
                raise UnsupportedModule(
                    f"the output {name!r} of {type(self.module).__name__} does not depend on its input. Wrap the "
                    "network in a module that leaves it out."
                )
        arguments = {"names": list(names), "values": values, "form": form}
        return [*nodes, Node(OUTPUTS, OUTPUTS, arguments)], OUTPUTS

    def _results(self, program: torch.export.ExportedProgram, count: int) -> list[fx.Node]:
        """The nodes whose values a program returns. What is written into buffers comes before them."""
        given = program.graph.output_node().args[0]
        assert isinstance(given, (tuple, list))
        return [self._current(node) for node in given if isinstance(node, fx.Node)][-count:]

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
        """Read one node from its counterparts in both programs.

        Args:
            a: The node in the first program.
            b: The node in the second program.
            number: How many nodes have been read before.

        Returns:
            The node.

        Raises:
            UnsupportedModule: If the operator is no ATen operator, or one that cannot be written out of place.
        """
        path = path_of(a)
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
            plain = self._out_of_place(a)._schema
            kind, overload = plain.name.removeprefix("aten::"), plain.overload_name
            names = (argument.name for argument in plain.arguments)
            renamed = dict(zip((argument.name for argument in target._schema.arguments), names, strict=False))
            arguments = {renamed[name]: value for name, value in arguments.items()}
        if (kind, overload) == ("to", "device"):
            overload = "dtype"  # the device is set when the network runs
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

    def _out_of_place(self, node: fx.Node) -> torch._ops.OpOverload:
        """Replace an operator that writes into its operand by the one that does not. Later readers get the new value.

        Args:
            node: The node.

        Returns:
            The operator that does not write into its operand.

        Raises:
            UnsupportedModule: If there is no such operator, or if another view of the operand is read afterwards.
        """
        written, plain = node.args[0], without_writing(node)
        assert isinstance(written, fx.Node)
        if plain is None or written.name in self.tensors:
            raise self._unsupported(node, "it changes a tensor in place")
        if seen_elsewhere(node):
            raise self._unsupported(node, "it changes in place a tensor of which another view is read afterwards")
        self.replaced[written] = node
        return plain

    def _arguments(self, a: fx.Node, b: fx.Node) -> dict[str, Any]:
        """The arguments by the names in the operator's schema, defaults left out."""
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
            slope, rest = divmod(b - a, SIZES[1] - SIZES[0])
            if rest:
                raise self._unsupported(node, "it computes with the size of the batch")
            return {"batch": [slope, a - slope * SIZES[0]]}
        return a

    def _reference(self, node: fx.Node) -> dict[str, str]:
        node = self._current(node)
        if node.name in self.tensors:
            return {"state": self.tensors[node.name]}
        return {"value": self.names[node.name]}

    def _unsupported(self, node: fx.Node, why: str) -> UnsupportedModule:
        """An error that names the module's path, the operator, the reason and the remedy."""
        path = path_of(node)
        part = dict(self.module.named_modules()).get(path, self.module)
        return UnsupportedModule(
            f"{path or 'the network itself'!r} ({type(part).__name__}): operator {node.target} cannot be zipped: "
            f"{why}. Write this part of the network differently, or leave the network out of the group."
        )


_PLACES = frozenset({"device", "layout", "pin_memory", "memory_format", "non_blocking"})
"""Arguments about where and how a tensor is stored. They are set when the network runs."""

_KEPT = frozenset({"train", "training", "eps", "momentum", "p"})
"""Arguments that are stored even if they have their default value."""
