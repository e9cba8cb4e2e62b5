"""A job on a worker: which flow runs, what becomes of its errors, and where the log of a failed stage is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.group import flow, statistics_flow
from flows.group.stage import log_file
from flows.jobs.run_job import run_job
from flows.processes import warm
from flows.results.group_report import GroupReport, as_report
from flows.results.stage_result import StageFailed, StageRefused, StageResult
from flows.spec.job import Job
from mtz_core.errors import MtzError
from tasks.params import StorageParams
from tasks.storage.s3 import Storage
from tests.support.small_project import GROUP_PARAMS

Runs = Callable[..., None]


@pytest.fixture(autouse=True)
def no_interpreters(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The homes for which warm interpreters are kept; none is started."""
    kept: list[Path] = []
    monkeypatch.setattr(warm, "keep", kept.append)
    return kept


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    """Let the flows fail with an error, or return their name."""

    def set_up(error: BaseException | None = None) -> None:
        for module, name in ((flow, "zip_group"), (statistics_flow, "measure_model")):

            def run(job: Job, home: Path, name: str = name) -> dict[str, Any]:
                if error is not None:
                    raise error
                return {"flow": name, "home": home}

            monkeypatch.setattr(module, name, run)

    return set_up


def job(kind: str = "group", place: StorageParams | None = None) -> Job:
    settings = {**yaml.safe_load(GROUP_PARAMS), "storage": (place or StorageParams()).model_dump()}
    return Job(fleet="f", kind=kind, group="g", fingerprint="1" * 64, settings=settings, run="r1")  # type: ignore[typeddict-item]


def reported(found: dict[str, Any]) -> GroupReport:
    return as_report(found)


@pytest.mark.parametrize(("kind", "name"), [("group", "zip_group"), ("model", "measure_model")])
def test_the_kind_of_a_job_names_its_flow(
    kind: str, name: str, runs: Runs, tmp_path: Path, no_interpreters: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    runs()
    assert run_job(job(kind), tmp_path) == {"flow": name, "home": tmp_path}
    monkeypatch.setenv("MTZ_HOME", str(tmp_path / "own"))
    assert run_job(job(kind))["home"] == tmp_path / "own"
    assert no_interpreters == [tmp_path, tmp_path / "own"]


@pytest.mark.parametrize(
    ("error", "status"),
    [(StageRefused("match", "too small"), "refused"), (MtzError("the storage does not answer"), "failed")],
)
def test_known_errors_are_reported(error: MtzError, status: str, runs: Runs, tmp_path: Path) -> None:
    runs(error)
    report = reported(run_job(job("model"), tmp_path))
    assert (report.group, report.status, report.reason, report.kind) == ("g", status, str(error), "model")
    assert (report.fingerprint, report.log) == ("1" * 64, "")


@pytest.mark.parametrize("failure", [StageRefused("match", "too small"), StageFailed("match", "no pairs")])
def test_what_was_done_before_a_failure_is_reported(failure: StageFailed, runs: Runs, tmp_path: Path) -> None:
    failure.finished = (StageResult("collect@a", "restored"), StageResult("hessians@a", "executed", 2.0, 1.5))
    runs(failure)
    report = reported(run_job(job(), tmp_path))
    assert report.stages == list(failure.finished)
    assert report.zipping_seconds == 1.5


def test_our_own_mistakes_are_not_hidden(runs: Runs, tmp_path: Path) -> None:
    runs(KeyError("a mistake"))
    with pytest.raises(KeyError):
        run_job(job(), tmp_path)


@pytest.mark.parametrize(("kind", "shown"), [("group", "g"), ("model", "statistics/g")])
def test_the_log_of_a_failed_stage_goes_where_others_can_read_it(
    kind: str, shown: str, runs: Runs, home: Path, place: StorageParams, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs(StageFailed("match", "no pairs"))
    log = log_file(home, shown, "match")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("all that it said")
    report = reported(run_job(job(kind, place), home))
    key = f"logs/r1/{shown}/match.log"
    assert (report.status, report.log) == ("failed", store.url(key)), "this home is not that of the current folder"
    assert store.read(key) == b"all that it said"
    monkeypatch.setenv("MTZ_HOME", str(home))
    assert reported(run_job(job(kind, place))).log == str(log), "it lies on this machine"


def test_where_the_storage_is_what_failed_the_log_is_named_with_its_machine(runs: Runs, tmp_path: Path) -> None:
    runs(StageFailed("match", "no pairs"))
    report = reported(run_job(job(place=StorageParams(endpoint="http://127.0.0.1:9")), tmp_path))
    assert report.log.startswith(f"{log_file(tmp_path, 'g', 'match')} on ")
