"""Warm interpreters: a child is what a process of its own would be, and never outlives whoever asked for it."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.group.dvc import Pipeline
from flows.processes import warm
from flows.processes.child import Child, _start_cold, python_environment
from flows.results.stage_result import StageFailed
from tasks.warm_client import VARIABLE, Running
from tests.support.processes import is_alive, own_children
from tests.support.stages import make_lenets
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[3]
LIFELINE = ROOT / "flows" / "processes" / "lifeline.py"

PROGRAM = """
    from tasks.warm_client import hand_over
    if __name__ == "__main__":
        hand_over()
    import atexit, json, numpy, os, random, signal, subprocess, sys, threading, time, warnings
    what, *rest = sys.argv[1:]
    if what == "tell":
        umask = os.umask(0)
        os.umask(umask)
        print(json.dumps({
            "argv": sys.argv, "path": sys.path, "folder": os.getcwd(), "environment": dict(os.environ), "umask": umask,
            "file": __file__, "main": sys.modules["__main__"].__spec__.name, "name": __name__, "package": __package__,
            "signals": {n: str(signal.getsignal(n)) for n in sorted(signal.valid_signals())},
            "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "input": sys.stdin.read(),
            "flags": repr(sys.flags), "streams": [
                repr((stream.name, stream.encoding, stream.errors, stream.line_buffering, stream.write_through))
                for stream in (sys.stdout, sys.stderr)
            ],
            "leader": os.getpgid(0) == os.getpid(),
        }))
        print(random.random(), numpy.random.random())
    if what == "spoil":
        os.environ["SPOILED"] = "1"
        os.chdir("/")
        os.umask(0o77)
        sys.path.insert(0, "/spoiled")
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        warnings.simplefilter("error")
    if what == "end":
        atexit.register(lambda: print("at exit", flush=True))
        threading.Thread(target=lambda: (threading.main_thread().join(), print("thread"))).start()
        sys.stdout.write("not flushed\\n")
        exec(rest[0])
    if what == "wait":
        below = subprocess.Popen(["sleep", "3600"])
        print(os.getpid(), below.pid, flush=True)
        time.sleep(3600)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a package `tasks` that hands its work over as the stages' does."""
    root = tmp_path_factory.mktemp("work")
    (root / "tasks").mkdir()
    shutil.copy(ROOT / "tasks" / "warm_client.py", root / "tasks")
    (root / "tasks" / "__init__.py").touch()
    (root / "tasks" / "__main__.py").write_text(textwrap.dedent(PROGRAM))
    (root / "dvc.py").write_text(textwrap.dedent(PROGRAM))
    return root


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Interpreters that have imported next to nothing, so that a test takes no time; their home."""
    monkeypatch.setattr(warm, "PRELOADED", {"dvc": ("numpy",), "tasks": ("numpy.random",)})
    with warm.serving(tmp_path / ".mtz"):
        yield tmp_path / ".mtz"


def start(
    folder: Path, *arguments: str, cold: bool = False, sockets: Path | None = None, **variables: str
) -> "subprocess.Popen[str]":
    environment = python_environment(**variables)
    if cold:
        del environment[VARIABLE]
    if sockets:
        environment[VARIABLE] = str(sockets)
    return subprocess.Popen(
        ["python", "-m", "tasks", *arguments],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    folder: Path, *arguments: str, cold: bool = False, sockets: Path | None = None, **variables: str
) -> tuple[int, str, str]:
    process = start(folder, *arguments, cold=cold, sockets=sockets, **variables)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err


_others: list[int] = []


@pytest.fixture(autouse=True)
def other_servers() -> None:
    """Remember the servers that other tests have started."""
    _others[:] = own_children("warm_server.py")


def servers() -> list[int]:
    """The servers of this test."""
    return [pid for pid in own_children("warm_server.py") if pid not in _others]


def parent(pid: int) -> int:
    """The process that started it; 0 if it is gone."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def children(pid: int) -> str:
    return Path(f"/proc/{pid}/task/{pid}/children").read_text()


