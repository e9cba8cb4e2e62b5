"""The report of one group, or of one model's statistics, in a run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from flows.results.stage_result import StageResult

Status = Literal["merged", "unchanged", "refused", "failed", "measured"]
"""How a group ends; `measured` is how a model's statistics end."""


@dataclass
class GroupReport:
    """The result of one group's run. For a model's statistics, `group` is the model, and nothing is registered.

    Attributes:
        group: Name of the group or model.
        status: How it ended.
        reason: Why it was refused or failed, or other remarks.
        log: Where the whole output of the failed stage is kept.
        fingerprint: Fingerprint of the snapshot.
        stages: Results of the stages.
        seconds: Wall time.
        folder: The workspace.
        metrics: The content of `metrics.json`.
        model: Name of the registered model.
        version: Number of the registered version.
        release: URL of the bundle.
        content_digest: Digest of the registered content.
        kind: `group`, or `model` for a model's statistics.
        statistics: SHA-256 of a model's statistics, a content.
    """

    group: str
    status: Status = "merged"
    reason: str = ""
    log: str = ""
    fingerprint: str = ""
    stages: list[StageResult] = field(default_factory=list)
    seconds: float = 0.0
    folder: str = ""
    metrics: dict[str, Any] | None = None
    model: str = ""
    version: int | None = None
    release: str = ""
    content_digest: str = ""
    kind: Literal["group", "model"] = "group"
    statistics: str = ""

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
        """Return the report as plain values, which can be sent between machines."""
        return asdict(self)


def as_report(values: Mapping[str, Any]) -> GroupReport:
    """Return the report whose `as_values` these are."""
    return GroupReport(**{**values, "stages": [StageResult(**stage) for stage in values["stages"]]})


def metrics_table(report: GroupReport) -> list[dict[str, Any]]:
    """Return one row per task: errors (before, zipped, after light retraining), agreement, and what is stored."""
    assert report.metrics is not None
    stored = report.metrics["stored"]
    return [
        {
            "task": name,
            "metric": errors["metric"],
            "unit": errors["unit"],
            "error before": errors["error_original"],
            "error zipped": errors["error_zipped"],
            "error after retraining": errors["error_retrained"],
            "agreement %": errors["agreement_retrained"],
            "stored %": round(100 * stored["fraction"], 1),
            "bytes": stored["bytes"],
            "bytes before": stored["original_bytes"],
            "version": report.version,
        }
        for name, errors in report.metrics["tasks"].items()
    ]


def _is_pretraining(stage: StageResult) -> bool:
    return stage.stage.partition("@")[0] == "pretrain"
