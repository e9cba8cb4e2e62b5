"""What must be true before a run is worth starting."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from flows.fleet_file import GroupPlan, read_fleet
from mtz_core.errors import MtzError
from tasks.home import find_home
from tasks.params import Params

LEAST_FREE_BYTES = 1 << 30
"""Activations and Hessians of a small group, once in its workspace and once in DVC's cache."""


class NotReady(MtzError):
    """Something that a run needs is missing."""


def check_project(
    project: Path, params: Path, fleet: Path, groups: Sequence[str], settings: Sequence[str]
) -> tuple[GroupPlan, ...]:
    """Check what can be checked at once: the folder, the settings, the files they name, the disk. Return the groups.

    Raises:
        NotReady, InvalidFleet, InvalidParams: with the remedy.
    """
    if not (project / "dvc.yaml").is_file():
        raise NotReady(f"there is no dvc.yaml in {project}. Run mtz in the folder of the project.")
    plans = read_fleet(project / params, project / fleet, groups, settings)
    for plan in plans:
        _check_files(project, plan)
    check_disk(find_home(project))
    return plans


def check_disk(home: Path) -> None:
    """Check that there is some space left. Raises `NotReady`."""
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < LEAST_FREE_BYTES:
        raise NotReady(
            f"only {free >> 20} MiB are free on the disk of {home}, and a run needs at least {LEAST_FREE_BYTES >> 20}. "
            "Free some space."
        )


def check_all(
    project: Path,
    params: Path,
    fleet: Path,
    groups: Sequence[str],
    settings: Sequence[str],
    tell: Callable[[str], None],
) -> None:
    """Check everything that a run needs, network factories, weights, storage and registry included.

    Raises:
        MtzError: the first thing that is not right.
    """
    from tasks import storage, tracking

    plans = check_project(project, params, fleet, groups, settings)
    home = find_home(project)
    tell(f"parameters: {len(plans)} groups ({', '.join(plan.name for plan in plans)})")
    for plan in plans:
        _check_networks(project, plan.params)
        tell(f"networks of {plan.name}: {', '.join(plan.params.models)}")
    shared = plans[0].params
    with storage.connect(shared.storage, home) as store:
        tell(f"storage: {store.url()} at {store.endpoint or 'AWS'} is writable")
    tracking.prepare(shared.tracking, home)
    tell(f"registry: {tracking.tracking_uri(shared.tracking, home)} answers")


def _check_files(project: Path, plan: GroupPlan) -> None:
    for name, model in plan.params.models.items():
        where = f"group '{plan.name}', models.{name}"
        if not (project / model.data).exists():
            raise NotReady(
                f"{where}.data: there is no {model.data} in {project}. Put the data there, or name another folder."
            )
        if name not in plan.params.pretrain and not (project / model.weights).is_file():
            raise NotReady(
                f"{where}.weights: there is no {model.weights} in {project}. Put the weights there, "
                f"or let pretrain.{name} make them."
            )


def _check_networks(project: Path, params: Params) -> None:
    """Trace each network, with the weights that are there already, and see that they can be zipped as asked.

    Networks that a pretrain stage makes are traced untrained.
    """
    from mtz_core.matching import check_compatible, shared_counts
    from tasks.budgets import check_budget
    from tasks.factories import build_network
    from tasks.models import load_network, trace_on_own_image
    from tasks.workspace import Workspace

    workspace = Workspace(project)
    traced = {}
    for name in params.models:
        pretrained = name not in params.pretrain
        network = load_network(params, workspace, name) if pretrained else build_network(params, name)
        traced[name] = trace_on_own_image(params, workspace, name, network)
    check_compatible(traced)
    shared_counts(traced, params.zip_config())
    check_budget(params, workspace, traced)
