"""A fleet with everything that can go well or wrong in it: `mtz run` and `mtz fleet` with real services."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from tasks.data.factories import materialise
from tests.benchmarks.fleet_project import copy_project
from tests.support import prefect_server
from tests.support.command_line import mtz, start
from tests.support.waiting import PATIENCE_SECONDS

pytestmark = pytest.mark.e2e

MODULE = '''
"""Networks and data of the fleet."""

import torch
from torch import nn

from safetensors.torch import load_file


def build(width=12):
    return nn.Sequential(nn.Flatten(), nn.Linear(16, width), nn.ReLU(), nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 3))


def deep(width=12):
    return nn.Sequential(nn.Flatten(), nn.Tanh(), *build(width)[1:-1], nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def read(split, weights):
    """Images whose labels are what a network says, so that it makes no error."""
    images = torch.rand(dict(train=80, validation=20, test=200)[split], 1, 4, 4)
    network = deep() if "deep" in weights else build()
    network.load_state_dict(load_file(weights))
    with torch.no_grad():
        return images, network(images).argmax(1)
'''

FLEET = {
    "version": 2,
    "name": "all",
    "defaults": {
        "collect": {"images": 60},
        "match": {"share": 1.0},
        "retrain": {"images": 60, "iterations": 4, "validate_every": 2},
        "register": {"agreement": 0},
    },
    "groups": {
        "good": {"models": ["a", "b"]},
        "floor": {"models": ["c", "d"]},
        "misfit": {"models": ["e", "deep"]},
        "nan": {"models": ["f", "nan"]},
        "gone": {"models": ["h", "gone"]},
    },
    "auto": {"size": 2},
}
NAMES = ("a", "b", "c", "d", "e", "deep", "f", "nan", "h", "gone", "twin-1", "twin-2", "deep-loner")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fleet") / "project"
    copy_project(root)
    shutil.rmtree(root / "data")
    (root / "my_fleet.py").write_text(MODULE)
    module: dict[str, Any] = {}
    exec(MODULE, module)
    models: dict[str, dict[str, Any]] = {}
    (root / "models").mkdir()
    for number, name in enumerate(NAMES):
        torch.manual_seed(0 if name.startswith("twin") else number + 1)
        kind = "deep" if "deep" in name else "build"
        save_file(module[kind]().state_dict(), root / f"models/{name}.safetensors")
        models[name] = {"source": f"models/{name}.safetensors", "network": f"my_fleet:{kind}", "data": f"data/{name}"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.syspath_prepend(str(root))
        for name in NAMES:
            (root / "data" / name).mkdir(parents=True)
            materialise("my_fleet:read", {"weights": f"models/{name}.safetensors"}, root / "data" / name)
    arguments = {"weights": "models/a.safetensors"}
    models["a"]["data"] = {"factory": "my_fleet:read", "arguments": arguments}
    models["c"]["floor"] = models["d"]["floor"] = 0
    weights = module["build"]().state_dict()
    weights["1.weight"][0, 0] = torch.nan
    save_file(weights, root / "models/nan.safetensors")
    (root / "models/gone.safetensors").unlink()
    (root / "fleet.yaml").write_text(yaml.safe_dump({**FLEET, "models": models}, sort_keys=False))
    return root


@pytest.fixture(scope="module")
def server() -> dict[str, str]:
    return {"PREFECT_API_URL": prefect_server.running()[0]}


@pytest.fixture(scope="module")
def first_run(project: Path, server: dict[str, str]) -> tuple[int, str, str]:
    return mtz(project, "run", **server)


def rows(project: Path) -> dict[str, dict[str, Any]]:
    record = json.loads((project / ".mtz/runs/all/last.json").read_text())
    return {row["group"]: row for row in record["groups"]}


def test_every_group_ends_as_it_must_and_none_stops_another(project: Path, first_run: tuple[int, str, str]) -> None:
    status, out, err = first_run
    assert status == 1
    found = rows(project)
    assert {name: row["status"] for name, row in found.items()} == {
        "good": "merged",
        "floor": "refused",
        "misfit": "refused",
        "nan": "failed",
        "gone": "failed",
        "auto-twin-1": "merged",
    }
    assert "points of test error, and 0 are allowed" in found["floor"]["reason"]
    assert "the networks differ in structure" in found["misfit"]["reason"]
    assert "finite" in found["nan"]["reason"]
    assert "models/gone.safetensors: there is no such file" in found["gone"]["reason"]
    assert "NaN or infinite" in Path(found["nan"]["log"]).read_text()
    assert f"Log of nan: {found['nan']['log']}" in out
    assert "Try the failed groups again: `mtz fleet retry`." in out
    executed = len(re.findall(r"^\[[^/\]]+\] \S+: executed", out, re.MULTILINE))
    assert f"Stages: {executed} executed" in out, "also those of groups that failed"
    assert err.count("error: ") == 1 and "Traceback" not in out + err
    assert found["good"]["version"] == 1 and len(found["good"]["content_digest"]) == 64


def test_only_what_failed_is_tried_again(
    project: Path, server: dict[str, str], first_run: tuple[int, str, str]
) -> None:
    shutil.copy2(project / "models/h.safetensors", project / "models/gone.safetensors")
    status, out, _ = mtz(project, "fleet", "retry", **server)
    assert status == 1
    assert {name: row["status"] for name, row in rows(project).items()} == {"nan": "failed", "gone": "merged"}
    assert "[planner]" not in out, "what the file lists needs no planner"


def test_the_plan_says_which_models_belong_together(
    project: Path, server: dict[str, str], first_run: tuple[int, str, str]
) -> None:
    status, out, err = mtz(project, "fleet", "plan", **server)
    assert status == 0, out + err
    for name in ("good", "gone", "auto-twin-1"):
        assert f"leave it: {name} version 1" in out
    assert "refuse it: " in out
    assert "deep-loner" in out.partition("Better left alone")[2]
    assert (project / ".mtz/plans/all.svg").read_text().startswith("<?xml")


@pytest.mark.long
def test_a_deployed_fleet_runs_its_groups_on_workers_elsewhere(
    project: Path, server: dict[str, str], first_run: tuple[int, str, str], tmp_path: Path
) -> None:
    """The whole chain: deployment, the fleet's worker, the pool of groups, a worker that shares nothing but S3."""
    elsewhere = ("--set", "flow.executor=pool", "--set", "flow.pool=all-groups")
    status, out, err = mtz(
        project, "fleet", "deploy", "--cron", "0 2 * * *", "--pool", "all-fleets", *elsewhere, **server
    )
    assert status == 0, out + err
    assert "deployed: zip-fleet/all, 0 2 * * * (UTC)" in out and "0 workers" in out
    _, exported, _ = mtz(project, "s3", "--export")
    credentials = dict(re.findall(r"export (\w+)=(\S+)", exported.replace("'", "")))
    (tmp_path / "elsewhere").mkdir()
    own = {**server, **credentials, "MTZ_HOME": str(tmp_path / "elsewhere/.mtz"), "PYTHONPATH": str(project)}
    own["MTZ_WARM"] = ""
    workers = [
        start(project, "fleet", "worker", "--pool", "all-fleets", output=tmp_path / "fleets.log", **server),
        start(tmp_path / "elsewhere", "fleet", "worker", "--pool", "all-groups", output=tmp_path / "groups.log", **own),
    ]
    try:
        changed = ("--group", "good", "--set", "retrain.iterations=2")
        status, out, err = mtz(project, "fleet", "start", *changed, "--wait", **server)
        assert status == 0, out + err + (tmp_path / "fleets.log").read_text() + (tmp_path / "groups.log").read_text()
        assert rows(project)["good"]["status"] == "merged" and rows(project)["good"]["version"] == 2
        assert (tmp_path / "elsewhere/.mtz/workspaces/good/metrics.json").exists()
        status, out, err = mtz(project, "fleet", "status", **server)
        assert re.search(r"last .* Completed", out), out
        assert re.search(r"next .* Scheduled", out), out
    finally:
        for worker in workers:
            worker.terminate()
        for worker in workers:
            worker.wait(PATIENCE_SECONDS)
    for log in (tmp_path / "fleets.log", tmp_path / "groups.log"):
        assert credentials["AWS_SECRET_ACCESS_KEY"] not in log.read_text()
