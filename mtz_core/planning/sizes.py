"""How many bytes a zipped network stores, as a function of how many neurons are kept and how many are shared."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtz_core.merging.compatibility import why_separate
from mtz_core.network.graph import INPUT, KERNEL, Axis, Network
from mtz_core.network.narrowing import analysis_of
from mtz_core.zipped.ownership import positions_of

Counts = Mapping[str, Any]
"""A number of neurons for every hidden group; or several numbers, as an array, to compare."""


@dataclass(frozen=True)
class _Extent:
    """The length of an axis: so many positions for each neuron of some groups, and some that are always there."""

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
    """Something stored: every task's rows and columns, and what of them corresponds in all tasks."""

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
    """The stored bytes of networks of one topology, given counts.

    What all tasks share is stored once: a layer's rows and columns cost ``Σ_t r_t c_t − (T − 1) r c`` values, with
    ``r c`` those that all share. So neighbouring groups depend on each other: sharing in one saves the more, the more
    is shared in the other.
    """

    def __init__(self, networks: Mapping[str, Network]) -> None:
        self.tasks = tuple(networks)
        first = next(iter(networks.values()))
        self.widths = [
            {group.name: network.graph.widths[group.name] for group in network.graph.hidden_groups}
            for network in networks.values()
        ]
        self._tables = [
            *(_layer(networks, node.name) for node in first.graph.layers),
            *(table for i, network in enumerate(networks.values()) for table in _own(network, i, len(networks))),
        ]
        self._touching = {name: [table for table in self._tables if name in table.groups] for name in self.widths[0]}

    def stored(self, kept: Sequence[Counts], shared: Counts) -> int:
        """Bytes with these many neurons of every group kept by each task, and shared by all of them."""
        return int(sum(table.bytes(kept, shared) for table in self._tables))

    def around(self, group: str, kept: Sequence[Counts], shared: Counts) -> Any:
        """The part of the bytes that depends on a group; arrays of counts give an array."""
        return sum(table.bytes(kept, shared) for table in self._touching[group])


def _layer(networks: Mapping[str, Network], name: str) -> _Table:
    graphs = [network.graph for network in networks.values()]
    hidden = frozenset(group.name for group in graphs[0].hidden_groups)
    node = graphs[0].node(name)
    rows, columns = ([getattr(graph, side)[name] for graph in graphs] for side in ("rows", "columns"))
    lengths = [_Extent.of(axis, hidden) for axis in columns]
    bias = int(node.bias is not None)
    common = _common(columns, hidden)
    return _Table(
        rows=[_Extent.of(axis, hidden) for axis in rows],
        columns=[_Extent(extent.slots, extent.fixed + bias) for extent in lengths],
        shared_rows=_NOTHING if why_separate(networks, node) else _common(rows, hidden),
        shared_columns=_Extent(common.slots, common.fixed + bias),
        itemsize=next(iter(networks.values())).state[node.weight].element_size(),
    )


def _common(axes: Sequence[Axis], hidden: frozenset[str]) -> _Extent:
    """What of an axis can correspond in all networks."""
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
    hidden = frozenset(group.name for group in network.graph.hidden_groups)
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
