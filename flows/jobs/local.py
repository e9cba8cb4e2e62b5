"""Jobs on threads of this process."""

import contextvars
import pkgutil
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Literal

from flows.jobs import capacity
from flows.jobs.executor import WORK, Done, ReportValues, report_of, threads_of
from flows.processes import child
from flows.spec.job import Job


@dataclass(frozen=True)
class LocalExecutor:
    """An executor on threads of this process; the stages of a job are processes of their own anyway.

    Attributes:
        workers: The most jobs at a time; `auto` for as many as fit.
        memory: GiB that one job takes; None if unknown.
        work: Name of the function that runs a job.
    """

    workers: int | Literal["auto"] = "auto"
    memory: float | None = None
    work: str = WORK

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all jobs, see `Executor.run`."""
        if not jobs:
            return
        run_job = pkgutil.resolve_name(self.work)
        places = min(len(jobs), capacity.places(self.workers, threads_of(jobs), self.memory))
        with ThreadPoolExecutor(places, thread_name_prefix="group") as pool:
            # Each thread needs the flow run that it belongs to, and the progress display.
            started: dict[Future[ReportValues], Job] = {
                pool.submit(contextvars.copy_context().run, run_job, job): job for job in jobs
            }
            try:
                for future in as_completed(started):
                    done(started[future], report_of(started[future], future.result))
            except BaseException:
                child.stop_all()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
