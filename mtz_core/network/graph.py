"""The structure of a network: nodes that run one after the other, and neuron groups that say whose channels are tied.

A node is one ATen operator with its arguments. It names the values that it reads and the tensors that it is given.
Arguments are JSON, so that a graph can be stored and run again without the source that it was traced from:
``{"value": name}`` stands for the value of another node, ``{"state": name}`` for a stored tensor, ``{"batch": [a, b]}``
for the number ``a · batch + b``, and ``{"dtype": name}`` for a dtype of torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtz_core.batches import Batch, Form, one_or_named, tensors_of
from mtz_core.network.layers import LAYERS, Layer

INPUT = ":input"
"""The name of the network's input, as a value and as a neuron group. No path of a module holds a colon.

Of inputs with names, the value is called by its own, as in ``:input:attention_mask``; the group is one.
"""

KERNEL = ":kernel"
"""Stands in an `Axis` for the columns of a grouped convolution: every row has them, for what its conv_group reads."""

OUTPUTS = ":outputs"
"""The name and the kind of a node that gathers what a network returns, if that is not one tensor."""

GETITEM = "getitem"
"""The kind of a node that selects one of several values of another node."""

NAMED = 8
"""How many operators or parameters a message names."""

FIXED = -1
"""Stands in an `Axis` for a position that belongs to no neuron."""


@dataclass(frozen=True)
class Node:
    """One step of a network.

    A *layer* is a node with a weight matrix that zipping may share.

    Attributes:
        name: The name of the node and of its value.
        kind: The ATen operator, as ``conv2d`` or ``add.Tensor``.
        arguments: The operator's arguments by name.
        module: The path of the module that the node comes from.
        is_layer: Whether the node is a layer.
        separate: Whether the layer stays task-specific.
        opaque: Whether the operator is taken as one without a rule.
    """

    name: str
    kind: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    module: str = ""
    is_layer: bool = False
    separate: bool = False
    opaque: bool = False

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """The values that the node reads."""
        return tuple(_references(self.arguments, "value"))

    @cached_property
    def state(self) -> tuple[str, ...]:
        """The stored tensors that the node is given."""
        return tuple(_references(self.arguments, "state"))

    @property
    def layer(self) -> Layer:
        """How the node is seen as a matrix."""
        return LAYERS[self.kind]

    @property
    def source(self) -> str:
        """The value that a layer reads."""
        return str(self.arguments[self.layer.input]["value"])

    @property
    def weight(self) -> str:
        """The name of a layer's weight."""
        return str(self.arguments[self.layer.weight]["state"])

    @property
    def bias(self) -> str | None:
        """The name of a layer's bias; None if it has none."""
        bias = self.arguments.get(self.layer.bias) if self.layer.bias else None
        return None if bias is None else str(bias["state"])


def leaves(argument: Any) -> Iterator[Any]:
    """Iterate over an argument, or over the arguments inside it if it is a list.

    Args:
        argument: The argument.

    Yields:
        Arguments that are no lists.
    """
    if isinstance(argument, list):
        for part in argument:
            yield from leaves(part)
    else:
        yield argument


def _references(arguments: Mapping[str, Any], key: str) -> Iterator[str]:
    for argument in arguments.values():
        for leaf in leaves(argument):
            if isinstance(leaf, Mapping) and key in leaf:
                yield str(leaf[key])


@dataclass(frozen=True)
class NeuronGroup:
    """Neurons that share one pairing: outputs of layers that are tied element by element.

    A chain's groups have one writer each; sums, products, normalisations and depthwise convolutions tie several. The
    neurons of a group are interchangeable units: a head of an attention layer is one neuron that has several rows in
    the matrices of its writers.

    Attributes:
        name: The group's name, that of the first layer that writes it. (What is kept separate comes last.)
        writers: The layers whose rows belong to the group's neurons.
        readers: The layers whose columns belong to the group's neurons.
        hidden: Whether the group can be shared; the network's input and its outputs cannot.
    """

    name: str
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    hidden: bool = True


@dataclass(frozen=True, eq=False)
class Axis:
    """Which neuron each row or column of a layer's matrix belongs to.

    The positions of equal neurons correspond in ascending order.

    Attributes:
        groups: The groups that occur on the axis.
        group: For every position, the index of its group in `groups`, or `FIXED`.
        neuron: For every position, the index of its neuron in the group, or `FIXED`.
    """

    groups: tuple[str, ...]
    group: Int64[np.ndarray, " n"]
    neuron: Int64[np.ndarray, " n"]


