"""Trace any ``nn.Module`` into a frozen `LayerGraph`: which layers there are, who reads whom, which neurons are tied.

Tracing goes through ``torch.export``: it sees the operations that really run, however the module spells them
(``nn.ReLU``, ``F.relu``, ``x.relu_()``), knows every shape, and needs no specification by hand. What the graph
cannot express is refused, with the module's path and the operation; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, fx, nn

from mtz_core.errors import InvalidCalibration, InvalidWeights, UnsupportedModule
from mtz_core.layers import DROPOUT, LAYERS, OPERATIONS, Settings, from_matrix, to_matrix

INPUT = ":input"
"""The name of the network's input, as a value and as a neuron group. No path of a module holds a colon."""

_REMEDY = "Supported are chains of {}. Teach a new one in mtz_core/layers.py, or leave this network out of the group."


@dataclass(frozen=True)
class Node:
    """One step of a network: a layer with weights (`kind` in `LAYERS`) or an operation (`kind` in `OPERATIONS`)."""

    name: str
    kind: str
    source: str
    settings: Settings = field(default_factory=dict)
    bias: bool = False

    @property
    def is_layer(self) -> bool:
        return self.kind in LAYERS


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that share one pairing: the outputs of `writers`, read by `readers`.

    In a chain every group has one writer; sums and normalisation tie several. The group of the network's input has
    no writer, the group of its output no reader.
    """

    name: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]


@dataclass(frozen=True)
class LayerGraph:
    """The structure of a network, without weights and widths: equal for networks that can be zipped together."""

    nodes: tuple[Node, ...]
    groups: tuple[NeuronGroup, ...]

    @property
    def layers(self) -> tuple[Node, ...]:
        """The nodes with weights, in topological order."""
        return tuple(node for node in self.nodes if node.is_layer)

    @property
    def hidden_groups(self) -> tuple[NeuronGroup, ...]:
        """The groups whose neurons can be shared: neither input nor output."""
        return tuple(group for group in self.groups if group.writers and group.readers)

    def read_by(self, layer: str) -> NeuronGroup:
        """The group that feeds a layer."""
        return next(group for group in self.groups if layer in group.readers)

    def written_by(self, layer: str) -> NeuronGroup:
        """The group that a layer's neurons belong to."""
        return next(group for group in self.groups if layer in group.writers)


@dataclass(frozen=True)
class Network:
    """A traced network: its structure, and the matrix of every layer (see `mtz_core.layers`).

    `input_shape` is the shape of one example. `parameters` and `bytes` count the original module's weights.
    """

    graph: LayerGraph
    weights: Mapping[str, Float[Tensor, "out in"]]
    input_shape: tuple[int, ...]
    parameters: int
    bytes: int

    def width(self, group: NeuronGroup) -> int:
        """The number of neurons of a group; channels for the input."""
        return self.weights[group.writers[0]].shape[0] if group.writers else self.input_shape[0]

    def columns_per_neuron(self, layer: Node) -> int:
        """How many columns of a layer's matrix belong to each neuron that it reads."""
        columns = self.weights[layer.name].shape[1] - layer.bias
        return columns // self.width(self.graph.read_by(layer.name))


