"""Jobs on the workers of a pool, of which one is killed, and what is started there."""

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest
from prefect import get_client

from flows.commands import schedule
from flows.jobs.executor import ExecutorFailed
from flows.jobs.pool import PoolExecutor
from flows.results import progress
from tasks.params import StorageParams
from tasks.storage import s3
from tests.support import prefect_server, tiny_jobs
from tests.support.prefect_server import pool_worker
from tests.support.tiny_jobs import STORE, begun, fleet, job, reports
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.e2e

POOL = "jobs"


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


@pytest.mark.long
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
