"""How many bytes a zipped network stores, given how many neurons each set of tasks owns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64

from mtz_core.merging.compatibility import why_separate
from mtz_core.network.graph import INPUT, KERNEL, Axis, LayerGraph, Network
from mtz_core.network.groups import analysis_of
from mtz_core.zipped.codes import SCALES
from mtz_core.zipped.ownership import positions_of
from mtz_core.zipped.structure import hidden_groups

Counts = Mapping[str, Any]
"""For every hidden group, the number of neurons that each of `Sizes.owners` has, ``[owners]``; or, of states that are
compared, ``[states, owners]``."""

Bits = Mapping[str, Int64[np.ndarray, " owners"]]
"""For every layer, the bits of a weight in the rows of each of `Sizes.owners`; if not rounded, those of its type."""


def owner_sets(tables: Iterable[Int64[np.ndarray, "_units _tasks"]]) -> list[tuple[bool, ...]]:
    """The sets of tasks that own units together: for each, whether each task belongs to it."""
    found = {tuple(owns) for units in tables for owns in np.unique(units >= 0, axis=0).tolist()}
    return sorted(found, reverse=True)


@dataclass(frozen=True)
class _Extent:
    """The length of an axis, set of owners by set of owners, as a function of how many neurons its groups have.

    Attributes:
        slots: For every group, how many positions of each set of owners (columns) a neuron of each set (rows) takes.
        fixed: The number of positions of each set of owners that are always there.
    """

    slots: Mapping[str, Int64[np.ndarray, "owners owners"]]
    fixed: Int64[np.ndarray, " owners"]

    def length(self, counts: Counts) -> Any:
        return sum((counts[name] @ slots for name, slots in self.slots.items()), start=self.fixed)


@dataclass(frozen=True)
class _Table:
    """Something stored: a grid of blocks, one for each two sets of owners that have a task in common.

    Attributes:
        rows: The rows.
        columns: The columns.
        itemsize: Bytes per value.
        layer: The layer whose weights it is; others are never rounded.
        bias: Whether every row has a bias besides.
    """

    rows: _Extent
    columns: _Extent
    itemsize: int
    layer: str | None = None
    bias: bool = False

    @property
    def groups(self) -> frozenset[str]:
        return frozenset((*self.rows.slots, *self.columns.slots))

    def bytes(self, counts: Counts, meet: Int64[np.ndarray, "owners owners"], bits: Bits) -> Any:
        if self.layer is None:
            return self.itemsize * (self.rows.length(counts) * (self.columns.length(counts) @ meet)).sum(axis=-1)
        rows, columns, own = self.rows.length(counts), self.columns.length(counts), bits[self.layer]
        rounded = own < 8 * self.itemsize
        if not rounded.any():
            return self.itemsize * (rows * (columns @ meet + self.bias)).sum(axis=-1)
        blocks = rows[..., :, None] * columns[..., None, :] * meet  # each is packed by itself
        packed = -(-blocks * own[:, None] // 8)
        return packed.sum(axis=(-2, -1)) + rows @ (rounded * SCALES.itemsize + self.bias * self.itemsize)


class Sizes:
    """The stored bytes of zipped networks of one topology, given counts of neurons.

    A layer's matrix is stored as a grid of blocks (`mtz_core.zipped.structure`): rows of each set of owners by columns
    of each set of owners, as far as the two have a task in common. So neighbouring groups depend on each other: the
    more is shared in one, the more sharing saves in the other.

    Attributes:
        tasks: The tasks.
        owners: The sets of tasks that can own neurons together: each task alone, all of them, and further ones.
        widths: For every task, the number of neurons of each hidden group; 0 of those that other tasks have.
        layers: The layers.
        full_bits: The bits of a weight that is not rounded.
        meet: Whether each two sets of owners have a task in common.
    """

    def __init__(self, networks: Mapping[str, Network], sets: Iterable[tuple[bool, ...]] = ()) -> None:
        """Describe what zipped networks of these networks store.

        Args:
            networks: The networks by task.
            sets: Further sets of tasks that can own neurons together; see `owner_sets`.
        """
        self.tasks = tuple(networks)
        count = len(self.tasks)
        alone = [tuple(row) for row in np.eye(count, dtype=bool).tolist()]
        self.owners: Bool[np.ndarray, "owners tasks"] = np.array(list(dict.fromkeys([*alone, (True,) * count, *sets])))
        graphs = [network.graph for network in networks.values()]
        names = hidden_groups(graphs)
        self.widths = [{name: graph.hidden_widths.get(name, 0) for name in names} for graph in graphs]
        self.meet = (self.owners[:, None] & self.owners[None]).any(axis=2).astype(np.int64)
        self.layers = tuple(dict.fromkeys(node.name for graph in graphs for node in graph.layers))
        self._by_layer = {name: self._layer(networks, name) for name in self.layers}
        self.full_bits = 8 * next(iter(self._by_layer.values())).itemsize
        self._tables = [
            *self._by_layer.values(),
            *(table for i, network in enumerate(networks.values()) for table in self._own(network, i)),
        ]
        self._unrounded = self.bits_of(self.full_bits)
        self._touching = {name: [table for table in self._tables if name in table.groups] for name in self.widths[0]}

    def neighbours(self, group: str) -> frozenset[str]:
        """The other groups on which the bytes around a group depend."""
        return frozenset(name for table in self._touching[group] for name in table.groups) - {group}

    def each(self, units: Int64[np.ndarray, "units tasks"]) -> Int64[np.ndarray, "units owners"]:
        """Tell which set of `owners` each unit belongs to: 1 for that set, 0 for all others."""
        return ((units >= 0)[:, None] == self.owners[None]).all(axis=2).astype(np.int64)

    def count(self, units: Int64[np.ndarray, "units tasks"]) -> Int64[np.ndarray, " owners"]:
        """Count the units of each set of `owners`."""
        found: Int64[np.ndarray, " owners"] = self.each(units).sum(axis=0)
        return found

    def counts(self, kept: Sequence[Mapping[str, int]], shared: Mapping[str, int]) -> dict[str, Any]:
        """Count the neurons of each set of owners where neurons are alone or shared by all tasks.

        Args:
            kept: For every task, how many neurons of each group it keeps.
            shared: For every group, how many neurons all tasks share.

        Returns:
            The counts.
        """
        found = {}
        for name, common in shared.items():
            found[name] = np.zeros(len(self.owners), dtype=np.int64)
            for t, own in enumerate(kept):
                found[name][t] = own[name] - common
            found[name][self.owners.all(axis=1)] += common
        return found

    def bits_of(self, bits: int) -> Bits:
        """The same bits for all layers."""
        return {layer: np.full(len(self.owners), bits) for layer in self.layers}

    def stored(self, counts: Counts, bits: Bits | None = None) -> int:
        """Compute the stored bytes.

        Args:
            counts: For every group, how many neurons each set of owners has.
            bits: The bits of every layer's weights; nothing is rounded if they are left out.

        Returns:
            The size in bytes.
        """
        bits = self._unrounded if bits is None else bits
        return int(sum(table.bytes(counts, self.meet, bits) for table in self._tables))

    def around(self, group: str, counts: Counts, bits: Bits | None = None) -> Any:
        """Compute the part of the stored bytes that depends on one group.

        Args:
            group: The group.
            counts: For every group, how many neurons each set of owners has; of some, in each of several states.
            bits: The bits of every layer's weights; nothing is rounded if they are left out.

        Returns:
            The size in bytes; an array over states if there are any.
        """
        bits = self._unrounded if bits is None else bits
        return sum(table.bytes(counts, self.meet, bits) for table in self._touching[group])

    def layers_around(self, group: str) -> tuple[str, ...]:
        """The layers whose bytes depend on a group."""
        return tuple(table.layer for table in self._touching[group] if table.layer is not None)

    def extents(self, layer: str, counts: Counts) -> tuple[Any, Any]:
        """The rows and the columns of each set of owners in a layer's matrix, biases aside."""
        table = self._by_layer[layer]
        return table.rows.length(counts), table.columns.length(counts)

    def slots(self, layer: str, group: str) -> tuple[Any, Any]:
        """How a layer's rows and columns grow with the counts of a group, ``[owners, owners]``; None if they do not."""
        table = self._by_layer[layer]
        return table.rows.slots.get(group), table.columns.slots.get(group)

    def bias_bytes(self, layer: str) -> int:
        """The bytes of the bias of one of a layer's rows."""
        table = self._by_layer[layer]
        return table.bias * table.itemsize

    def fixed_around(self, group: str, counts: Counts) -> Any:
        """The stored bytes that depend on one group and are no layer's weights or biases; see `around`."""
        others = [table for table in self._touching[group] if table.layer is None]
        return sum((table.bytes(counts, self.meet, {}) for table in others), start=np.zeros(1, dtype=np.int64))

    def _layer(self, networks: Mapping[str, Network], name: str) -> _Table:
        graphs = [network.graph for network in networks.values()]
        holders = [network for network in networks.values() if name in network.graph.layers_by_name]
        node = holders[0].graph.layers_by_name[name]
        common = why_separate(networks, node) is None
        sides = [[graph.rows.get(name) for graph in graphs], [graph.columns.get(name) for graph in graphs]]
        rows, columns = (self._extent(graphs, axes, common) for axes in sides)
        return _Table(rows, columns, holders[0].state[node.weight].element_size(), name, node.bias is not None)

    def _alone(self, values: Sequence[int]) -> Int64[np.ndarray, " owners"]:
        """A number for every task alone."""
        return np.append(np.array(values, dtype=np.int64), np.zeros(len(self.owners) - len(values), dtype=np.int64))

    def _extent(self, graphs: Sequence[LayerGraph], axes: Sequence[Axis | None], common: bool) -> _Extent:
        """Describe one axis of something that some networks have.

        Args:
            graphs: The graphs of the networks.
            axes: The axis in each network; None in those that lack it.
            common: Whether anything can correspond.

        Returns:
            The axis as a function of counts.
        """
        tables = {
            name: [positions_of(axis, name) if axis is not None else np.zeros((0, 0), dtype=np.int64) for axis in axes]
            for name in dict.fromkeys(name for axis in axes if axis is not None for name in axis.groups)
        }
        slots: dict[str, Int64[np.ndarray, "owners owners"]] = {}
        fixed = self._alone([0 if axis is None else int((axis.group < 0).sum()) for axis in axes])
        for name, found in tables.items():
            hidden = [name in graph.hidden_widths for graph in graphs]
            corresponds = common and len({table.shape[1] for table in found}) == 1
            if corresponds and all(hidden):
                slots[name] = found[0].shape[1] * np.eye(len(self.owners), dtype=np.int64)
                continue
            if corresponds and name in (INPUT, KERNEL):
                fixed = fixed + found[0].size * self.owners.all(axis=1)
                continue
            fixed = fixed + self._alone([0 if h else t.size for h, t in zip(hidden, found, strict=True)])
            if any(hidden):
                each = self._alone([t.shape[1] if h else 0 for h, t in zip(hidden, found, strict=True)])
                slots[name] = self.owners @ np.diag(each)[: len(graphs)]
        return _Extent(slots, fixed)

    def _own(self, network: Network, number: int) -> list[_Table]:
        """The tensors of one network that are no layer's matrix."""
        analysis = analysis_of(network)
        layers = {name for node in network.graph.layers for name in (node.weight, node.bias)}
        place = np.arange(len(self.tasks)) == number

        def extent(axis: Axis) -> _Extent:
            return self._extent([network.graph] * len(place), [axis if own else None for own in place], common=False)

        one = _Extent({}, self._alone(place.tolist()))
        tables = []
        for name, tensor in network.state.items():
            if name in layers:
                continue
            rows, columns = _Extent({}, tensor.numel() * one.fixed), one
            node = next((n for n in network.graph.nodes if n.name in analysis.rows and n.weight == name), None)
            if node is not None:
                rows, columns = extent(analysis.rows[node.name]), extent(analysis.columns[node.name])
            elif name in analysis.constants:
                rows = extent(analysis.constants[name])
            tables.append(_Table(rows, columns, tensor.element_size()))
        return tables
