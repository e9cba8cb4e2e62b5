"""Ways to run the same jobs: threads of this process, a Dask cluster and, in `flows.pool`, a Prefect work pool."""

import contextvars
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import capacity, processes
from flows.job import Job
from flows.report import GroupReport
from mtz_core.errors import MtzError
from tasks.storage import Storage

if TYPE_CHECKING:
    from distributed import Future as DaskFuture
    from prefect_dask.task_runners import DaskTaskRunner

    from flows.cluster import Cluster

Report = dict[str, Any]
"""A `GroupReport` as a mapping."""

Done = Callable[[Job, Report], None]

WORK = "flows.job:run_job"
"""The function that runs a job, by name: workers in other processes import it."""

LOCAL_CLUSTER = "local"
_TRIES = 3
_STARTING_SECONDS = 600.0
_CONNECTING_SECONDS = 30.0


class ExecutorFailed(MtzError):
    """No job could be started."""


class Executor(Protocol):
    """Runs jobs."""

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all jobs; call `done` in this thread as each ends, with its report.

        A job that breaks, by an exception or with its worker, ends with a report that says why it failed, and stops
        no other. A job whose worker is lost is run again, on another worker if there is one, a few times. An interrupt
        stops all jobs. Raises `ExecutorFailed`.
        """


class Settings(Protocol):
    """What the flow's settings say about where jobs run."""

    @property
    def executor(self) -> Literal["local", "dask", "pool"]: ...
    @property
    def workers(self) -> int | Literal["auto"]: ...
    @property
    def memory(self) -> float | None: ...
    @property
    def dask(self) -> str: ...
    @property
    def pool(self) -> str: ...


def executor_for(settings: Settings, home: Path, store: Storage, environment: Mapping[str, str]) -> Executor:
    """Return the executor that the settings name.

    Args:
        store: through which reports come back from where they cannot come otherwise.
        environment: variables that workers which we start ourselves need on top of this process's own: the storage's
            address and credentials, and PREFECT_API_URL.
    """
    if settings.executor == "dask":
        return DaskExecutor(settings.dask, settings.workers, settings.memory, home, environment)
    if settings.executor == "pool":
        from flows.pool import PoolExecutor

        return PoolExecutor(settings.pool, settings.workers, store)
    return LocalExecutor(settings.workers, settings.memory)


@dataclass(frozen=True)
class LocalExecutor:
    """Threads of this process; the stages of a job are processes of their own anyway.

    Attributes:
        memory: GiB that one job takes, as far as known.
        work: the name of the function that runs a job.
    """

    workers: int | Literal["auto"] = "auto"
    memory: float | None = None
    work: str = WORK

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """See `Executor`."""
        if not jobs:
            return
        run_job = pkgutil.resolve_name(self.work)
        places = min(len(jobs), capacity.places(self.workers, _threads(jobs), self.memory))
        with ThreadPoolExecutor(places, thread_name_prefix="group") as pool:
            # Each thread needs the flow run that it belongs to, and the progress display.
            started: dict[Future[Report], Job] = {
                pool.submit(contextvars.copy_context().run, run_job, job): job for job in jobs
            }
            try:
                for future in as_completed(started):
                    done(started[future], report_of(started[future], future.result))
            except BaseException:
                processes.stop_all()
                pool.shutdown(wait=False, cancel_futures=True)
                raise


@dataclass(frozen=True)
class DaskExecutor:
    """Workers of a Dask scheduler; each job is a task of the flow that runs.

    Dask gives the job of a lost worker to another. Jobs that are lost with their scheduler are started again
    on the next one.

    Everything that Dask sends is pickled, so whoever reaches its scheduler can run any code on the workers: keep it
    behind TLS, or in a network of its own.

    Attributes:
        address: of the scheduler, such as `tls://host:8786`; `local` starts a cluster on this machine.
        workers, memory, environment: of such a cluster.
    """

    address: str
    workers: int | Literal["auto"]
    memory: float | None
    home: Path
    environment: Mapping[str, str]
    work: str = WORK

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """See `Executor`."""
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
        from flows.cluster import Cluster, local_cluster

        if self.address != LOCAL_CLUSTER:
            yield Cluster(self.address)
            return
        places = min(len(jobs), capacity.places(self.workers, _threads(jobs), self.memory))
        with local_cluster(self.home, places, self.memory, self.environment) as cluster:
            yield cluster


@task(name="zip-group-job", task_run_name="{job[group]}", cache_policy=NO_CACHE, persist_result=False)
def run_elsewhere(work: str, job: Job) -> Report:
    """Run a job on this worker by the function that `work` names."""
    report: Report = pkgutil.resolve_name(work)(job)
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
    """Connect Prefect's tasks to the scheduler. Raises `ExecutorFailed`."""
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


def _dask_result(ended: "DaskFuture[Any]") -> Report:
    from distributed.client import FutureCancelledError
    from distributed.scheduler import KilledWorker

    try:
        report: Report = ended.result().result(raise_on_failure=True)
    except KilledWorker as error:
        raise ExecutorFailed(
            f"its worker was lost {error.allowed_failures + 1} times, most likely for want of memory. "
            "Raise flow.memory or lower flow.workers, and run again"
        ) from error
    except FutureCancelledError as error:
        raise ExecutorFailed("the Dask scheduler was lost. Run again: finished stages are kept") from error
    return report


def _threads(jobs: Sequence[Job]) -> int:
    """Return the most threads with which one of the jobs computes."""
    return max(job["settings"].get("runtime", {}).get("threads", 1) for job in jobs)


def report_of(job: Job, result: Callable[[], Report]) -> Report:
    """Return the result, or a report of the exception that it raises."""
    try:
        return result()
    except Exception as error:
        told = str(error) if isinstance(error, MtzError) else f"{type(error).__name__}: {error}"
        return broken(job, told)


def broken(job: Job, reason: str) -> Report:
    """Return the report of a job that ended without one of its own."""
    return GroupReport(
        job["group"], "failed", reason, fingerprint=job["fingerprint"], kind=job.get("kind", "group")
    ).as_values()
