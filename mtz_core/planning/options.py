"""What can be done to one neuron group to save bytes, and at what damage: *share* tuples of neurons, *drop* units.

Both moves are counted in the tasks' losses (`mtz_core.statistics.sensitivity`), task by task. The damage that sharing a
tuple does to task t is what the change of its neuron's outputs costs, ``½ f_t (s* − s_t)ᵀ M_t (s* − s_t)``. The damage
of dropping a unit is what the layers that read it cannot make up for (`mtz_core.planning.dropping`). An *option* is a
state that a group can be brought to: some tuples are shared, among all tasks or within families
(`mtz_core.planning.families`), then units are dropped, shared ones in all their networks at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float64, Int64

from mtz_core.merging.pairing import Pairing
from mtz_core.planning.dropping import Reader, eliminate
from mtz_core.planning.families import Sharing
from mtz_core.planning.sizes import Sizes

STARTS = (0.0, 0.125, 0.25, 0.5, 0.75, 1.0)
"""The fractions of a group's tuples that are shared before units are dropped."""

TILTS = tuple(2.0**power for power in (-6, -5, -4, -3, -2, -1, 1, 2, 3, 4, 5, 6))
"""How much more or less the damage to one task counts on other paths on which nothing is shared."""

SHARES = 64
"""The steps from nothing to everything in which a group can be shared when none of it is dropped."""


@dataclass(frozen=True, eq=False)
class DropPath:
    """A sequence of states of a group: some of its tuples are shared, then its units are dropped one after the other.

    Attributes:
        units: The neuron of every task in each unit, shared units first.
        sharing: The damage that sharing each unit does to every task; 0 for a neuron alone.
        order: The units in the order in which they are dropped.
        dropping: The damage that each of these adds to every task.
    """

    units: Int64[np.ndarray, "units tasks"]
    sharing: Float64[np.ndarray, "units tasks"]
    order: Int64[np.ndarray, " dropped"]
    dropping: Float64[np.ndarray, "dropped tasks"]

    def members(self, gone: int) -> Int64[np.ndarray, "left tasks"]:
        """The units that are left when the first `gone` of the order are dropped."""
        return np.delete(self.units, self.order[:gone], axis=0)


@dataclass(frozen=True, eq=False)
class Prices:
    """How damage counts.

    Attributes:
        tasks: The factor of the damage to every task.
        sharing: The factor of damage by sharing.
        dropping: The factor of damage by dropping.
        rounding: The factor of damage by rounding.
    """

    tasks: Float64[np.ndarray, " tasks"]
    sharing: float = 1.0
    dropping: float = 1.0
    rounding: float = 1.0


@dataclass(frozen=True, eq=False)
class Options:
    """All states that a group can be brought to. State i lies on path ``path[i]`` with ``gone[i]`` units dropped.

    Attributes:
        paths: The paths that the states lie on.
        path: The path of every state.
        gone: The number of units that are dropped in every state.
        counts: The number of neurons that each set of owners has in every state; see `Sizes.owners`.
        kept: The number of neurons that each task keeps in every state.
        shared: The number of neurons that belong to more than one task in every state.
        sharing: The damage that sharing does to every task in every state.
        dropping: The damage that dropping does to every task in every state.
        complete: For every way to share, the state in which everything is shared and nothing is dropped.
    """

    paths: Sequence[DropPath]
    path: Int64[np.ndarray, " states"]
    gone: Int64[np.ndarray, " states"]
    counts: Int64[np.ndarray, "states owners"]
    kept: Int64[np.ndarray, "tasks states"]
    shared: Int64[np.ndarray, " states"]
    sharing: Float64[np.ndarray, "tasks states"]
    dropping: Float64[np.ndarray, "tasks states"]
    complete: Sequence[int]

    @classmethod
    def along(cls, paths: Sequence[DropPath], sizes: Sizes, complete: Sequence[int] = ()) -> Options:
        """List every state on every path.

        Args:
            paths: The paths.
            sizes: Knows the sets of owners.
            complete: For every way to share, the number of the path that starts with everything shared.

        Returns:
            The states.
        """
        columns = []
        for number, path in enumerate(paths):
            each = sizes.each(path.units)
            gone = np.arange(len(path.order) + 1)
            nothing = np.zeros((1, path.units.shape[1]))
            lost = np.concatenate([0 * each[:1], each[path.order].cumsum(axis=0)])
            regained = np.concatenate([nothing, path.sharing[path.order].cumsum(axis=0)])
            left = np.maximum(path.sharing.sum(axis=0) - regained, 0.0)
            spent = np.concatenate([nothing, path.dropping.cumsum(axis=0)])
            columns.append((np.full(len(gone), number), gone, each.sum(axis=0) - lost, left, spent))
        path_, gone_, counts, sharing, dropping = (np.concatenate(parts) for parts in zip(*columns, strict=True))
        starts = np.flatnonzero(gone_ == 0)[list(complete)].tolist()
        common = sizes.owners.sum(axis=1) > 1
        kept, shared = (counts @ sizes.owners).T, counts[:, common].sum(axis=1)
        return cls(paths, path_, gone_, counts, kept, shared, sharing.T, dropping.T, starts)

    @cached_property
    def numbers(self) -> Float64[np.ndarray, "states owners"]:
        """The counts as floating-point numbers, whose products are faster."""
        return self.counts.astype(np.float64)

    def damage(self, prices: Prices) -> Float64[np.ndarray, " states"]:
        """Compute the weighted damage of every state, over all tasks."""
        found: Float64[np.ndarray, " states"] = prices.tasks @ (
            prices.sharing * self.sharing + prices.dropping * self.dropping
        )
        return found

    def members(self, state: int) -> Int64[np.ndarray, "left tasks"]:
        """The units that are left in a state, by the originals' neurons."""
        return self.paths[self.path[state]].members(int(self.gone[state]))


