"""`mtz run`: the fleet's flow with its server, its display and its summary."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from flows.commands.check import check_project
from flows.processes import servers
from flows.results.fleet_result import FleetFailed, failed_groups
from flows.results.summary import print_summary
from flows.spec.fleet_file import Fleet, GroupPlan
from flows.spec.request import Request, Timetable
from tasks.registry import mlflow_client

_WIDTH_WITHOUT_TERMINAL = 120
_FLUSH_SECONDS = 30.0
_NAMED = 8


def run_fleet(
    request: Request,
    verify: bool = False,
    debug: bool = False,
) -> None:
    """Bring the groups up to date and print a summary.

    Args:
        request: What was asked for.
        verify: Check every group with DVC, rather than trust the records of unchanged groups.
        debug: Print Prefect's log instead of the live display.

    Raises:
        FleetFailed: Some groups failed; the others are done.
        MtzError: Nothing was started.
    """
    console = console_for_people()
    declared, plans = check_project(request)
    title = declared.title if declared.absent else f"{declared.title[0].upper()}{declared.title[1:]}"
    console.print(Text(f"{title}: {_named(declared, plans)}"), soft_wrap=True)
    if declared.upgraded:
        named = "" if request.fleet == Request.fleet else f" --fleet {request.fleet}"
        console.print(
            f"{request.fleet} is in the format before version 2, and read as such: `mtz fleet upgrade{named}` rewrites "
            "it.",
            soft_wrap=True,
        )
    home = request.home
    with prefect(home, debug):
        from flows.fleet.flow import zip_fleet
        from flows.results.progress import shown

        try:
            with shown(console, quiet=debug), request.in_use():
                result = zip_fleet(**request.as_parameters(), verify=verify)
        except FleetFailed as failure:
            print_summary(console, failure.result, home)
            raise
        print_summary(console, result, home)


def retry_failed(request: Request, debug: bool = False) -> None:
    """Run the groups that failed in the last run.

    Args:
        request: What was asked for.
        debug: Print Prefect's log instead of the live display.

    Raises:
        NoRun: The fleet has not run yet.
        FleetFailed: Some groups failed again; the others are done.
        MtzError: Nothing was started.
    """
    declared = request.declared
    groups = failed_groups(request.home, declared.name, declared.common().storage)
    if groups == ():
        console_for_people().print("Nothing to retry: no group failed in the last run.")
        return
    run_fleet(replace(request, groups=groups or ()), debug=debug)


def show_plan(request: Request, debug: bool = False) -> None:
    """Print the groups of the fleet and the reasons for them.

    Args:
        request: What was asked for.
        debug: Print Prefect's log instead of the live display.

    Raises:
        MtzError: The fleet cannot be planned.
    """
    declared, _ = check_project(request)
    home = request.home
    console = console_for_people()
    with prefect(home, debug):
        from flows.fleet.flow import plan_fleet
        from flows.fleet.plan_tables import print_plan
        from flows.results.progress import shown

        with shown(console, quiet=debug), request.in_use():
            plan = plan_fleet(**request.as_parameters())
        print_plan(console, plan, home, declared.name)


def deploy_fleet(
    request: Request,
    name: str | None,
    timetable: Timetable,
    pool: str,
    on_progress: Callable[[str], None],
) -> None:
    """Deploy the fleet to a Prefect server, which runs it on a schedule.

    Args:
        request: The fleet, and changes for every run.
        name: Name of the deployment; by default the fleet's name.
        timetable: When it runs.
        pool: The work pool for the fleet's runs.
        on_progress: Receives the result.

    Raises:
        MtzError: The project is not ready, or the server or the schedule cannot be used.
    """
    os.environ.update(servers.prefect_environment(request.home))
    from flows.commands import schedule

    declared, _ = check_project(request)
    flow = declared.common().flow
    group_pool = flow.pool if flow.executor == "pool" else None
    deployed = schedule.deploy(request, name or declared.name, timetable, pool, group_pool)
    on_progress(f"deployed: {deployed}, {timetable.cron} ({timetable.timezone})")
    schedule.status(deployed, on_progress)


def _named(fleet: Fleet, plans: Sequence[GroupPlan]) -> str:
    names = [plan.name for plan in plans]
    listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    free = len(fleet.file.free_models()) if fleet.file.auto is not None else 0
    parts = [
        f"group{'s' * (len(names) != 1)} {listed}" if names else "",
        f"{free} model{'s' * (free != 1)} to be grouped" if free else "",
    ]
    return " and ".join(filter(None, parts))


def console_for_people() -> Console:
    """Return a console that is as wide as the terminal, or wide enough for tables if there is none."""
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_WITHOUT_TERMINAL
    return console


@contextmanager
def prefect(home: Path, debug: bool) -> Iterator[None]:
    """Let flows run in this process, on the server that PREFECT_API_URL names or on one that is started here.

    Args:
        home: The folder of the project's runtime state.
        debug: Print Prefect's log.

    Yields:
        Nothing; flows may run while the block does.

    Raises:
        ServiceFailed: The server does not answer.
    """
    os.environ.update(servers.prefect_environment(home, debug))
    if servers.uses_own_prefect_server():
        servers.check_own_prefect_server()
        yield
        _flush()
        return
    with servers.prefect_server(home) as server:
        os.environ["PREFECT_API_URL"] = f"{server.url}/api"
        import flows.fleet.flow  # noqa: F401 - takes seconds, while the server starts

        mlflow_client.preload()
        server.wait()
        try:
            yield
        finally:
            _flush()


def _flush() -> None:
    """Send what Prefect still has to report to its server, which stops before this process ends."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=_FLUSH_SECONDS)
