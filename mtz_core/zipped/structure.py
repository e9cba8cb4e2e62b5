"""What a zipped network consists of beside its values: who owns which neuron, and names and shapes of blocks.

A zipped network holds, for each of its tasks, that task's own graph with that task's neurons in their own order.
Weights are what is shared. A layer's matrix is a grid of *blocks*: one for each set of tasks that own its rows and each
set that own its columns, as far as the two sets have a task in common. A task's dense matrix is put together from its
blocks and brought into its own order; a block that several tasks use is one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from mtz_core.network.graph import Axis, Inputs, LayerGraph, Network, Node
from mtz_core.zipped.codes import SCALES, codes_of, pack, packed_bytes
from mtz_core.zipped.ownership import Arrangement, Members, Owners, arrange, one_size, positions_of
from mtz_core.zipped.report import LayerReport, ZipReport

TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""The names that a task can have. Names of blocks are made of them."""


def block_name(layer: str, rows: Owners, columns: Owners) -> str:
    """Name a block of weights, for files and ``state_dict``.

    Args:
        layer: The layer.
        rows: The tasks that own the block's rows. Task names hold neither '+' nor '/'.
        columns: The tasks that own its columns.

    Returns:
        The name.
    """
    return f"{layer}/weight/{'+'.join(rows)}/{'+'.join(columns)}"


def bias_name(layer: str, rows: Owners) -> str:
    """Name a block of biases by its layer and the tasks that own its rows."""
    return f"{layer}/bias/{'+'.join(rows)}"


def scale_name(layer: str, rows: Owners) -> str:
    """Name the scales of rounded rows by their layer and the tasks that own the rows."""
    return f"{layer}/scale/{'+'.join(rows)}"


def own_name(tensor: str, task: str) -> str:
    """Name a task's own tensor that is no layer's weight or bias, such as a normalisation's or a position embedding."""
    return f"{tensor}/own/{task}"


@dataclass(frozen=True, eq=False)
class TaskStructure:
    """One task's side of a zipped network, without values.

    Attributes:
        graph: The task's graph.
        shapes: The shape of every tensor that the task's network needs, by the tensor's name.
        trainable: The names of the tensors that are parameters.
        inputs: What the network is given.
        parameters: The number of trainable values in the task's original network.
        bytes: The size of the task's original network, in bytes.
        non_persistent: The names of the tensors that the original's ``state_dict`` leaves out.
    """

    graph: LayerGraph
    shapes: Mapping[str, tuple[int, ...]]
    trainable: frozenset[str]
    inputs: Inputs
    parameters: int
    bytes: int
    non_persistent: frozenset[str] = frozenset()

    @classmethod
    def of(cls, network: Network, original: Network | None = None) -> TaskStructure:
        """Describe a traced network.

        Args:
            network: The network, some of whose neurons may have been dropped.
            original: The network that it comes from, if that is another one. Its sizes are taken.

        Returns:
            The network's structure.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state.items()}
        original = original or network
        sizes = original.parameters, original.bytes
        return cls(network.graph, shapes, network.trainable, network.inputs, *sizes, network.non_persistent)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """The names of the tensors that are a layer's weight or bias."""
        return frozenset(n for node in self.graph.layers for n in (node.weight, node.bias) if n is not None)

    @property
    def own(self) -> tuple[str, ...]:
        """The names of all other tensors."""
        return tuple(name for name in self.shapes if name not in self.matrices)


