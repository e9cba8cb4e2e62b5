"""All groups of a fleet as one Prefect flow, side by side; a group that fails stops no other."""

import contextvars
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow

from flows import processes, progress
from flows.fleet_file import GroupPlan, read_fleet
from flows.group import GroupReport, as_report, zip_group
from flows.pipeline import StageFailed
from flows.stage import log_file
from mtz_core.errors import MtzError
from tasks import storage, tracking
from tasks.home import find_home


class FleetFailed(MtzError):
    """Some groups failed.

    Attributes:
        reports: of all groups.
    """

    def __init__(self, reports: list[GroupReport]) -> None:
        failed = [report for report in reports if report.error]
        super().__init__("; ".join(f"group '{report.group}': {report.error}" for report in failed))
        self.reports = reports


@flow(name="zip-fleet", persist_result=False)
def zip_fleet(
    project: Path = Path(),
    params: Path = Path("params.yaml"),
    fleet: Path = Path("fleet.yaml"),
    groups: Sequence[str] = (),
    settings: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Bring all groups up to date; return their `GroupReport`s as mappings.

    Args:
        params, fleet: the files, relative to the project.
        groups: names of groups; all by default.
        settings: `key.path=value` to change in all groups.

    Raises:
        FleetFailed: a group failed; the others are done.
        InvalidFleet, InvalidParams, StorageError, TrackingError: nothing was started.
    """
    project = project.resolve()
    home = find_home(project)
    plans = read_fleet(project / params, project / fleet, groups, settings)
    shared = plans[0].params
    # Held throughout, so that the embedded server is started once. The registry is made before several groups use it.
    with storage.connect(shared.storage, home):
        tracking.prepare(shared.tracking, home)
        reports = _run_side_by_side(plans, project, home, shared.flow.workers)
    if any(report.error for report in reports):
        raise FleetFailed(reports)
    return [asdict(report) for report in reports]


def _run_side_by_side(plans: Sequence[GroupPlan], project: Path, home: Path, workers: int) -> list[GroupReport]:
    with ThreadPoolExecutor(min(workers, len(plans)), thread_name_prefix="group") as pool:
        # Each thread needs the flow run that it belongs to, and the progress display.
        futures = [pool.submit(contextvars.copy_context().run, _run_group, plan, project, home) for plan in plans]
        try:
            return [future.result() for future in futures]
        except BaseException:
            processes.stop_all()
            for future in futures:
                future.cancel()
            raise


def _run_group(plan: GroupPlan, project: Path, home: Path) -> GroupReport:
    start = time.monotonic()
    try:
        return as_report(zip_group(plan.name, project, home, plan.content))
    except MtzError as error:
        reason = str(error)
        if isinstance(error, StageFailed):
            reason += f" (all it said: {log_file(home, plan.name, error.stage)})"
        progress.current.get().ended(plan.name, reason)
        return GroupReport(plan.name, error=reason, seconds=round(time.monotonic() - start, 3))
