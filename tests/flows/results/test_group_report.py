"""Reports of groups: how their time is told apart, and that they travel between machines unchanged."""

import json

import pytest

from flows.results.group_report import GroupReport, as_report, metrics_table
from flows.results.stage_result import StageResult

STAGES = [
    StageResult("pretrain@digits", "executed", 11.0, 10.0),
    StageResult("collect@digits", "restored", 2.0),
    StageResult("merge", "executed", 4.0, 3.0, "merge: wrote 7 layers"),
]


def test_time_is_of_pretraining_of_zipping_or_of_neither() -> None:
    report = GroupReport("g", stages=STAGES, seconds=18.0)
    assert (report.pretraining_seconds, report.zipping_seconds) == (10.0, 3.0)
    assert report.orchestration_seconds == pytest.approx(5.0)
    assert GroupReport("g", stages=STAGES, seconds=12.9).orchestration_seconds == 0, (
        "clocks differ; time does not run back"
    )


def test_a_report_comes_back_as_it_went() -> None:
    sent = GroupReport(
        "g", "refused", "why", "log", "f" * 64, STAGES, 7.5, "folder", {"tasks": {}}, "m", 3, "s3://r", "c"
    )
    assert as_report(json.loads(json.dumps(sent.as_values()))) == sent
    model = GroupReport("m", "measured", kind="model", statistics="5" * 64)
    assert as_report(model.as_values()) == model


def test_metrics_have_one_row_a_task() -> None:
    errors = {"metric": "error", "unit": "%", "agreement_retrained": 97.5}
    errors |= {"error_original": 1.0, "error_zipped": 1.75, "error_retrained": 1.5}
    stored = {"fraction": 0.50049, "bytes": 500, "original_bytes": 1000}
    report = GroupReport(
        "g", version=4, metrics={"stored": stored, "tasks": {"a": errors, "b": {**errors, "error_zipped": 9.0}}}
    )
    first, second = metrics_table(report)
    assert first == {
        "task": "a",
        "metric": "error",
        "unit": "%",
        "error before": 1.0,
        "error zipped": 1.75,
        "error after retraining": 1.5,
        "agreement %": 97.5,
        "stored %": 50.0,
        "bytes": 500,
        "bytes before": 1000,
        "version": 4,
    }
    assert second == {**first, "task": "b", "error zipped": 9.0}
