"""`mtz run` on the small project: real Prefect, DVC and S3 servers, groups that succeed and fail."""

import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.support import prefect_server
from tests.support.command_line import ROOT, mtz, start
from tests.support.small_project import is_alive, make_project
from tests.support.waiting import PATIENCE_SECONDS, until

PARAMS = """
    group: small
    models:
      digits: {network: "tasks.models.example_networks:lenet5", weights: networks/any, data: data/digits.txt}
      fashion: {network: "tasks.models.example_networks:lenet5", weights: networks/any, data: data/fashion}
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
    (root / "data" / "wait").write_text("please wait\n")
    return root


@pytest.fixture
def prefect_url() -> str:
    """A server as a team has it, so that not every run has to start one."""
    return prefect_server.running()[0]


def test_interrupting_stops_everything(project: Path, prefect_url: str) -> None:
    process = start(project, "run", "--group", "slow", "--debug")
    log = project / ".mtz" / "logs" / "slow" / "collect@digits.log"

    def at_work() -> bool:
        assert process.poll() is None
        return log.exists() and "reading" in log.read_text()

    until(at_work)
    members = children_of(process.pid)
    status, _, err = mtz(project, "run", "--group", "good", PREFECT_API_URL=prefect_url)
    assert status == 1
    assert "error: a run of fleet 'nightly' is under way" in err
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "finished stages are kept" in err
    assert len(members) >= 4, "server, dvc, shell or stage"
    until(lambda: not any(map(is_alive, members)))


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
    assert loaded_by("flows.cli", "torch", "prefect", "mlflow", "boto3") == set()


def test_the_flows_do_without_torch_and_mlflow_until_they_need_them() -> None:
    assert loaded_by(
        "flows.fleet.flow, flows.group.flow, flows.commands.run, flows.jobs.pool", "torch", "mlflow", "scipy", "prefect"
    ) == {"prefect"}


def loaded_by(modules: str, *libraries: str) -> set[str]:
    program = f"import sys, {modules}; print(*({{*sys.argv[1:]}} & sys.modules.keys()))"
    command = [sys.executable, "-c", program, *libraries]
    return {*subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()}


def test_a_group_runs_and_dvc_by_hand_reaches_its_data(project: Path, prefect_url: str) -> None:
    status, out, err = mtz(project, "run", "--group", "good", PREFECT_API_URL=prefect_url)
    assert status == 0, err
    assert "[good] evaluate: executed" in out and "[good] merged" in out
    status, out, err = mtz(project, "dvc", "--group", "good", "--", "status", "--cloud")
    assert status == 0, err
    assert "are in sync" in out + err