@dataclass(frozen=True, eq=False)
class ZippedStructure:
    """Everything about a zipped network but its values.

    Attributes:
        tasks: The tasks, in the order of the columns of `members`.
        networks: Every task's structure.
        members: Which neurons are one, with an entry for every hidden group of any task.
        report: The report on sharing and sizes.
        separate: For ``rows/LAYER`` and ``columns/LAYER``, the groups that stay separate there because they did not
            correspond in a network that has been taken out since.
        bits: The number of bits to which each block of weights is rounded, by the block's name; others are not rounded.
            The rows of a segment have one scale for all of its rounded blocks.
    """

    tasks: tuple[str, ...]
    networks: Mapping[str, TaskStructure]
    members: Members
    report: ZipReport
    separate: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[Node, ...]:
        """Every layer, as the first task has it that has it."""
        return tuple(next(iter(nodes.values())) for nodes in self.nodes.values())

    @cached_property
    def nodes(self) -> Mapping[str, Mapping[str, Node]]:
        """Every layer by its name, as each of its tasks has it. Other tasks may lack it."""
        found: dict[str, dict[str, Node]] = {}
        for task in self.tasks:
            for node in self.networks[task].graph.layers:
                found.setdefault(node.name, {})[task] = node
        return found

    @cached_property
    def rows(self) -> Mapping[str, Arrangement]:
        """Who owns the rows of each layer's matrix."""
        return {name: self._arrange(name, "rows", not can_share(name, self.networks.values())) for name in self.nodes}

    @cached_property
    def columns(self) -> Mapping[str, Arrangement]:
        """Who owns the columns of each layer's matrix, the bias aside."""
        return {name: self._arrange(name, "columns", len(self.nodes[name]) < len(self.tasks)) for name in self.nodes}

    def _arrange(self, layer: str, side: str, all_separate: bool) -> Arrangement:
        return arrange(
            tuple(self.nodes[layer]),
            {task: getattr(self.networks[task].graph, side)[layer] for task in self.nodes[layer]},
            self.members,
            all_separate=all_separate,
            separate=self.separate.get(f"{side}/{layer}", ()),
        )

    def all_separate(self) -> dict[str, tuple[str, ...]]:
        """The groups that do not correspond, for whatever reason, by ``rows/LAYER`` and ``columns/LAYER``."""
        found: dict[str, tuple[str, ...]] = {}
        for layer, nodes in self.nodes.items():
            for side in ("rows", "columns"):
                axes = [getattr(self.networks[task].graph, side)[layer] for task in nodes]
                whole = side == "rows" and not can_share(layer, self.networks.values())
                names = {name for axis in axes for name in axis.groups}
                unequal = {n for n in names if whole or not one_size(positions_of(a, n) for a in axes)}
                unequal |= set(self.separate.get(f"{side}/{layer}", ()))
                if unequal:
                    found[f"{side}/{layer}"] = tuple(sorted(unequal))
        return found

    def reported(self, tensors: Mapping[str, Tensor], layers: Sequence[LayerReport]) -> ZippedStructure:
        """Return the same structure with a new report.

        Args:
            tensors: Every tensor that the zipped network stores, by name.
            layers: The reports of the layers.

        Returns:
            The structure with a report on these layers and tensors.
        """
        own = [
            network.shapes[name]
            for network in self.networks.values()
            for name in network.own
            if name in network.trainable
        ]
        scales = self.scale_shapes()
        report = ZipReport(
            method=self.report.method,
            layers=tuple(layers),
            stored_parameters=sum(map(prod, (*self.block_shapes().values(), *own))),
            original_parameters=sum(network.parameters for network in self.networks.values()),
            stored_bytes=sum(
                tensor.numel() * (SCALES.itemsize if name in scales else tensor.element_size())
                for name, tensor in tensors.items()
            ),
            original_bytes=sum(network.bytes for network in self.networks.values()),
            descent=self.report.descent,
            tasks={task: judged for task, judged in self.report.tasks.items() if task in self.tasks},
        )
        return replace(self, report=report)

    def parameters_of(self, layer: str) -> int:
        """The number of a layer's weights and biases, rounded or not."""
        return sum(prod(shape) for name, shape in self._blocks_of(layer))

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every block of weights or biases, rounded or not."""
        return dict(block for layer in self.nodes for block in self._blocks_of(layer))

    def _blocks_of(self, layer: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every block of weights or biases of a layer."""
        for rows in self.rows[layer].segments:
            for columns in self.columns[layer].segments:
                if set(rows.owners) & set(columns.owners):
                    yield block_name(layer, rows.owners, columns.owners), (rows.size, columns.size)
            if self.nodes[layer][rows.owners[0]].bias is not None:
                yield bias_name(layer, rows.owners), (rows.size,)

    def scale_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of the scales of all segments of rows of which a block is rounded."""
        return {
            scale_name(layer, rows.owners): (rows.size,)
            for layer, arrangement in self.rows.items()
            for rows in arrangement.segments
            if self.is_rounded(layer, rows.owners)
        }

    def is_rounded(self, layer: str, rows: Owners) -> bool:
        """Whether some of a layer's weights in the rows of these tasks are rounded."""
        return bool(self.bits) and any(
            block_name(layer, rows, columns.owners) in self.bits for columns in self.columns[layer].segments
        )

    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor that a zipped network of this structure stores; rounded blocks are packed."""
        shapes = self.block_shapes()
        packed = {name: (packed_bytes(prod(shapes[name]), bits),) for name, bits in self.bits.items()}
        return {**shapes, **packed, **self.scale_shapes(), **self.own_shapes()}

    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every other tensor that a zipped network of this structure stores."""
        return {
            own_name(name, task): network.shapes[name]
            for task, network in self.networks.items()
            for name in network.own
        }


