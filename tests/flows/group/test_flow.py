"""One group's flow on the small project, with real DVC and S3: what it reports, records and stores."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from flows.group import flow
from flows.group.flow import zip_group
from flows.results.group_report import GroupReport, as_report
from flows.results.stage_result import StageFailed, StageRefused, StageResult
from flows.spec.job import Job
from tasks.files import write_json
from tasks.params import StorageParams
from tasks.registry import upload
from tasks.storage import outcomes
from tasks.storage.contents import Contents
from tasks.storage.outcomes import Outcome
from tasks.storage.s3 import Storage
from tests.support.small_project import STAGES, job_of

pytestmark = pytest.mark.usefixtures("without_server")

FAILS = "import sys\nprint('error: there are too few neurons.', file=sys.stderr)\nsys.exit({status})\n"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Prefect's pages show, by key."""
    found: dict[str, Any] = {}
    for kind in ("create_table_artifact", "create_markdown_artifact"):
        monkeypatch.setattr(flow, kind, lambda content, key, description: found.update({key: content}))
    return found


@pytest.fixture
def contents(home: Path, store: Storage) -> Contents:
    return Contents(home / "contents", store)


def zipped(job: Job, home: Path) -> GroupReport:
    return as_report(zip_group.fn(job, home))


def test_a_group_is_run_stored_and_left_alone_and_comes_back_from_the_storage(
    project: Path, contents: Contents, place: StorageParams, store: Storage, home: Path, shown: dict[str, Any]
) -> None:
    job = job_of(project, contents, place, "whole")
    report = zipped(job, home)
    assert (report.status, report.model, report.version) == ("merged", "small", None)
    assert [(stage.stage, stage.outcome) for stage in report.stages] == [(name, "executed") for name in STAGES]
    folder = Path(report.folder)
    assert folder == home / "workspaces" / "whole" and (folder / "metrics.txt").exists()
    assert store.read("locks/groups/whole.lock") == (folder / "dvc.lock").read_bytes()
    assert 0 < sum(stage.seconds for stage in report.stages) <= report.seconds
    fingerprint = job["fingerprint"]
    assert outcomes.recall(store, [fingerprint]) == {fingerprint: Outcome("merged", "whole")}
    assert [row["stage"] for row in shown["group-whole-stages"]] == list(STAGES)

    again = zipped(job, home)
    assert (again.status, {stage.outcome for stage in again.stages}) == ("unchanged", {"unchanged"})

    before = (folder / "metrics.txt").read_text()
    shutil.rmtree(folder)
    shutil.rmtree(home.parent / ".dvc")
    elsewhere = zipped(job, home)
    assert [stage.outcome for stage in elsewhere.stages] == ["restored"] * len(STAGES)
    assert (folder / "metrics.txt").read_text() == before


@pytest.mark.parametrize(("status", "error"), [(65, StageRefused), (1, StageFailed)])
def test_a_refusal_is_recorded_and_a_failure_is_not(
    status: int,
    error: type[StageFailed],
    project: Path,
    contents: Contents,
    place: StorageParams,
    store: Storage,
    home: Path,
) -> None:
    (project / "code" / "step.py").write_text(FAILS.format(status=status))
    job = job_of(project, contents, place, f"status-{status}")
    with pytest.raises(StageFailed, match=r"^collect@digits: there are too few neurons\.$") as failure:
        zipped(job, home)
    assert type(failure.value) is error
    found = outcomes.recall(store, [job["fingerprint"]])
    reason = "collect@digits: there are too few neurons."
    refused = {job["fingerprint"]: Outcome("refused", f"status-{status}", reason=reason)}
    assert found == (refused if error is StageRefused else {})
    assert not store.exists(f"locks/groups/status-{status}.lock")


class Released:
    """A run of a group whose register stage has registered; the registry has lost it `lost` times."""

    def __init__(self, folder: Path, versions: list[int | None]) -> None:
        self.versions, self.forced = versions, list[tuple[str, bool]]()
        self.name, self.params, self.home = "g", None, folder
        self.pipeline = type("Pipeline", (), {"folder": folder})
        self.store = Storage(None, "bucket", "", "", None)
        write_json(folder / "registration.json", {"content_digest": "c" * 64, "release": "releases/zip/c"})

    def run_stage(self, stage: str, force: bool = False) -> StageResult:
        self.forced.append((stage, force))
        return StageResult(stage, "executed", 3.0)

    def report(self, monkeypatch: pytest.MonkeyPatch) -> GroupReport:
        monkeypatch.setattr(upload, "verify", lambda *_: self.versions.pop(0))
        report = GroupReport(
            "g", model="zip", stages=[StageResult("evaluate", "unchanged"), StageResult("register", "restored")]
        )
        flow._release(self, report)  # type: ignore[arg-type]
        return report


def test_a_release_that_is_there_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Released(tmp_path, [4])
    report = run.report(monkeypatch)
    assert (report.version, report.content_digest) == (4, "c" * 64)
    assert report.release == "s3://bucket/releases/zip/c"
    assert run.forced == [] and report.stages[1].outcome == "restored"


def test_a_release_that_the_registry_lost_is_registered_once_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Released(tmp_path, [None, 7])
    report = run.report(monkeypatch)
    assert (report.version, run.forced) == (7, [("register", True)])
    assert [(stage.stage, stage.outcome) for stage in report.stages] == [
        ("evaluate", "unchanged"),
        ("register", "executed"),
    ]


def test_what_is_recorded_of_a_release_is_what_was_registered(tmp_path: Path) -> None:
    run: Any = Released(tmp_path, [])
    metrics: dict[str, Any] = {"tasks": {}}
    report = GroupReport("g", model="zip", version=4, content_digest="c" * 64, metrics=metrics)
    assert flow._outcome(run, report) == Outcome(
        "merged", "g", model="zip", content_digest="c" * 64, release="releases/zip/c", metrics=metrics
    )


def test_pages_show_errors_and_the_release_where_there_are_any(shown: dict[str, Any]) -> None:
    errors = {"metric": "error", "unit": "%", "agreement_retrained": 99.0}
    errors |= {"error_original": 1.0, "error_zipped": 1.75, "error_retrained": 1.5}
    metrics = {"stored": {"fraction": 0.5, "bytes": 1, "original_bytes": 2}, "tasks": {"a": errors}}
    flow._publish(GroupReport("My_Group", model="zip", version=3, release="s3://r", metrics=metrics, folder="/w"))
    assert shown.keys() == {"group-my-group-errors", "group-my-group-stages", "group-my-group-release"}
    assert "`models:/zip/3`" in shown["group-my-group-release"] and "`s3://r`" in shown["group-my-group-release"]
    shown.clear()
    flow._publish(GroupReport("g"))
    assert shown == {"group-g-stages": []}
