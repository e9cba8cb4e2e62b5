"""`mtz run` on the small project: real Prefect, DVC and S3 servers, groups that succeed and fail."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from flows import services
from tests.flows.small_project import is_alive, make_project

ROOT = Path(__file__).parents[2]

PARAMS = """
    group: small
    models:
      digits: {network: "tasks.networks:lenet5", weights: networks/any, data: data/digits.txt}
      fashion: {network: "tasks.networks:lenet5", weights: networks/any, data: data/fashion}
    collect: {images: 1}
    match: {share: 1.0}
    evaluate: {batch_size: 1}
    register: {name: small}
    flow: {workers: 2, retries: 1, retry_delay_seconds: 0}
"""

FLEET = """
    version: 2
    name: nightly
    groups:
      good: {}
      bad: {params: {models: {digits: {data: data/refuse}}, register: {name: bad}}}
      gone: {params: {models: {digits: {data: data/gone}}, register: {name: gone}}}
      slow: {params: {models: {digits: {data: data/wait}}, register: {name: slow}}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fleet") / "project"
    make_project(root)
    (root / "params.yaml").write_text(textwrap.dedent(PARAMS))
    (root / "fleet.yaml").write_text(textwrap.dedent(FLEET))
    (root / "networks").mkdir()
    (root / "networks" / "any").touch()
    (root / "data" / "refuse").write_text("please refuse\n")
    (root / "data" / "wait").write_text("please wait\n")
    (root / "data" / "gone").mkdir()
    return root


@pytest.fixture(scope="module")
def prefect_url(project: Path) -> Iterator[str]:
    """A server as a team has it, so that not every run has to start one."""
    with services.prefect_server(project / ".mtz") as server:
        server.wait()
        yield f"{server.url}/api"


@pytest.fixture
def heard() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A webhook's address, and what it has received."""
    received: list[dict[str, Any]] = []

    class Hook(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(503 if len(received) == 1 else 200)
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hook) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/secret-token", received
        server.shutdown()


def start(project: Path, *arguments: str, output: Path | None = None, **variables: str) -> "subprocess.Popen[str]":
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MTZ_", "PREFECT_", "AWS_"))
    }
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=project,
        env={**environment, "PYTHONPATH": str(ROOT), **variables},
        stdout=subprocess.PIPE if output is None else output.open("wb"),
        stderr=subprocess.PIPE if output is None else subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def mtz(project: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run the command; return its status and what it printed."""
    process = start(project, *arguments, output=None, **variables)
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def last_run(project: Path) -> dict[str, Any]:
    """What the last run has recorded: group → its row."""
    record = json.loads((project / ".mtz" / "runs" / "nightly" / "last.json").read_text())
    return {row["group"]: row for row in record["groups"]}


def test_failing_groups_stop_no_other_and_are_tried_again(
    project: Path, prefect_url: str, heard: tuple[str, list[dict[str, Any]]]
) -> None:
    url, received = heard
    three = ("--group", "good", "--group", "bad", "--group", "gone")
    (project / "data" / "gone").rmdir()
    (project / "data" / "gone").symlink_to("vanished")
    status, out, err = mtz(project, "run", *three, PREFECT_API_URL=prefect_url, MTZ_WEBHOOK_URL=url)
    assert status == 1
    assert "error: group 'bad': collect@digits: the data asks to be refused. Give other data." in err
    assert "group 'gone': data/gone does not exist in" in err
    assert "Traceback" not in out + err and "secret-token" not in out + err
    assert "[good] merged" in out and "[good] evaluate: executed" in out
    assert (project / ".mtz" / "workspaces" / "good" / "metrics.txt").exists()
    assert {name: row["status"] for name, row in last_run(project).items()} == {
        "good": "merged",
        "bad": "failed",
        "gone": "failed",
    }
    log = Path(last_run(project)["bad"]["log"])
    assert "asks to be refused" in log.read_text() and str(log) in out
    assert len(received) == 2, "a webhook that is away for a moment is tried again"
    assert received[1]["text"].startswith("Fleet nightly: 2 failed, 1 merged. Failed: bad: collect@digits: the data")

    (project / "data" / "gone").unlink()
    (project / "data" / "gone").write_text("here again\n")
    status, out, err = mtz(project, "fleet", "retry", PREFECT_API_URL=prefect_url, MTZ_WEBHOOK_URL="no address")
    assert status == 1 and list(last_run(project)) == ["bad", "gone"]
    assert last_run(project)["gone"]["status"] == "merged"
    assert "warning: nobody was told: the address in MTZ_WEBHOOK_URL cannot be used (ValueError)" in out

    (project / "data" / "refuse").write_text("please do\n")
    status, out, err = mtz(project, "run", *three, PREFECT_API_URL=prefect_url)
    assert status == 0, err
    assert [row["status"] for row in last_run(project).values()] == ["unchanged", "merged", "unchanged"]
    status, out, err = mtz(project, "fleet", "retry", PREFECT_API_URL=prefect_url)
    assert status == 0 and "Nothing to retry" in out


def test_interrupting_stops_everything(project: Path, prefect_url: str) -> None:
    process = start(project, "run", "--group", "slow", "--debug")
    log = project / ".mtz" / "logs" / "slow" / "collect@digits.log"
    deadline = time.monotonic() + 120
    while not (log.exists() and "reading" in log.read_text()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    members = children_of(process.pid)
    status, _, err = mtz(project, "run", "--group", "good", PREFECT_API_URL=prefect_url)
    assert status == 1
    assert "error: a run of fleet 'nightly' is under way" in err
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished stages are kept" in err
    assert len(members) >= 4, "server, dvc, shell or stage"
    assert not [pid for pid in members if is_alive(pid)]


def children_of(parent: int) -> list[int]:
    """All processes that descend from this one."""
    listing = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
    parents = {int(pid): int(ppid) for pid, ppid in map(str.split, listing.splitlines())}
    found = [parent]
    for pid in found:
        found.extend(child for child, its_parent in parents.items() if its_parent == pid)
    return found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "god"], "there is no group 'god'; did you mean 'good'?"),
        (["--set", "retrain.iteration=3"], "retrain.iteration: unknown key"),
        (["--set", "retrain"], "--set retrain: write it as key.path=value"),
        (["--params", "none.yaml"], "none.yaml: No such file"),
        (["--set", "models.digits.data=data/none"], "models.digits.data: there is no data/none"),
        (["--fleet", "other.yaml"], "other.yaml: version: 7 is not known here"),
    ],
)
def test_wrong_settings_are_told_in_one_line(project: Path, arguments: list[str], message: str) -> None:
    (project / "other.yaml").write_text("version: 7\n")
    status, _, err = mtz(project, "run", *arguments)
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_help_teaches_and_is_quick(project: Path) -> None:
    for command in ("run", "check", "pareto", "ui", "s3", "dvc"):
        status, out, _ = mtz(project, command, "--help")
        assert status == 0
        assert "Example: mtz " in out
    program = "import sys, flows.cli; print({'torch', 'prefect', 'mlflow', 'boto3'} & sys.modules.keys())"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert loaded.strip() == "set()"


def test_dvc_by_hand_reaches_the_storage(project: Path) -> None:
    status, out, err = mtz(project, "dvc", "--group", "good", "--", "status", "--cloud")
    assert status == 0, err
    assert "are in sync" in out + err