def trace(module: nn.Module, example: Float[Tensor, "batch ..."]) -> Network:
    """The graph and weights of a module, found by exporting it on an example input. The module is not modified.

    Raises `UnsupportedModule` for what cannot be zipped, `InvalidWeights` for weights that are not finite,
    `InvalidCalibration` if the module does not accept the example.
    """
    if not isinstance(module, nn.Module):
        raise UnsupportedModule(f"{module!r} is not a torch.nn.Module.")
    if example.ndim < 2:
        raise InvalidCalibration(
            f"an example of shape {list(example.shape[1:])} has no features for a network to read."
        )
    _check_weights(module)
    pair = torch.cat([example[:1], example[:1]])
    with evaluation_mode(module):
        try:
            module(pair)
        except Exception as error:  # whatever a user's forward raises means the same: this input does not fit it
            raise InvalidCalibration(
                f"{type(module).__name__} does not accept an input of shape {list(pair.shape)} ({pair.dtype}): "
                f"{_first_line(error)} Check that the calibration data are meant for this network."
            ) from error
        try:
            program = torch.export.export(module, (pair,), strict=False)
        except Exception as error:
            raise UnsupportedModule(
                f"{type(module).__name__} cannot be exported by torch.export: {_first_line(error)} "
                "Control flow that depends on data cannot be zipped; make it independent of the data, or leave this "
                "network out of the group."
            ) from error
    return _Reader(program, module, tuple(example.shape[1:])).network()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _check_weights(module: nn.Module) -> None:
    for name, tensor in module.named_parameters():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise UnsupportedModule(
                f"parameter {name!r} has dtype {tensor.dtype}; zipping needs float32 or float64. "
                "Convert the network first, for example with `.float()`."
            )
        if not bool(torch.isfinite(tensor).all()):
            raise InvalidWeights(f"parameter {name!r} has NaN or infinite values. Train or export the network again.")


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