def test_a_child_is_what_a_process_of_its_own_would_be(folder: Path, served: Path) -> None:
    def on_progress(cold: bool = False) -> tuple[dict[str, object], set[str]]:
        status, out, err = run(folder, "tell", "with space", cold=cold, MARK="ä\udcff")
        assert (status, err) == (0, "")
        about, drawn = out.splitlines()
        return json.loads(about), set(drawn.split())

    about, drawn = on_progress(cold=True)
    assert about.pop("leader") is False
    first, second = on_progress(), on_progress()
    assert first[0] == about | {"leader": True}
    assert len(drawn | first[1] | second[1]) == 6, "no random number is drawn twice"
    assert run(folder, "spoil")[0] == 0
    assert on_progress()[0] == first[0]


@pytest.mark.parametrize(
    "code",
    ["pass", "sys.exit(0)", "sys.exit(3)", "sys.exit(259)", "sys.exit('why')", "1 / 0", "raise KeyboardInterrupt"],
)
def test_it_ends_as_a_process_of_its_own(folder: Path, served: Path, code: str) -> None:
    cold = run(folder, "end", code, cold=True)
    status, out, err = run(folder, "end", code)
    assert (status, out) == cold[:2]
    assert "at exit" in out and "thread" in out and "not flushed" in out
    assert err.splitlines()[-1:] == cold[2].splitlines()[-1:]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_that_ends_a_child_ends_its_requester(folder: Path, served: Path, number: signal.Signals) -> None:
    assert run(folder, "end", f"os.kill(os.getpid(), {number})")[0] == -number


def test_a_killed_requester_takes_everything_below_along(folder: Path, served: Path) -> None:
    process = start(folder, "wait")
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    assert all(map(is_alive, pids))
    process.kill()
    process.communicate()
    until(lambda: not any(map(is_alive, pids)))
    until(lambda: not any(children(server) for server in servers()))


def test_a_killed_server_is_replaced(folder: Path, served: Path) -> None:
    process = start(folder, "wait")
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    server = parent(pids[0])
    os.kill(server, signal.SIGKILL)
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    process.communicate()
    until(lambda: not any(map(is_alive, pids)))
    until(lambda: len(servers()) == 2)
    assert run(folder, "end", "pass")[2] == ""


def test_without_a_server_a_process_starts_by_itself_and_says_so(folder: Path, tmp_path: Path) -> None:
    status, out, err = run(folder, "end", "sys.exit(3)", sockets=tmp_path)
    assert status == 3 and "thread" in out
    assert err.startswith("The warm interpreter is not used: it does not answer: No such file")
    child = Child(["dvc", "--version"], tmp_path, python_environment(**{VARIABLE: str(tmp_path)}))
    said, version = child.lines()
    assert said.startswith("The warm interpreter is not used: ") and version[0].isdigit()
    assert child.wait() == 0


def test_what_is_read_at_start_only_is_not_ignored(folder: Path, served: Path) -> None:
    status, out, err = run(folder, "end", "print(os.environ['OMP_NUM_THREADS'])", OMP_NUM_THREADS="7")
    assert status == 0 and out.startswith("not flushed\n7\n")
    assert "another value of the environment variable OMP_NUM_THREADS" in err and err.count("\n") == 1


