"""Fleets by the clock: a real Prefect server and a worker that is started as people start one."""

import os
import signal
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect import get_client
from prefect.client.schemas.objects import ConcurrencyLimitStrategy
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from flows.commands import schedule
from flows.commands.schedule import InvalidSchedule, NoSchedule, NoServer, RunFailed
from flows.fleet.flow import zip_fleet
from flows.spec.request import Overlap, Request, Timetable
from tests.support import prefect_server, tiny_jobs
from tests.support.prefect_server import pool_worker
from tests.support.waiting import AGES_SECONDS, until

pytestmark = pytest.mark.e2e

POOL = "fleets"
NIGHTLY = "tiny-fleet/nightly"
CLOCK = CronSchedule(cron="0 2 * * *", timezone="Europe/Zurich")


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_server.used():
        yield


@pytest.fixture(scope="module")
def trail(server: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which the runs of the deployment leave a trail, with a worker that does them."""
    trail = tmp_path_factory.mktemp("trail")
    deploy_tiny(trail, CLOCK)
    with pool_worker(POOL, tmp_path_factory.mktemp("worker") / "here", limit=3):
        yield trail


def deploy_tiny(trail: Path, clock: CronSchedule | IntervalSchedule) -> None:
    entrypoint = "tests.support.tiny_jobs.tiny_fleet"
    with get_client(sync_client=True) as client:
        parameters = {"trail": str(trail)}
        schedule.deploy_flow(client, tiny_jobs.tiny_fleet, entrypoint, "nightly", POOL, parameters, clock, "skip")


def start(name: str = "run", seconds: float = 0, wait: bool = True) -> None:
    schedule.start(NIGHTLY, {"name": name, "seconds": seconds}, wait, print)


def test_what_is_impossible_is_refused_before_anything_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def deploy(cron: str = "0 2 * * *", timezone: str = "UTC", group_pool: str | None = None) -> None:
        schedule.deploy(Request(Path()), "n", Timetable(cron, timezone), POOL, group_pool)

    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    with pytest.raises(InvalidSchedule, match=r'cron: Invalid cron string: "0 25 \* \* \*"\. Write cron as'):
        deploy(cron="0 25 * * *")
    with pytest.raises(InvalidSchedule, match="timezone: "):
        deploy(timezone="Europe/Zurch")
    with pytest.raises(InvalidSchedule, match="Name another pool"):
        deploy(group_pool=POOL)
    # Prefect's own client would ask again and again.
    monkeypatch.setattr(schedule, "get_client", lambda **_: pytest.fail("the server was not asked for first"))
    with pytest.raises(NoServer, match=r"no Prefect server answers at PREFECT_API_URL \(http://127\.0\.0\.1:9/api\)"):
        schedule.pause("nightly")
    monkeypatch.delenv("PREFECT_API_URL")
    with pytest.raises(NoServer, match="`mtz ui`"):
        schedule.worker(POOL, None)


def test_deploying_again_changes_the_deployment(server: None, tmp_path: Path) -> None:
    def deploy(cron: str, overlap: Overlap, **changes: Any) -> str:
        return schedule.deploy(Request(tmp_path, **changes), "n", Timetable(cron, overlap=overlap), POOL, "jobs")

    assert deploy("0 2 * * *", "skip", groups=("a",)) == "zip-fleet/n"
    assert deploy("0 3 * * *", "queue", settings=("a.b=1",)) == "zip-fleet/n"
    with get_client(sync_client=True) as client:
        found = client.read_deployment_by_name("zip-fleet/n")
        assert len(client.read_automations_by_name(schedule._AUTOMATION)) == 1
        assert client.read_deployment_by_name("zip-group-job/group").work_pool_name == "jobs"
        assert client.read_work_pool(POOL).type == "process"
    assert [each.schedule for each in found.schedules] == [CronSchedule(cron="0 3 * * *", timezone="UTC")]
    files = {"project": str(tmp_path), "params": "params.yaml", "fleet": "fleet.yaml"}
    assert found.parameters == files | {"groups": [], "settings": ["a.b=1"]}
    assert found.global_concurrency_limit is not None
    assert found.global_concurrency_limit.limit == 1
    assert found.concurrency_options is not None
    assert found.concurrency_options.collision_strategy == ConcurrencyLimitStrategy.ENQUEUE
    with get_client(sync_client=True) as client, pytest.raises(InvalidSchedule, match="gruops"):
        schedule.deploy_flow(client, zip_fleet, "flows.fleet.flow.zip_fleet", "n", POOL, {"gruops": ["a"]})


def test_one_run_at_a_time_and_a_killed_one_blocks_no_other(trail: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start("long", AGES_SECONDS, wait=False)
    until(lambda: bool(list(trail.glob("long.*"))))
    with pytest.raises(RunFailed, match="ended as Cancelled: Deployment concurrency limit reached"):
        start("other")
    (long,) = trail.glob("long.*")
    os.kill(int(long.suffix[1:]), signal.SIGKILL)
    with get_client(sync_client=True) as client:
        until(lambda: not [run for run in client.read_flow_runs() if run.state_name == "Running"])
    start("after")
    assert [path.stem for path in trail.iterdir() if path.stem in ("other", "after")] == ["after"]
    capsys.readouterr()
    schedule.status(NIGHTLY, print)
    told = capsys.readouterr().out
    assert told.startswith("tiny-fleet/nightly: 0 2 * * * (Europe/Zurich)\npool fleets: 1 worker\n")
    assert {word for word in ("Crashed", "Cancelled", "Completed") if word in told} == {
        "Crashed",
        "Cancelled",
        "Completed",
    }


def test_wrong_parameters_and_names_are_told(trail: Path) -> None:
    with pytest.raises(InvalidSchedule, match="nmae"):
        schedule.start(NIGHTLY, {"nmae": "x"}, False, print)
    with pytest.raises(NoSchedule, match="no deployment 'zip-fleet/none'"):
        schedule.status("none", print)


@pytest.mark.long
def test_the_clock_starts_runs_unless_paused(trail: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def told() -> str:
        capsys.readouterr()
        schedule.status(NIGHTLY, print)
        return capsys.readouterr().out

    deploy_tiny(trail, IntervalSchedule(interval=timedelta(seconds=4)))
    until(lambda: bool(list(trail.glob("run.*"))))
    assert "\nnext  20" in told()
    schedule.pause(NIGHTLY)
    assert ", paused\n" in told()
    assert "\nnext" not in told()
    schedule.resume(NIGHTLY)
    assert "paused" not in told()
    until(lambda: "\nnext  20" in told())
    schedule.pause(NIGHTLY)
