"""Choose, for every neuron group, how much is shared and what is dropped: least damage within the budget of bytes.

Damage adds up over groups and tasks. Bytes do not, since two neighbouring groups save more when both are shared
(`mtz_core.planning.sizes`). So the plan for a price λ per byte is found by coordinate descent: group by group, the
state of least ``damage + λ · bytes`` is chosen given the other groups' states, from several starts. The price is
bisected until the bytes fit. The bits of every layer's weights are chosen in the same descent, given the states
(`mtz_core.planning.precision`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import ceil, exp, log

import numpy as np
from jaxtyping import Float64, Int64

from mtz_core.errors import InvalidConfig
from mtz_core.merging.compatibility import check_compatible
from mtz_core.merging.pairing import Pairing
from mtz_core.network.narrowing import Dropper, Keep
from mtz_core.planning.dropping import Reader, readers
from mtz_core.planning.families import ways_to_share
from mtz_core.planning.options import Options, Prices, options
from mtz_core.planning.precision import Precisions
from mtz_core.planning.sizes import Bits, Counts, Sizes, owner_sets
from mtz_core.settings import Move, ZipConfig
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.ownership import NOT_A_MEMBER

_PRICES, _CLOSE = (1e-16, 1e4), 1.0001
"""Between which prices of a byte a plan is looked for first, and how close to each other they come."""

_ANY_PRICE = 1e30
"""A price per byte at which nothing but bytes counts."""


@dataclass(frozen=True, eq=False)
class Plan:
    """Which neurons each task keeps, and which of those are one.

    Attributes:
        keep: For every task and each of its groups, the neurons that are kept, ascending.
        pairings: The pairing of every group. It numbers the neurons that are kept.
        bytes: The size of the zipped network, in bytes.
        sharing: The expected damage by sharing in every group, over all tasks.
        dropping: The expected damage by dropping in every group, over all tasks.
        damages: The expected damage by both in every group, to every task.
        damping: The relative ``λ`` that held-out data ask for when some tasks' layers are fitted.
        bits: The number of bits to which weights are rounded, by the names of their scales (`scale_name`).
        rounding: The expected damage by rounding to every task.
    """

    keep: Mapping[str, Keep]
    pairings: Mapping[str, Pairing]
    bytes: int
    sharing: Mapping[str, float]
    dropping: Mapping[str, float]
    damages: Mapping[str, Mapping[str, float]]
    damping: Mapping[str, float] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)
    rounding: Mapping[str, float] = field(default_factory=dict)

    @property
    def lost(self) -> dict[str, float]:
        """The share of its information that each task is expected to lose."""
        moved = {task: sum(damage[task] for damage in self.damages.values()) for task in self.keep}
        return {task: lost + self.rounding.get(task, 0.0) for task, lost in moved.items()}

    @property
    def damage(self) -> float:
        """The expected damage of all moves to all tasks."""
        return sum(self.sharing.values()) + sum(self.dropping.values()) + sum(self.rounding.values())

    def same(self, other: Plan) -> bool:
        """Whether another plan keeps and shares the same neurons, and rounds them alike."""
        return (
            self.bits == other.bits
            and all(
                np.array_equal(pairing.members, other.pairings[name].members) for name, pairing in self.pairings.items()
            )
            and all(
                np.array_equal(kept, other.keep[task][name])
                for task, own in self.keep.items()
                for name, kept in own.items()
            )
        )


States = dict[str, int]
"""The chosen state of every group."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What a plan is made of.

    Attributes:
        states: The state of every group.
        bits: The bits of every layer's weights.
    """

    states: States
    bits: Bits


NEVER = 1e12
"""A factor at which no move is worth its damage."""

TRIED_ON = 4
"""The number of examples on which it is tried whether a group can lose neurons."""


class Planner:
    """Makes plans for networks of one topology, from their weights, Hessians and sensitivities alone.

    Attributes:
        networks: The traced networks by task, in alphabetical order.
        tasks: The tasks in the same order.
        sizes: The stored bytes, given counts.
        options: The states that every hidden group can be brought to.
    """

    def __init__(
        self,
        traced: Mapping[str, Traced],
        config: ZipConfig,
        moves: Sequence[Move],
        known: Precisions | None = None,
    ) -> None:
        """Match the networks and list the states of every group.

        Args:
            traced: The networks by task, with moments, sensitivities and calibration data.
            config: How to zip.
            moves: The moves that are allowed.
            known: What rounding costs these networks, if another planner has measured it.

        Raises:
            MtzError: If the networks cannot be zipped together, or if a Hessian cannot be factorised.
        """
        traced = dict(sorted(traced.items()))
        self.networks = {task: own.network for task, own in traced.items()}
        self.tasks = tuple(traced)
        self._balance = len(traced) * np.array(config.balance_of(self.tasks))
        check_compatible(self.networks)
        ways = ways_to_share(traced, config, self._balance) if "share" in moves else []
        self.sizes = Sizes(self.networks, owner_sets(found for way in ways for found, _ in way.tuples.values()))
        droppable = _droppable(traced.values()) if "drop" in moves else set()
        self.options: dict[str, Options] = {}
        for name in self.sizes.widths[0]:
            reading: list[list[Reader]] = [[] for _ in self.tasks]
            if name in droppable:
                reading = [
                    readers(own.network, name, own.moments, own.sensitivity or {}, config.fixed_damping)
                    for own in traced.values()
                ]
            self.options[name] = options(name, ways, reading, self.sizes, name in droppable, self._balance)
        self.precisions = Precisions(list(traced.values()), self.sizes, config.fixed_damping, "round" in moves, known)
        self._near = {name: sorted(self.sizes.neighbours(name)) for name in self.options}
        self._priced: Prices | None = None
        self._damages: dict[str, Float64[np.ndarray, " states"]] = {}

    @property
    def original_bytes(self) -> int:
        """The size of all originals together, in bytes."""
        return sum(network.bytes for network in self.networks.values())

    def reaches(self, size: float, moves: Collection[Move]) -> bool:
        """Whether a size can be reached by some moves alone, sharing and dropping not together.

        Args:
            size: The size relative to the originals' bytes.
            moves: The moves.

        Returns:
            Whether doing as much of the moves as possible stores at most that size.
        """
        states = dict.fromkeys(self.options, 0)
        for name, table in self.options.items() if "share" in moves or "drop" in moves else ():
            pure = table.gone == 0 if "share" in moves else table.shared == 0
            least = table.counts.sum(axis=1)
            states[name] = int(np.argmin(np.where(pure, least, np.iinfo(np.int64).max)))
        bits = self.precisions.least() if "round" in moves else self.precisions.none()
        return self._bytes(Choice(states, bits)) <= int(size * self.original_bytes + 1e-6)

    @property
    def least_bytes(self) -> int:
        """The least size that any plan has, in bytes."""
        return min(self._bytes(choice) for choice in self._descents(_ANY_PRICE, Prices(self._balance), []))

    def plan(
        self,
        size: float,
        sharing: float = 1.0,
        dropping: float = 1.0,
        counted: Mapping[str, float] | None = None,
        rounding: float = 1.0,
    ) -> Plan:
        """Make the plan of least damage that fits a size.

        Args:
            size: The most that is stored, relative to the originals' bytes.
            sharing: The factor of the damage that sharing is expected to do. `NEVER` leaves out all sharing that costs
                anything.
            dropping: The same factor for dropping.
            counted: The factor of the damage to each task; the configured balance if it is left out.
            rounding: The same factor for rounding.

        Returns:
            The plan.

        Raises:
            InvalidConfig: If no plan is that small.
        """
        weights = self._balance if counted is None else np.array([counted[task] for task in self.tasks])
        return self._plan(self._cheapest(size, Prices(weights, sharing, dropping, rounding)))

    def size_for(self, lost: float, above: float = 0.0) -> float | None:
        """Find the least size, in steps of 5 %, at which no task is expected to lose more than a share of information.

        Args:
            lost: The share.
            above: A size that is too small, as has been seen.

        Returns:
            The size relative to the originals' bytes; None if only the originals themselves are large enough.
        """
        least = self.least_bytes / self.original_bytes
        for size in (step / 20 for step in range(1, 20)):
            if size >= least and size > above and max(self.plan(size).lost.values()) <= lost:
                return size
        return None

    def _cheapest(self, size: float, prices: Prices) -> Choice:
        """The choice of least damage that fits a size. Raises `InvalidConfig` if none does."""
        budget = int(size * self.original_bytes + 1e-6)
        best: Choice | None = None
        tried: list[States] = []
        for low, high in pairwise((*_PRICES, _ANY_PRICE)):
            while high > low * _CLOSE:
                price = exp((log(low) + log(high)) / 2)
                choice = min(self._descents(price, prices, tried), key=lambda one: self._objective(one, price, prices))
                tried = [choice.states]
                if self._bytes(choice) > budget:
                    low = price
                    continue
                high = price
                if best is None or self._objective(choice, 0.0, prices) < self._objective(best, 0.0, prices):
                    best = choice
            if best is not None:
                break
        if best is None:
            least = ceil(1000 * self.least_bytes / self.original_bytes) / 1000
            raise InvalidConfig(
                f"budget.size: {size:g} is impossible: the least that these networks can be stored in is "
                f"{least:.3f} of their bytes ({self.least_bytes:,})."
            )
        return self._fill(best, budget, prices)

    def stepped_back(self, plan: Plan, to: Plan) -> Iterator[tuple[str, Plan]]:
        """Bring ever more groups of a plan into the state that they have in another plan.

        Args:
            plan: The plan.
            to: The plan to go back to.

        Yields:
            The names of the groups that step back, those that do most damage first, and the plan with them stepped
                back.
        """
        damage = {name: plan.sharing[name] + plan.dropping[name] for name in plan.pairings}
        worst = sorted((name for name in damage if damage[name] > 0), key=lambda name: -damage[name])
        for count in range(1, len(worst)):
            back = set(worst[:count])
            parts = {name: to if name in back else plan for name in damage}
            keep = {task: {name: parts[name].keep[task][name] for name in own} for task, own in plan.keep.items()}
            pairings = {name: part.pairings[name] for name, part in parts.items()}
            counts = {name: self.sizes.count(pairing.members) for name, pairing in pairings.items()}
            bits = self.precisions.named({**to.bits, **plan.bits})
            yield (
                ", ".join(worst[:count]),
                Plan(
                    keep,
                    pairings,
                    self.sizes.stored(counts, bits),
                    {name: part.sharing[name] for name, part in parts.items()},
                    {name: part.dropping[name] for name, part in parts.items()},
                    {name: part.damages[name] for name, part in parts.items()},
                    plan.damping,
                    self.precisions.names(counts, bits),
                    self._rounding(counts, bits),
                ),
            )

    def alike(self, size: float) -> Plan | None:
        """The plan that only rounds, all weights to the same bits: as many as fit a size; None if none do."""
        states, budget = dict.fromkeys(self.options, 0), int(size * self.original_bytes + 1e-6)
        for bits in self.precisions.offered[1:]:
            choice = Choice(states, self.sizes.bits_of(bits))
            if self._bytes(choice) <= budget:
                return self._plan(choice)
        return None

    def whole(self) -> Plan:
        """The plan that shares, drops and rounds nothing."""
        return self._plan(Choice(dict.fromkeys(self.options, 0), self.precisions.none()))

    def _descents(self, price: float, prices: Prices, tried: Sequence[States]) -> list[Choice]:
        """Local optima of coordinate descent.

        Args:
            price: The price of a byte.
            prices: How damage counts.
            tried: Further states to start from.

        Returns:
            The optima, starting from nothing done, from everything shared in each way, from as much as possible done,
                and from `tried`.
        """
        nothing = dict.fromkeys(self.options, 0)
        if min(prices.sharing, prices.dropping) >= NEVER:
            return [self._descend(nothing, price, prices)]
        ways = range(min((len(o.complete) for o in self.options.values()), default=0))
        shared = [{name: o.complete[way] for name, o in self.options.items()} for way in ways]
        smallest = {name: len(o.gone) - 1 for name, o in self.options.items()}
        return [self._descend(start, price, prices) for start in (nothing, *shared, smallest, *tried)]

    def _descend(self, states: States, price: float, prices: Prices) -> Choice:
        states = dict(states)
        while True:
            choice = Choice(states, self.precisions.best(self._counts(states), price, prices))
            changed = False
            for name in self.options:
                bytes_, damage = self._around(name, choice, prices)
                cost = damage + price * bytes_
                best = int(np.argmin(cost))
                if cost[best] < cost[states[name]] - 1e-12 * abs(cost[states[name]]):
                    states[name], changed = best, True
            if not changed:
                return choice

    def _fill(self, choice: Choice, budget: float, prices: Prices) -> Choice:
        """Spend what is left of the budget where it saves most damage."""
        while True:
            best, most = choice, 0.0
            spare = budget - self._bytes(choice)
            for name, now in choice.states.items():
                bytes_, damage = self._around(name, choice, prices)
                gain = np.where(bytes_ - bytes_[now] <= spare, damage[now] - damage, -np.inf)
                found = int(np.argmax(gain))
                if gain[found] > most + 1e-12 * damage[now]:
                    other = replace(choice, states={**choice.states, name: found})
                    if self._bytes(other) <= budget:  # packing may round up
                        best, most = other, gain[found]
            counts = self._counts(choice.states)
            for layer, owners, more, saved in self.precisions.finer(counts, choice.bits, spare, prices):
                if saved > most * (1 + 1e-12):
                    own = choice.bits[layer].copy()
                    own[owners] = more
                    other = replace(choice, bits={**choice.bits, layer: own})
                    if self._bytes(other) <= budget:
                        best, most = other, saved
            if best is choice:
                return choice
            choice = best

    def _around(
        self, name: str, choice: Choice, prices: Prices
    ) -> tuple[Float64[np.ndarray, " states"], Float64[np.ndarray, " states"]]:
        """The bytes and the damage that depend on a group, in each of its states."""
        near = self._counts({other: choice.states[other] for other in self._near[name]})
        counts = {**near, name: self.options[name].numbers}
        bytes_, damage = self.precisions.around(name, counts, choice.bits, prices)
        return bytes_, self._damage(name, prices) + damage

    def _damage(self, name: str, prices: Prices) -> Float64[np.ndarray, " states"]:
        """The damage of sharing and dropping in every state of a group; kept while prices are the same."""
        if self._priced is not prices:
            self._priced, self._damages = prices, {}
        if name not in self._damages:
            self._damages[name] = self.options[name].damage(prices)
        return self._damages[name]

    def _counts(self, states: States) -> dict[str, Int64[np.ndarray, " owners"]]:
        """How many neurons each set of owners has in each of these groups."""
        return {name: self.options[name].counts[state] for name, state in states.items()}

    def _bytes(self, choice: Choice) -> int:
        return self.sizes.stored(self._counts(choice.states), choice.bits)

    def _objective(self, choice: Choice, price: float, prices: Prices) -> float:
        damage = sum(float(self._damage(name, prices)[state]) for name, state in choice.states.items())
        rounding = self.precisions.damage(self._counts(choice.states), choice.bits, prices)
        return damage + rounding + price * self._bytes(choice)

    def _rounding(self, counts: Counts, bits: Bits) -> dict[str, float]:
        """The damage that rounding does to each task."""
        return dict(zip(self.tasks, self.precisions.by_task(counts, bits).tolist(), strict=True))

    def _plan(self, choice: Choice) -> Plan:
        states, counts = choice.states, self._counts(choice.states)
        keep: dict[str, dict[str, Int64[np.ndarray, " kept"]]] = {task: {} for task in self.tasks}
        pairings = {}
        for name, table in self.options.items():
            units = table.members(states[name])
            left = [np.sort(units[units[:, t] >= 0, t]) for t in range(len(self.tasks))]
            for t, task in enumerate(self.tasks):
                if name in self.networks[task].graph.hidden_widths:
                    keep[task][name] = left[t]
            tuples = units[(units >= 0).sum(axis=1) > 1]
            places = [np.searchsorted(left[t], tuples[:, t]) for t in range(len(self.tasks))]
            tuples = np.where(tuples >= 0, np.stack(places, axis=1), NOT_A_MEMBER)
            pairings[name] = Pairing.from_tuples(self.tasks, [len(own) for own in left], tuples)
        chosen = {name: (table, states[name]) for name, table in self.options.items()}
        return Plan(
            keep,
            pairings,
            self._bytes(choice),
            {name: float(table.sharing[:, i].sum()) for name, (table, i) in chosen.items()},
            {name: float(table.dropping[:, i].sum()) for name, (table, i) in chosen.items()},
            {
                name: dict(zip(self.tasks, (table.sharing[:, i] + table.dropping[:, i]).tolist(), strict=True))
                for name, (table, i) in chosen.items()
            },
            bits=self.precisions.names(counts, choice.bits),
            rounding=self._rounding(counts, choice.bits),
        )


def _droppable(traced: Iterable[Traced]) -> set[str]:
    """The groups that can lose neurons in all networks that have them, found by trying on a few examples of each."""
    can, cannot = set(), set()
    for own in traced:
        found = set(Dropper(own.network).droppable(own.batches[0][:TRIED_ON]))
        can |= found
        cannot |= own.network.graph.hidden_widths.keys() - found
    return can - cannot
