"""Jobs on a Dask cluster of which a worker is killed."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect import get_client
from prefect.client.schemas.sorting import TaskRunSort

from flows.jobs import dask
from flows.jobs.dask import DaskExecutor
from flows.jobs.executor import ExecutorFailed
from tests.support import prefect_server
from tests.support.prefect_server import ROOT
from tests.support.tiny_jobs import WORK, begun, fleet, job, reports

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_server.used():
        yield


@pytest.mark.long
def test_dask_runs_a_killed_workers_job_on_another(server: None, tmp_path: Path) -> None:
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
