"""What all executors share: the threads that jobs compute with, and reports of jobs that left none."""

from flows.jobs.executor import broken, report_of, threads_of
from flows.results.group_report import as_report
from flows.spec.job import Job
from mtz_core.errors import MtzError


def job(kind: str = "group", **settings: object) -> Job:
    return Job(fleet="f", kind=kind, group="g", fingerprint="1" * 64, settings=settings, run="r")  # type: ignore[typeddict-item]


def test_the_job_with_most_threads_decides() -> None:
    assert threads_of([job()]) == threads_of([job(runtime={})]) == 1
    assert threads_of([job(runtime={"threads": 2}), job(runtime={"threads": 4}), job()]) == 4


def test_an_exception_becomes_a_report_with_its_reason() -> None:
    def fails(error: Exception) -> str:
        def result() -> dict[str, object]:
            raise error

        report = as_report(report_of(job(), result))
        assert (report.group, report.status, report.fingerprint) == ("g", "failed", "1" * 64)
        return report.reason

    assert fails(MtzError("no weights. Put them there.")) == "no weights. Put them there."
    assert fails(ValueError("as asked")) == "ValueError: as asked", "of a mistake of ours, its kind is worth telling"
    assert report_of(job(), lambda: {"status": "merged"}) == {"status": "merged"}


def test_a_model_fails_as_a_model() -> None:
    assert as_report(broken(job("model"), "gone")).kind == "model"
    assert as_report(broken(job(), "gone")).kind == "group"
