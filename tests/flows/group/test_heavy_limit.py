"""Places for heavy stages, on a real Prefect server."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect import get_client
from prefect.exceptions import ObjectNotFound

from flows.group import heavy_limit
from tests.support import prefect_server
from tests.support.prefect_server import ROOT
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module", autouse=True)
def home() -> Iterator[Path]:
    with prefect_server.used() as home:
        yield home


def held() -> int:
    with get_client(sync_client=True) as client:
        return client.read_global_concurrency_limit_by_name(heavy_limit.HEAVY).active_slots


def test_no_more_than_the_limit_at_a_time() -> None:
    heavy_limit.ensure(5)
    heavy_limit.ensure(1)
    inside: list[int] = []
    most: list[int] = []

    def stage(number: int) -> None:
        with heavy_limit.heavy_place(1):
            inside.append(number)
            most.append(len(inside))
            time.sleep(0.3)
            inside.remove(number)

    threads = [threading.Thread(target=stage, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_SECONDS)
    assert most == [1, 1, 1]
    assert held() == 0


def test_the_place_of_a_killed_holder_comes_free(home: Path) -> None:
    heavy_limit.ensure(1)
    leases = home / "prefect" / "concurrency_leases"
    before = {*leases.glob("*.json")}  # of other tests
    program = "import time\nfrom flows.group import heavy_limit\nwith heavy_limit.heavy_place(1):\n    time.sleep(3600)"
    holder = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
    until(lambda: held() == 1 and bool(new_leases(leases, before)))
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    end = datetime.fromisoformat(pass_over_lease(leases, before))
    assert end < datetime.now(UTC) + timedelta(seconds=heavy_limit.LEASE_SECONDS)
    with heavy_limit.heavy_place(1):
        assert held() == 1


def new_leases(folder: Path, before: set[Path]) -> list[Path]:
    """Those that the server has written down whole: in a file of their own, and then in the list of ends."""
    ends = folder / "expirations.json"
    listed = json.loads(ends.read_text()) if ends.exists() else {}
    return [path for path in folder.glob("*.json") if path not in before and path.stem in listed]


def pass_over_lease(folder: Path, before: set[Path]) -> str:
    """Set the end of the lease that is new to now, instead of waiting for it; return when it would have been."""
    now = datetime.now(UTC).isoformat()
    (path,) = new_leases(folder, before)
    lease = json.loads(path.read_text())
    path.write_text(json.dumps({**lease, "expiration": now}))
    (folder / "expirations.json").write_text(json.dumps({lease["id"]: now}))
    return str(lease["expiration"])


def test_without_a_limit_nothing_is_asked() -> None:
    heavy_limit.ensure(1)
    heavy_limit.ensure(None)
    heavy_limit.ensure(None)
    with get_client(sync_client=True) as client, pytest.raises(ObjectNotFound):
        client.read_global_concurrency_limit_by_name(heavy_limit.HEAVY)
    with heavy_limit.heavy_place(None):
        pass
    with pytest.raises(heavy_limit.NoPlace, match=r"flow\.heavy"), heavy_limit.heavy_place(1):
        pytest.fail("there is no such limit")