def options(
    name: str,
    ways: Sequence[Sharing],
    reading: Sequence[Sequence[Reader]],
    sizes: Sizes,
    drop: bool,
    balance: Float64[np.ndarray, " tasks"],
) -> Options:
    """List the states that a group can be brought to.

    Args:
        name: The group.
        ways: The ways in which tasks can share; none if they are not to.
        reading: For every task, the layers that read the group; empty if the group cannot lose neurons.
        sizes: The stored bytes, given counts.
        drop: Whether neurons may be dropped.
        balance: How much the damage to each task counts where the order of moves is decided.

    Returns:
        The states.
    """
    widths = [own[name] for own in sizes.widths]
    drop = drop and all(len(task) > 0 for task, width in zip(reading, widths, strict=True) if width)
    nobody = np.zeros((0, len(widths)), dtype=np.int64)
    units, sharing = _with_own(sizes.tasks, widths, nobody, np.zeros(nobody.shape))
    paths = [DropPath(units, sharing, np.zeros(0, dtype=np.int64), np.zeros(nobody.shape))]
    if drop:
        paths = _separate_paths(reading, units, sharing, _freed(name, units, sizes, None, 0.0), balance)
    complete = []
    for way in ways:
        most = len(way.tuples[name][0])
        starts = {round(start * most) for start in STARTS}
        for count in sorted((starts | {round(step / SHARES * most) for step in range(SHARES + 1)}) - {0}):
            found = way.cheapest(name, count, exact=count in starts)
            units, sharing = _with_own(sizes.tasks, widths, *found)
            order, dropping = np.zeros(0, dtype=np.int64), np.zeros((0, len(widths)))
            if drop and count in starts:
                order, dropping = eliminate(reading, units, _freed(name, units, sizes, way, count / most), balance)
            paths.append(DropPath(units, sharing, order, dropping))
        complete.append(len(paths) - 1 if most else 0)
    return Options.along(paths, sizes, complete)


def _separate_paths(
    reading: Sequence[Sequence[Reader]],
    units: Int64[np.ndarray, "units tasks"],
    sharing: Float64[np.ndarray, "units tasks"],
    freed: Float64[np.ndarray, " units"],
    balance: Float64[np.ndarray, " tasks"],
) -> list[DropPath]:
    """List the paths on which nothing is shared, first the one on which damage counts as the balance says.

    What one task drops makes no difference to another. So each has a sequence of its own, and a path is a merger of
    these: its price per byte decides which task is next. On the other paths the damage to one task counts for more or
    for less.

    Args:
        reading: For every task, the layers that read the group.
        units: The neurons, each alone.
        sharing: The damage by sharing, none.
        freed: The bytes that dropping each neuron frees.
        balance: How much the damage to each task counts.

    Returns:
        The paths.
    """
    sequences = []
    for t in range(units.shape[1]):
        own = np.flatnonzero(units[:, t] >= 0)
        order, damage = eliminate([reading[t]], units[own][:, [t]], freed[own])
        sequences.append((own[order], damage * (np.arange(len(balance)) == t)))
    orders = np.concatenate([order for order, _ in sequences])
    damages = np.concatenate([damage for _, damage in sequences])
    ends = np.cumsum([len(order) for order, _ in sequences])[:-1]
    tilted = range(1) if len(balance) == 2 else range(len(balance))  # of two tasks only the ratio counts
    tilts = [np.ones(len(balance))]
    tilts += [np.where(np.arange(len(balance)) == t, tilt, 1.0) for t in tilted for tilt in TILTS]
    paths = []
    for tilt in tilts:
        price = damages @ (tilt * balance) / freed[orders]
        keys = np.concatenate([np.maximum.accumulate(own) for own in np.split(price, ends)])  # sequences stay in order
        following = np.argsort(keys, kind="stable")
        paths.append(DropPath(units, sharing, orders[following], damages[following]))
    return paths


def _with_own(
    tasks: tuple[str, ...],
    widths: Sequence[int],
    tuples: Int64[np.ndarray, "k tasks"],
    sharing: Float64[np.ndarray, "k tasks"],
) -> tuple[Int64[np.ndarray, "units tasks"], Float64[np.ndarray, "units tasks"]]:
    """Tuples and, behind them, every other neuron alone, with the damage of sharing."""
    units = Pairing.from_tuples(tasks, widths, tuples).members
    alone = units[(units >= 0).sum(axis=1) == 1]
    return np.concatenate([tuples, alone]), np.concatenate([sharing, np.zeros(alone.shape)])


def _freed(
    name: str, units: Int64[np.ndarray, "units tasks"], sizes: Sizes, way: Sharing | None, share: float
) -> Float64[np.ndarray, " units"]:
    """The bytes that dropping each unit frees if the same fraction of every other group is shared."""
    counts = sizes.counts(sizes.widths, dict.fromkeys(sizes.widths[0], 0))
    if way is not None:
        for group in sizes.neighbours(name):
            tuples = way.tuples[group][0]
            widths, found = [own[group] for own in sizes.widths], tuples[: round(share * len(tuples))]
            counts[group] = sizes.count(Pairing.from_tuples(sizes.tasks, widths, found).members)
    each = sizes.each(units)
    counts[name] = each.sum(axis=0)
    before = sizes.around(name, counts)
    kinds = np.eye(len(sizes.owners), dtype=np.int64)
    freed = before - sizes.around(name, {**counts, name: counts[name] - kinds})
    return np.maximum(each @ freed, 1.0)
