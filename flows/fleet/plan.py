"""The plan of a fleet: its groups, including those that the planner chose; `flows.fleet.choose` chooses them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from flows.results.group_report import GroupReport
from flows.spec.fleet_file import GroupPlan
from flows.spec.snapshot import Snapshot

if TYPE_CHECKING:  # these import torch, which most runs of a fleet do not need
    from mtz_core.grouping.affinity import Affinities
    from mtz_core.grouping.groups import Grouping

_PREFIX = "auto"


@dataclass(frozen=True)
class Measured:
    """A model whose statistics exist.

    Attributes:
        plan: The model as a group of its own.
        snapshot: Its snapshot.
        statistics: SHA-256 of its Hessians and sensitivities, a content.
        tags: The model's tags.
    """

    plan: GroupPlan
    snapshot: Snapshot
    statistics: str
    tags: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Choice:
    """The planner's comparison and its result.

    Attributes:
        affinities: The affinities of all pairs.
        grouping: The groups, and the models that are better left alone.
    """

    affinities: Affinities
    grouping: Grouping

    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the models of each group by its name, which stays the same as long as its first model does."""
        return {f"{_PREFIX}-{group.models[0]}": group.models for group in self.grouping.groups}


@dataclass(frozen=True)
class FleetPlan:
    """The groups of a fleet.

    Attributes:
        groups: The groups that the file lists, then those that the planner chose.
        failed: Models without sources or statistics, which the planner left out.
        choice: Why the planner chose its groups; None if it was not needed.
    """

    groups: Sequence[GroupPlan]
    failed: Sequence[GroupReport] = field(default_factory=list)
    choice: Choice | None = None


@dataclass(frozen=True)
class PlannedFleet:
    """The groups of a fleet and what a run would do.

    Attributes:
        plan: The groups.
        reports: Reports of the groups that need no work or cannot be started, by name.
    """

    plan: FleetPlan
    reports: Mapping[str, GroupReport]
