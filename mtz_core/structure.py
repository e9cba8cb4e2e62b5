"""What a zipped network is made of, beside its values: who owns which neuron, names and shapes of blocks, the report.

A zipped network is, for each of its tasks, that task's own graph with that task's neurons in their own order. What is
shared is weights: a layer's matrix is a grid of *blocks*, one for each set of tasks that own its rows and each set that
own its columns, as far as the two have a task in common. A task's dense matrix is its blocks, put into its own order;
what several tasks use is one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mtz_core.graph import INPUT, KERNEL, Axis, LayerGraph, Network, Node

TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What may name a task: names of blocks are made of it."""

Owners = tuple[str, ...]
"""The tasks that a neuron, a column or a block of weights belongs to, in the order of the zipped network's tasks."""

NOT_A_MEMBER = -1

Members = Mapping[str, "Int64[np.ndarray, 'neurons tasks']"]
"""For every hidden group: which neuron of each task is (a part of) each of its neurons, or `NOT_A_MEMBER`."""


@dataclass(frozen=True)
class LayerReport:
    """What zipping did to one layer.

    `neurons` are the rows of its matrix per task, `shared` of them stored once for several tasks; `cost` is the
    predicted loss of the shared ones, ``Σ_t ½ α_t (s* − s_t)ᵀ M_t (s* − s_t)``; `error` per task is the measured
    relative squared error of the layer's output on calibration data, ``E‖ŷ − y‖² / E‖y‖²`` against the original
    network. `note` says why nothing is shared where that is not by choice, `few_rows` by how much calibration data are
    too few to fit the layer well.
    """

    layer: str
    kind: str
    neurons: Mapping[str, int]
    shared: int
    cost: float
    error: Mapping[str, float]
    parameters: int
    original_parameters: Mapping[str, int]
    note: str = ""
    few_rows: str = ""

    def of(self, tasks: Sequence[str], shared: int, blocks: Mapping[str, Tensor]) -> LayerReport:
        """The report when only these tasks are left."""
        return replace(
            self,
            neurons={task: self.neurons[task] for task in tasks},
            shared=shared,
            error={task: self.error[task] for task in tasks},
            parameters=sum(block.numel() for block in blocks.values()),
            original_parameters={task: self.original_parameters[task] for task in tasks},
        )


@dataclass(frozen=True)
class ZipReport:
    """Per layer what was shared, and sizes: parameters, and bytes of all that is stored (statistics, too).

    `descent` is the predicted cost of sharing before and after every step of the coordinate descent over neuron groups;
    empty where no pairing depends on a later one.
    """

    method: str
    layers: tuple[LayerReport, ...]
    stored_parameters: int
    original_parameters: int
    stored_bytes: int
    original_bytes: int
    descent: tuple[float, ...] = ()

    @property
    def stored_fraction(self) -> float:
        """Stored parameters relative to the originals'."""
        return self.stored_parameters / self.original_parameters


@dataclass(frozen=True)
class Run:
    """Positions of one axis of a layer's matrix that the same tasks own.

    ``places[task]`` are the positions in that task's own matrix; equal indices correspond.
    """

    owners: Owners
    places: Mapping[str, Int64[np.ndarray, " n"]]

    @property
    def size(self) -> int:
        return len(self.places[self.owners[0]])


