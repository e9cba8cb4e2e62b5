"""What a run of a fleet came to, kept for `mtz fleet retry` and for other programs."""

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
    """What a run came to; times in seconds, memory in bytes."""

    fleet: str
    run: str
    started: str
    reports: list[GroupReport]
    seconds: float
    peak_bytes: int
    warning: str = ""

    def as_values(self) -> dict[str, Any]:
        """Return it as plain values: what is written to `last.json`, for `mtz fleet retry` and for other programs."""
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
        result: what the run came to.
    """

    def __init__(self, result: FleetResult) -> None:
        failed = [report for report in result.reports if report.status == "failed"]
        super().__init__("; ".join(f"group '{report.group}': {report.reason}" for report in failed))
        self.result = result


def last_run(home: Path, fleet: str) -> Path:
    """Return the file that says what the fleet's last run came to."""
    return home / "runs" / fleet / "last.json"


def failed_groups(home: Path, fleet: str, settings: StorageParams) -> tuple[str, ...] | None:
    """Return the groups that failed in the fleet's last run from here, or else from any machine.

    None stands for all groups: where a model failed, the planner has left it out, and may choose others now.

    Raises `NoRun`, `StorageError`.
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
