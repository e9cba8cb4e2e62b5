"""The common prefix: what all tasks of a zipped network compute alike, from the input on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, Shaped
from torch import Tensor

from mtz_core.network.graph import OUTPUTS, Node, blank_values, run_node
from mtz_core.network.operations import Operation, Window, movement, operation_of
from mtz_core.zipped.ownership import Arrangement
from mtz_core.zipped.structure import ZippedStructure


@dataclass(frozen=True, eq=False)
class Order:
    """How a task's channels lie in the first task's value.

    Attributes:
        axis: The axis of the channels.
        index: Channel i of the task is channel ``index[i]`` of the first task's value; None if the order is the same.
    """

    axis: int = 1
    index: Int64[Tensor, " channels"] | None = None

    def same(self, other: Order) -> bool:
        """Whether two values are ordered alike."""
        if self.index is None or other.index is None:
            return self.index is other.index
        return self.axis == other.axis and torch.equal(self.index, other.index)

    def apply(self, value: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        """The task's own value, from the first task's."""
        return value if self.index is None else value.index_select(self.axis, self.index.to(value.device))


@dataclass(frozen=True, eq=False)
class Prefix:
    """The common prefix of all tasks.

    Attributes:
        nodes: The nodes that need to run only once.
        frontier: The values among theirs, or the inputs, that other nodes read or that are the output.
        orders: For every task, the order of its channels in each of these values.
    """

    nodes: frozenset[str]
    frontier: frozenset[str]
    orders: Mapping[str, Mapping[str, Order]]


def common_prefix(structure: ZippedStructure, precision: torch.dtype = torch.float32) -> Prefix:
    """Find the nodes whose value is the same for all tasks, up to the order of its channels, given the same input.

    Args:
        structure: The zipped network's structure.
        precision: The dtype of its weights.

    Returns:
        The common prefix.
    """
    first, *others = structure.tasks
    graphs = {task: network.graph for task, network in structure.networks.items()}
    orders: dict[str, dict[str, Order]] = {
        task: {name: Order() for name in network.inputs} for task, network in structure.networks.items()
    }
    nodes: set[str] = set()
    entry = structure.networks[first]
    state = {name: torch.empty(shape, dtype=precision, device="meta") for name, shape in entry.shapes.items()}
    values = blank_values(entry.inputs, 1, precision)
    nodes_of = [{node.name: node for node in graph.nodes} for graph in graphs.values()]
    for node in graphs[first].nodes:
        steps = [own.get(node.name) for own in nodes_of]
        if any(source not in orders[first] for source in node.sources) or not node.sources or node.kind == OUTPUTS:
            continue
        if any(step is None or (step.kind, step.arguments) != (node.kind, node.arguments) for step in steps):
            continue
        if not _is_common(structure, node):
            continue
        shape = _shape(values[node.sources[0]])
        found = {task: _order(structure, node, task, orders[task], shape) for task in others}
        if any(order is None for order in found.values()):
            continue
        values[node.name] = run_node(node, values, state, 1)
        nodes.add(node.name)
        orders[first][node.name] = Order()
        for task, order in found.items():
            assert order is not None
            orders[task][node.name] = order
    read = {s for graph in graphs.values() for node in graph.nodes if node.name not in nodes for s in node.sources}
    read |= {graph.output for graph in graphs.values()}
    return Prefix(frozenset(nodes), frozenset(read & {*entry.inputs, *nodes}), orders)


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.shape[1:]) if isinstance(value, Tensor) else ()


def _is_common(structure: ZippedStructure, node: Node) -> bool:
    if not node.is_layer:
        return not node.state
    return _one_run(structure.rows[node.name], structure) and _one_run(structure.columns[node.name], structure)


def _one_run(arrangement: Arrangement, structure: ZippedStructure) -> bool:
    return [run.owners for run in arrangement.segments] == [structure.tasks]


def _order(
    structure: ZippedStructure, node: Node, task: str, orders: Mapping[str, Order], shape: tuple[int, ...]
) -> Order | None:
    """Find the order of a node's channels in one task.

    Args:
        structure: The zipped network's structure.
        node: The node.
        task: The task.
        orders: The orders of the values that the node reads.
        shape: The shape of the first of these values, for one example.

    Returns:
        The order; None if it cannot be derived.
    """
    given = [orders[source] for source in node.sources]
    if node.is_layer:
        arrangement = structure.rows[node.name]
        if not _one_run(arrangement, structure):
            return None
        (run,) = arrangement.segments
        index = np.empty(run.size, dtype=np.int64)
        index[run.places[task]] = run.places[structure.tasks[0]]
        if not _groups_agree(structure, node, index, given[0]):
            return None
        same = bool((index == np.arange(run.size)).all())
        return Order() if same else Order(1 if node.layer.channel_axis(3) == 1 else -1, torch.from_numpy(index))
    if all(order.index is None for order in given):
        return Order()
    operation = operation_of(node.kind)
    if operation is None:
        return None
    if operation.keeps and all(order.same(given[0]) for order in given):
        return None if _mixes(operation, given[0], len(shape) + 1) else given[0]
    return _moved(node, given[0], shape) if operation.rule is movement and len(given) == 1 else None


def _mixes(operation: Operation, order: Order, ndim: int) -> bool:
    """Whether an operator that keeps channels runs over them here, in a value of so many axes."""
    return isinstance(operation.rule, Window) and order.axis % ndim >= ndim - operation.rule.axes


def _groups_agree(structure: ZippedStructure, node: Node, index: np.ndarray, source: Order) -> bool:
    """Whether every row of a grouped convolution reads the same neurons as the first task's row does."""
    conv_groups = node.layer.conv_groups(node.arguments)
    if conv_groups == 1:
        return True
    _, inputs, *_ = structure.networks[structure.tasks[0]].shapes[node.weight]
    read = np.arange(conv_groups * inputs) if source.index is None else source.index.numpy()
    group = np.arange(len(index)) // (len(index) // conv_groups)
    theirs = index // (len(index) // conv_groups)
    expected = theirs[:, None] * inputs + np.arange(inputs)
    return bool((read.reshape(conv_groups, inputs)[group] == expected).all())


def _moved(node: Node, order: Order, shape: tuple[int, ...]) -> Order | None:
    """The order behind an operator that flattens all values of an example; None behind any other."""
    first = torch.arange(prod(shape)).reshape(1, *shape)
    own = order.apply(first)
    before, after = (run_node(node, {node.sources[0]: value}, {}, 1) for value in (first, own))
    if not isinstance(before, Tensor) or before.ndim != 2 or before.numel() != first.numel():
        return None
    return Order(1, before.flatten().argsort()[after.flatten()])
