"""The planner at work: real networks and statistics, put into groups within the limits of the fleet file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from flows.fleet.choose import choose
from flows.fleet.plan import Choice, Measured
from flows.spec.fleet_file import Fleet, read_fleet
from flows.spec.snapshot import Snapshot
from mtz_core import ZipConfig
from mtz_core.network.tracing import trace
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import sensitivities
from tasks.artifacts.statistics import write_moments
from tasks.params import TrackingParams
from tasks.sources import Access
from tasks.storage.contents import Contents
from tasks.storage.s3 import Storage
from tests.support.stages import perceptron, write_images

SEEDS = {"anna": 1, "berta": 2, "clara": 1}
"""Anna and Clara are twins."""


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Measured], Access]:
    """Three models whose statistics are made, and contents that have all their files."""
    root = tmp_path_factory.mktemp("fleet")
    contents = Contents(root / ".mtz" / "contents")
    access = Access(root, root / ".mtz", contents, Storage(None, "none", "", "", None), TrackingParams())
    fleet, found = declared(root), dict[str, Measured]()
    for name, seed in SEEDS.items():
        torch.manual_seed(seed)
        network = perceptron().eval()
        torch.manual_seed(len(found) + 10)
        images = torch.randint(0, 256, (60, 6, 6), dtype=torch.uint8)
        write_images(root / "train.parquet", images.numpy(), torch.zeros(60, dtype=torch.int64).numpy())
        save_file(network.state_dict(), root / "weights")
        batches = as_batches(images[:, None] / 255, name)
        traced = trace(network, batches[0][:2])
        write_moments(root / "hessians", original_moments(traced, batches, ZipConfig()), sensitivities(traced, batches))
        files = {f"networks/{name}.safetensors": root / "weights", f"data/{name}/train.parquet": root / "train.parquet"}
        snapshot = Snapshot({**{path: contents.add(file) for path, file in files.items()}, "tasks/x.py": "0" * 64}, {})
        plan = fleet.model(name)
        found[name] = Measured(plan, snapshot, contents.add(root / "hessians"), frozenset(plan.models[name].tags))
    return found, access


def declared(root: Path, **auto: Any) -> Fleet:
    (root / "params.yaml").write_text("{}\n")
    network = {"source": "any", "network": "tests.support.stages:perceptron"}
    models = {name: {**network, "data": f"data/{name}", "tags": ["eu" if name == "anna" else "us"]} for name in SEEDS}
    file = {"version": 2, "name": "three", "models": models, "groups": "auto", "auto": auto}
    (root / "fleet.yaml").write_text(yaml.safe_dump(file))
    return read_fleet(root / "params.yaml", root / "fleet.yaml")


def chosen(measured: tuple[dict[str, Measured], Access], tmp_path: Path, **auto: Any) -> tuple[Choice, list[str]]:
    told: list[str] = []
    models, access = measured
    return choose(declared(tmp_path, **auto), models, access, told.append), told


def test_twins_are_put_together_and_what_is_known_is_not_compared_again(
    measured: tuple[dict[str, Measured], Access], tmp_path: Path
) -> None:
    choice, told = chosen(measured, tmp_path)
    assert choice.groups() == {"auto-anna": ("anna", "clara")}
    assert choice.affinities.of("anna", "clara").similarity > 0.95
    assert told[0] == "3 of 3 pairs of models to compare"
    assert (measured[1].home / "plans" / "three-affinities.json").exists()
    again, told = chosen(measured, tmp_path)
    assert told == [] and again.groups() == choice.groups()


@pytest.mark.parametrize("limit", [{"separate": ["eu"]}, {"damage": 1e-30}, {"similarity": 1.0}])
def test_a_limit_of_the_file_keeps_even_twins_apart(
    limit: dict[str, Any], measured: tuple[dict[str, Measured], Access], tmp_path: Path
) -> None:
    choice, _ = chosen(measured, tmp_path, **limit)
    assert not any({"anna", "clara"} <= set(models) for models in choice.groups().values())


def test_size_and_similarity_come_from_the_file(measured: tuple[dict[str, Measured], Access], tmp_path: Path) -> None:
    together, _ = chosen(measured, tmp_path, similarity=0.0, damage=1e9)
    assert together.groups() == {"auto-anna": ("anna", "berta", "clara")}
    pairs, _ = chosen(measured, tmp_path, similarity=0.0, damage=1e9, size=2)
    assert pairs.groups() == {"auto-anna": ("anna", "clara")}
