"""A plan of a fleet: its groups, those that the planner chose, and why; `flows.fleet.choose` chooses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flows.results.group_report import GroupReport
from flows.spec.fleet_file import GroupPlan
from flows.spec.snapshot import Snapshot

if TYPE_CHECKING:  # these bring torch, which most runs of a fleet do without
    from mtz_core.grouping.affinity import Affinities
    from mtz_core.grouping.groups import Grouping

_PREFIX = "auto"


@dataclass(frozen=True)
class Measured:
    """A model whose statistics are there."""

    plan: GroupPlan
    snapshot: Snapshot
    statistics: str
    """SHA-256 of its Hessians and sensitivities, a content."""
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """What the planner has compared, and chosen."""

    affinities: Affinities
    grouping: Grouping

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the models of each group by its name, which stays the same as long as its first model does."""
        return {f"{_PREFIX}-{group.models[0]}": group.models for group in self.grouping.groups}


@dataclass(frozen=True)
class FleetPlan:
    """The groups of a fleet.

    Attributes:
        failed: models whose sources or statistics are not to be had, so that the planner left them out.
        choice: why the planner chose the groups that the file does not list; None where there are none.
    """

    groups: Sequence[GroupPlan]
    failed: Sequence[GroupReport] = field(default_factory=list)
    choice: Choice | None = None


@dataclass(frozen=True)
class PlannedFleet:
    """The groups of a fleet, with reports of those that have nothing to do, or cannot be begun."""

    plan: FleetPlan
    reports: Mapping[str, GroupReport]
