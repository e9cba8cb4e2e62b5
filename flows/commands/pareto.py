"""`mtz pareto`: error against stored bytes for one group, from the results of the stages before `match`."""

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.commands.check import check_project
from flows.group import workspace
from flows.group.dvc import Pipeline, Stage
from flows.processes.child import Child, python_environment, stop_all
from flows.spec.fleet_file import select
from flows.spec.request import Request
from flows.spec.snapshot import Project
from mtz_core.errors import MtzError
from tasks.artifacts.paths import Workspace
from tasks.sources import Access
from tasks.storage import s3
from tasks.storage.contents import Contents
from tasks.studies.pareto import Asked, Row, limits, read_rows

_WIDTH_WITHOUT_TERMINAL = 120

MATCH = "match"
"""The stage whose inputs are needed here too."""


class ParetoFailed(MtzError):
    """The networks of a curve could not be made."""


def draw_pareto(
    request: Request,
    group: str | None,
    asked: Asked,
    on_progress: Callable[[str], None] = print,
) -> None:
    """Bring the group's stages before `match` up to date, measure the curve, and print it as a table.

    Args:
        request: What was asked for.
        group: Name of the group; by default the one in the parameters.
        asked: The networks to compare.
        on_progress: Receives progress messages.

    Raises:
        ParetoFailed: The process that measures failed; the message is its error.
        KeyboardInterrupt: The user interrupted; all child processes have been stopped.
        MtzError: The project is not ready, or a stage, the storage or the workspace cannot be used.
    """
    project, home = request.project, request.home
    declared, _ = check_project(request)
    name = group or str(declared.base.get("group"))
    (plan,) = select(declared.explicit_groups(), (name,))
    folder = workspace.folder_of(home, name)
    with s3.connect(plan.params.storage, home) as store, workspace.held(folder):
        contents = Contents(home / "contents", store)
        access = Access(project, home, contents, store, plan.params.tracking)
        snapshot = Project(project, contents).group(plan, access)
        environment = workspace.environment_of(store, home)
        cache, remote = workspace.cache_of(home), workspace.remote_of(store)
        pipeline, stages = workspace.prepare(folder, snapshot, contents, plan.content, cache, remote, environment)
        try:
            _bring_up_to_date(pipeline, stages, on_progress)
            _measure(folder, environment, asked, on_progress)
        except KeyboardInterrupt:
            stop_all()
            raise
        rows = read_rows(Workspace(folder).pareto / "pareto.parquet")
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_WITHOUT_TERMINAL
    console.print(_table(rows))
    if limit := limits(rows, min(asked.sizes)):
        console.print(Text(f"{limit[0].upper()}{limit[1:]}."), soft_wrap=True)
    console.print(Text(f"Table and figure: {os.path.relpath(Workspace(folder).pareto)}"), soft_wrap=True)


def _bring_up_to_date(pipeline: Pipeline, stages: Sequence[Stage], on_progress: Callable[[str], None]) -> None:
    """Restore or run those stages that `match` needs and that DVC reports as changed."""
    needed = needed_by(stages, MATCH)
    if not pipeline.changes().keys() & needed:
        return
    on_progress("looking for earlier results")
    pipeline.restore()
    for stage in stages:
        if stage.name in needed:
            result = pipeline.reproduce(stage.name, on_progress=on_progress)
            on_progress(f"{stage.name}: {result.outcome}")


def needed_by(stages: Sequence[Stage], name: str) -> frozenset[str]:
    """Return the stages that a stage needs, directly or indirectly."""
    direct = {stage.name: stage.needs for stage in stages}[name]
    return frozenset(direct).union(*(needed_by(stages, other) for other in direct))


def _measure(folder: Path, environment: Mapping[str, str], asked: Asked, on_progress: Callable[[str], None]) -> None:
    """Run `python -m tasks pareto` in the workspace: with its code, threads and determinism."""
    sizes = ",".join(map(str, asked.sizes))
    options = ["--sizes", sizes, "--methods", ",".join(asked.methods), *(["--retrain"] if asked.retraining else [])]
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    child = Child(["tasks", "pareto", *options], folder, python_environment(**environment, PYTHONPATH=path))
    error = ""
    for line in child.lines():
        if line.startswith("error: "):
            error = line.removeprefix("error: ")
        else:
            on_progress(line)
    if (status := child.wait()) == 0:
        return
    raise ParetoFailed(error or f"the networks could not be measured: their process ended with status {status}.")


def _table(rows: Sequence[Row]) -> Table:
    """Return a table with one row per network: its bytes, and the error of each task with its rise."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    table = Table(title="Test error by stored bytes, %; rise in points", title_justify="left", title_style="bold")
    table.add_column("method")
    for column in ("stored %", "bytes", *tasks, *(["mean rise"] if len(tasks) > 1 else [])):
        table.add_column(column, justify="right")
    before = {row.task: row.error_original for row in rows}
    first = rows[0]
    table.add_row(
        "originals",
        "100.0",
        f"{first.original_bytes:,}",
        *(f"{before[task]:.2f}" for task in tasks),
        *([""] if len(tasks) > 1 else []),
        end_section=True,
    )
    networks: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        networks.setdefault((row.curve, row.stored_bytes), []).append(row)
    previous = ""
    for (curve, stored), own in networks.items():
        if previous not in ("", curve):
            table.add_section()
        rises = [row.rise for row in own]
        table.add_row(
            curve if curve != previous else "",
            f"{100 * own[0].stored_fraction:.1f}",
            f"{stored:,}",
            *(f"{row.error:.2f} ({row.rise:+.2f})" for row in own),
            *([f"{sum(rises) / len(rises):+.2f}"] if len(tasks) > 1 else []),
        )
        previous = curve
    return table