@dataclass(frozen=True)
class Input:
    """What a network is given.

    Attributes:
        shape: The shape of one example.
        dtype: The dtype of the examples.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype


Inputs = Mapping[str, Input]
"""The inputs of a network by the names of their values: ``:input`` alone, or one for each name."""


def input_values(batch: Batch) -> dict[str, Any]:
    """The values that a network starts from, by name."""
    return {f"{INPUT}:{name}" if name else INPUT: tensor for name, tensor in tensors_of(batch).items()}


def given_name(value: str) -> str:
    """The name by which an input is given, from that of its value; empty for one without a name."""
    return value.removeprefix(INPUT).removeprefix(":")


def inputs_of(batch: Batch) -> dict[str, Input]:
    """What a network is given that reads this batch."""
    return {name: Input(tuple(x.shape[1:]), x.dtype) for name, x in input_values(batch).items()}


def blank_values(inputs: Inputs, batch: int, dtype: torch.dtype | None = None) -> dict[str, Any]:
    """Inputs without values, on the meta device.

    Args:
        inputs: The inputs.
        batch: The number of examples.
        dtype: The dtype of floating-point inputs; their own if it is left out.

    Returns:
        A tensor for each input, by the name of its value.
    """
    return {
        name: torch.empty(
            batch,
            *own.shape,
            dtype=dtype if dtype is not None and own.dtype.is_floating_point else own.dtype,
            device="meta",
        )
        for name, own in inputs.items()
    }


@dataclass(frozen=True, eq=False)
class LayerGraph:
    """A network's structure, without weights.

    Attributes:
        nodes: The nodes, in an order in which they can run.
        output: The value that is the network's output.
        groups: The neuron groups.
        widths: The number of neurons of every group.
        rows: For every layer, whose its rows are.
        columns: For every layer, whose its columns are, the bias aside.
    """

    nodes: tuple[Node, ...]
    output: str
    groups: tuple[NeuronGroup, ...]
    widths: Mapping[str, int]
    rows: Mapping[str, Axis]
    columns: Mapping[str, Axis]

    @cached_property
    def layers(self) -> tuple[Node, ...]:
        """The nodes that are layers, in topological order."""
        return tuple(node for node in self.nodes if node.is_layer)

    @property
    def form(self) -> Form:
        """What holds the network's outputs; 0 for a tensor alone."""
        return self.node(OUTPUTS).arguments["form"] if self.output == OUTPUTS else 0

    @cached_property
    def endings(self) -> Mapping[str, str]:
        """The kind of the node that computes each output, by the output's name; empty if an output is an input."""
        outputs = {"": self.output}
        if self.output == OUTPUTS:
            node = self.node(OUTPUTS)
            outputs = dict(zip(node.arguments["names"], node.sources, strict=True))
        return {name: self._by_name[own].kind if own in self._by_name else "" for name, own in outputs.items()}

    @property
    def outputs(self) -> tuple[str, ...]:
        """The names of the outputs if there are several."""
        return tuple(self.endings) if len(self.endings) > 1 else ()

    @property
    def ending(self) -> str:
        """The kind of the node that computes the output; empty if the output is the input."""
        return next(iter(self.endings.values()))

    @cached_property
    def _by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    def node(self, name: str) -> Node:
        """The node of that name."""
        return self._by_name[name]

    @cached_property
    def layers_by_name(self) -> Mapping[str, Node]:
        """The layers by name."""
        return {node.name: node for node in self.layers}

    @cached_property
    def hidden_groups(self) -> tuple[NeuronGroup, ...]:
        """The groups whose neurons can be shared."""
        return tuple(group for group in self.groups if group.hidden)

    @cached_property
    def hidden_widths(self) -> Mapping[str, int]:
        """The number of neurons of every group that can be shared."""
        return {group.name: self.widths[group.name] for group in self.hidden_groups}

    @cached_property
    def last_use(self) -> Mapping[str, str]:
        """For every value except the output, the last node that reads it."""
        return {source: node.name for node in self.nodes for source in node.sources if source != self.output}


@dataclass(frozen=True, eq=False)
class Network:
    """A traced network: its graph and every tensor that it needs, in the module's own shapes.

    Attributes:
        graph: The graph.
        state: The tensors by name.
        trainable: The names of the tensors that are parameters.
        inputs: What the network is given.
        non_persistent: The names of the tensors that a ``state_dict`` leaves out.
        unlike: Why layers stay separate that nobody has listed: where the network differs from another one, in words.
        unused: The module's parameters that no output depends on, and their bytes. They are no part of the network.
    """

    graph: LayerGraph
    state: Mapping[str, Tensor]
    trainable: frozenset[str]
    inputs: Inputs
    non_persistent: frozenset[str] = frozenset()
    unlike: str = ""
    unused: Mapping[str, int] = field(default_factory=dict)

    @property
    def left_out(self) -> str:
        """Which parameters are no part of the network, in words; empty if there are none."""
        if not self.unused:
            return ""
        more = f" and {len(self.unused) - NAMED} more" if len(self.unused) > NAMED else ""
        return (
            f"parameters are left out, as no output depends on them: {', '.join(list(self.unused)[:NAMED])}{more} "
            f"({sum(self.unused.values()):,} bytes, counted neither before nor after zipping)"
        )

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example; of several inputs, of the first one's."""
        return next(iter(self.inputs.values())).shape

    @property
    def input_dtype(self) -> torch.dtype:
        """The dtype of the examples; of several inputs, of the first one's."""
        return next(iter(self.inputs.values())).dtype

    @property
    def parameters(self) -> int:
        """The number of trainable values."""
        return sum(self.state[name].numel() for name in self.trainable)

    @property
    def bytes(self) -> int:
        """The size in bytes of everything that the network needs to run: parameters, statistics and constants."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.state.values())

    def matrix(self, layer: Node) -> Float[Tensor, "out columns"]:
        """A layer's weights as a matrix, the bias (if any) as its last column (see `mtz_core.network.layers`)."""
        matrix = layer.layer.matrix(self.state[layer.weight])
        if layer.bias is None:
            return matrix
        return torch.cat([matrix, self.state[layer.bias][:, None]], dim=1)

    def columns(self, layer: Node) -> int:
        """The number of inputs of a layer's rows, the trailing 1 of a bias included."""
        return layer.layer.matrix(self.state[layer.weight]).shape[1] + (layer.bias is not None)


