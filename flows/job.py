"""A job: what a worker, on whatever machine, has to bring up to date. It names contents, and has no secrets."""

import importlib
import socket
import time
from pathlib import Path
from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic, and so Prefect, refuses the one of typing before 3.12

from flows import warm
from flows.pipeline import StageFailed, StageRefused
from flows.report import GroupReport
from mtz_core.errors import MtzError
from tasks import storage
from tasks.home import find_home
from tasks.params import validate


class Job(TypedDict):
    """One group to zip, or one model whose statistics to make, in plain values."""

    fleet: str
    kind: Literal["group", "model"]
    group: str
    """The name of the group, or of the model."""
    fingerprint: str
    """Of the snapshot, which the storage has."""
    settings: dict[str, Any]
    """All that its params.yaml says, and so where the storage and the registry are."""
    run: str
    """Of the fleet, for records."""


def run_job(job: Job, home: Path | None = None) -> dict[str, Any]:
    """Bring a group, or a model's statistics, up to date; return its `GroupReport` as plain values.

    What can be cured elsewhere never raises: the report says what went wrong.

    Args:
        home: the worker's own `.mtz`; by default the one of the current folder.
    """
    start = time.monotonic()
    home = home or find_home()
    warm.keep(home)
    flow = getattr(importlib.import_module(f"flows.{_FLOWS[job['kind']][0]}"), _FLOWS[job["kind"]][1])
    report = GroupReport(job["group"], fingerprint=job["fingerprint"], kind=job["kind"])
    try:
        return dict(flow(job, home))
    except StageRefused as error:
        report.status, report.reason = "refused", str(error)
    except MtzError as error:
        report.status, report.reason = "failed", str(error)
        if isinstance(error, StageFailed):
            report.log = _keep_log(job, home, error)
    report.seconds = round(time.monotonic() - start, 3)
    return report.as_values()


_FLOWS = {"group": ("group", "zip_group"), "model": ("statistics", "measure_model")}
"""Prefect takes seconds to import, so the flows are only imported where one runs."""


def shown_as(job: Job) -> str:
    """Return the name under which the job is shown and logged."""
    return job["group"] if job["kind"] == "group" else f"statistics/{job['group']}"


def _keep_log(job: Job, home: Path, failure: StageFailed) -> str:
    """Store the failed stage's log, which may lie on another machine than the one that reads this."""
    from flows.stage import log_file

    log = log_file(home, shown_as(job), failure.stage)
    key = f"logs/{job['run']}/{shown_as(job)}/{failure.stage}.log"
    try:
        with storage.connect(validate(job["settings"], job["group"]).storage, home) as store:
            store.put(key, log.read_bytes())
    except (MtzError, OSError):  # the storage may be what failed
        return f"{log} on {socket.gethostname()}"
    return str(log) if home == find_home() else store.url(key)
