"""Tests of the register stage on a small workspace, with a real registry and a real S3."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import save_model
from torch import nn

from tasks.artifacts.paths import Workspace
from tasks.files import InvalidArtifact, write_json, write_table
from tasks.params import Params, load_params
from tasks.registry import mlflow_client, upload
from tasks.registry.build import gather
from tasks.stages import register
from tasks.storage.s3 import Storage
from tests.support.services import Place, Registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def workspace(
    zipped: Path,
    networks: dict[str, nn.Module],
    place: Place,
    registry: Registry,
    home: Path,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> Workspace:
    """What the stages before this one leave behind."""
    monkeypatch.setenv("MTZ_HOME", str(home))
    workspace = Workspace(tmp_path / "workspace")
    shutil.copytree(zipped, workspace.retrained)
    for name, network in networks.items():
        (workspace.root / "networks").mkdir(exist_ok=True)
        save_model(network, str(workspace.root / "networks" / f"{name}.safetensors"))
        (workspace.root / "data" / name).mkdir(parents=True)
        (workspace.root / "data" / name / "train.parquet").write_bytes(name.encode() * 10)
    for code in ("mtz_core", "tasks"):
        shutil.copytree(ROOT / code, workspace.root / code, ignore=shutil.ignore_patterns("__pycache__"))
    models = {
        name: {
            "network": "tasks.models.example_networks:lenet5",
            "weights": f"networks/{name}.safetensors",
            "data": f"data/{name}",
        }
        for name in networks
    }
    settings = {
        "group": "tiny",
        "models": models,
        "register": {"name": re.sub(r"\W", "-", request.node.name)},
        "storage": dataclasses.asdict(place),
        "tracking": dataclasses.asdict(registry),
    }
    workspace.params.write_text(yaml.safe_dump(settings))
    errors = {"error_original": 1.0, "error_zipped": 3.0, "error_retrained": 2.0, "agreement_retrained": 97.0}
    write_json(workspace.metrics, {"tasks": dict.fromkeys(networks, errors), "stored": {"fraction": 0.5}})
    group = {"shared": 12, "kept": {"a": 12, "b": 12}, "cost": 0.25, "members": [[i, i] for i in range(12)]}
    found = {"tasks": list(networks), "groups": {"1": group}, "descent": [], "keep": {}, "search": None}
    write_json(workspace.pairing, found)
    curve = [(0, "a", "", 2.0, True), (0, "b", "", 3.0, True), (10, "a", 1.5, 1.0, True), (10, "b", 1.5, 2.0, True)]
    columns = ("iteration", "task", "training_loss", "validation_loss", "best")
    write_table(workspace.plots / "learning_curve.csv", columns, curve)
    lock = {"schema": "2.0", "stages": {"evaluate": {"cmd": "python -m tasks evaluate"}}}
    (workspace.root / "dvc.lock").write_text(yaml.safe_dump(lock))
    return workspace


@pytest.fixture
def params(workspace: Workspace) -> Params:
    return load_params(workspace.params)


@pytest.fixture
def number(params: Params, workspace: Workspace, home: Path, store: Storage) -> Callable[[], int | None]:
    """Asks for the version that the workspace's registration stands for."""
    return lambda: upload.verify(params, workspace, home, store)


def folder_of(workspace: Workspace) -> str:
    return str(json.loads(workspace.registration.read_text())["release"])


