"""`mtz run`: the fleet's flow with its services, its display and its summary."""

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from flows import services
from flows.checks import check_project
from flows.memory import PeakMemory
from tasks.home import find_home

_WIDTH_WITHOUT_TERMINAL = 120
_FLUSH_SECONDS = 5.0


def run_fleet(
    project: Path, params: Path, fleet: Path, groups: Sequence[str], settings: Sequence[str], debug: bool = False
) -> None:
    """Bring the groups up to date and print a summary.

    Raises:
        MtzError: nothing was started, or, as `FleetFailed`, some groups failed.
    """
    start = time.monotonic()
    console = Console()
    if not console.is_terminal:
        console.width = _WIDTH_WITHOUT_TERMINAL
    home = find_home(project)
    plans = check_project(project, params, fleet, groups, settings)
    names = ", ".join(plan.name for plan in plans)
    console.print(
        f"Zipping {len(plans)} groups: {names}" if len(plans) > 1 else f"Zipping group {names}", highlight=False
    )
    with ExitStack() as stack:
        memory = stack.enter_context(PeakMemory())
        os.environ.update(services.prefect_environment(home, debug))
        server = None
        if services.uses_own_prefect_server():
            services.check_own_prefect_server()
        else:
            server = stack.enter_context(services.prefect_server(home))
            os.environ["PREFECT_API_URL"] = f"{server.url}/api"
        # Everything slow below goes on while the server starts.
        from tasks import storage, tracking

        shared = plans[0].params
        stack.enter_context(storage.connect(shared.storage, home))
        tracking.prepare(shared.tracking, home)
        from flows.fleet import FleetFailed, zip_fleet
        from flows.group import as_report
        from flows.progress import shown
        from flows.summary import print_summary

        if server is not None:
            server.wait()
        try:
            with shown(console, quiet=debug):
                reports = [as_report(values) for values in zip_fleet(project, params, fleet, groups, settings)]
        except FleetFailed as failure:
            print_summary(console, failure.reports, home, time.monotonic() - start, memory.bytes)
            raise
        finally:
            _flush()
    print_summary(console, reports, home, time.monotonic() - start, memory.bytes)


def _flush() -> None:
    """Hand over what Prefect still has to say to its server, which stops before this process ends."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (EventsWorker, APILogWorker):
        worker.drain_all(timeout=_FLUSH_SECONDS)