def operator(kind: str) -> torch._ops.OpOverload:
    """Find the ATen operator of a kind.

    Args:
        kind: The operator's name, with or without an overload.

    Returns:
        The operator.

    Raises:
        AttributeError: If there is no such operator.
    """
    packet, _, overload = kind.partition(".")
    found = getattr(getattr(torch.ops.aten, packet, None), overload or "default", None)
    if not isinstance(found, torch._ops.OpOverload):
        raise AttributeError(f"there is no operator {kind!r}")
    return found


def resolve(argument: Any, values: Mapping[str, Any], state: Mapping[str, Any], batch: int) -> Any:
    """Replace the references in an argument by what they stand for.

    Args:
        argument: An argument of a node.
        values: What stands for the values of nodes, by name.
        state: What stands for stored tensors, by name.
        batch: The number of examples.

    Returns:
        The argument without references.
    """
    if isinstance(argument, list):
        return [resolve(part, values, state, batch) for part in argument]
    if not isinstance(argument, Mapping):
        return argument
    ((key, content),) = argument.items()
    if key == "value":
        return values[content]
    if key == "state":
        return state[content]
    if key == "batch":
        return content[0] * batch + content[1]
    return getattr(torch, content)  # {"dtype": name}


_TRAINING = frozenset({"train", "training"})


def run_node(
    node: Node,
    values: Mapping[str, Any],
    state: Mapping[str, Tensor],
    batch: int,
    training: bool = False,
) -> Any:
    """Compute the value of one node.

    Args:
        node: The node.
        values: The values that it reads.
        state: The stored tensors.
        batch: The number of examples.
        training: Whether dropout is active and normalisations use (and update) the statistics of the batch.

    Returns:
        A tensor, or a sequence of tensors for operators with several outputs.
    """
    arguments = {name: resolve(value, values, state, batch) for name, value in node.arguments.items()}
    if node.kind == GETITEM:
        return arguments["value"][arguments["index"]]
    if node.kind == OUTPUTS:
        return one_or_named(dict(zip(arguments["names"], arguments["values"], strict=True)))
    if training:
        arguments |= dict.fromkeys(_TRAINING & arguments.keys(), True)
    found = operator(node.kind)
    if not node.sources and not node.state and any(argument.name == "device" for argument in found._schema.arguments):
        arguments["device"] = next((value.device for value in values.values() if isinstance(value, Tensor)), None)
    return found(**arguments)


def run(graph: LayerGraph, state: Mapping[str, Tensor], x: Batch, training: bool = False) -> Any:
    """Compute the output, or outputs, of a network. Values are freed after their last use.

    Args:
        graph: The network's graph.
        state: Its tensors.
        x: A batch of inputs.
        training: Whether dropout is active and normalisations use (and update) the statistics of the batch.

    Returns:
        The output; several as `NamedTensors`. A network that squeezes its values drops a batch of one.
    """
    values = input_values(x)
    for node in graph.nodes:
        values[node.name] = run_node(node, values, state, len(x), training)
        free_unused(graph, values, node)
    return values[graph.output]


def free_unused(graph: LayerGraph, values: dict[str, Any], node: Node) -> None:
    """Free the values that a node was the last to read.

    Args:
        graph: The network's graph.
        values: The live values; those that are no longer needed are removed.
        node: The node that has just run.
    """
    for source in set(node.sources):
        if graph.last_use.get(source) == node.name:
            values.pop(source, None)


def blank_run(network: Network) -> Iterator[tuple[Node, Any]]:
    """Run a network on one example without values, on the meta device.

    Args:
        network: The network.

    Yields:
        Each node, and what it puts out.
    """
    state = {name: tensor.to("meta") for name, tensor in network.state.items()}
    values = blank_values(network.inputs, 1)
    for node in network.graph.nodes:
        values[node.name] = run_node(node, values, state, 1)
        yield node, values[node.name]
