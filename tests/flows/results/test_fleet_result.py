"""What is kept of a fleet's run, and which groups a retry takes from it."""

import json
from pathlib import Path

import pytest

from flows.results.fleet_result import FleetFailed, FleetResult, NoRun, failed_groups, last_run
from flows.results.group_report import GroupReport, Status
from flows.results.stage_result import StageResult
from tasks.files import write_json
from tasks.params import StorageParams
from tasks.storage.s3 import Storage


def result(*reports: GroupReport) -> FleetResult:
    return FleetResult("nightly", "run-1", "2026-01-02T03:04:05+00:00", list(reports), 9.5, 1 << 30)


def ended(home: Path, **groups: Status) -> None:
    """A last run whose groups ended so."""
    found = result(*(GroupReport(group, status) for group, status in groups.items()))
    write_json(last_run(home, "nightly"), found.as_values())


def test_what_is_kept_says_how_many_ended_how_and_where_time_went() -> None:
    stages = [StageResult("pretrain@a", "executed", 5.0, 4.0), StageResult("merge", "executed", 3.0, 2.0)]
    good = GroupReport(
        "good", stages=stages, seconds=8.0, model="m", version=2, content_digest="c", metrics={"tasks": {}}
    )
    values = result(
        good, GroupReport("bad", "failed", "no weights"), GroupReport("worse", "failed", "no data")
    ).as_values()
    assert json.loads(json.dumps(values)) == values
    assert values["counts"] == {"merged": 1, "failed": 2}
    assert (values["fleet"], values["run"], values["seconds"], values["peak_bytes"]) == (
        "nightly",
        "run-1",
        9.5,
        1 << 30,
    )
    row = values["groups"][0]
    assert (row["command_seconds"], row["overhead_seconds"]) == (6.0, 2.0)
    assert (row["model"], row["version"], row["content_digest"], row["kind"]) == ("m", 2, "c", "group")
    assert "stages" not in row and "metrics" not in row, "what a retry does not need"


def test_failed_groups_are_told_with_their_reasons() -> None:
    failure = FleetFailed(result(GroupReport("a"), GroupReport("b", "failed", "x"), GroupReport("c", "failed", "y")))
    assert str(failure) == "group 'b': x; group 'c': y"
    assert len(failure.result.reports) == 3


def test_a_retry_takes_those_that_failed_here(tmp_path: Path) -> None:
    ended(tmp_path, good="merged", bad="failed", refused="refused", worse="failed")
    assert failed_groups(tmp_path, "nightly", StorageParams()) == ("bad", "worse")
    ended(tmp_path, good="merged", same="unchanged")
    assert failed_groups(tmp_path, "nightly", StorageParams()) == ()


def test_where_a_model_failed_all_groups_are_planned_anew(tmp_path: Path) -> None:
    found = result(GroupReport("good"), GroupReport("lone", "failed", "no data", kind="model"))
    write_json(last_run(tmp_path, "nightly"), found.as_values())
    assert failed_groups(tmp_path, "nightly", StorageParams()) is None


def test_a_run_on_another_machine_is_found_in_the_storage(place: StorageParams, store: Storage, home: Path) -> None:
    with pytest.raises(NoRun, match=r"fleet 'elsewhere' has not run yet.*`mtz run` it"):
        failed_groups(home, "elsewhere", place)
    store.put("runs/elsewhere/last.json", json.dumps(result(GroupReport("bad", "failed")).as_values()).encode())
    assert failed_groups(home, "elsewhere", place) == ("bad",)
    here = result(GroupReport("other", "failed"))
    write_json(last_run(home, "elsewhere"), here.as_values())
    assert failed_groups(home, "elsewhere", place) == ("other",), "the last run from here comes first"
