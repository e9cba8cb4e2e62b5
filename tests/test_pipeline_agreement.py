"""The pipeline's three descriptions agree: a file in `tasks/`, a stage in `dvc.yaml`, a block in `params.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from tasks.__main__ import GROUP_STAGES, MODEL_STAGES

STAGES = (*MODEL_STAGES, *GROUP_STAGES)

WIRING = {
    "mtz_core.errors",
    "mtz_core.settings",
    *(f"tasks.{name}" for name in ("code", "faults", "home", "params", "progress")),
}
"""Modules that say what to do and tell what is done, but compute nothing; settings are versioned as parameters."""

SERVICES = {"tasks.locks", "tasks.storage.embedded", "tasks.storage.errors"}
"""Modules that start and reach services; what they move is versioned."""

NETWORKS = {"tasks.models.example_networks"}
BY_NAME = {
    "pretrain": NETWORKS,
    **dict.fromkeys(("collect", "match", "merge", "retrain", "evaluate"), NETWORKS | {"tasks.models.programs"}),
    "register": {"tasks.registry.served_model"},
}
"""Modules that stages import by a name: factories of networks from params.yaml, the model that MLflow serves."""


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("mtz_core", "tasks", cache_dir=None)


@pytest.fixture(scope="module")
def pipeline() -> dict[str, Any]:
    stages: dict[str, Any] = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    return stages


def test_same_stages_everywhere(pipeline: dict[str, Any]) -> None:
    assert tuple(pipeline) == STAGES
    params = yaml.safe_load(Path("params.yaml").read_text())
    for stage in STAGES:
        assert stage in params
        assert Path("tasks", "stages", f"{stage}.py").is_file()


@pytest.mark.parametrize("stage", STAGES)
def test_command_and_parameters(pipeline: dict[str, Any], stage: str) -> None:
    entry = pipeline[stage]
    body = entry.get("do", entry)
    assert ("foreach" in entry) == (stage in MODEL_STAGES)
    assert body["cmd"] == f"python -m tasks {stage}" + (" ${key}" if stage in MODEL_STAGES else "")
    assert any(name.partition(".")[0] == stage for name in body["params"])


def test_a_change_of_light_retraining_runs_nothing_before_it(pipeline: dict[str, Any]) -> None:
    bodies = {stage: entry.get("do", entry) for stage, entry in pipeline.items()}
    assert [stage for stage, body in bodies.items() if "retrain" in body["params"]] == ["retrain"]


def test_what_merges_plans_or_networks_depends_on_all_that_decides_how(pipeline: dict[str, Any]) -> None:
    for stage in ("match", "merge"):
        assert {"runtime", "models", "collect", "match", "merge"} <= set(pipeline[stage]["params"])


def named_in(stage: dict[str, Any]) -> set[str]:
    """The modules and packages of ours whose files and folders a stage of dvc.yaml depends on."""
    paths = {path for path in stage.get("do", stage)["deps"] if path.startswith(("tasks", "mtz_core"))}
    assert all(Path(path).exists() for path in paths)
    return {path.removesuffix(".py").replace("/", ".") for path in paths}


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_depends_on_what_it_imports_and_on_nothing_else(
    pipeline: dict[str, Any], graph: grimp.ImportGraph, stage: str
) -> None:
    used = graph.find_upstream_modules(f"tasks.stages.{stage}") | {f"tasks.stages.{stage}"} | BY_NAME.get(stage, set())
    named = {name: {name} | graph.find_descendants(name) for name in named_in(pipeline[stage])}
    assert used - WIRING - SERVICES - set().union(*named.values()) == set()
    assert [name for name, inner in named.items() if not inner & used] == []


def test_a_change_of_planning_or_merging_measures_no_model_again(pipeline: dict[str, Any]) -> None:
    for stage in ("collect", "hessians"):
        core = {name for name in named_in(pipeline[stage]) if name.startswith("mtz_core")}
        assert core == {"mtz_core.batches", "mtz_core.network", "mtz_core.statistics", "mtz_core.task_loss"}
