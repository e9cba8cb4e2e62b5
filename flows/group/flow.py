"""One group as a Prefect flow: its stages that changed, in order, then a check that the release exists."""

import time
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from flows.group import workspace
from flows.group.refresh import PipelineRun, opened
from flows.results import progress
from flows.results.group_report import GroupReport, metrics_table
from flows.results.stage_result import StageRefused
from flows.spec.job import Job
from tasks.artifacts.paths import Workspace
from tasks.files import read_json
from tasks.registry import upload
from tasks.storage import outcomes
from tasks.storage.outcomes import Outcome

REGISTER = "register"


@flow(name="zip-group", flow_run_name="{job[group]}", persist_result=False)
def zip_group(job: Job, home: Path) -> dict[str, Any]:
    """Bring one group up to date.

    Args:
        job: The group.
        home: The folder of the worker's runtime state.

    Returns:
        The group's `GroupReport` as plain values.

    Raises:
        StageRefused: The group cannot be zipped as configured; that is recorded, and not tried again.
        StageFailed: A stage failed.
        InvalidParams: The parameters cannot be used.
        WorkspaceBusy: Another process works in the workspace.
        MissingContent: A file of the snapshot is neither here nor in the storage.
        DvcFailed: DVC itself failed.
        StorageError: The storage cannot be used.
        TrackingError: The registry cannot be used.
    """
    start = time.monotonic()
    group = job["group"]
    folder = workspace.folder_of(home, group)
    report = GroupReport(group, fingerprint=job["fingerprint"], folder=str(folder))
    with opened(job, home, folder, group) as run:
        report.model = run.params.register.name
        try:
            report.stages = run.bring_up_to_date()
        except StageRefused as refusal:
            outcomes.record(run.store, job["fingerprint"], Outcome("refused", group, reason=str(refusal)))
            raise
        if any(stage.name == REGISTER for stage in run.stages):
            _release(run, report)
        run.store_data(report.stages)
        if (metrics := folder / "metrics.json").exists():
            report.metrics = read_json(metrics)
        if all(stage.outcome == "unchanged" for stage in report.stages):
            report.status = "unchanged"
        outcomes.record(run.store, job["fingerprint"], _outcome(run, report))
    report.seconds = round(time.monotonic() - start, 3)
    _publish(report)
    return report.as_values()


def _release(run: PipelineRun, report: GroupReport) -> None:
    """Make sure that this registry and this storage have the release that the register stage recorded.

    The record may come from a run with another registry, or the registry may have been lost since.

    Args:
        run: The run of the group's pipeline.
        report: The report, which receives the release.
    """
    progress.current.get().busy(run.name, "checking the release")
    own = Workspace(run.pipeline.folder)
    report.version = upload.verify(run.params, own, run.home, run.store)
    if report.version is None:
        again = run.run_stage(REGISTER, force=True)
        report.stages = [again if stage.stage == REGISTER else stage for stage in report.stages]
        report.version = upload.verify(run.params, own, run.home, run.store)
    registration = read_json(own.registration)
    report.content_digest = registration["content_digest"]
    report.release = run.store.url(registration["release"])


def _outcome(run: PipelineRun, report: GroupReport) -> Outcome:
    if report.version is None:
        return Outcome("merged", report.group, metrics=report.metrics)
    release = read_json(Workspace(run.pipeline.folder).registration)["release"]
    return Outcome(
        "merged",
        report.group,
        model=report.model,
        content_digest=report.content_digest,
        release=release,
        metrics=report.metrics,
    )


def _publish(report: GroupReport) -> None:
    """Show the group's results on Prefect's pages."""
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