def test_the_stage_registers_once_and_says_where(
    params: Params, workspace: Workspace, number: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    assert number() is None
    register.run(params, workspace)
    said, written = capsys.readouterr(), workspace.registration.read_bytes()
    assert "registered: " in said.out.splitlines()[-1]
    assert "version 1" in said.out.splitlines()[-1]
    assert said.err == ""
    assert number() == 1
    register.run(params, workspace)
    assert "there already" in capsys.readouterr().out
    assert workspace.registration.read_bytes() == written
    assert number() == 1


def test_the_bundle_is_the_release(params: Params, workspace: Workspace, store: Storage, tmp_path: Path) -> None:
    register.run(params, workspace)
    names = store.get_folder(folder_of(workspace), tmp_path / "bundle")
    assert names == [
        "dvc.lock",
        "metrics.json",
        "network/manifest.json",
        "network/weights.safetensors",
        "pairing/pairing.json",
        "params.yaml",
        "plots/learning_curve.csv",
        "release.json",
    ]
    weights = tmp_path / "bundle" / "network" / "weights.safetensors"
    assert weights.read_bytes() == (workspace.retrained / "weights.safetensors").read_bytes()
    manifest = json.loads((tmp_path / "bundle" / "release.json").read_text())
    assert manifest["content_digest"] == json.loads(workspace.registration.read_text())["content_digest"]
    assert set(manifest["files"]) == set(names) - {"release.json"}


def test_weights_in_a_folder_are_a_source_like_any_other(params: Params, workspace: Workspace) -> None:
    folder = workspace.root / "networks" / "many"
    folder.mkdir()
    (workspace.root / "networks" / "a.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    models = {**params.models, "a": params.models["a"].model_copy(update={"weights": "networks/many"})}
    sharded = dataclasses.replace(params, models=models)
    digest = gather(sharded, workspace).sources["a"]
    assert gather(sharded, workspace).sources["a"] == digest
    (folder / "model-00001-of-00001.safetensors").write_bytes(b"others")
    assert gather(sharded, workspace).sources["a"] != digest


def test_the_digest_follows_the_content_and_nothing_else(params: Params, workspace: Workspace) -> None:
    before = gather(params, workspace)
    (workspace.root / "tasks" / "stages" / "merge.py").write_text("# changed\n")
    lock = yaml.safe_load((workspace.root / "dvc.lock").read_text())
    (workspace.root / "dvc.lock").write_text(json.dumps({**lock, "stages": {**lock["stages"], "register": {}}}))
    code_changed = gather(params, workspace)
    assert code_changed.content_digest == before.content_digest
    assert code_changed.tags["mtz.dvc_lock"] == before.tags["mtz.dvc_lock"]
    assert code_changed.tags["mtz.code"] != before.tags["mtz.code"]
    (workspace.root / "data" / "b" / "train.parquet").write_bytes(b"other data")
    data_changed = gather(params, workspace)
    assert data_changed.content_digest != before.content_digest
    assert data_changed.data["a"] == before.data["a"]
    assert data_changed.data["b"] != before.data["b"]


def test_where_things_are_kept_is_not_logged(params: Params, workspace: Workspace) -> None:
    release = gather(params, workspace)
    assert release.parameters["retrain.iterations"] == 100
    assert not any(name.startswith(("storage", "tracking", "flow")) for name in release.parameters)
    assert release.metrics["a/error_zipped"] == 3.0
    assert release.metrics["stored/fraction"] == 0.5
    assert release.learning_curve[0] == {"step": 0, "a/validation_loss": 2.0, "b/validation_loss": 3.0}
    assert release.learning_curve[1]["b/training_loss"] == 1.5


def test_the_plan_of_a_budget_is_logged(params: Params, workspace: Workspace) -> None:
    release = gather(params, workspace)
    figures = {name: value for name, value in release.metrics.items() if name.startswith("plan/")}
    assert figures == {"plan/1/shared": 12, "plan/1/cost": 0.25, "plan/1/kept/a": 12, "plan/1/kept/b": 12}
    assert "plan.limit" not in release.parameters
    limit = "at 0.400 of the bytes a loses 1.50 points, allowed are 1"
    search = {"limit": limit, "bytes": 900, "stored": 0.45, "damage": 0.125, "tried": []}
    write_json(workspace.pairing, json.loads(workspace.pairing.read_text()) | {"search": search})
    planned = gather(params, workspace)
    assert {name: planned.metrics[f"plan/{name}"] for name in ("stored", "bytes", "damage")} == {
        "stored": 0.45,
        "bytes": 900,
        "damage": 0.125,
    }
    assert planned.parameters["plan.limit"] == limit
    assert planned.content_digest == release.content_digest


def test_the_metric_of_a_task_is_no_number(params: Params, workspace: Workspace, number: Any) -> None:
    metrics = json.loads(workspace.metrics.read_text())
    metrics["tasks"] = {task: {"metric": "top5_error", **errors} for task, errors in metrics["tasks"].items()}
    write_json(workspace.metrics, metrics)
    register.run(params, workspace)
    assert number() == 1
    assert gather(params, workspace).metrics["a/error_zipped"] == 3.0


def test_new_metrics_make_a_new_version(params: Params, workspace: Workspace, number: Any) -> None:
    register.run(params, workspace)
    first = folder_of(workspace)
    write_json(workspace.metrics, json.loads(workspace.metrics.read_text()) | {"stored": {"fraction": 0.4}})
    register.run(params, workspace)
    assert folder_of(workspace) != first
    assert number() == 2


@pytest.mark.parametrize("lost", ["release.json", "metrics.json"])
def test_a_bundle_that_lost_an_object_is_made_whole(
    lost: str, params: Params, workspace: Workspace, store: Storage, number: Any
) -> None:
    register.run(params, workspace)
    store.client.delete_object(Bucket=store.bucket, Key=store.key(folder_of(workspace), lost))
    assert number() is None
    register.run(params, workspace)
    assert number() == 1


def test_another_registry_does_not_know_the_version(
    params: Params, workspace: Workspace, store: Storage, tmp_path: Path
) -> None:
    register.run(params, workspace)
    assert upload.verify(params, workspace, tmp_path / ".mtz", store) is None
    mlflow_client.prepare(params.tracking, tmp_path / ".mtz")
    assert upload.verify(params, workspace, tmp_path / ".mtz", store) is None


KILLED = """
import os, signal
from pathlib import Path
from tasks.stages import register
from tasks.artifacts.paths import Workspace
from tasks.params import load_params
from tasks.storage.s3 import Storage

put, sent = Storage._put, []

def put_three(*arguments):
    if len(sent) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    sent.append(put(*arguments))
    return sent[-1]

Storage._put = put_three
register.run(load_params(Path("params.yaml")), Workspace(Path()))
"""


@pytest.mark.long
def test_a_killed_upload_is_completed(params: Params, workspace: Workspace, store: Storage, number: Any) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=workspace.root, env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    assert not workspace.registration.exists()
    folder = gather(params, workspace).folder
    assert len(store.names(folder)) == 3
    assert not store.exists(f"{folder}/release.json")
    register.run(params, workspace)
    assert number() == 1


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("dvc.lock", "dvc repro"),
        ("metrics.json", "metrics.json"),
        ("networks/a.safetensors", "a.safetensors"),
        ("data/b/train.parquet", "data/b"),
        ("plots/learning_curve.csv", "Run retrain"),
    ],
)
def test_what_is_missing_is_named(missing: str, said: str, params: Params, workspace: Workspace) -> None:
    (workspace.root / missing).unlink()
    with pytest.raises(InvalidArtifact, match=said):
        register.run(params, workspace)
    assert not workspace.registration.exists()
