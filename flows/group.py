"""One group's pipeline as a Prefect flow: the stages that changed, in order, then a check that the release is there."""

import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.cache_policies import NO_CACHE

from flows import progress, workspace
from flows.pipeline import Outcome, Pipeline, Stage, StageResult
from flows.stage import as_result, reproduce_stage
from tasks import register, storage
from tasks.files import read_json
from tasks.params import Params, validate
from tasks.workspace import Workspace

REGISTER = "register"


@dataclass
class GroupReport:
    """What came out of one group's run."""

    group: str
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
    error: str | None = None

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


def _is_pretraining(stage: StageResult) -> bool:
    return stage.stage.partition("@")[0] == "pretrain"


@flow(name="zip-group", flow_run_name="{group}", persist_result=False)
def zip_group(group: str, project: Path, home: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Bring one group up to date; return its `GroupReport` as a mapping.

    Args:
        settings: the group's own params.yaml.

    Raises:
        InvalidParams, WorkspaceBusy, StageFailed, DvcFailed, StorageError, TrackingError.
    """
    start = time.monotonic()
    params = validate(settings, f"group '{group}'")
    shown = progress.current.get()
    shown.busy(group, "preparing")
    with storage.connect(params.storage, home) as store, workspace.held(home, group) as folder:
        remote = workspace.Remote(store.url("dvc"), store.endpoint, store.region)
        environment = {**store.environment(), "MTZ_HOME": str(home), "DVC_SITE_CACHE_DIR": str(home / "dvc")}
        code = (*workspace.CODE, *workspace.modules_of(params))
        pipeline, stages = workspace.prepare(project, folder, settings, remote, environment, code)
        shown.planned(group, len(stages))
        run = _GroupRun(group, home, params, pipeline, stages)
        report = GroupReport(group, folder=str(folder), stages=run.bring_up_to_date(), model=params.register.name)
        if any(stage.name == REGISTER for stage in stages):
            run.release(store, report)
        if not run.is_stored(store, report.stages):
            shown.busy(group, "storing data in S3")
            run.push()
        if (metrics := folder / "metrics.json").exists():
            report.metrics = read_json(metrics)
    report.seconds = round(time.monotonic() - start, 3)
    _publish(report)
    shown.ended(group)
    return asdict(report)


def as_report(values: dict[str, Any]) -> GroupReport:
    """Return the `GroupReport` that `zip_group` returned as a mapping."""
    return GroupReport(**{**values, "stages": [as_result(stage) for stage in values["stages"]]})


@dataclass(frozen=True)
class _GroupRun:
    group: str
    home: Path
    params: Params
    pipeline: Pipeline
    stages: tuple[Stage, ...]

    def bring_up_to_date(self) -> list[StageResult]:
        """Restore what was run before, here or elsewhere; run what else changed, and what reads the results of that."""
        changed = self.pipeline.changed()
        if not changed:
            get_run_logger().info("nothing to do: all %d stages are unchanged", len(self.stages))
            return [self._done(stage, "unchanged") for stage in self.stages]
        progress.current.get().busy(self.group, "looking for earlier results")
        restored = self.pipeline.restore()
        results: dict[str, StageResult] = {}
        for stage in self.stages:
            touched = any(results[name].outcome != "unchanged" for name in stage.needs)
            if stage.name in restored:
                results[stage.name] = self._done(stage, "restored")
            elif touched or stage.name in changed:
                results[stage.name] = self.run_stage(stage.name)
            else:
                results[stage.name] = self._done(stage, "unchanged")
        return list(results.values())

    def run_stage(self, stage: str, force: bool = False) -> StageResult:
        """Run one stage as a task of this flow."""
        with_retries = reproduce_stage.with_options(**self._retries())
        return as_result(with_retries(self.group, stage, self.pipeline, self.home, force))

    def release(self, store: storage.Storage, report: GroupReport) -> None:
        """Make sure that this registry and this storage hold the release that the register stage has recorded.

        Its record may come from a run on another registry, or the registry may have been lost since.
        """
        progress.current.get().busy(self.group, "checking the release")
        report.version = self._version(store)
        if report.version is None:
            again = self.run_stage(REGISTER, force=True)
            report.stages = [again if stage.stage == REGISTER else stage for stage in report.stages]
            report.version = self._version(store)
        registration = read_json(Workspace(self.pipeline.folder).registration)
        report.release = store.url(registration["release"])

    def is_stored(self, store: storage.Storage, results: Iterable[StageResult]) -> bool:
        """Tell whether nothing changed and the remote holds all outputs; DVC stores a folder's list after its files."""
        return all(result.outcome == "unchanged" for result in results) and all(
            store.exists(f"dvc/{name}") for name in self.pipeline.output_objects()
        )

    def push(self) -> None:
        """Send the data to the remote as a task of this flow."""
        push_data.with_options(**self._retries())(self.group, self.pipeline)

    def _retries(self) -> dict[str, Any]:
        settings = self.params.flow
        return {"retries": settings.retries, "retry_delay_seconds": settings.retry_delay_seconds}

    def _version(self, store: storage.Storage) -> int | None:
        return register.verify(self.params, Workspace(self.pipeline.folder), self.home, store)

    def _done(self, stage: Stage, outcome: Outcome) -> StageResult:
        result = StageResult(stage.name, outcome)
        progress.current.get().finished(self.group, result)
        return result


@task(name="push", task_run_name="{group} · push", cache_policy=NO_CACHE, persist_result=False)
def push_data(group: str, pipeline: Pipeline) -> None:
    """Send the group's data, and the records of runs, to the remote. Raises `DvcFailed`."""
    pipeline.push()


def _publish(report: GroupReport) -> None:
    """Show the group's results in Prefect's pages."""
    key = f"group-{report.group}".lower().replace("_", "-")
    if report.metrics is not None:
        create_table_artifact(metrics_table(report), key=f"{key}-errors", description=f"{report.group}: test error")
    stages = [
        {
            "stage": stage.stage,
            "outcome": stage.outcome,
            "seconds": stage.seconds,
            "last line": stage.last_line,
        }
        for stage in report.stages
    ]
    create_table_artifact(stages, key=f"{key}-stages", description=f"{report.group}: stages")
    if report.version is not None:
        create_markdown_artifact(
            f"**{report.model}**, version {report.version}\n\n- `models:/{report.model}/{report.version}`\n"
            f"- bundle: `{report.release}`\n- workspace: `{report.folder}`\n",
            key=f"{key}-release",
            description=f"{report.group}: registered release",
        )


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
