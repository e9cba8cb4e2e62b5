"""The whole pipeline with its services: `mtz run`, `dvc repro` by hand, a second clone, the registered model."""

from __future__ import annotations

import json
import os
import re
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
import yaml

from tests.support import interpreters, prefect_server
from tests.support.processes import command_lines
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[1]
MODEL = "lenet-300-100-digits-fashion"
OUTPUTS = (
    *("networks", "activations", "hessians", "pairing", "merged", "retrained", "plots"),
    *("metrics.json", "registration.json", "dvc.lock", "params.yaml"),
)


def clone(target: Path) -> Path:
    """The project as git would give it, with one small group: LeNet-300-100 trained for one epoch, and a budget."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines():
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    params = yaml.safe_load((target / "params.yaml").read_text())
    params |= {"group": "small", "register": {"name": MODEL}}
    for model in params["models"].values():
        model["network"] = "tasks.models.example_networks:lenet_300_100"
    for settings in params["pretrain"].values():
        settings["epochs"] = 1
    params["collect"]["images"] = 400
    params["match"] |= {"share": None, "budget": {"size": 0.35, "moves": ["share", "drop"]}}
    params["retrain"] |= {"images": 400, "iterations": 40}
    (target / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    (target / "fleet.yaml").write_text("version: 2\ngroups: {small: {}}\n")
    subprocess.run(["git", "init", "--quiet"], cwd=target, check=True)
    return target


def environment(**more: str) -> dict[str, str]:
    """The environment of a person at a terminal: this Python first in the path, no leftovers of other runs."""
    kept = {name: value for name, value in os.environ.items() if not re.match("AWS_|MTZ_|PREFECT_|MLFLOW_", name)}
    return kept | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | more


def run(folder: Path, *command: str, **variables: str) -> str:
    result = subprocess.run(
        command, cwd=folder, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


def mtz(folder: Path, *arguments: str, **variables: str) -> str:
    return run(folder, sys.executable, "-m", "flows.cli", *arguments, **interpreters.running(), **variables)


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for name in OUTPUTS for path in (folder / name, *(folder / name).rglob("*"))]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.is_file() and p.name != ".gitignore"}


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clone(tmp_path_factory.mktemp("first") / "project")


@pytest.fixture(scope="module")
def first_run(project: Path) -> str:
    return run(project, sys.executable, "-m", "flows.cli", "run")  # with interpreters, and a server, of its own


@pytest.fixture(scope="module")
def workspace(project: Path, first_run: str) -> Path:
    return project / ".mtz/workspaces/small"


@pytest.fixture
def storage(project: Path, first_run: str) -> Iterator[dict[str, str]]:
    """The variables with which other programs reach the first clone's storage while it is served."""
    server = subprocess.Popen(
        [sys.executable, "-m", "flows.cli", "s3"], cwd=project, env=environment(), stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        assert server.stdout.readline()
        exported = mtz(project, "s3", "--export")
        yield dict(re.findall(r"export (\w+)=(\S+)", exported.replace("'", "")))
    finally:
        server.terminate()
        server.wait(PATIENCE_SECONDS)


def test_a_run_executes_every_stage_and_registers_a_version(first_run: str, workspace: Path) -> None:
    assert "11 executed, 0 restored, 0 unchanged" in first_run
    assert f"models:/{MODEL}/1" in first_run
    metrics = json.loads((workspace / "metrics.json").read_text())
    assert 0.34 < metrics["stored"]["fraction"] <= 0.35
    for task in ("digits", "fashion"):
        errors = metrics["tasks"][task]
        assert errors["error_original"] < 25
        assert errors["error_retrained"] < errors["error_original"] + 5


def test_dvc_by_hand_gives_the_same_bytes(project: Path, workspace: Path, tmp_path: Path) -> None:
    by_hand = clone(tmp_path / "by-hand")
    told = run(by_hand, "dvc", "repro", **interpreters.running())
    assert told.count("Running stage") == 11
    assert contents(by_hand) == contents(workspace)
    assert "error_retrained" in run(by_hand, "dvc", "metrics", "show")
    assert "merge" in run(by_hand, "dvc", "dag")


def test_a_second_run_executes_nothing_and_says_so(project: Path, workspace: Path) -> None:
    before = contents(workspace)
    told = mtz(project, "run", "--verify", PREFECT_API_URL=prefect_server.running()[0])
    assert "Nothing to do: 1 of 1 groups unchanged, all 11 stages" in told
    assert f"models:/{MODEL}/1" in told
    assert contents(workspace) == before


def test_a_second_clone_computes_nothing(
    project: Path, workspace: Path, storage: dict[str, str], tmp_path: Path
) -> None:
    second = clone(tmp_path / "second")
    settings = [
        f"storage.endpoint={storage['AWS_ENDPOINT_URL_S3']}",
        f"tracking.uri=sqlite:///{project / '.mtz/mlflow.db'}",
    ]
    places = [word for setting in settings for word in ("--set", setting)]
    told = mtz(second, "run", "--verify", *places, **storage, PREFECT_API_URL=prefect_server.running()[0])
    assert "0 executed, 11 restored, 0 unchanged" in told
    expected, found = contents(workspace), contents(second / ".mtz/workspaces/small")
    expected.pop("params.yaml"), found.pop("params.yaml")  # it says where the storage is
    assert found == expected


def test_the_version_says_where_it_comes_from(project: Path, first_run: str) -> None:
    with closing(sqlite3.connect(project / ".mtz/mlflow.db")) as registry:
        tags = dict(registry.execute("SELECT key, value FROM model_version_tags WHERE version = 1"))
    for tag in ("content_digest", "source.digits", "source.fashion", "data.digits", "params", "code", "dvc_lock"):
        assert re.fullmatch("[0-9a-f]{64}", tags[f"mtz.{tag}"]), tag


def test_only_what_depends_on_a_setting_runs_again(project: Path, first_run: str) -> None:
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["retrain"]["iterations"] = 20
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    told = mtz(project, "run", PREFECT_API_URL=prefect_server.running()[0])
    assert re.findall(r"\[small\] (\S+): executed", told) == ["retrain", "evaluate", "register"]
    assert "3 executed, 0 restored, 8 unchanged" in told
    assert f"models:/{MODEL}/2" in told


def test_nothing_is_left_running_and_no_secret_in_a_log(project: Path, first_run: str) -> None:
    credentials = json.loads((project / ".mtz/s3/credentials.json").read_text())
    secret = max((str(value) for value in credentials.values()), key=len)
    assert secret not in first_run
    for log in [*(project / ".mtz/logs").rglob("*.log"), *(project / ".mtz/s3").glob("*.log")]:
        assert secret not in log.read_text(errors="replace"), log
    assert secret not in command_lines()
    until(lambda: str(project) not in command_lines())
