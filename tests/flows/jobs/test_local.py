"""Jobs on threads of this process."""

from pathlib import Path

from flows.jobs.local import LocalExecutor
from tests.support.tiny_jobs import WORK, job, reports


def test_local_jobs_run_side_by_side_and_break_alone(tmp_path: Path) -> None:
    """A job that goes on until the others are reported needs a place beside theirs, and reports that come at once."""
    jobs = [job("slow", tmp_path, after=["last"]), job("bad", tmp_path, breaks=True)]
    jobs += [job("quick", tmp_path, after=["bad"]), job("last", tmp_path, after=["quick"])]
    found = reports(LocalExecutor(2, None, WORK), jobs)
    assert found["bad"]["status"] == "failed"
    assert found["bad"]["reason"] == "ValueError: as asked"
    assert found["bad"]["fingerprint"] == "of bad"
    assert list(found) == ["bad", "quick", "last", "slow"]
    reports(LocalExecutor("auto", None, WORK), [])


def test_local_jobs_are_as_many_at_a_time_as_were_asked_for(tmp_path: Path) -> None:
    pairs = {"a": "b", "b": "a", "c": "d", "d": "c"}
    jobs = [job(name, tmp_path, beside=[other], seconds=0.2) for name, other in pairs.items()]
    found = reports(LocalExecutor(2, None, WORK), jobs)
    assert max(report["at_once"] for report in found.values()) == 2
