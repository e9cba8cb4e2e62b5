"""`mtz check`: everything that must be in order before a run is worth starting."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from flows.group.workspace import place
from flows.spec.fleet_file import Fleet, GroupPlan, check_names, select
from flows.spec.request import Request
from flows.spec.snapshot import PIPELINE, sources_of
from mtz_core.errors import MtzError
from tasks.params import Params
from tasks.sources import Access
from tasks.storage.contents import Contents

LEAST_FREE_BYTES = 1 << 30
"""Bytes for the activations and Hessians of a small group, once in its workspace and once in DVC's cache."""

_LISTED = 20
"""The most problems that one error lists."""


class NotReady(MtzError):
    """Things that a run needs are missing or not in order.

    Attributes:
        problems: What is wrong, one text each, at least one.
    """

    def __init__(self, *problems: str) -> None:
        listed = "".join(f"\n  - {problem}" for problem in problems[:_LISTED])
        more = f"\n  and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        super().__init__(problems[0] if len(problems) == 1 else f"{len(problems)} problems:{listed}{more}")
        self.problems = problems


class Problems:
    """What is not in order, gathered so that one check tells all of it.

    Attributes:
        found: The errors so far.
    """

    def __init__(self) -> None:
        self.found: list[MtzError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the error that ends the block, if one does; what comes after the block goes on."""
        try:
            yield
        except MtzError as error:
            self.found.append(error)

    def raise_all(self) -> None:
        """Raise what was noted, if anything was: one error as it is, several as one.

        Raises:
            MtzError: There is one problem.
            NotReady: There are several.
        """
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            raise NotReady(*(text for error in self.found for text in _texts(error)))


def _texts(error: MtzError) -> tuple[str, ...]:
    """Return each of the problems that an error tells."""
    return error.problems if isinstance(error, NotReady) else (str(error),)


def check_project(request: Request) -> tuple[Fleet, tuple[GroupPlan, ...]]:
    """Check what can be checked at once: the folder, the settings, the files that they name, the disk.

    Args:
        request: What was asked for.

    Returns:
        The fleet, and the wanted groups among those that its file lists.

    Raises:
        NotReady: The folder is no project, a file is missing in every group, or the disk is nearly full.
        InvalidFleet: The fleet file, a name of a group or a change cannot be used.
        InvalidParams: The parameters cannot be used.
    """
    project, groups = request.project, request.groups
    if not (project / PIPELINE).is_file():
        raise NotReady(f"there is no {PIPELINE} in {project}. Run mtz in the folder of the project.")
    declared = request.declared
    declared.common()
    listed = declared.explicit_groups()
    check_names(listed)
    # A group that the planner will choose has no name yet.
    plans = select(listed, groups) if declared.file.auto is None else listed
    problems = Problems()
    for plan in plans:
        with problems.noted():
            _check_files(project, plan)
    if len(problems.found) == len(plans):  # otherwise those with problems fail, and the others go on
        problems.raise_all()
    check_disk(request.home)
    return declared, plans


def check_disk(home: Path) -> None:
    """Check that there is some space left.

    Args:
        home: The folder on the disk in question.

    Raises:
        NotReady: Less than `LEAST_FREE_BYTES` are free.
    """
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if free < LEAST_FREE_BYTES:
        raise NotReady(
            f"only {free >> 20} MiB are free on the disk of {home}, and a run needs at least {LEAST_FREE_BYTES >> 20}. "
            "Free some space."
        )


def check_all(
    request: Request,
    on_progress: Callable[[str], None],
) -> None:
    """Check everything that a run needs, including network factories, weights, storage and registry.

    Args:
        request: What was asked for.
        on_progress: Receives a line for each part that is in order.

    Raises:
        NotReady: Files, networks, the storage or the registry are not in order; all such problems are told.
        MtzError: The folder, the fleet or the parameters cannot be used, as `check_project` raises it.
    """
    from tasks.registry import mlflow_client
    from tasks.storage import s3

    declared, plans = check_project(request)
    project, home, shared = request.project, request.home, declared.common()
    problems = Problems()
    names = f" ({', '.join(plan.name for plan in plans)})" if plans else " listed"
    on_progress(f"{declared.title}: {len(plans) or 'no'} group{'' if len(plans) == 1 else 's'}{names}")
    if declared.file.auto is not None:
        on_progress(f"to be grouped: {', '.join(declared.file.free_models())}")
    for plan in plans:
        if not plan.models:
            with problems.noted():
                _check_files(project, plan)
                _check_group(project, plan, on_progress)
    with problems.noted(), s3.connect(shared.storage, home) as store:
        on_progress(f"storage: {store.url()} at {store.endpoint or 'AWS'} is writable")
        access = Access(project, home, Contents(home / "contents", store), store, shared.tracking)
        _check_declared(declared, plans, access, problems, on_progress)
    with problems.noted():
        mlflow_client.prepare(shared.tracking, home)
        on_progress(f"registry: {mlflow_client.tracking_uri(shared.tracking, home)} answers")
    problems.raise_all()


def _check_declared(
    fleet: Fleet, plans: Sequence[GroupPlan], access: Access, problems: Problems, on_progress: Callable[[str], None]
) -> None:
    """Fetch the sources of all models that the fleet declares; build and trace their networks, group by group."""
    free = fleet.file.free_models() if fleet.file.auto is not None else ()
    for plan in (*(plan for plan in plans if plan.models), *(fleet.model(name) for name in free)):
        with problems.noted(), tempfile.TemporaryDirectory() as folder:
            place(sources_of(plan, access), access.contents, Path(folder))
            _check_group(Path(folder), plan, on_progress)


def _check_group(folder: Path, plan: GroupPlan, on_progress: Callable[[str], None]) -> None:
    from mtz_core.zipped.report import noted_in_brief

    try:
        separate = check_networks(folder, plan.params)
    except MtzError as error:
        raise NotReady(*(f"{plan.name}: {text}" for text in _texts(error))) from error
    on_progress(f"networks of {plan.name}: {', '.join(plan.params.models)}")
    if separate:
        on_progress(f"  {noted_in_brief(separate, 'stays separate', 'stay separate')}")


def _check_files(project: Path, plan: GroupPlan) -> None:
    """Raise `NotReady` where files of a group's parameters are missing; a group of declared models needs none."""
    missing = []
    for name, model in plan.params.models.items() if not plan.models else ():
        where = f"group '{plan.name}', models.{name}"
        if not (project / model.data).exists():
            missing.append(
                f"{where}.data: there is no {model.data} in {project}. Put the data there, or name another folder."
            )
        if name not in plan.params.pretrain and not (project / model.weights).exists():
            missing.append(
                f"{where}.weights: there is no {model.weights} in {project}. Put the weights there, "
                f"or let pretrain.{name} make them."
            )
    if missing:
        raise NotReady(*missing)


def check_networks(project: Path, params: Params) -> dict[str, str]:
    """Trace each network and check that the networks can be zipped as configured.

    Networks of a pretrain stage are traced untrained; all others have their weights.

    Args:
        project: The folder of the project.
        params: The parameters of the group.

    Returns:
        Why layers will stay separate that nobody has listed, by the layer's name.

    Raises:
        MtzError: Networks, their weights or their data cannot be used, or zipped as configured. If there are several
            such networks, a `NotReady` tells all of them.
    """
    from mtz_core.merging.compatibility import common_part, separate_layers, shared_counts
    from tasks.artifacts.paths import Workspace
    from tasks.models.factories import build_network
    from tasks.models.load import check_tokens, load_network, trace_on_own_image
    from tasks.models.outputs import check_splits
    from tasks.stages.budget_checks import check_budget
    from tasks.stages.output_checks import check_outputs

    workspace, problems = Workspace(project), Problems()
    traced = {}
    for name in params.models:
        with problems.noted():
            pretrained = name not in params.pretrain
            network = load_network(params, workspace, name) if pretrained else build_network(params, name)
            traced[name] = trace_on_own_image(params, workspace, name, network)
            check_tokens(params, workspace, name, traced[name])
            check_splits(params, workspace, name, traced[name], ["validation"])
            check_outputs(params, workspace, name, traced[name], pretrained)
    problems.raise_all()
    if len(traced) < 2:
        return {}
    traced = common_part(traced)
    shared_counts(traced, params.zip_config())
    check_budget(params, workspace, traced)
    return separate_layers(traced)
