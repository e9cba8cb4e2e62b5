"""The same jobs on threads, on a Dask cluster of which a worker is killed, and on the workers of a pool."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
from prefect import get_client
from prefect.client.schemas.sorting import TaskRunSort

from flows.commands import schedule
from flows.jobs import dask
from flows.jobs.choose import executor_for
from flows.jobs.dask import DaskExecutor
from flows.jobs.executor import Executor, ExecutorFailed
from flows.jobs.local import LocalExecutor
from flows.jobs.pool import PoolExecutor
from flows.results import progress
from tasks.params import StorageParams
from tasks.storage import s3
from tasks.storage.s3 import Storage
from tests.support import prefect_server, tiny_jobs
from tests.support.prefect_server import ROOT, pool_worker
from tests.support.tiny_jobs import fleet, job, reports
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.e2e

WORK = "tests.support.tiny_jobs:work"
POOL = "jobs"
STORE = Storage(endpoint=None, bucket="never-used", prefix="", region="", client=None)


def begun(trail: Path, group: str) -> list[int]:
    """The processes in which a group's job has begun."""
    return [int(file.suffix[1:]) for file in trail.glob(f"{group}.*")]


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


def test_settings_choose_the_executor(tmp_path: Path) -> None:
    settings = {"workers": "auto", "memory": 1.5, "dask": "tls://there:8786", "pool": "p"}

    def chosen(executor: str) -> Executor:
        return executor_for(SimpleNamespace(executor=executor, **settings), tmp_path, STORE, {"A": "b"})

    assert chosen("local") == LocalExecutor("auto", 1.5)
    assert chosen("dask") == DaskExecutor("tls://there:8786", "auto", 1.5, tmp_path, {"A": "b"})
    assert chosen("pool") == PoolExecutor("p", "auto", STORE)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Prefect server, an S3 server, and two workers of a pool that come up while other tests run; their folder."""
    folder = tmp_path_factory.mktemp("served")
    with ExitStack() as stack:
        starting = stack.enter_context(ThreadPoolExecutor(1)).submit(prefect_server.running)
        store = stack.enter_context(s3.connect(StorageParams(), folder / "s3" / ".mtz"))
        starting.result()
        stack.enter_context(prefect_server.used(**store.environment()))
        with get_client(sync_client=True) as client:
            schedule.deploy_flow(client, tiny_jobs.tiny_job, "tests.support.tiny_jobs.tiny_job", "group", POOL)
        for name in ("first", "second"):
            stack.enter_context(pool_worker(POOL, folder / name))
        (folder / "endpoint").write_text(store.endpoint or "")
        yield folder


def test_dask_runs_a_killed_workers_job_on_another(served: Path, tmp_path: Path) -> None:
    jobs = [job("long", tmp_path, after=["dies"]), job("bad", tmp_path, breaks=True)]
    jobs += [job("dies", tmp_path, dies=True), job("quick", tmp_path)]
    home = tmp_path / ".mtz"
    executor = DaskExecutor("local", 2, None, home, {"PYTHONPATH": str(ROOT)}, WORK)
    found = fleet(executor, jobs)
    assert len(begun(tmp_path, "dies")) == 2
    assert {name: report["status"] for name, report in found.items()} == {
        "long": "merged",
        "bad": "failed",
        "dies": "merged",
        "quick": "merged",
    }
    assert found["bad"]["reason"] == "ValueError: as asked"
    homes = {report["home"] for report in found.values() if "home" in report}
    assert homes <= {str(home / "dask" / name / ".mtz") for name in ("worker-0", "worker-1")}
    assert not list((home / "dask").glob("*.pem"))
    with get_client(sync_client=True) as client:
        runs = client.read_task_runs(sort=TaskRunSort.END_TIME_DESC)
    states = {run.name: run.state_name for run in runs}
    assert states.items() >= {"long": "Completed", "bad": "Failed", "dies": "Completed"}.items()


def test_without_a_scheduler_nothing_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "_CONNECTING_SECONDS", 1.0)
    with pytest.raises(ExecutorFailed, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        reports(DaskExecutor("tcp://127.0.0.1:9", 1, None, tmp_path, {}, WORK), [job("any", tmp_path)])


def test_pool_runs_jobs_on_its_workers_and_reads_their_reports(served: Path, tmp_path: Path) -> None:
    place = StorageParams(endpoint=(served / "endpoint").read_text()).model_dump()
    jobs = [job("dies", tmp_path, dies=True, storage=place), job("bad", tmp_path, breaks=True, storage=place)]
    jobs += [job("good", tmp_path, storage=place)]
    with s3.connect(StorageParams(**place), tmp_path) as store:
        found = fleet(PoolExecutor(POOL, 2, store, deployment="tiny-job/group"), jobs)
    assert len(begun(tmp_path, "dies")) == 2
    assert found["dies"]["status"] == found["good"]["status"] == "merged"
    assert {found[name]["home"] for name in ("dies", "good")} <= {
        str(served / name / ".mtz") for name in ("first", "second")
    }
    assert found["bad"]["status"] == "failed"
    assert "ended as Failed and left no report" in found["bad"]["reason"]
    assert "as asked" in found["bad"]["reason"]
    with pytest.raises(ExecutorFailed, match="no work pool 'none'"):
        reports(PoolExecutor("none", "auto", STORE), jobs)


def test_an_interrupt_cancels_the_pools_runs(served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = StorageParams(endpoint=(served / "endpoint").read_text()).model_dump()
    executor = PoolExecutor("unserved", "auto", STORE, deployment="tiny-job/unserved")
    seen = threading.Event()
    monkeypatch.setattr(progress.Silent, "busy", lambda *_: seen.set())

    with get_client(sync_client=True) as client:
        schedule.deploy_flow(client, tiny_jobs.tiny_job, "tests.support.tiny_jobs.tiny_job", "unserved", "unserved")

        def states() -> list[str | None]:
            return [run.state_name for run in client.read_flow_runs() if run.name == "waits"]

        def interrupt() -> None:
            assert seen.wait(PATIENCE_SECONDS)
            os.kill(os.getpid(), signal.SIGINT)

        thread = threading.Thread(target=interrupt)
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            reports(executor, [job("waits", tmp_path, storage=place)])
        thread.join()
        until(lambda: states() == ["Cancelled"])
