"""Which groups a fleet has: those that its file lists, and those that the planner chooses for all other models."""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from flows import workspace
from flows.fleet_file import Fleet, GroupPlan
from flows.report import GroupReport
from flows.snapshot import Snapshot
from mtz_core.affinity import Affinities
from mtz_core.graph import Network
from mtz_core.grouping import LEAST_SIMILARITY, Grouping, Limits, choose_groups
from tasks.affinities import ModelStatistics, compare
from tasks.models import load_traced
from tasks.sources import Access
from tasks.workspace import Workspace

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


def choose(fleet: Fleet, measured: Mapping[str, Measured], access: Access, tell: Callable[[str], None]) -> Choice:
    """Compare the models and put them into groups, within the limits of the fleet file.

    Raises:
        MissingContent, StorageError: a model's files are not to be had.
        MtzError: a network cannot be built or traced.
    """
    auto = fleet.file.auto
    assert auto is not None
    limits = Limits(
        size=auto.size,
        similarity=LEAST_SIMILARITY if auto.similarity is None else auto.similarity,
        **({} if auto.damage is None else {"damage": auto.damage}),
        apart=frozenset(auto.apart),
    )
    models = {name: _statistics(name, one, access) for name, one in measured.items()}
    affinities = compare(models, access.home / "plans" / f"{fleet.name}-affinities.json", tell)
    return Choice(affinities, choose_groups(affinities, limits))


def _statistics(name: str, measured: Measured, access: Access) -> ModelStatistics:
    return ModelStatistics(
        name,
        partial(_load, name, measured, access),
        access.contents.path(measured.statistics),
        f"{measured.snapshot.files[f'networks/{name}.safetensors']}-{measured.statistics}",
        measured.tags,
    )


def _load(name: str, measured: Measured, access: Access) -> Network:
    """Build the network here; its files need not be in this machine's workspaces."""
    places = ("networks/", "data/")
    files = {path: digest for path, digest in measured.snapshot.files.items() if path.startswith(places)}
    with tempfile.TemporaryDirectory() as folder:
        workspace.place(files, access.contents, Path(folder))
        return load_traced(measured.plan.params, Workspace(Path(folder)), name)
