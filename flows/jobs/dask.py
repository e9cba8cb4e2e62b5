"""Jobs as tasks on the workers of a Dask cluster."""

import pkgutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.jobs import capacity
from flows.jobs.executor import WORK, Done, ExecutorFailed, ReportValues, broken, report_of, threads_of
from flows.spec.job import Job

if TYPE_CHECKING:
    from distributed import Future as DaskFuture
    from prefect_dask.task_runners import DaskTaskRunner

    from flows.jobs.dask_cluster import Cluster

LOCAL_CLUSTER = "local"
_TRIES = 3
_STARTING_SECONDS = 600.0
_CONNECTING_SECONDS = 30.0


@dataclass(frozen=True)
class DaskExecutor:
    """An executor on the workers of a Dask scheduler; each job is a task of the flow that runs.

    Dask gives the job of a lost worker to another. Jobs that are lost with their scheduler are started again on the
    next one.

    Everything that Dask sends is pickled, so whoever reaches its scheduler can run any code on the workers: keep it
    behind TLS, or in a network of its own.

    Attributes:
        address: Address of the scheduler, such as `tls://host:8786`; `local` starts a cluster on this machine.
        workers: Number of workers of a local cluster; `auto` for as many as fit.
        memory: GiB that one job takes on a local cluster; None if unknown.
        home: The folder of the project's runtime state.
        environment: Further environment variables of a local cluster.
        work: Name of the function that runs a job.
    """

    address: str
    workers: int | Literal["auto"]
    memory: float | None
    home: Path
    environment: Mapping[str, str]
    work: str = WORK

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all jobs, see `Executor.run`.

        Args:
            jobs: The jobs.
            done: Called with each job and its report, in this thread.

        Raises:
            ExecutorFailed: No job could be started.
        """
        if not jobs:
            return
        _check_installed()
        waiting = list(jobs)
        for tries in range(1, _TRIES + 1):
            try:
                with self._cluster(waiting) as cluster, _connected(cluster) as runner:
                    waiting = self._round(runner, waiting, done, last=tries == _TRIES)
            except ExecutorFailed as error:
                if tries == 1:
                    raise
                for job in waiting:
                    done(job, broken(job, str(error)))
                return
            if not waiting:
                return

    def _round(self, runner: "DaskTaskRunner", jobs: Sequence[Job], done: Done, last: bool) -> list[Job]:
        """Run the jobs; return those that were lost with their scheduler, unless it is the last round."""
        import distributed

        started: dict[DaskFuture[Any], Job] = {}
        for job in jobs:
            future = runner.submit(run_elsewhere, {"work": self.work, "job": job})
            started[future.wrapped_future] = job
        lost: list[Job] = []
        finished: Iterator[DaskFuture[Any]] = distributed.as_completed(list(started), loop=runner.client.loop)  # type: ignore[no-untyped-call]
        for ended in finished:
            job = started.pop(ended)
            if ended.status == "cancelled" and not last:
                lost.append(job)
                continue
            done(job, report_of(job, lambda: _dask_result(ended)))  # noqa: B023 - called at once
        return lost

    @contextmanager
    def _cluster(self, jobs: Sequence[Job]) -> Iterator["Cluster"]:
        from flows.jobs.dask_cluster import Cluster, local_cluster

        if self.address != LOCAL_CLUSTER:
            yield Cluster(self.address)
            return
        places = min(len(jobs), capacity.places(self.workers, threads_of(jobs), self.memory))
        with local_cluster(self.home, places, self.memory, self.environment) as cluster:
            yield cluster


@task(name="zip-group-job", task_run_name="{job[group]}", cache_policy=NO_CACHE, persist_result=False)
def run_elsewhere(work: str, job: Job) -> ReportValues:
    """Run a job on this worker by the function that `work` names."""
    report: ReportValues = pkgutil.resolve_name(work)(job)
    return report


def _check_installed() -> None:
    try:
        import prefect_dask  # noqa: F401
    except ImportError as error:
        raise ExecutorFailed(
            "flow.executor: dask needs Dask, which is not installed. Install the extra 'cluster' "
            "(pip install 'mtz[cluster]'), or set flow.executor to 'local'."
        ) from error


@contextmanager
def _connected(cluster: "Cluster") -> Iterator["DaskTaskRunner"]:
    """Connect Prefect's tasks to the scheduler; raise `ExecutorFailed` if it does not answer."""
    from prefect_dask.task_runners import DaskTaskRunner

    patience = _CONNECTING_SECONDS if cluster.logs is None else _STARTING_SECONDS
    options = {"security": cluster.security, "timeout": patience}
    with DaskTaskRunner(address=cluster.address, client_kwargs=options) as runner:
        try:
            _ = runner.client
        except (OSError, ValueError, TypeError) as error:
            remedy = (
                "Start a scheduler there, correct flow.dask, or set it to 'local'."
                if cluster.logs is None
                else f"Its log says why: {cluster.logs / 'scheduler.log'}"
            )
            raise ExecutorFailed(f"no Dask scheduler answers at {cluster.address}: {error}. {remedy}") from error
        yield runner


def _dask_result(ended: "DaskFuture[Any]") -> ReportValues:
    from distributed.client import FutureCancelledError
    from distributed.scheduler import KilledWorker

    try:
        report: ReportValues = ended.result().result(raise_on_failure=True)
    except KilledWorker as error:
        raise ExecutorFailed(
            f"its worker was lost {error.allowed_failures + 1} times, most likely for want of memory. "
            "Raise flow.memory or lower flow.workers, and run again"
        ) from error
    except FutureCancelledError as error:
        raise ExecutorFailed("the Dask scheduler was lost. Run again: finished stages are kept") from error
    return report
