"""Children that start by themselves: what they are given, how they end, and that none outlives its owner's wish.

Those in warm interpreters are in test_warm.py.
"""

import json
import os
import signal
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.processes import child
from flows.processes.child import Child, Interrupted, python_environment, stop_all, stopping
from tests.support.processes import is_alive
from tests.support.waiting import until

PROGRAM = """
    import json, os, signal, subprocess, sys, time
    what, *rest = sys.argv[1:]
    if what == "tell":
        print(json.dumps({"argv": sys.argv[1:], "folder": os.getcwd(), "mark": os.environ.get("MARK"),
                          "leader": os.getpgid(0) == os.getpid(), "input": sys.stdin.read()}))
        print("to standard error", file=sys.stderr)
        sys.exit(int(rest[0]))
    if what == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if what == "polite":
        signal.signal(signal.SIGTERM, lambda *_: (print("bye", flush=True), sys.exit(0)))
    if what == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    below = subprocess.Popen(["sleep", "3600"])
    print(os.getpid(), below.pid, flush=True)
    time.sleep(3600)
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    file = tmp_path / "program.py"
    file.write_text(textwrap.dedent(PROGRAM))
    return file


@pytest.fixture(autouse=True)
def own_state(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No other test is stopped along."""
    monkeypatch.setattr(child, "_running", set())
    monkeypatch.setattr(child, "_stopping", threading.Event())
    yield
    for each in list(child._running):
        each.stop()


def start(program: Path, *arguments: str, server: bool = False, **variables: str) -> Child:
    return Child([str(program), *arguments], program.parent, python_environment(**variables), server=server)


def waiting(program: Path, what: str = "wait", server: bool = False) -> tuple[Child, list[int], Iterator[str]]:
    """A child that waits, it and its own child by number, and the rest of its lines."""
    found = start(program, what, server=server)
    lines = found.lines()
    return found, [int(word) for word in next(lines).split()], lines


def test_it_gets_folder_arguments_and_variables_and_no_input(program: Path) -> None:
    found = start(program, "tell", "3", "with space", MARK="ä")
    first, second = found.lines()
    assert json.loads(first) == {
        "argv": ["tell", "3", "with space"],
        "folder": str(program.parent),
        "mark": "ä",
        "leader": True,
        "input": "",
    }
    assert second == "to standard error"
    assert found.wait() == 3 and found.ended()
    assert not child._running


def test_a_module_is_run_by_its_name(tmp_path: Path) -> None:
    found = Child(["platform", "--terse"], tmp_path, python_environment())
    (line,) = found.lines()
    assert line.startswith("Linux") and found.wait() == 0


def test_a_signal_that_ends_it_is_its_status(program: Path) -> None:
    assert start(program, "die").wait() == -signal.SIGKILL


def test_output_goes_to_a_file_where_there_is_one(program: Path, tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        assert Child([str(program), "tell", "0"], tmp_path, python_environment(), output=log).wait() == 0
    assert "to standard error\n" in (tmp_path / "log").read_text()


def test_stopping_is_polite_first(program: Path) -> None:
    found, pids, lines = waiting(program, "polite")
    found.stop()
    assert list(lines) == ["bye"]
    until(lambda: not any(map(is_alive, pids)))


def test_what_does_not_listen_is_killed(program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_GRACE_SECONDS", 0.05)
    found, pids, _ = waiting(program, "stubborn")
    found.stop()
    assert found.wait() == -signal.SIGKILL
    until(lambda: not any(map(is_alive, pids)))


def test_stopping_all_leaves_servers_and_lets_no_child_start(program: Path) -> None:
    first, second = waiting(program), waiting(program, "polite")
    server, server_pids, _ = waiting(program, server=True)
    assert not stopping()
    stop_all()
    assert stopping()
    until(lambda: not any(map(is_alive, first[1] + second[1])))
    assert all(map(is_alive, server_pids)) and not server.ended()
    with pytest.raises(Interrupted):
        start(program, "tell", "0")
    server.stop()
    until(lambda: not any(map(is_alive, server_pids)))


def test_a_stages_python_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = str(Path(sys.executable).parent)
    monkeypatch.setenv("PATH", "/usr/bin")
    found = python_environment(MARK="1")
    assert found["PATH"] == os.pathsep.join((scripts, "/usr/bin"))
    assert (found["MARK"], found["PYTHONUNBUFFERED"]) == ("1", "1")
    assert "MARK" not in os.environ
    monkeypatch.setenv("PATH", found["PATH"])
    assert python_environment()["PATH"] == found["PATH"], "once is enough"
    assert python_environment(PATH="/own")["PATH"] == "/own"