def hidden_groups(graphs: Iterable[LayerGraph]) -> tuple[str, ...]:
    """The neuron groups that are hidden in any of these graphs."""
    return tuple(dict.fromkeys(name for graph in graphs for name in graph.hidden_widths))


def can_share(layer: str, networks: Iterable[TaskStructure | Network]) -> bool:
    """Whether rows of a layer can be shared.

    They can if all networks have the layer and none keeps it separate, if its kernels have one size, and if what it
    reads are the same neurons, with as many values per neuron in all networks.

    Args:
        layer: The layer's name.
        networks: The networks, traced or as structures.

    Returns:
        Whether all of this holds.
    """
    networks = list(networks)
    nodes = [network.graph.layers_by_name.get(layer) for network in networks]
    if any(node is None or node.separate for node in nodes):
        return False
    rows, columns = ([getattr(network.graph, side)[layer] for network in networks] for side in ("rows", "columns"))
    if not same_groups(rows) or not same_groups(columns):
        return False
    if len(columns[0].groups) == 1 and not one_size(positions_of(axis, columns[0].groups[0]) for axis in columns):
        return False
    return same_kernels(layer, networks)


def same_groups(axes: Iterable[Axis]) -> bool:
    """Whether axes are made of the same groups."""
    return len({frozenset(axis.groups) for axis in axes}) == 1


def same_kernels(layer: str, networks: Iterable[TaskStructure | Network]) -> bool:
    """Whether a layer's kernels, and its conv_groups if there are several, have one size in all networks."""
    shapes = set()
    for network in networks:
        node = network.graph.layers_by_name[layer]
        shape = network.shapes[node.weight] if isinstance(network, TaskStructure) else network.state[node.weight].shape
        grouped = node.layer.conv_groups(node.arguments) > 1
        shapes.add((tuple(shape[2:]) if node.kind.startswith("conv") else (), grouped, shape[1] if grouped else 0))
    return len(shapes) == 1


def to_blocks(
    layer: str,
    task: str,
    matrix: Float[Tensor, "out columns"],
    rows: Arrangement,
    columns: Arrangement,
    bias: bool,
    known: Mapping[str, Tensor],
    scales: Float[Tensor, " out"] | None = None,
    bits: Mapping[str, int] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """Cut one task's dense matrix into the blocks that a zipped network stores.

    Args:
        layer: The layer's name.
        task: The task.
        matrix: The dense matrix, a bias as its last column.
        rows: Who owns the layer's rows.
        columns: Who owns the layer's columns, the bias aside.
        bias: Whether the layer has a bias.
        known: Blocks of the layer that other tasks have given already.
        scales: The scale of every row, if some blocks are rounded.
        bits: The number of bits of every block that is rounded.

    Returns:
        The task's blocks by name, without those that are known. Rounded ones are packed, and come with their scales.
    """
    blocks: dict[str, Tensor] = {}
    for segment in rows.of(task):
        parts = {block_name(layer, segment.owners, part.owners): part.places[task] for part in columns.of(task)}
        missing = {name: torch.from_numpy(places) for name, places in parts.items() if name not in known}
        own = torch.from_numpy(segment.places[task])
        if missing:
            strip = matrix[own]
            blocks |= {name: strip[:, places].contiguous() for name, places in missing.items()}
        if scales is not None and any(name in bits for name in parts):
            if scale_name(layer, segment.owners) not in known:
                blocks[scale_name(layer, segment.owners)] = scales[own].to(matrix.dtype)
            for name in missing.keys() & bits.keys():
                blocks[name] = pack(codes_of(blocks[name], scales[own], bits[name]), bits[name])
        if bias and bias_name(layer, segment.owners) not in known:
            blocks[bias_name(layer, segment.owners)] = matrix[own, -1].clone()
    return blocks
