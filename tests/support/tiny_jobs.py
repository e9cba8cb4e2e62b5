"""Jobs and flows that do next to nothing, for workers in other processes to import."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

from prefect import flow

from flows.jobs import pool
from tasks.home import find_home
from tasks.storage.s3 import Storage
from tests.support.waiting import until

WORK = "tests.support.tiny_jobs:work"
"""The function that runs a tiny job."""

STORE = Storage(endpoint=None, bucket="never-used", prefix="", region="", client=None)
"""A storage for executors that have no use for it."""


def job(group: str, trail: Path, **settings: Any) -> dict[str, Any]:
    return {
        "fleet": "fleet",
        "kind": "group",
        "group": group,
        "fingerprint": f"of {group}",
        "settings": {"runtime": {"threads": 1}, "trail": str(trail), **settings},
        "run": "run",
    }


def begun(trail: Path, group: str) -> list[int]:
    """The processes in which a group's job has begun."""
    return [int(file.suffix[1:]) for file in trail.glob(f"{group}.*")]


def work(job: dict[str, Any]) -> dict[str, Any]:
    """Write down that the job begins, and do what its settings say.

    Settings: `breaks`; `dies` the first time; ends only once all of `beside` have begun, and those of `after` have been
    reported; `seconds` that it takes at least.
    """
    settings = job["settings"]
    trail = Path(settings["trail"])
    begun = trail / f"{job['group']}.{os.getpid()}"
    first = not list(trail.glob(f"{job['group']}.*"))
    begun.touch()
    if settings.get("breaks"):
        raise ValueError("as asked")
    if settings.get("dies") and first:
        os.kill(os.getpid(), signal.SIGKILL)
    running = trail / "running" / job["group"]
    running.parent.mkdir(exist_ok=True)
    running.touch()
    until(lambda: all(list(trail.glob(f"{other}.*")) for other in settings.get("beside", ())))
    until(lambda: all((trail / "reported" / other).exists() for other in settings.get("after", ())))
    time.sleep(settings.get("seconds", 0))
    at_once = len(list(running.parent.iterdir()))
    running.unlink()
    return {"group": job["group"], "status": "merged", "home": str(find_home()), "at_once": at_once}


@flow(name="tiny-job", persist_result=False)
def tiny_job(job: dict[str, Any]) -> None:
    pool.deliver(job, work(job), find_home())  # type: ignore[arg-type]


@flow(name="tiny-fleet", persist_result=False)
def tiny_fleet(trail: str, name: str = "run", seconds: float = 0) -> None:
    file = Path(trail) / f"{name}.{os.getpid()}"
    file.touch()
    time.sleep(seconds)


def reports(executor: Any, jobs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What each group reported; every job reports once, in the thread that runs them."""
    found: dict[str, dict[str, Any]] = {}

    def done(job: Any, report: dict[str, Any]) -> None:
        assert threading.current_thread() is thread
        assert job["group"] not in found
        found[job["group"]] = report
        reported = Path(job["settings"]["trail"]) / "reported"
        reported.mkdir(exist_ok=True)
        (reported / job["group"]).touch()

    thread = threading.current_thread()
    executor.run(jobs, done)
    assert set(found) == {job["group"] for job in jobs}
    return found


@flow(name="fleet", persist_result=False, validate_parameters=False)
def fleet(executor: Any, jobs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return reports(executor, jobs)
