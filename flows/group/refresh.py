"""Bringing the stages of one workspace up to date: changed stages are run or restored, the others are left."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from flows.group import workspace
from flows.group.dvc import Pipeline, Stage
from flows.group.stage import reproduce_stage
from flows.results import progress
from flows.results.stage_result import StageFailed, StageResult, StageStatus
from flows.spec.job import Job
from flows.spec.snapshot import CODE, Snapshot
from tasks.files import whole_file
from tasks.params import Params, StorageParams, validate
from tasks.storage import s3
from tasks.storage.contents import Contents
from tasks.storage.s3 import Storage

_JITTER = 0.2
_LOCK = "dvc.lock"


@dataclass(frozen=True)
class PipelineRun:
    """A held workspace, prepared for a job, with the storage open.

    Attributes:
        job: The job.
        home: The folder of the worker's runtime state.
        params: The parameters of the group.
        store: The storage.
        contents: The store of contents.
        pipeline: The workspace's pipeline.
        stages: Its stages, each after those it needs.
        name: The name under which the run is shown and logged.
    """

    job: Job
    home: Path
    params: Params
    store: Storage
    contents: Contents
    pipeline: Pipeline
    stages: tuple[Stage, ...]
    name: str

    def bring_up_to_date(self) -> list[StageResult]:
        """Restore stages that were run elsewhere; run the other changed stages and those that read their results.

        Returns:
            The result of every stage.

        Raises:
            StageFailed: A stage failed, or refused; it has the results of those before it.
        """
        missing = frozenset[str]()
        if not (self.pipeline.folder / _LOCK).exists():
            missing = self._fetch_locks()
        recorded = (self.pipeline.folder / _LOCK).exists()
        changes = self.pipeline.changes() if recorded else dict.fromkeys(self._all(), frozenset[str]())
        if of_code := [stage for stage, paths in changes.items() if any(Path(path).parts[0] in CODE for path in paths)]:
            count = f"{len(of_code)} of {len(self.stages)} stages"
            progress.current.get().note(self.name, f"code has changed since the last run: {count} depend on it")
        restored = frozenset[str]()
        if missing & changes.keys():
            progress.current.get().busy(self.name, "fetching earlier results")
            restored = self.pipeline.restore()
        results: dict[str, StageResult] = {}
        for stage in self.stages:
            touched = any(results[name].outcome != "unchanged" for name in stage.needs)
            if stage.name in restored:
                results[stage.name] = self._done(stage, "restored")
            elif touched or stage.name in changes:
                try:
                    results[stage.name] = self.run_stage(stage.name)
                except StageFailed as failure:
                    failure.finished = tuple(results.values())
                    raise
            else:
                results[stage.name] = self._done(stage, "unchanged")
        return list(results.values())

    def run_stage(self, stage: str, force: bool = False) -> StageResult:
        """Run one stage as a task of this flow."""
        with_retries = reproduce_stage.with_options(**self._retries())
        return StageResult(**with_retries(self.name, stage, self.pipeline, self.home, force, self.params.flow.heavy))

    def store_data(self, results: Iterable[StageResult]) -> None:
        """Send the data of all stages, and then the list of them, to the storage, unless it has them."""
        if self._is_stored(results):
            return
        progress.current.get().busy(self.name, "storing data in S3")
        key = lock_key(self.job["kind"], self.job["group"])
        push_data.with_options(**self._retries())(self.name, self.pipeline, self.params.storage, self.home, key)

    def _fetch_locks(self) -> frozenset[str]:
        """Start from the stages that another machine, or a model's own workspace, has run; return their names."""
        key = lock_key(self.job["kind"], self.job["group"])
        models = [lock_key("model", model) for model in self.params.models]
        found = self.store.read_many([key, *models])
        if (content := found[key]) is None:
            locks = [yaml.safe_load(lock) for lock in found.values() if lock is not None]
            if not locks:
                return frozenset()
            known = {name: stage for lock in locks for name, stage in lock["stages"].items() if name in self._all()}
            content = yaml.safe_dump({**locks[0], "stages": known}, sort_keys=False, allow_unicode=True).encode()
        with whole_file(self.pipeline.folder / _LOCK) as partial:
            partial.write_bytes(content)
        return frozenset(yaml.safe_load(content)["stages"])

    def _is_stored(self, results: Iterable[StageResult]) -> bool:
        """Return whether nothing changed and the remote has all outputs; DVC stores a folder's list after its files."""
        return all(result.outcome == "unchanged" for result in results) and all(
            self.store.exists(f"dvc/{name}") for name in self.pipeline.output_objects()
        )

    def _all(self) -> frozenset[str]:
        return frozenset(stage.name for stage in self.stages)

    def _retries(self) -> dict[str, Any]:
        flow = self.params.flow
        delay = exponential_backoff(flow.retry_delay_seconds)
        return {"retries": flow.retries, "retry_delay_seconds": delay, "retry_jitter_factor": _JITTER}

    def _done(self, stage: Stage, outcome: StageStatus) -> StageResult:
        result = StageResult(stage.name, outcome)
        progress.current.get().finished(self.name, result)
        return result


@task(name="push", task_run_name="{name} · push", cache_policy=NO_CACHE, persist_result=False)
def push_data(name: str, pipeline: Pipeline, settings: StorageParams, home: Path, key: str) -> None:
    """Send a workspace's data, and then its dvc.lock, to the storage.

    Args:
        name: The name under which the run is shown.
        pipeline: The workspace's pipeline.
        settings: Where the storage is.
        home: The folder of the worker's runtime state.
        key: The object for the dvc.lock.

    Raises:
        DvcFailed: DVC failed.
        StorageError: The storage cannot be used.
    """
    # A new connection starts the embedded server again if it has died.
    with s3.connect(settings, home) as store:
        pipeline.push()
        store.put(key, (pipeline.folder / _LOCK).read_bytes())


def lock_key(kind: str, name: str) -> str:
    """Return the object with the newest dvc.lock of a group's, or a model's, workspace."""
    return f"locks/{kind}s/{name}.lock"


@contextmanager
def opened(job: Job, home: Path, folder: Path, shown_as: str) -> Iterator[PipelineRun]:
    """Open the storage, hold a workspace, and bring it up to date with the job's snapshot.

    Args:
        job: The job.
        home: The folder of the worker's runtime state.
        folder: The folder of the workspace.
        shown_as: The name under which the run is shown and logged.

    Yields:
        The prepared run.

    Raises:
        InvalidParams: The job's settings cannot be used.
        WorkspaceBusy: Another process works in the workspace.
        MissingContent: A file of the snapshot is neither here nor in the storage.
        DvcFailed: DVC does not understand the pipeline.
        StorageError: The storage cannot be used.
    """
    params = validate(job["settings"], f"{job['kind']} '{job['group']}'")
    shown = progress.current.get()
    shown.busy(shown_as, "preparing")
    with s3.connect(params.storage, home) as store, workspace.held(folder):
        contents = Contents(home / "contents", store)
        snapshot = Snapshot.load(contents, job["fingerprint"])
        environment = workspace.environment_of(store, home)
        if params.flow.memory is not None:
            environment["MTZ_MEMORY_LIMIT"] = str(int(params.flow.memory * 2**30))
        cache, remote = workspace.cache_of(home), workspace.remote_of(store)
        pipeline, stages = workspace.prepare(folder, snapshot, contents, job["settings"], cache, remote, environment)
        shown.planned(shown_as, len(stages))
        yield PipelineRun(job, home, params, store, contents, pipeline, stages, shown_as)
