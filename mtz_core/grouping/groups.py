"""Which models of a fleet should be zipped together: disjoint groups, from what every two models have in common.

Groups are found by average linkage: the two groups whose models have most in common on average are joined, again and
again, as long as the limits hold. Where only the size of groups stands in the way, the models of a small group are
spread over others that have room. The result does not depend on the order in which models are listed; their names break
ties.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf

import numpy as np
from jaxtyping import Float

from mtz_core.errors import InvalidConfig
from mtz_core.grouping.affinity import Affinities

LEAST_SIMILARITY = 0.6
"""Measured: networks of one ancestor lie above it, those of other data below (docs/benchmarks/affinities.md)."""


@dataclass(frozen=True)
class Limits:
    """What groups may be.

    Attributes:
        size: The most models in a group, 2 or more.
        similarity: The least mean similarity of a model to the others of its group, 0 to 1.
        damage: The most damage that is predicted for a model, in nats.
        separate: Tags that keep models separate: all models of a group have such a tag, or none has.
    """

    size: int = 8
    similarity: float = LEAST_SIMILARITY
    damage: float = inf
    separate: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        if self.size < 2:
            raise InvalidConfig(f"size: {self.size} is impossible. Allowed: 2 or more models in a group.")
        if not 0 <= self.similarity <= 1:
            raise InvalidConfig(f"similarity: {self.similarity:g} is impossible. Allowed: 0 to 1.")
        if not self.damage > 0:
            raise InvalidConfig(f"damage: {self.damage:g} is impossible. Allowed: above 0 nats.")


@dataclass(frozen=True)
class Group:
    """Models to be zipped together, and what sharing all their neurons is expected to do.

    Attributes:
        models: The models, in alphabetical order.
        bytes: The size of the originals, in bytes.
        saved: The bytes that need not be stored. Exact for networks of equal hidden widths; a lower bound where one of
            them is the narrowest throughout.
        similarity: The mean similarity of all pairs.
        least: The least similarity of any pair.
        damage: The nats that each model is expected to lose.
    """

    models: tuple[str, ...]
    bytes: int
    saved: int
    similarity: float
    least: float
    damage: Mapping[str, float]

    @property
    def after(self) -> int:
        """The bytes that are stored when all neurons are shared."""
        return self.bytes - self.saved

    @property
    def mean_damage(self) -> float:
        """The expected damage per model, in nats."""
        return sum(self.damage.values()) / len(self.damage)


@dataclass(frozen=True)
class Alone:
    """A model that is in no group.

    Attributes:
        model: The model.
        bytes: Its size, in bytes.
        why: Why it is in no group.
        nearest: The model that it has most in common with; None if there is none to compare with.
        similarity: The similarity of these two.
    """

    model: str
    bytes: int
    why: str
    nearest: str | None
    similarity: float


@dataclass(frozen=True)
class Grouping:
    """Disjoint groups, and the models that are in none.

    Attributes:
        groups: The groups, those that save most first.
        alone: The models in no group, in alphabetical order.
        limits: The limits that the groups keep.
    """

    groups: tuple[Group, ...]
    alone: tuple[Alone, ...]
    limits: Limits

    @property
    def bytes(self) -> int:
        """The size of all models, in bytes."""
        return sum(group.bytes for group in self.groups) + sum(one.bytes for one in self.alone)

    @property
    def saved(self) -> int:
        """The bytes that all groups save."""
        return sum(group.saved for group in self.groups)


def choose_groups(affinities: Affinities, limits: Limits) -> Grouping:
    """Find groups that keep the limits, by joining those that have most in common.

    Args:
        affinities: The affinities of all pairs of models.
        limits: The limits.

    Returns:
        The groups, and the models that are in none.
    """
    table = _Table(affinities, limits)
    members = _linked(table)
    while (spread := _spread(table, members)) is not None:
        members = spread
    groups = [_group(table, own) for own in members if len(own) > 1]
    alone = [_alone(table, own[0], members) for own in members if len(own) == 1]
    return Grouping(
        tuple(sorted(groups, key=lambda group: (-group.saved, group.models))),
        tuple(sorted(alone, key=lambda one: one.model)),
        limits,
    )


ModelIndices = tuple[int, ...]
"""The indices of a group's models, ascending. Models are indexed in alphabetical order."""


