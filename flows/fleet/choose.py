"""The planner: compares models by their statistics and puts them into groups."""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from flows.fleet.plan import Choice, Measured
from flows.group import workspace
from flows.spec.fleet_file import Fleet
from mtz_core.grouping.groups import LEAST_SIMILARITY, Limits, choose_groups
from mtz_core.network.graph import Network
from tasks.artifacts.paths import Workspace
from tasks.models.load import load_traced
from tasks.sources import Access
from tasks.studies.affinities import ModelStatistics, compare


def choose(
    fleet: Fleet, measured: Mapping[str, Measured], access: Access, on_progress: Callable[[str], None]
) -> Choice:
    """Compare the models and put them into groups, within the limits of the fleet file.

    Args:
        fleet: The fleet; its file must have a block `auto`.
        measured: The models with their statistics, by name.
        access: How the models' files are fetched.
        on_progress: Receives progress messages.

    Returns:
        The affinities of the models and the groups.

    Raises:
        MissingContent: A model's file is neither here nor in the storage.
        StorageError: The storage cannot be used.
        MtzError: A network cannot be built or traced.
    """
    auto = fleet.file.auto
    assert auto is not None
    limits = Limits(
        size=auto.size,
        similarity=LEAST_SIMILARITY if auto.similarity is None else auto.similarity,
        **({} if auto.damage is None else {"damage": auto.damage}),
        separate=frozenset(auto.separate),
    )
    models = {name: _statistics(name, one, access) for name, one in measured.items()}
    affinities = compare(models, access.home / "plans" / f"{fleet.name}-affinities.json", on_progress)
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
    """Build the network in a temporary folder; its files need not be in this machine's workspaces."""
    places = ("networks/", "data/")
    files = {path: digest for path, digest in measured.snapshot.files.items() if path.startswith(places)}
    with tempfile.TemporaryDirectory() as folder:
        workspace.place(files, access.contents, Path(folder))
        return load_traced(measured.plan.params, Workspace(Path(folder)), name)
