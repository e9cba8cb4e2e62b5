"""The summary of a run, as people read it."""

from pathlib import Path
from typing import Any

import pytest

from flows.results.fleet_result import FleetResult
from flows.results.group_report import GroupReport
from flows.results.stage_result import StageResult
from flows.results.summary import summary_text

RAN = [StageResult("pretrain@a", "executed", 5.0, 4.0), StageResult("merge", "executed", 3.0, 2.5)]
SAME = [StageResult("collect@a", "unchanged"), StageResult("match", "unchanged")]
NAMED = {"metric": "error", "unit": "%", "agreement_retrained": 98.04}
METRICS: dict[str, Any] = {
    "stored": {"fraction": 0.5, "bytes": 1500, "original_bytes": 3000},
    "tasks": {
        "digits": NAMED | {"error_original": 1.0, "error_zipped": 1.756, "error_retrained": 1.5},
        "fashion": NAMED | {"error_original": 9.0, "error_zipped": 9.5, "error_retrained": 9.25},
    },
}
MERGED = GroupReport("pair", stages=RAN, seconds=8.0, metrics=METRICS, model="zip", version=3, release="s3://b/r")


def summary(*reports: GroupReport, warning: str = "") -> list[str]:
    """The lines, without those of tables, words one space apart."""
    result = FleetResult("nightly", "run", "now", list(reports), 12.4, 3 << 29, warning)
    text = summary_text(result, Path("/home/project/.mtz"))
    return [" ".join(line.replace("│", " ").split()) for line in text.splitlines()]


def test_a_merged_group_shows_errors_sizes_times_and_where_it_went() -> None:
    lines = summary(MERGED)
    assert "pair digits error, % 1.00 1.76 1.50 98.0 50.0 1,500 3,000" in lines
    assert "fashion error, % 9.00 9.50 9.25 98.0" in lines, "what holds for the group is said once"
    assert "pair 4.0 2.5 1.5 8.0" in lines
    assert "pair merged models:/zip/3 s3://b/r" in lines
    assert "Wall time 12 s without the start of services, peak memory 1.5 GiB." in lines
    last = "Groups: 1 merged. Stages: 2 executed, 0 restored, 0 unchanged."
    assert last in lines
    assert "/home/project/.mtz/workspaces/GROUP" in lines


def test_a_metric_of_ones_own_has_no_unit() -> None:
    own = {**METRICS["tasks"]["digits"], "metric": "my.metrics:pixels", "unit": ""}
    lines = summary(GroupReport("pair", stages=RAN, metrics={**METRICS, "tasks": {"points": own}}))
    assert "pair points pixels 1.00 1.76 1.50 98.0 50.0 1,500 3,000" in lines


def test_what_failed_or_was_refused_says_why_and_what_to_do() -> None:
    failed = GroupReport("bad", "failed", "match: no pairs", log="/logs/bad/match.log")
    lines = summary(failed, GroupReport("no", "refused", "too small"), warning="warning: no report")
    assert "bad failed match: no pairs" in lines
    assert "no refused too small" in lines
    assert "Log of bad: /logs/bad/match.log" in lines
    assert "Try the failed groups again: `mtz fleet retry`." in lines
    assert "warning: no report" in lines
    assert not [line for line in lines if "Look" in line or "Test" in line], "no stage ran, so there is nothing to see"


def test_a_run_without_work_says_so() -> None:
    lines = summary(GroupReport("a", "unchanged", stages=SAME), GroupReport("b", "unchanged", stages=SAME))
    assert lines[-3].endswith("Nothing to do: 2 of 2 groups unchanged, all 4 stages.")
    lines = summary(GroupReport("a", "unchanged"))
    assert lines[-1].endswith("Nothing to do: 1 of 1 groups unchanged.")


def test_work_on_an_unchanged_group_is_not_hidden() -> None:
    restored = [*SAME, StageResult("evaluate", "restored", 1.0)]
    lines = summary(GroupReport("a", "unchanged", stages=restored))
    assert lines[-3].endswith("Groups: 1 unchanged. Stages: 0 executed, 1 restored, 2 unchanged.")


@pytest.mark.parametrize("count", [20, 21])
def test_of_a_large_fleet_only_what_changed_is_listed(count: int) -> None:
    unchanged = [GroupReport(f"same-{number}", "unchanged") for number in range(count)]
    lines = summary(GroupReport("odd", "refused", "why"), *unchanged)
    listed = [line for line in lines if line.startswith("same-")]
    assert len(listed) == (20 if count == 20 else 0)
    assert ("21 more unchanged" in lines) == (count == 21)
    assert "odd refused why" in lines
