"""Jobs as runs of a deployment in a Prefect work pool with workers anywhere; reports come back through S3."""

import json
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast
from uuid import UUID

from prefect import flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from flows.jobs.executor import Done, ExecutorFailed, ReportValues, broken
from flows.jobs.run_job import run_job
from flows.results import progress
from flows.spec.job import Job, shown_as
from mtz_core.errors import MtzError
from tasks.home import find_home
from tasks.params import StorageParams
from tasks.storage import s3
from tasks.storage.s3 import Storage

FLOW = "zip-group-job"
DEPLOYMENT = f"{FLOW}/group"
"""The deployment that workers of the pool run; `mtz fleet deploy` creates it."""

_TRIES = 3
_STARTS_AT_ONCE = 50
_PAGE = 200  # the server's limit for one answer
_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 10.0


@flow(name=FLOW, flow_run_name="{job[group]}", persist_result=False)
def zip_group_job(job: dict[str, Any]) -> None:
    """Run a job on this worker, in its own `.mtz`, and store its report.

    Args:
        job: The job.

    Raises:
        StorageError: The storage cannot be used.
    """
    own = cast(Job, job)
    deliver(own, run_job(own), find_home())


def deliver(job: Job, report: ReportValues, home: Path) -> None:
    """Store a job's report, for the process that started the job.

    Args:
        job: The job.
        report: Its report.
        home: The folder of the worker's runtime state.

    Raises:
        StorageError: The storage cannot be used.
    """
    with s3.connect(StorageParams(**job["settings"]["storage"]), home) as store:
        store.put(report_key(job), json.dumps(report).encode())


def report_key(job: Job) -> str:
    """Return the object that a job's report becomes."""
    return f"reports/{job['run']}/{shown_as(job)}.json"


@dataclass(frozen=True)
class PoolExecutor:
    """An executor on the workers of a work pool.

    A run that crashes, as it does when its worker is killed, is started again a few times.

    Attributes:
        pool: The work pool that receives the deployment's runs.
        workers: The most runs at a time; `auto` leaves that to the workers' own limits.
        store: The storage in which the workers leave their reports.
        deployment: Full name of the deployment.
    """

    pool: str
    workers: int | Literal["auto"]
    store: Storage
    deployment: str = DEPLOYMENT

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        """Run all jobs, see `flows.jobs.executor.Executor.run`."""
        if not jobs:
            return
        with get_client(sync_client=True) as client:
            self._check(client)
            _Runs(self, client, self.store, deque(jobs), done).all()

    def _check(self, client: SyncPrefectClient) -> None:
        try:
            client.read_work_pool(self.pool)
            deployment = client.read_deployment_by_name(self.deployment)
        except ObjectNotFound as error:
            raise ExecutorFailed(
                f"the Prefect server at {client.api_url} has no work pool '{self.pool}' with the deployment "
                f"'{self.deployment}'. `mtz fleet deploy` makes both; or set flow.executor to 'local'."
            ) from error
        if deployment.work_pool_name != self.pool:
            raise ExecutorFailed(
                f"the deployment '{self.deployment}' belongs to the work pool '{deployment.work_pool_name}', not to "
                f"'{self.pool}'. Correct flow.pool, or deploy again with `mtz fleet deploy`."
            )


@dataclass
class _Run:
    """One attempt at a job.

    Attributes:
        job: The job.
        number: Number of the attempt, from 1.
        state: Last known state of its flow run.
    """

    job: Job
    number: int
    state: str = ""


class _Runs:
    """All runs of some jobs: those under way, and those still to start."""

    def __init__(
        self, executor: PoolExecutor, client: SyncPrefectClient, store: Storage, jobs: deque[Job], done: Done
    ) -> None:
        self._executor = executor
        self._client = client
        self._store = store
        self._waiting = deque(_Run(job, 1) for job in jobs)
        self._running: dict[UUID, _Run] = {}
        self._done = done

    def all(self) -> None:
        """Start every job and wait for its end; on any interrupt, cancel the runs under way."""
        pause = _FIRST_PAUSE_SECONDS
        try:
            while self._waiting or self._running:
                self._start()
                changed = sum(self._look(run) for run in self._read())
                pause = _FIRST_PAUSE_SECONDS if changed else min(1.5 * pause, _LONGEST_PAUSE_SECONDS)
                time.sleep(pause)
        except BaseException:
            for run in self._running:
                with suppress(Exception):  # the server may be what failed
                    self._client.set_flow_run_state(run, Cancelling())
            raise

    def _start(self) -> None:
        limit = self._executor.workers
        for _ in range(_STARTS_AT_ONCE):
            if not self._waiting or (limit != "auto" and len(self._running) >= limit):
                return
            run = self._waiting.popleft()
            name = shown_as(run.job)
            parameters = {"job": dict(run.job)}
            started = run_deployment(self._executor.deployment, parameters=parameters, timeout=0, flow_run_name=name)
            self._running[cast(FlowRun, started).id] = run

    def _read(self) -> list[FlowRun]:
        names = list(self._running)
        pages = [names[start : start + _PAGE] for start in range(0, len(names), _PAGE)]
        return [run for page in pages for run in self._client.read_flow_runs(flow_run_filter=_these(page))]

    def _look(self, found: FlowRun) -> bool:
        """Act on the state of a run; return whether it has changed."""
        run, state = self._running[found.id], found.state
        if state is None or state.name == run.state:
            return False
        run.state = state.name or ""
        if not state.is_final():
            progress.current.get().busy(shown_as(run.job), f"{run.state.lower()} in pool {self._executor.pool}")
            return True
        del self._running[found.id]
        if state.is_crashed() and run.number < _TRIES:
            self._waiting.append(_Run(run.job, run.number + 1))
        else:
            self._done(run.job, self._report(run.job, found, state))
        return True

    def _report(self, job: Job, found: FlowRun, state: State[Any]) -> ReportValues:
        try:
            content = self._store.read_many([report_key(job)])[report_key(job)]
        except MtzError as error:
            return broken(job, f"its report cannot be read: {error}")
        if content is not None:
            report: ReportValues = json.loads(content)
            return report
        message = f": {state.message}" if state.message else ""
        tries = f" {_TRIES} times" if state.is_crashed() else ""
        return broken(
            job,
            f"its flow run '{found.name}' ({found.id}) ended as {state.name}{tries} and left no report{message}. "
            "Its log is in Prefect's pages; run again: finished stages are kept",
        )


def _these(names: list[UUID]) -> FlowRunFilter:
    return FlowRunFilter(id=FlowRunFilterId(any_=names))