class _Reader:
    """Reads an exported program node by node, following the one value that runs through a chain."""

    def __init__(self, program: torch.export.ExportedProgram, module: nn.Module, input_shape: tuple[int, ...]) -> None:
        self.program = program
        self.module = module
        self.input_shape = input_shape
        self.state = dict(module.named_parameters()) | dict(module.named_buffers())
        signature = program.graph_signature
        self.parameter_of = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        self.nodes: list[Node] = []
        self.weights: dict[str, Tensor] = {}

    def network(self) -> Network:
        graph = self.program.graph
        (*_, value), result = (n for n in graph.nodes if n.op == "placeholder"), graph.output_node()
        self._check_parameters()
        used: list[str] = []
        current, name = value, INPUT
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            if [n for n in node.all_input_nodes if n.name not in self.parameter_of] != [current]:
                raise self._unsupported(node, "it does not read the one value before it")
            step = self._step(node, name)
            if step is not None:
                self.nodes.append(step)
                name = step.name
                used += [self.parameter_of[n.name] for n in node.all_input_nodes if n.name in self.parameter_of]
            current = node
        if list(result.args[0]) != [current] or len(self.program.graph_signature.user_outputs) != 1:
            raise UnsupportedModule(f"{type(self.module).__name__} does not return the one tensor it ends with.")
        if not self.weights:
            raise UnsupportedModule(f"{type(self.module).__name__} has no layer with weights to share.")
        self._check_use(used)
        return Network(
            graph=LayerGraph(tuple(self.nodes), _chain_groups(self.nodes)),
            weights=self.weights,
            input_shape=self.input_shape,
            parameters=sum(p.numel() for p in self.module.parameters()),
            bytes=sum(p.numel() * p.element_size() for p in self.module.parameters()),
        )

    def _check_parameters(self) -> None:
        if len(list(self.module.named_parameters(remove_duplicate=False))) != len(list(self.module.named_parameters())):
            raise UnsupportedModule(
                f"{type(self.module).__name__} ties one parameter to several layers. Zipping stores each layer's "
                "neurons on their own: untie the weights, or leave this network out of the group."
            )

    def _check_use(self, used: list[str]) -> None:
        twice = sorted({key for key in used if used.count(key) > 1})
        if twice:
            raise UnsupportedModule(
                f"parameter {twice[0]!r} is used by several operations (a shared submodule called twice?). "
                "Give each call its own layer, or leave this network out of the group."
            )
        unused = sorted(set(dict(self.module.named_parameters())) - set(used))
        if unused:
            raise UnsupportedModule(
                f"parameter {unused[0]!r} is never used when the network runs. Remove it, "
                "so that sizes before and after zipping speak of the same network."
            )

    def _step(self, node: fx.Node, source: str) -> Node | None:
        """The node of our graph for one exported operation; None for one that changes nothing."""
        target: Any = node.target
        kind = target._schema.name.removeprefix("aten::").removesuffix("_")
        if not isinstance(node.meta["val"], Tensor):
            raise self._unsupported(node, "it has several outputs")
        before, after = (self._shape(n) for n in (node.all_input_nodes[0], node))
        if kind in LAYERS:
            return self._layer(node, kind, source)
        if kind in ("contiguous", "clone", "detach", "alias"):
            return None
        if kind in ("flatten", "view", "reshape", "_unsafe_view"):
            if after == before:
                return None
            if after != (before[0], int(torch.Size(before[1:]).numel())):
                raise self._unsupported(node, f"it reshapes {list(before)} to {list(after)}")
            return Node(f"flatten:{len(self.nodes)}", "flatten", source)
        if kind not in OPERATIONS:
            raise self._unsupported(node, "zipping does not know this operation")
        if OPERATIONS[kind].spatial and len(before) != 4:
            raise self._unsupported(node, f"its input has shape {list(before)}, not [batch, channels, height, width]")
        settings = self._arguments(node)
        if settings.pop("train", False):
            raise self._unsupported(node, "it stays on in evaluation mode (pass training=self.training)")
        if settings.get("dtype") is not None:
            raise self._unsupported(node, "it changes the dtype")
        if settings.get("stride") == settings.get("kernel_size"):
            settings.pop("stride", None)  # a pooling's default, which some ways of writing it spell out
        return Node(f"{kind}:{len(self.nodes)}", kind, source, settings)

    def _layer(self, node: fx.Node, kind: str, source: str) -> Node:
        arguments = self._arguments(node, with_tensors=True)
        weight, bias = arguments["weight"], arguments.get("bias")
        for tensor in (weight, bias):
            if isinstance(tensor, fx.Node) and tensor.name not in self.parameter_of:
                raise self._unsupported(node, "its weights are computed, not stored")
        key = self.parameter_of[weight.name]
        name = key.removesuffix(".weight") if key != "weight" else kind
        settings: dict[str, Any] = {}
        shape = self._shape(node.all_input_nodes[0])
        if kind == "linear" and len(shape) != 2:
            raise self._unsupported(node, f"its input has shape {list(shape)}, not [batch, features]")
        if any(hasattr(fx.GraphModule, part) for part in name.split(".")):
            raise self._unsupported(node, f"{name!r} is a name that modules of torch use themselves; rename the layer")
        if kind == "conv2d":
            if len(shape) != 4:
                raise self._unsupported(
                    node, f"its input has shape {list(shape)}, not [batch, channels, height, width]"
                )
            settings = self._convolution(node, arguments)
        self.weights[name] = to_matrix(
            self.state[key].detach().cpu(),
            None if bias is None else self.state[self.parameter_of[bias.name]].detach().cpu(),
        )
        return Node(name, kind, source, settings, bias=bias is not None)

    def _convolution(self, node: fx.Node, arguments: Mapping[str, Any]) -> dict[str, Any]:
        if arguments.get("groups", 1) != 1:
            raise self._unsupported(node, f"it is a grouped convolution ({arguments['groups']} groups)")
        kernel = list(self._shape(arguments["weight"])[2:])
        settings = {
            "kernel_size": kernel,
            **{
                key: [value] * 2 if isinstance(value, int) else list(value) * (2 // len(value))
                for key, value in (("stride", arguments.get("stride", 1)), ("dilation", arguments.get("dilation", 1)))
            },
        }
        padding = arguments.get("padding", 0)
        if padding == "valid":
            padding = [0, 0]
        elif padding == "same":
            total = [d * (k - 1) for d, k in zip(settings["dilation"], kernel, strict=True)]
            if any(t % 2 for t in total):
                raise self._unsupported(node, "its padding='same' is wider on one side than on the other")
            padding = [t // 2 for t in total]
        elif isinstance(padding, int):
            padding = [padding, padding]
        return settings | {"padding": list(padding) * (2 // len(padding))}

    @staticmethod
    def _arguments(node: fx.Node, with_tensors: bool = False) -> dict[str, Any]:
        """The arguments by the names that the operator's schema gives them."""
        target: Any = node.target
        names = [argument.name for argument in target._schema.arguments]
        arguments = dict(zip(names, node.args, strict=False)) | dict(node.kwargs)
        if with_tensors:
            return arguments
        defaults = {argument.name: argument.default_value for argument in target._schema.arguments}
        return {
            key: list(value) if isinstance(value, (list, tuple)) else value
            for key, value in arguments.items()
            if not isinstance(value, fx.Node) and value != defaults[key]
        }

    @staticmethod
    def _shape(node: fx.Node) -> tuple[int, ...]:
        return tuple(node.meta["val"].shape)

    def _unsupported(self, node: fx.Node, why: str) -> UnsupportedModule:
        stack = list(node.meta.get("nn_module_stack", {}).values())
        path, kind = stack[-1] if stack else ("", type(self.module).__name__)
        kind = kind if isinstance(kind, str) else kind.__name__
        known = ", ".join((*LAYERS, *OPERATIONS))
        return UnsupportedModule(
            f"{path or 'the network itself'!r} ({kind.rsplit('.', 1)[-1]}): operation {node.target} cannot be zipped: "
            f"{why}. {_REMEDY.format(known)}"
        )


def _chain_groups(nodes: list[Node]) -> tuple[NeuronGroup, ...]:
    """One group for the input and one for each layer's neurons, read by the next layer."""
    layers = [node.name for node in nodes if node.is_layer]
    last = max(i for i, node in enumerate(nodes) if node.is_layer)
    for node in nodes[:last]:
        if not node.is_layer and OPERATIONS[node.kind].neurons == "mixed":
            raise UnsupportedModule(
                f"operation {node.kind} mixes the neurons of a hidden layer; "
                "zipping can follow it only behind the last layer."
            )
    return (
        NeuronGroup(INPUT, (), (layers[0],)),
        *(NeuronGroup(name, (name,), tuple(layers[i + 1 : i + 2])) for i, name in enumerate(layers)),
    )


def run_node(
    node: Node,
    x: Tensor,
    weight: Float[Tensor, "out in"] | None = None,
    bias: Float[Tensor, " out"] | None = None,
    training: bool = False,
) -> Tensor:
    """The value of one node, given its input and, for a layer, its weights as a matrix."""
    if weight is None:
        return OPERATIONS[node.kind].run(node.kind, node.settings, x, training)
    shape = LAYERS[node.kind].weight_shape(node.settings, weight.shape[1])
    return LAYERS[node.kind].run(node.settings, x, weight.reshape(-1, *shape), bias)


def build_module(graph: LayerGraph, weights: Mapping[str, Float[Tensor, "out in"]]) -> fx.GraphModule:
    """A plain torch module for a graph and dense weights.

    Its parameters are named as in the traced module, as far as they are the `weight` and `bias` of a submodule there.
    """
    root = nn.Module()
    drawing = fx.Graph()
    values = {INPUT: drawing.placeholder("x")}
    for node in graph.nodes:
        x = values[node.source]
        if node.is_layer:
            weight, bias = from_matrix(weights[node.name].detach().clone(), node.bias)
            shape = LAYERS[node.kind].weight_shape(node.settings, weight.shape[1])
            module = LAYERS[node.kind].module(node.settings, weight.reshape(-1, *shape), bias)
            _add_submodule(root, node.name, module)
            values[node.name] = drawing.call_module(node.name, (x,))
        elif node.kind in DROPOUT:
            _add_submodule(root, node.name, DROPOUT[node.kind](node.settings.get("p", 0.5)))
            values[node.name] = drawing.call_module(node.name, (x,))
        elif node.kind == "flatten":
            values[node.name] = drawing.call_function(torch.flatten, (x, 1))
        else:
            operator = getattr(torch.ops.aten, node.kind)
            values[node.name] = drawing.call_function(operator, (x,), dict(node.settings))
    drawing.output(values[graph.nodes[-1].name])
    return fx.GraphModule(root, drawing)


def _add_submodule(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(leaf, module)
