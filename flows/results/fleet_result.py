"""The result of a run of a fleet, kept for `mtz fleet retry` and for other programs."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.results.group_report import GroupReport
from mtz_core.errors import MtzError
from tasks.params import StorageParams
from tasks.storage import s3


@dataclass(frozen=True)
class FleetResult:
    """The result of a run.

    Attributes:
        fleet: The fleet's name.
        run: Identifier of the run.
        started: When the run started, ISO 8601, UTC.
        reports: A report of every group, and of every model that failed.
        seconds: Wall time.
        peak_bytes: The most memory that the run and its processes took, in bytes.
        warning: The webhook's warning; empty if there is none.
    """

    fleet: str
    run: str
    started: str
    reports: list[GroupReport]
    seconds: float
    peak_bytes: int
    warning: str = ""

    def as_values(self) -> dict[str, Any]:
        """Return the result as plain values, as written to `last.json`."""
        return {
            "fleet": self.fleet,
            "run": self.run,
            "started": self.started,
            "seconds": self.seconds,
            "peak_bytes": self.peak_bytes,
            "counts": dict(Counter(report.status for report in self.reports)),
            "groups": [_row(report) for report in self.reports],
        }


class NoRun(MtzError):
    """There is no record of a run."""


class FleetFailed(MtzError):
    """Some groups failed.

    Attributes:
        result: The result of the run.
    """

    def __init__(self, result: FleetResult) -> None:
        failed = [report for report in result.reports if report.status == "failed"]
        super().__init__("; ".join(f"group '{report.group}': {report.reason}" for report in failed))
        self.result = result


def last_run(home: Path, fleet: str) -> Path:
    """Return the file with the result of the fleet's last run."""
    return home / "runs" / fleet / "last.json"


def failed_groups(home: Path, fleet: str, settings: StorageParams) -> tuple[str, ...] | None:
    """Return the groups that failed in the fleet's last run from here, or else from any machine.

    Args:
        home: The folder of the project's runtime state.
        fleet: The fleet's name.
        settings: Where the storage is.

    Returns:
        Names of the groups. None stands for all groups: if a model failed, the planner left it out, and may choose
            other groups now.

    Raises:
        NoRun: The fleet has not run yet.
        StorageError: The storage cannot be used.
    """
    file = last_run(home, fleet)
    if file.exists():
        content = file.read_bytes()
    else:
        with s3.connect(settings, home) as store:
            found = store.read_many([f"runs/{fleet}/last.json"]).popitem()[1]
        if found is None:
            raise NoRun(
                f"fleet '{fleet}' has not run yet: there is no {file}, nor a record in the storage. `mtz run` it."
            )
        content = found
    failed = [row for row in json.loads(content)["groups"] if row["status"] == "failed"]
    return None if any(row["kind"] == "model" for row in failed) else tuple(row["group"] for row in failed)


def _row(report: GroupReport) -> dict[str, Any]:
    kept = (
        "group",
        "kind",
        "status",
        "reason",
        "log",
        "seconds",
        "model",
        "version",
        "content_digest",
        "release",
        "fingerprint",
    )
    command_seconds = report.pretraining_seconds + report.zipping_seconds
    return {
        **{name: getattr(report, name) for name in kept},
        "command_seconds": round(command_seconds, 3),
        "overhead_seconds": round(report.orchestration_seconds, 3),
    }
