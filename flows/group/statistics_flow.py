"""A model's statistics as a Prefect flow: its activations and Hessians, made once for all groups and the planner."""

import time
from pathlib import Path
from typing import Any

from prefect import flow

from flows.group import workspace
from flows.group.refresh import opened
from flows.results.group_report import GroupReport
from flows.results.stage_result import StageRefused
from flows.spec.job import Job, shown_as
from tasks.artifacts.paths import Workspace
from tasks.storage import outcomes
from tasks.storage.outcomes import Outcome


@flow(name="measure-model", flow_run_name="{job[group]}", persist_result=False)
def measure_model(job: Job, home: Path) -> dict[str, Any]:
    """Bring a model's statistics up to date.

    Args:
        job: The model.
        home: The folder of the worker's runtime state.

    Returns:
        The model's `GroupReport` as plain values.

    Raises:
        StageRefused: The model cannot be measured as configured; that is recorded, and not tried again.
        StageFailed: A stage failed.
        InvalidParams: The parameters cannot be used.
        WorkspaceBusy: Another process works in the workspace.
        MissingContent: A file of the snapshot is neither here nor in the storage.
        DvcFailed: DVC itself failed.
        StorageError: The storage cannot be used.
    """
    start = time.monotonic()
    name, model = shown_as(job), job["group"]
    folder = workspace.statistics_folder(home, model)
    report = GroupReport(model, "measured", fingerprint=job["fingerprint"], folder=str(folder), kind="model")
    with opened(job, home, folder, name) as run:
        try:
            report.stages = run.bring_up_to_date()
        except StageRefused as refusal:
            outcomes.record(run.store, job["fingerprint"], Outcome("refused", model, reason=str(refusal)))
            raise
        run.store_data(report.stages)
        report.statistics = run.contents.add(Workspace(folder).hessians(model))
        run.contents.upload([report.statistics])
        outcomes.record(run.store, job["fingerprint"], Outcome("measured", model, statistics=report.statistics))
    report.seconds = round(time.monotonic() - start, 3)
    return report.as_values()
