"""A Dask cluster on this machine: places that are kept filled, and a certificate that only its owner reads."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed.security import Security

from flows.jobs import dask_cluster
from flows.jobs.dask_cluster import Cluster, _certificate, _Keeper, _Worker
from tasks.warm_client import VARIABLE
from tests.support.waiting import until

TELLS = """
import json, os, sys
print(json.dumps(sys.argv[1:]), *(os.environ.get(name) for name in ("MTZ_HOME", "PREFECT_HOME", "MARK", "MTZ_WARM")))
"""
WAITS = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(3600)\n"


@pytest.fixture
def workers(tmp_path: Path) -> Iterator[list[_Worker]]:
    """Workers that a test makes; stopped at its end."""
    (tmp_path / "tells.py").write_text(TELLS)
    (tmp_path / "waits.py").write_text(WAITS)
    made: list[_Worker] = []
    yield made
    for worker in made:
        worker.stop()


def make(workers: list[_Worker], folder: Path, program: str, name: str = "worker-0") -> _Worker:
    workers.append(_Worker(folder / name, [str(folder / program), "given"], {"MARK": "1", VARIABLE: "no such folder"}))
    return workers[-1]


def said(folder: Path, name: str = "worker-0") -> list[str]:
    return (folder / name / "worker.log").read_text().splitlines()


def ended(worker: _Worker) -> bool:
    return worker._child is not None and worker._child.ended()


def test_a_worker_has_a_folder_and_a_home_of_its_own(workers: list[_Worker], tmp_path: Path) -> None:
    worker = make(workers, tmp_path, "tells.py")
    worker.keep()
    until(lambda: ended(worker))
    own = tmp_path / "worker-0"
    arguments = f'["given", "--name", "worker-0", "--local-directory", "{own / "dask"}"]'
    assert said(tmp_path) == [f"{arguments} {own / '.mtz'} {own / '.mtz' / 'prefect'} 1 None"]


def test_one_that_died_is_replaced_and_waited_for_ever_longer(
    workers: list[_Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(dask_cluster, "time", SimpleNamespace(monotonic=lambda: now[0]))
    worker = make(workers, tmp_path, "tells.py")
    starts = []
    worker.keep()
    for _ in range(7):
        until(lambda: ended(worker))
        before, waited = worker._child, 0
        while worker._child is before:
            worker.keep()
            if worker._child is before:
                waited += 1
                now[0] += 1
        starts.append(waited)
    assert starts == [0, 2, 4, 8, 16, 30, 30]


def test_a_long_life_is_no_reason_to_wait(
    workers: list[_Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr(dask_cluster, "time", SimpleNamespace(monotonic=lambda: now[0]))
    worker = make(workers, tmp_path, "tells.py")
    worker.keep()
    worker._short_lives = 4
    until(lambda: ended(worker))
    now[0] += 31
    worker.keep()
    assert worker._short_lives == 0


def test_all_places_are_filled_until_they_are_stopped(
    workers: list[_Worker], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dask_cluster, "_WATCH_SECONDS", 0.02)
    keeper = _Keeper([make(workers, tmp_path, "waits.py", f"worker-{number}") for number in range(2)])
    keeper.start()
    until(lambda: all(said(tmp_path, f"worker-{number}") for number in range(2)))
    (first,) = said(tmp_path)
    os.kill(int(first), 9)
    until(lambda: len(said(tmp_path)) == 2)
    keeper.stop()
    assert all(worker._child is None for worker in workers)
    assert not keeper._thread.is_alive()


def test_whoever_may_not_read_the_certificate_can_run_nothing(tmp_path: Path) -> None:
    security: Security = Security.temporary()  # type: ignore[no-untyped-call]
    file = tmp_path / "certificate.pem"
    file.write_text("left by a killed run")
    with _certificate(security, file) as found:
        assert found == file and stat.S_IMODE(file.stat().st_mode) == 0o600
        content = file.read_text()
        assert "PRIVATE KEY" in content and "BEGIN CERTIFICATE" in content and "left by" not in content
        assert "PRIVATE KEY" not in repr(Cluster("tls://here", security))
    assert not file.exists()
