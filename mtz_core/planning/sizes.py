"""How many bytes a zipped network stores, given how many neurons are kept and how many are shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtz_core.merging.compatibility import why_separate
from mtz_core.network.graph import INPUT, KERNEL, Axis, LayerGraph, Network
from mtz_core.network.narrowing import analysis_of
from mtz_core.zipped.ownership import positions_of
from mtz_core.zipped.structure import hidden_groups

Counts = Mapping[str, Any]
"""The number of neurons of every hidden group; or an array of numbers that are compared."""


@dataclass(frozen=True)
class _Extent:
    """The length of an axis, as a function of how many neurons its groups have.

    Attributes:
        slots: For every group, how many positions each of its neurons has.
        fixed: The number of positions that are always there.
    """

    slots: Mapping[str, int]
    fixed: int

    @classmethod
    def of(cls, axis: Axis, hidden: frozenset[str]) -> _Extent:
        slots = {name: positions_of(axis, name).shape[1] for name in axis.groups if name in hidden}
        own = [number for number, name in enumerate(axis.groups) if name in hidden]
        return cls(slots, int((~np.isin(axis.group, own)).sum()))

    def length(self, counts: Counts) -> Any:
        return self.fixed + sum(n * counts[name] for name, n in self.slots.items())


@dataclass(frozen=True)
class _Table:
    """Something stored: the rows and columns of every task, and what of them can correspond in all tasks.

    Attributes:
        rows: The rows of every task.
        columns: The columns of every task.
        shared_rows: The rows that can correspond in all tasks.
        shared_columns: The columns that can correspond in all tasks.
        itemsize: Bytes per value.
    """

    rows: Sequence[_Extent]
    columns: Sequence[_Extent]
    shared_rows: _Extent
    shared_columns: _Extent
    itemsize: int

    @property
    def groups(self) -> frozenset[str]:
        return frozenset(name for extent in (*self.rows, *self.columns) for name in extent.slots)

    def bytes(self, kept: Sequence[Counts], shared: Counts) -> Any:
        own = sum(r.length(k) * c.length(k) for r, c, k in zip(self.rows, self.columns, kept, strict=True))
        common = self.shared_rows.length(shared) * self.shared_columns.length(shared)
        return self.itemsize * (own - (len(self.rows) - 1) * common)


_NOTHING = _Extent({}, 0)
_ONE = _Extent({}, 1)


class Sizes:
    """The stored bytes of zipped networks of one topology, given counts of neurons.

    What all tasks share is stored once. With T tasks, a layer's matrix costs ``Σ_t r_t c_t − (T − 1) r c`` values,
    where task t has ``r_t`` rows and ``c_t`` columns, of which ``r`` and ``c`` are shared by all. So neighbouring
    groups depend on each other: the more is shared in one, the more sharing saves in the other.

    Attributes:
        tasks: The tasks.
        widths: For every task, the number of neurons of each hidden group; 0 of those that other tasks have.
    """

    def __init__(self, networks: Mapping[str, Network]) -> None:
        self.tasks = tuple(networks)
        graphs = [network.graph for network in networks.values()]
        names = hidden_groups(graphs)
        self.widths = [{name: graph.hidden_widths.get(name, 0) for name in names} for graph in graphs]
        self._tables = [
            *(_layer(networks, name) for name in dict.fromkeys(node.name for graph in graphs for node in graph.layers)),
            *(table for i, network in enumerate(networks.values()) for table in _own(network, i, len(networks))),
        ]
        self._touching = {name: [table for table in self._tables if name in table.groups] for name in self.widths[0]}

    def neighbours(self, group: str) -> frozenset[str]:
        """The other groups on which the bytes around a group depend."""
        return frozenset(name for table in self._touching[group] for name in table.groups) - {group}

    def stored(self, kept: Sequence[Counts], shared: Counts) -> int:
        """Compute the stored bytes.

        Args:
            kept: For every task, how many neurons of each group it keeps.
            shared: For every group, how many neurons all tasks share.

        Returns:
            The size in bytes.
        """
        return int(sum(table.bytes(kept, shared) for table in self._tables))

    def around(self, group: str, kept: Sequence[Counts], shared: Counts) -> Any:
        """Compute the part of the stored bytes that depends on one group.

        Args:
            group: The group.
            kept: For every task, how many neurons of each group it keeps; arrays of counts are compared element by
                element.
            shared: For every group, how many neurons all tasks share; likewise.

        Returns:
            The size in bytes, an array if counts are arrays.
        """
        return sum(table.bytes(kept, shared) for table in self._touching[group])


def _layer(networks: Mapping[str, Network], name: str) -> _Table:
    graphs = [network.graph for network in networks.values()]
    hidden = frozenset.intersection(*(frozenset(graph.hidden_widths) for graph in graphs))
    holders = [network for network in networks.values() if name in network.graph.layers_by_name]
    node = holders[0].graph.layers_by_name[name]
    why = why_separate(networks, node)
    common = _NOTHING if why else _common([graph.columns[name] for graph in graphs], hidden)
    return _Table(
        rows=[_extent(graph, "rows", name) for graph in graphs],
        columns=[_extent(graph, "columns", name) for graph in graphs],
        shared_rows=_NOTHING if why else _common([graph.rows[name] for graph in graphs], hidden),
        shared_columns=_Extent(common.slots, common.fixed + int(node.bias is not None)),
        itemsize=holders[0].state[node.weight].element_size(),
    )


def _extent(graph: LayerGraph, side: str, name: str) -> _Extent:
    """One axis of a layer's matrix, a bias counted as a column; nothing if the network lacks the layer."""
    node = graph.layers_by_name.get(name)
    if node is None:
        return _NOTHING
    extent = _Extent.of(getattr(graph, side)[name], frozenset(graph.hidden_widths))
    bias = int(side == "columns" and node.bias is not None)
    return _Extent(extent.slots, extent.fixed + bias)


def _common(axes: Sequence[Axis], hidden: frozenset[str]) -> _Extent:
    """The part of an axis that can correspond in all networks."""
    slots, fixed = {}, 0
    for name in axes[0].groups:
        tables = [positions_of(axis, name) for axis in axes]
        if len({table.shape[1] for table in tables}) == 1:
            if name in hidden:
                slots[name] = tables[0].shape[1]
            elif name in (INPUT, KERNEL):
                fixed += tables[0].size
    return _Extent(slots, fixed)


def _own(network: Network, number: int, tasks: int) -> list[_Table]:
    """The tensors of one network that are no layer's matrix."""
    analysis = analysis_of(network)
    hidden = frozenset(network.graph.hidden_widths)
    layers = {name for node in network.graph.layers for name in (node.weight, node.bias)}
    tables = []
    for name, tensor in network.state.items():
        if name in layers:
            continue
        rows, columns = _Extent({}, tensor.numel()), _ONE
        node = next((n for n in network.graph.nodes if n.name in analysis.rows and n.weight == name), None)
        if node is not None:
            rows, columns = (_Extent.of(axes[node.name], hidden) for axes in (analysis.rows, analysis.columns))
        elif name in analysis.constants:
            rows = _Extent.of(analysis.constants[name], hidden)
        place = [rows if i == number else _NOTHING for i in range(tasks)]
        tables.append(_Table(place, [columns] * tasks, _NOTHING, _NOTHING, tensor.element_size()))
    return tables
