"""Running a job on a worker, on whatever machine."""

import importlib
import socket
import time
from pathlib import Path
from typing import Any

from flows.processes import warm
from flows.results.group_report import GroupReport
from flows.results.stage_result import StageFailed, StageRefused
from flows.spec.job import Job, shown_as
from mtz_core.errors import MtzError
from tasks.home import find_home
from tasks.params import validate
from tasks.storage import s3


def run_job(job: Job, home: Path | None = None) -> dict[str, Any]:
    """Bring a group, or a model's statistics, up to date.

    An error that a user can cure never raises: the report has the reason.

    Args:
        job: The job.
        home: The worker's own `.mtz`; by default the one of the current folder.

    Returns:
        The `GroupReport` as plain values.
    """
    start = time.monotonic()
    home = home or find_home()
    warm.keep(home)
    flow = getattr(importlib.import_module(f"flows.{_FLOWS[job['kind']][0]}"), _FLOWS[job["kind"]][1])
    report = GroupReport(job["group"], fingerprint=job["fingerprint"], kind=job["kind"])
    try:
        return dict(flow(job, home))
    except MtzError as error:
        refused = isinstance(error, StageRefused)
        report.status, report.reason = "refused" if refused else "failed", str(error)
        if isinstance(error, StageFailed):
            report.stages = list(error.finished)
            report.log = "" if refused else _keep_log(job, home, error)
    report.seconds = round(time.monotonic() - start, 3)
    return report.as_values()


_FLOWS = {"group": ("group.flow", "zip_group"), "model": ("group.statistics_flow", "measure_model")}
"""Modules and names of the flows, imported only where one runs, since Prefect takes seconds to import."""


def _keep_log(job: Job, home: Path, failure: StageFailed) -> str:
    """Store the failed stage's log for readers on other machines; return where it is."""
    from flows.group.stage import log_file

    log = log_file(home, shown_as(job), failure.stage)
    key = f"logs/{job['run']}/{shown_as(job)}/{failure.stage}.log"
    try:
        with s3.connect(validate(job["settings"], job["group"]).storage, home) as store:
            store.put(key, log.read_bytes())
    except (MtzError, OSError):  # the storage may be what failed
        return f"{log} on {socket.gethostname()}"
    return str(log) if home == find_home() else store.url(key)