def test_nothing_is_left_of_a_killed_owner(folder: Path, tmp_path: Path) -> None:
    program = (
        "import os, sys, pathlib, time; from flows.processes import warm; warm.PRELOADED = {'tasks': ()}\n"
        "with warm.serving(pathlib.Path(sys.argv[1])):\n"
        "    print(os.environ['MTZ_WARM'], flush=True); time.sleep(3600)"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    place = Path(owner.stdout.readline().strip())
    process = start(folder, "wait", sockets=place)
    assert process.stdout is not None
    pids = [int(word) for word in process.stdout.readline().split()]
    pids.append(parent(pids[0]))
    owner.kill()
    owner.communicate()
    assert process.wait(PATIENCE_SECONDS) == -signal.SIGKILL
    process.communicate()
    until(lambda: not any(map(is_alive, pids)) and not place.exists())


def test_the_sockets_are_private_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warm, "PRELOADED", {"tasks": ()})
    monkeypatch.setenv(VARIABLE, "before")
    with warm.serving(tmp_path):
        place = Path(os.environ[VARIABLE])
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert (place / "tasks").is_socket()
        assert len(servers()) == 1
        with warm.serving(tmp_path):
            assert os.environ[VARIABLE] == str(place), "one set is enough"
    assert os.environ[VARIABLE] == "before" and not place.exists() and not servers()


class TestChild:
    """`dvc`, which a flow starts without a process in between. A module of that name stands for it."""

    def start(self, folder: Path, *arguments: str, **options: object) -> Child:
        environment = python_environment()
        return Child([str(folder / "dvc.py"), *arguments], folder, environment, **options)  # type: ignore[arg-type]

    def test_lines_come_when_they_are_printed(self, folder: Path, served: Path, tmp_path: Path) -> None:
        read = tmp_path / "read"
        waits = f"while not os.path.exists({str(read)!r}): time.sleep(0.01)"
        child = self.start(folder, "end", f"print('first')\n{waits}\nsys.exit(3)")
        lines = child.lines()
        assert [next(lines), next(lines)] == ["not flushed", "first"]
        assert not child.ended()
        read.touch()
        assert list(lines) == ["thread", "at exit"]
        assert child.wait() == 3 and child.ended()

    def test_stopping_ends_the_group(self, folder: Path, served: Path) -> None:
        child = self.start(folder, "wait")
        pids = [int(word) for word in next(child.lines()).split()]
        statuses: list[int] = []
        waiting = threading.Thread(target=lambda: statuses.append(child.wait()))
        waiting.start()
        child.stop()
        waiting.join(PATIENCE_SECONDS)
        assert statuses == [-signal.SIGTERM]
        until(lambda: not any(map(is_alive, pids)))
        until(lambda: not any(children(server) for server in servers()))

    def test_output_to_a_file(self, folder: Path, served: Path, tmp_path: Path) -> None:
        with (tmp_path / "log").open("wb") as log:
            child = self.start(folder, "end", "print(1, file=sys.stderr, flush=True)", output=log)
            assert child.wait() == 0
        assert (tmp_path / "log").read_text().split("\n") == ["not flushed", "1", "thread", "at exit", ""]


DVC_YAML = """
    stages:
      good:
        cmd: python -m tasks end "open('out', 'w').write('done')"
        outs: [out]
      killed:
        cmd: python -m tasks end "os.kill(os.getpid(), 9)"
      orphan:
        cmd: python -m tasks end "os.kill(os.getppid(), 9); time.sleep(3600)"
"""