@dataclass(frozen=True)
class Arrangement:
    """One axis of a layer's matrix in a zipped network: runs of positions, those of more tasks first."""

    runs: tuple[Run, ...]

    def of(self, task: str) -> tuple[Run, ...]:
        """The runs that a task owns a part of."""
        return tuple(run for run in self.runs if task in run.owners)

    def order(self, task: str) -> Int64[np.ndarray, " n"]:
        """The task's own positions in the order of its runs."""
        parts = [run.places[task] for run in self.of(task)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def shared(self) -> int:
        """How many positions belong to more than one task."""
        return sum(run.size for run in self.runs if len(run.owners) > 1)


def arrange(
    tasks: Sequence[str],
    axes: Mapping[str, Axis],
    members: Members,
    separate: bool = False,
    apart: Sequence[str] = (),
) -> Arrangement:
    """Which positions of the tasks' axes are one, given which of their neurons are.

    Groups without an entry in `members`, those whose neurons have different numbers of positions in different tasks
    (another input size, another head), and those kept `apart` correspond nowhere; with `separate` nothing does.
    The input corresponds where it has as many positions in all tasks.
    """
    found: dict[Owners, dict[str, list[np.ndarray]]] = {}

    def put(owners: Owners, places: Mapping[str, np.ndarray]) -> None:
        into = found.setdefault(owners, {task: [] for task in owners})
        for task in owners:
            into[task].append(places[task])

    names = dict.fromkeys(name for axis in axes.values() for name in axis.groups)
    rest = {task: [np.flatnonzero(axes[task].group < 0)] for task in tasks}
    for name in names:
        tables = {task: positions_of(axes[task], name) for task in tasks}
        unpaired = name not in members and name not in (INPUT, KERNEL)
        if separate or unpaired or name in apart or not _one_size(tables.values()):
            for task in tasks:
                rest[task].append(tables[task].flatten())
            continue
        rows = members.get(name)
        if rows is None:
            rows = np.zeros((1, len(tasks)), dtype=np.int64)
        owned = rows >= 0
        for pattern in np.unique(owned, axis=0):
            own = rows[(owned == pattern).all(axis=1)]
            owners = tuple(task for task, owns in zip(tasks, pattern, strict=True) if owns)
            put(owners, {task: tables[task][own[:, tasks.index(task)]].flatten() for task in owners})
    for task in tasks:
        put((task,), {task: np.concatenate(rest[task])})
    runs = []
    for owners in sorted(found, key=lambda owners: (-len(owners), [tasks.index(task) for task in owners])):
        places = {task: np.concatenate(parts) for task, parts in found[owners].items()}
        order = np.argsort(places[owners[0]], kind="stable")
        if len(order):
            runs.append(Run(owners, {task: part[order] for task, part in places.items()}))
    return Arrangement(tuple(runs))


def _one_size(tables: Iterable[np.ndarray]) -> bool:
    """Whether neurons have as many positions in all networks."""
    return len({table.shape[1] for table in tables}) == 1


def positions_of(axis: Axis, group: str) -> Int64[np.ndarray, "neurons slots"]:
    """The positions of every neuron of a group on an axis, in order."""
    if group not in axis.groups:
        return np.zeros((0, 0), dtype=np.int64)
    own = np.flatnonzero(axis.group == axis.groups.index(group))
    ordered = own[np.argsort(axis.neuron[own], kind="stable")]
    return ordered.reshape(int(axis.neuron[own].max()) + 1, -1)


def block_name(layer: str, rows: Owners, columns: Owners) -> str:
    """The name of a block of weights, for files and ``state_dict``. Task names hold neither '+' nor '/'."""
    return f"{layer}/weight/{'+'.join(rows)}/{'+'.join(columns)}"


def bias_name(layer: str, rows: Owners) -> str:
    """The name of a block of biases."""
    return f"{layer}/bias/{'+'.join(rows)}"


def own_name(tensor: str, task: str) -> str:
    """The name of a tensor that is no layer's weight: each task has its own normalisation, embeddings of places, …"""
    return f"{tensor}/own/{task}"


@dataclass(frozen=True, eq=False)
class TaskStructure:
    """One task's side of a zipped network: graph, shapes of all tensors, what it reads, its original's size."""

    graph: LayerGraph
    shapes: Mapping[str, tuple[int, ...]]
    trainable: frozenset[str]
    input_shape: tuple[int, ...]
    input_dtype: torch.dtype
    parameters: int
    bytes: int

    @classmethod
    def of(cls, network: Network, original: Network | None = None) -> TaskStructure:
        """The structure of a traced network, and the size of the one that it comes from, if that is another."""
        shapes = {name: tuple(tensor.shape) for name, tensor in network.state.items()}
        original = original or network
        entry = network.input_shape, network.input_dtype
        return cls(network.graph, shapes, network.trainable, *entry, original.parameters, original.bytes)

    @cached_property
    def matrices(self) -> frozenset[str]:
        """The tensors that are a layer's weight or bias."""
        return frozenset(n for node in self.graph.layers for n in (node.weight, node.bias) if n is not None)

    @property
    def own(self) -> tuple[str, ...]:
        """All other tensors."""
        return tuple(name for name in self.shapes if name not in self.matrices)


@dataclass(frozen=True, eq=False)
class ZippedStructure:
    """Everything about a zipped network but its values. `members` has an entry for every hidden group.

    `apart` names, for ``rows/LAYER`` and ``columns/LAYER``, groups that stay separate there because they did not
    correspond in a network that has been taken out since.
    """

    tasks: tuple[str, ...]
    networks: Mapping[str, TaskStructure]
    members: Members
    report: ZipReport
    apart: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[Node, ...]:
        """The layers, which all tasks have alike."""
        return self.networks[self.tasks[0]].graph.layers

    @cached_property
    def rows(self) -> Mapping[str, Arrangement]:
        """Who owns the rows of each layer's matrix."""
        return {
            node.name: arrange(
                self.tasks,
                {task: self.networks[task].graph.rows[node.name] for task in self.tasks},
                self.members,
                separate=not can_share(node.name, self.networks.values()),
                apart=self.apart.get(f"rows/{node.name}", ()),
            )
            for node in self.layers
        }

    @cached_property
    def columns(self) -> Mapping[str, Arrangement]:
        """Who owns the columns of each layer's matrix, the bias aside."""
        return {
            node.name: arrange(
                self.tasks,
                {task: self.networks[task].graph.columns[node.name] for task in self.tasks},
                self.members,
                apart=self.apart.get(f"columns/{node.name}", ()),
            )
            for node in self.layers
        }

    def all_apart(self) -> dict[str, tuple[str, ...]]:
        """Where groups do not correspond, for whatever reason."""
        found: dict[str, tuple[str, ...]] = {}
        for node in self.layers:
            for side in ("rows", "columns"):
                axes = [getattr(network.graph, side)[node.name] for network in self.networks.values()]
                whole = side == "rows" and not can_share(node.name, self.networks.values())
                unequal = {n for n in axes[0].groups if whole or not _one_size(positions_of(a, n) for a in axes)}
                unequal |= set(self.apart.get(f"{side}/{node.name}", ()))
                if unequal:
                    found[f"{side}/{node.name}"] = tuple(sorted(unequal))
        return found

    def reported(self, tensors: Mapping[str, Tensor], layers: Sequence[LayerReport]) -> ZippedStructure:
        """The same structure with a report on these tensors."""
        own = (
            own_name(name, t)
            for t, network in self.networks.items()
            for name in network.own
            if name in network.trainable
        )
        report = ZipReport(
            method=self.report.method,
            layers=tuple(layers),
            stored_parameters=sum(tensors[name].numel() for name in (*self.block_shapes(), *own)),
            original_parameters=sum(network.parameters for network in self.networks.values()),
            stored_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            original_bytes=sum(network.bytes for network in self.networks.values()),
            descent=self.report.descent,
        )
        return replace(self, report=report)

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every block of weights that a zipped network of this structure stores."""
        shapes: dict[str, tuple[int, ...]] = {}
        for node in self.layers:
            for rows in self.rows[node.name].runs:
                for columns in self.columns[node.name].runs:
                    if set(rows.owners) & set(columns.owners):
                        shapes[block_name(node.name, rows.owners, columns.owners)] = (rows.size, columns.size)
                if node.bias is not None:
                    shapes[bias_name(node.name, rows.owners)] = (rows.size,)
        return shapes

    def own_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every other tensor that it stores."""
        return {
            own_name(name, task): network.shapes[name]
            for task, network in self.networks.items()
            for name in network.own
        }


def can_share(layer: str, networks: Iterable[TaskStructure | Network]) -> bool:
    """Whether rows of a layer can be common.

    It is kept separate nowhere, its kernels have one size, and what it reads has as many values per neuron.
    """
    networks = list(networks)
    columns = [network.graph.columns[layer] for network in networks]
    if len(columns[0].groups) == 1 and not _one_size(positions_of(axis, columns[0].groups[0]) for axis in columns):
        return False
    return same_kernels(layer, networks) and not any(_layer(layer, network).separate for network in networks)


def same_kernels(layer: str, networks: Iterable[TaskStructure | Network]) -> bool:
    """Whether a layer's kernels have one size in all networks, and its convolution groups, too."""
    shapes = set()
    for network in networks:
        node = _layer(layer, network)
        shape = network.shapes[node.weight] if isinstance(network, TaskStructure) else network.state[node.weight].shape
        grouped = node.layer.groups(node.arguments) > 1
        shapes.add((tuple(shape[2:]) if node.kind.startswith("conv") else (), grouped, shape[1] if grouped else 0))
    return len(shapes) == 1


def _layer(name: str, network: TaskStructure | Network) -> Node:
    return next(node for node in network.graph.layers if node.name == name)


def cut(
    layer: str,
    task: str,
    matrix: Tensor,
    rows: Arrangement,
    columns: Arrangement,
    bias: bool,
    known: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """One task's dense matrix (bias as last column) as the blocks that a zipped network stores, but for `known`."""
    blocks: dict[str, Tensor] = {}
    for run in rows.of(task):
        parts = {block_name(layer, run.owners, part.owners): part.places[task] for part in columns.of(task)}
        missing = {name: torch.from_numpy(places) for name, places in parts.items() if name not in known}
        if missing:
            strip = matrix[torch.from_numpy(run.places[task])]
            blocks |= {name: strip[:, places].contiguous() for name, places in missing.items()}
        if bias and bias_name(layer, run.owners) not in known:
            blocks[bias_name(layer, run.owners)] = matrix[torch.from_numpy(run.places[task]), -1].clone()
    return blocks
