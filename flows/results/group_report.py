"""What became of one group, or of one model's statistics, in a run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flows.results.stage_result import StageResult

Status = Literal["merged", "unchanged", "refused", "failed", "measured"]
"""How a group ends, or, `measured`, a model's statistics."""


@dataclass
class GroupReport:
    """What came out of one group's run. Of a model's statistics, `group` is the model, and nothing is registered."""

    group: str
    status: Status = "merged"
    reason: str = ""
    """Why it was refused, or failed; what else is worth telling."""
    log: str = ""
    """Where all that the failed stage said is kept."""
    fingerprint: str = ""
    """Of the snapshot that it was made from."""
    stages: list[StageResult] = field(default_factory=list)
    seconds: float = 0.0
    folder: str = ""
    metrics: dict[str, Any] | None = None
    """The content of metrics.json."""
    model: str = ""
    version: int | None = None
    """The registered version."""
    release: str = ""
    """Where the bundle lies."""
    content_digest: str = ""
    """Of the registered content."""
    kind: Literal["group", "model"] = "group"
    statistics: str = ""
    """SHA-256 of a model's statistics, a content."""

    @property
    def pretraining_seconds(self) -> float:
        """Time of the stages that train the example's networks."""
        return sum(stage.command_seconds for stage in self.stages if _is_pretraining(stage))

    @property
    def zipping_seconds(self) -> float:
        """Time of all other stages."""
        return sum(stage.command_seconds for stage in self.stages if not _is_pretraining(stage))

    @property
    def orchestration_seconds(self) -> float:
        """Time of everything but the stages' own processes."""
        return max(0.0, self.seconds - self.pretraining_seconds - self.zipping_seconds)

    def as_values(self) -> dict[str, Any]:
        """Return it as plain values, which travel between machines."""
        return asdict(self)


def as_report(values: Mapping[str, Any]) -> GroupReport:
    """Return the report whose `as_values` these are."""
    return GroupReport(**{**values, "stages": [StageResult(**stage) for stage in values["stages"]]})


def metrics_table(report: GroupReport) -> list[dict[str, Any]]:
    """Return one row a task: errors in percent before zipping, zipped, after light retraining, and what is stored."""
    assert report.metrics is not None
    stored = report.metrics["stored"]
    return [
        {
            "task": name,
            "error before": errors["error_original"],
            "error zipped": errors["error_zipped"],
            "error after retraining": errors["error_retrained"],
            "stored %": round(100 * stored["fraction"], 1),
            "bytes": stored["bytes"],
            "bytes before": stored["original_bytes"],
            "version": report.version,
        }
        for name, errors in report.metrics["tasks"].items()
    ]


def _is_pretraining(stage: StageResult) -> bool:
    return stage.stage.partition("@")[0] == "pretrain"