class _Table:
    """All pairs of models as matrices: similarity, damage to the first, bytes saved, and whether they may be joined."""

    def __init__(self, affinities: Affinities, limits: Limits) -> None:
        self.affinities, self.limits, self.names = affinities, limits, affinities.models
        count = len(self.names)
        self.similarity, self.damage, self.saved = (np.zeros((count, count)) for _ in range(3))
        self.comparable = np.zeros((count, count), dtype=bool)
        for i, j in combinations(range(count), 2):
            pair = affinities.of(self.names[i], self.names[j])
            self.comparable[i, j] = self.comparable[j, i] = pair.comparable
            self.similarity[i, j] = self.similarity[j, i] = pair.similarity
            self.saved[i, j] = self.saved[j, i] = pair.saved
            self.damage[i, j], self.damage[j, i] = pair.damage
        marks = [affinities.tags.get(name, frozenset()) & limits.separate for name in self.names]
        self.kept_apart = np.array([[one != other for other in marks] for one in marks], dtype=bool).reshape(
            count, count
        )
        self.may_meet = self.comparable & ~self.kept_apart

    def damages(self, own: ModelIndices) -> Float[np.ndarray, " own"]:
        """Predict what each model of a group loses when all share the mean of their neurons.

        Two models lose what their pair does. With more models that differ alike, each is up to twice as far from the
        mean of all.

        Args:
            own: The group's models.

        Returns:
            The nats that each of them loses.
        """
        others = len(own) - 1
        total: Float[np.ndarray, " own"] = self.damage[np.ix_(own, own)].sum(axis=1)
        return 2 * total / (others + 1)

    def likeness(self, own: ModelIndices) -> Float[np.ndarray, " own"]:
        """Every model's mean similarity to the others of a group."""
        total: Float[np.ndarray, " own"] = self.similarity[np.ix_(own, own)].sum(axis=1)
        return total / (len(own) - 1)

    def fits(self, own: ModelIndices) -> bool:
        """Whether a group of two or more models keeps all limits except that of its size."""
        pairs = self.may_meet[np.ix_(own, own)]
        return bool(
            pairs.sum() == len(own) * (len(own) - 1)
            and self.likeness(own).min() >= self.limits.similarity
            and self.damages(own).max() <= self.limits.damage
        )


def _told_apart(similarity: float) -> float:
    """A similarity, rounded to its precision: the order of a network's neurons changes it by less."""
    return round(float(similarity), 5)


def _linked(table: _Table) -> list[ModelIndices]:
    """Groups by average linkage."""
    groups: dict[ModelIndices, None] = {(i,): None for i in range(len(table.names))}
    waiting: list[tuple[float, ModelIndices, ModelIndices]] = []

    def consider(one: ModelIndices, other: ModelIndices) -> None:
        one, other = sorted((one, other))
        if len(one) + len(other) <= table.limits.size and table.fits(tuple(sorted(one + other))):
            waiting.append((-_told_apart(table.similarity[np.ix_(one, other)].mean()), one, other))

    for one, other in combinations(groups, 2):
        consider(one, other)
    heapq.heapify(waiting)
    while waiting:
        _, one, other = heapq.heappop(waiting)
        if one not in groups or other not in groups:
            continue
        del groups[one], groups[other]
        joined = tuple(sorted(one + other))
        known = len(waiting)
        for group in groups:
            consider(joined, group)
        found = waiting[known:]
        del waiting[known:]
        for entry in found:
            heapq.heappush(waiting, entry)
        groups[joined] = None
    return sorted(groups)


def _spread(table: _Table, members: Sequence[ModelIndices]) -> list[ModelIndices] | None:
    """The groups with one less, its models spread over others with room, if only group sizes kept it separate."""
    for own in sorted(members, key=lambda own: (len(own), own)):
        rest = [other for other in members if other != own]
        blocked = [
            other
            for other in rest
            if len(own) + len(other) > table.limits.size and table.fits(tuple(sorted(own + other)))
        ]
        placed = _placed(table, own, rest) if blocked else None
        if placed is not None:
            return sorted(placed)
    return None


