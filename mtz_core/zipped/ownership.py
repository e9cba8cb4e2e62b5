"""Who owns which rows and columns of a layer in a zipped network."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from mtz_core.network.graph import INPUT, KERNEL, Axis

Owners = tuple[str, ...]
"""The tasks that a neuron, a column or a block of weights belongs to, in the order of the zipped network's tasks."""

NOT_A_MEMBER = -1
Members = Mapping[str, Int64[np.ndarray, "_neurons tasks"]]
"""For every hidden group: which neuron of each task is (a part of) each of its neurons, or `NOT_A_MEMBER`."""


@dataclass(frozen=True)
class Segment:
    """Positions of one axis of a layer's matrix that the same tasks own.

    Attributes:
        owners: The tasks that own the positions.
        places: For every owner, the positions in that task's own matrix. Equal indices correspond.
    """

    owners: Owners
    places: Mapping[str, Int64[np.ndarray, " n"]]

    @property
    def size(self) -> int:
        """The number of positions."""
        return len(self.places[self.owners[0]])


@dataclass(frozen=True)
class Arrangement:
    """One axis of a layer's matrix in a zipped network.

    Attributes:
        segments: The segments of the axis, those of more tasks first.
    """

    segments: tuple[Segment, ...]

    def of(self, task: str) -> tuple[Segment, ...]:
        """The segments that a task owns a part of."""
        return tuple(segment for segment in self.segments if task in segment.owners)

    def order(self, task: str) -> Int64[np.ndarray, " n"]:
        """The task's own positions in the order of its segments."""
        parts = [segment.places[task] for segment in self.of(task)]
        return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)

    def shared(self) -> int:
        """The number of positions that belong to more than one task."""
        return sum(segment.size for segment in self.segments if len(segment.owners) > 1)


def arrange(
    tasks: Sequence[str],
    axes: Mapping[str, Axis],
    members: Members,
    separate: Sequence[str] = (),
    all_separate: bool = False,
) -> Arrangement:
    """Divide the tasks' axes into segments, given which of their neurons are one.

    Args:
        tasks: The tasks, in the order of the columns of `members`.
        axes: For every task, one axis of the same layer's matrix.
        members: Which neurons are one. A group without an entry corresponds nowhere, with two exceptions: the input,
            where it has as many positions per neuron in all tasks, and the columns of grouped convolutions.
        separate: Groups that correspond nowhere on this axis.
        all_separate: Whether nothing corresponds on this axis.

    Returns:
        The arrangement. A group also stays separate where its neurons have different numbers of positions in different
            tasks (another input size, another head).
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
        if all_separate or unpaired or name in separate or not one_size(tables.values()):
            for task in tasks:
                rest[task].append(tables[task].flatten())
            continue
        rows = members.get(name)
        if rows is None:
            rows = np.zeros((1, len(tasks)), dtype=np.int64)
        owned = rows >= 0
        for task in (task for t, task in enumerate(tasks) if not owned[:, t].any()):
            rest[task].append(tables[task].flatten())  # the neurons are outputs there
        for pattern in np.unique(owned, axis=0):
            own = rows[(owned == pattern).all(axis=1)]
            owners = tuple(task for task, owns in zip(tasks, pattern, strict=True) if owns)
            put(owners, {task: tables[task][own[:, tasks.index(task)]].flatten() for task in owners})
    for task in tasks:
        put((task,), {task: np.concatenate(rest[task])})
    segments = []
    for owners in sorted(found, key=lambda owners: (-len(owners), [tasks.index(task) for task in owners])):
        places = {task: np.concatenate(parts) for task, parts in found[owners].items()}
        order = np.argsort(places[owners[0]], kind="stable")
        if len(order):
            segments.append(Segment(owners, {task: part[order] for task, part in places.items()}))
    return Arrangement(tuple(segments))


def one_size(tables: Iterable[Int64[np.ndarray, "_ _"]]) -> bool:
    """Whether neurons have as many positions in all networks."""
    return len({table.shape[1] for table in tables}) == 1


def positions_of(axis: Axis, group: str) -> Int64[np.ndarray, "neurons slots"]:
    """The positions of every neuron of a group on an axis, in ascending order."""
    if group not in axis.groups:
        return np.zeros((0, 0), dtype=np.int64)
    own = np.flatnonzero(axis.group == axis.groups.index(group))
    ordered = own[np.argsort(axis.neuron[own], kind="stable")]
    return ordered.reshape(int(axis.neuron[own].max()) + 1, -1)
