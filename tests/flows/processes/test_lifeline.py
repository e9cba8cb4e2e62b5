"""The entry of every child process: it runs a module as `python -m` would, and ends with whoever holds its pipe."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.processes import is_alive
from tests.support.waiting import until

LIFELINE = Path(__file__).parents[3] / "flows" / "processes" / "lifeline.py"

TELLS = """
import json, sys
here = sys.path[0] in ("", ".")
print(json.dumps({"argv": sys.argv, "name": __name__, "input": sys.stdin.read(), "folder first": here}))
sys.exit(7)
"""

WAITS = """
import os, subprocess, time
below = subprocess.Popen(["sleep", "3600"])
print(os.getpid(), below.pid, flush=True)
time.sleep(3600)
"""


def start(folder: Path, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-P", str(LIFELINE), *arguments],
        cwd=folder,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "tells.py").write_text(TELLS)
    (tmp_path / "waits.py").write_text(WAITS)
    return tmp_path


def test_a_file_runs_as_main_with_its_arguments_and_no_input(folder: Path) -> None:
    process = start(folder, "tells.py", "a b", "c")
    assert process.stdout is not None
    told = json.loads(process.stdout.read())
    assert told == {"argv": ["tells.py", "a b", "c"], "name": "__main__", "input": "", "folder first": False}
    assert process.wait() == 7
    process.communicate()


def test_a_module_runs_by_its_name(folder: Path) -> None:
    (folder / "given.json").write_text('{"a":\n1}')
    process = start(folder, "json.tool", "--no-indent", "given.json")
    assert process.stdout is not None
    assert process.stdout.read() == '{"a": 1}\n'
    assert process.wait() == 0
    process.communicate()


def test_the_group_dies_when_the_pipe_is_closed(folder: Path) -> None:
    process = start(folder, "waits.py")
    assert process.stdin is not None and process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert all(map(is_alive, pids))
    process.stdin.write("words are no end")
    process.stdin.flush()
    assert process.poll() is None
    process.stdin.close()
    assert process.wait() == -9
    process.stdout.close()
    until(lambda: not any(map(is_alive, pids)))
