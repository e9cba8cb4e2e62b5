"""The pipeline's three descriptions agree: a file in `tasks/`, a stage in `dvc.yaml`, a block in `params.yaml`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grimp
import pytest
import yaml

from tasks.__main__ import GROUP_STAGES, MODEL_STAGES

STAGES = (*MODEL_STAGES, *GROUP_STAGES)

WIRING = {"mtz_core.errors", "mtz_core.settings", "tasks.params", "tasks.progress", "tasks.home", "tasks.faults"}
"""Modules that say what to do and tell what is done, but compute nothing; settings are versioned as parameters."""

SERVICES = {"tasks.locks", "tasks.storage.embedded", "tasks.storage.errors"}
"""Modules that start and reach services; what they move is versioned."""

BUILT_BY = {
    "pretrain": {"tasks.models.example_networks"},
    **{
        name: {"tasks.models.example_networks", "tasks.models.programs"}
        for name in ("collect", "match", "merge", "retrain", "evaluate")
    },
}
"""Modules with the factories of networks, which stages import by the names in params.yaml."""


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


@pytest.mark.parametrize("stage", STAGES)
def test_every_module_that_a_stage_uses_is_its_dependency(pipeline: dict[str, Any], stage: str) -> None:
    used = grimp.build_graph("mtz_core", "tasks").find_upstream_modules(f"tasks.stages.{stage}") - WIRING - SERVICES
    used |= {f"tasks.stages.{stage}"} | BUILT_BY.get(stage, set())
    used |= {"tasks.registry.served_model"} if stage == "register" else set()
    body = pipeline[stage].get("do", pipeline[stage])
    named = {path.removesuffix(".py").replace("/", ".") for path in body["deps"] if path.startswith(("tasks", "mtz"))}
    if "mtz_core" in named:
        used = {name if name.startswith("tasks") else "mtz_core" for name in used}
    assert named == used