def _placed(table: _Table, own: ModelIndices, groups: Sequence[ModelIndices]) -> list[ModelIndices] | None:
    """The groups with each of these models in the nearest one that has room; None if a model finds none."""
    groups = list(groups)
    for model in own:
        fitting = [
            (_told_apart(table.similarity[model, list(group)].mean()), -number)
            for number, group in enumerate(groups)
            if len(group) < table.limits.size and len(group) > 1 and table.fits(tuple(sorted((*group, model))))
        ]
        if not fitting:
            return None
        number = -max(fitting)[1]
        groups[number] = tuple(sorted((*groups[number], model)))
    return groups


def _group(table: _Table, own: ModelIndices) -> Group:
    names = [table.names[i] for i in own]
    pairs = list(combinations(own, 2))
    similarity = [float(table.similarity[pair]) for pair in pairs]
    return Group(
        models=tuple(names),
        bytes=sum(table.affinities.bytes[name] for name in names),
        saved=(len(own) - 1) * int(min(table.saved[pair] for pair in pairs)),
        similarity=sum(similarity) / len(pairs),
        least=min(similarity),
        damage=dict(zip(names, table.damages(own).tolist(), strict=True)),
    )


def _alone(table: _Table, model: int, members: Iterable[ModelIndices]) -> Alone:
    name = table.names[model]
    comparable = np.flatnonzero(table.comparable[model])
    bytes_ = table.affinities.bytes[name]
    if not len(comparable):
        return Alone(name, bytes_, _nobody(table, model), None, 0.0)
    nearest = _nearest(table, model, comparable)
    why = _why_alone(table, model, nearest, list(members))
    return Alone(name, bytes_, why, table.names[nearest], float(table.similarity[model, nearest]))


def _nearest(table: _Table, model: int, others: Sequence[int] | np.ndarray) -> int:
    return min(
        (int(other) for other in others), key=lambda other: (-_told_apart(table.similarity[model, other]), other)
    )


def _nobody(table: _Table, model: int) -> str:
    """Why there is no model to compare a model with: the reason that holds for most others."""
    name = table.names[model]
    reasons = [table.affinities.of(name, other).why for other in table.names if other != name]
    if not reasons:
        return "there is no other model"
    counted = sorted(set(reasons), key=lambda reason: (-reasons.count(reason), reason))
    return f"no other model can be compared with it; of {reasons.count(counted[0])}: {counted[0]}"


def _why_alone(table: _Table, model: int, nearest: int, members: Sequence[ModelIndices]) -> str:
    """Why a model is in no group although it can be compared with others."""
    limits, similarity = table.limits, float(table.similarity[model, nearest])
    there = f"the nearest, {table.names[nearest]}, has {similarity:.1%} in common with it"
    if similarity < limits.similarity:
        return f"{there}; at least {limits.similarity:.1%} are asked for"
    allowed = [int(other) for other in np.flatnonzero(table.may_meet[model])]
    if nearest not in allowed:
        tags = sorted(_tags(table, model) ^ _tags(table, nearest))
        keep = f"tags {' and '.join(tags)} keep" if len(tags) > 1 else f"tag {tags[0]} keeps"
        why = f"{there}, but the {keep} them apart"
        if not allowed:
            return f"{why}, as from all others"
        nearest = _nearest(table, model, allowed)
        similarity = float(table.similarity[model, nearest])
        there = f"{why}; of the others the nearest, {table.names[nearest]}, has {similarity:.1%}"
        if similarity < limits.similarity:
            return f"{there}; at least {limits.similarity:.1%} are asked for"
    fitting = [own for own in members if model not in own and table.fits(tuple(sorted((*own, model))))]
    if fitting:
        return f"{there}, but every group that it would fit is full ({limits.size} models)"
    if float(table.damages((model, nearest)).max()) > limits.damage:
        lost = float(table.damages((model, nearest)).max())
        return f"{there}, but sharing would cost {lost:.3g} nats; at most {limits.damage:g} are allowed"
    return f"{there}, but with all of that one's group together the limits would not hold"


def _tags(table: _Table, model: int) -> frozenset[str]:
    return table.affinities.tags.get(table.names[model], frozenset()) & table.limits.separate