def test_dvc_and_its_stages(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage that runs warm below a DVC that does: outcomes, what can be tried again, and no start of DVC."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "state"))
    monkeypatch.setitem(warm.PRELOADED, "tasks", ("numpy.random",))
    project = tmp_path / "project"
    shutil.copytree(folder, project)
    (project / ".dvc").mkdir()
    (project / ".dvc" / "config").write_text("[core]\n    no_scm = true\n    analytics = false\n")
    (project / "dvc.yaml").write_text(textwrap.dedent(DVC_YAML))
    pipeline = Pipeline(project)
    cold_starts: list[Sequence[str]] = []

    def counted(arguments: Sequence[str], *rest: Any) -> Any:
        cold_starts.append(arguments)
        return _start_cold(arguments, *rest)

    monkeypatch.setattr("flows.processes.child._start_cold", counted)
    assert pipeline.changes().keys() == {"good", "killed", "orphan"}
    assert len(cold_starts) == 1
    with warm.serving(tmp_path / ".mtz"):
        lines: list[str] = []
        assert pipeline.reproduce("good", on_progress=lines.append).outcome == "executed"
        assert not any("warm interpreter" in line for line in lines) and {"thread", "at exit"} <= set(lines)
        assert (project / "out").read_text() == "done"
        for stage in ("killed", "orphan"):
            with pytest.raises(StageFailed, match=r"was killed \(signal 9\)") as failure:
                pipeline.reproduce(stage)
            assert failure.value.can_be_retried
        assert pipeline.changes().keys() == {"killed", "orphan"}
    assert len(cold_starts) == 1, "DVC did not start anew"


TOO_MUCH = """
    def run(params, workspace, model):
        import {library}
        {library}.empty(3 << 28)
"""


PROBE = """
    import sys, torch
    own = {name.partition(".")[0] for name in sys.modules} & {"dvc", "flows", "mtz_core", "tasks"}
    print(torch.get_num_threads(), torch.are_deterministic_algorithms_enabled(), sorted(own))
    print(torch.rand(1))
"""


@pytest.mark.long
def test_stages(tmp_path: Path) -> None:
    """With all libraries: the same bytes as without them, nothing of one stage in the next, limits."""
    project = tmp_path / "project"
    make_lenets(project)
    for package in ("tasks", "mtz_core"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    params = yaml.safe_load((project / "params.yaml").read_text()) | {"runtime": {"threads": 2}}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    (project / "probe.py").write_text(textwrap.dedent(PROBE))
    written: dict[bool, dict[str, bytes]] = {}
    with warm.serving(tmp_path / ".mtz"):
        for cold in (True, False):
            status, _, err = run(project, "collect", "a", cold=cold)
            assert (status, err) == (0, "")
            written[cold] = {path.name: path.read_bytes() for path in project.glob("activations/a/*")}
            shutil.rmtree(project / "activations")
        assert written[True] == written[False] and written[True]

        first, second, cold_one = probed(project), probed(project), probed(project, cold=True)
        assert first[0] == second[0] == cold_one[0]
        assert len({first[1], second[1], cold_one[1]}) == 3, "no random number is drawn twice"
        (stages,) = (pid for pid in servers() if "torch" in Path(f"/proc/{pid}/cmdline").read_text())
        threads = [name.read_text().strip() for name in Path(f"/proc/{stages}/task").glob("*/comm")]
        assert set(threads[1:]) <= {"jemalloc_bg_thd"}, "whatever else runs may hold a lock while a child is forked"

        for library, cold in (("numpy", False), ("torch", True)):
            (project / "tasks" / "stages" / "hessians.py").write_text(textwrap.dedent(TOO_MUCH).format(library=library))
            status, _, err = run(project, "hessians", "a", cold=cold, MTZ_MEMORY_LIMIT=str(2 << 30))
            assert status == 1
            assert err.startswith("error: the memory did not suffice within the limit of 2,147,483,648 bytes. Raise ")
            assert err.count("\n") == 1


def probed(project: Path, cold: bool = False) -> list[str]:
    """The lines that the probe prints, run by the stages' interpreter or in a process of its own."""
    if cold:
        command = [sys.executable, "probe.py"]
        return subprocess.run(command, cwd=project, capture_output=True, text=True, check=True).stdout.splitlines()
    reading, writing = os.pipe()
    with open(reading) as out, open(writing, "w") as sink, open(os.devnull) as nothing:  # noqa: PTH123
        streams = (nothing.fileno(), sink.fileno(), sink.fileno())
        address = Path(os.environ[VARIABLE], "tasks")
        running = Running(address, [str(project / "probe.py")], project, python_environment(), streams)
        sink.close()
        assert running.wait() == 0
        return out.read().splitlines()
