"""The interface of executors: they run jobs and report on each as it ends."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from flows.results.group_report import GroupReport
from flows.spec.job import Job
from mtz_core.errors import MtzError

ReportValues = dict[str, Any]
"""A `GroupReport` as a mapping."""

Done = Callable[[Job, ReportValues], None]
"""Called with a job that has ended and its report."""
WORK = "flows.jobs.run_job:run_job"
"""Name of the function that runs a job: workers in other processes import it."""


class ExecutorFailed(MtzError):
    """No job could be started."""


class Executor(Protocol):
    """Something that runs jobs."""

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all jobs; call `done` in this thread as each ends, with its report.

        A job that breaks, by an exception or with its worker, ends with a report that gives the reason, and stops no
        other. A job whose worker is lost is run again, on another worker if there is one, a few times. An interrupt
        stops all jobs.

        Args:
            jobs: The jobs.
            done: Called with each job and its report.

        Raises:
            ExecutorFailed: No job could be started.
        """


def threads_of(jobs: Sequence[Job]) -> int:
    """Return the most threads with which one of the jobs computes."""
    return max(job["settings"].get("runtime", {}).get("threads", 1) for job in jobs)


def report_of(job: Job, result: Callable[[], ReportValues]) -> ReportValues:
    """Return the result of a function, or a report of the exception that it raises."""
    try:
        return result()
    except Exception as error:
        message = str(error) if isinstance(error, MtzError) else f"{type(error).__name__}: {error}"
        return broken(job, message)


def broken(job: Job, reason: str) -> ReportValues:
    """Return the report of a job that ended without one of its own."""
    return GroupReport(
        job["group"], "failed", reason, fingerprint=job["fingerprint"], kind=job.get("kind", "group")
    ).as_values()
