"""Budgets through the stages: a size and a floor, what is written of the search, what is refused and when."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mtz_core
from mtz_core import ZippedNetwork
from mtz_core.errors import InvalidConfig
from mtz_core.evaluation import error_rate
from mtz_core.planning.search import BudgetSearch
from mtz_core.settings import Budget
from tasks.__main__ import main
from tasks.artifacts.paths import Workspace
from tasks.artifacts.plans import read_pairings, read_plan
from tasks.artifacts.statistics import read_moments, read_sensitivities
from tasks.data.examples import read_examples
from tasks.faults import EXIT_REFUSED
from tasks.models.calibration import calibration
from tasks.models.load import load_network, load_traced
from tasks.params import load_params
from tasks.stages.budget_checks import check_budget
from tests.support.networks import joined
from tests.support.stages import change, outputs, perceptron, refused, write_images

pytestmark = pytest.mark.slow

STAGES = ["collect a", "collect b", "hessians a", "hessians b", "match", "merge", "retrain", "evaluate"]
SIZES = {"train": 120, "validation": 60, "test": 60}
CLASSES = 6
RETRAIN = {"images": 120, "iterations": 4, "validate_every": 2, "batch_size": 16, "learning_rate": 1e-4}


def train(images: torch.Tensor, labels: torch.Tensor) -> nn.Module:
    network = perceptron()
    optimiser = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(60):
        optimiser.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimiser.step()
    return network


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two trained perceptrons on noisy images of six patterns each; statistics are there."""
    root = tmp_path_factory.mktemp("template")
    (root / "networks").mkdir()
    models = {}
    for number, name in enumerate("ab"):
        draw = np.random.default_rng(number)
        patterns = draw.uniform(60, 200, (CLASSES, 6, 6))
        for split, count in SIZES.items():
            labels = draw.integers(0, CLASSES, count)
            images = (patterns[labels] + draw.normal(0, 55, (count, 6, 6))).clip(0, 255).astype(np.uint8)
            write_images(root / f"data/{name}/{split}.parquet", images, labels)
        torch.manual_seed(number)
        network = train(*read_examples(root / f"data/{name}", "train"))
        save_file(network.state_dict(), root / f"networks/{name}.safetensors")
        models[name] = {
            "network": "tests.support.stages:perceptron",
            "weights": f"networks/{name}.safetensors",
            "data": f"data/{name}",
        }
    params = {"group": "small", "models": models, "retrain": RETRAIN, "register": {"name": "small"}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in STAGES[:4]:
            assert main(stage.split()) == 0
    return root


def run(*stages: str) -> None:
    for stage in stages:
        assert main(stage.split()) == 0


def table(path: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(path).read_text().splitlines()))


def tried() -> list[dict[str, str]]:
    return table("pairing/search.csv")


def spend(root: Path, **budget: object) -> None:
    change(root, "match", budget=budget)


def test_a_size_is_kept_by_the_plan_that_does_best(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spend(project, size=0.3, moves=["share", "drop"])
    run("match")
    rows, said = tried(), capsys.readouterr().out
    names = list(dict.fromkeys(row["what"] for row in rows))
    assert names[0] == "drop only" and len(names) > 1 and names[1].startswith("sharing counted ")
    for name in names:
        assert f"{name}: predicted damage " in said
    losses = {name: sum(float(row["loss"]) for row in rows if row["what"] == name) for name in names}
    chosen = {row["what"] for row in rows if row["verdict"] == "chosen"}
    assert chosen == {min(losses, key=lambda name: losses[name])}
    assert {row["task"] for row in rows} == {"a", "b"}
    curves = table("pairing/curves.csv")
    for layer in {row["layer"] for row in curves}:
        costs = [float(row["cost"]) for row in curves if row["layer"] == layer]
        assert costs[0] == 0 < costs[-1] and costs == sorted(costs), "more neurons shared cost more"

    run("merge")
    said = capsys.readouterr().out
    merged, search = mtz_core.load("merged"), json.loads(Path("pairing/pairing.json").read_text())["search"]
    assert merged.report.stored_bytes == search["bytes"] <= 0.3 * merged.report.original_bytes
    assert search["stored"] == pytest.approx(merged.report.stored_bytes / merged.report.original_bytes)
    layers = table("plots/layers.csv")
    originals = {"1": 24, "3": 16, "5": CLASSES}
    assert all(int(row["neurons"]) + int(row["dropped"]) == originals[row["layer"]] for row in layers)
    assert sum(int(row["dropped"]) for row in layers) > 0 and " dropped, output error" in said

    run("retrain", "evaluate")
    stored = json.loads(Path("metrics.json").read_text())["stored"]
    assert stored["parameters"] == sum(t.numel() for t in load_file("retrained/weights.safetensors").values())
    assert stored["fraction"] == pytest.approx(search["stored"])
    assert stored["bytes"] == Path("retrained/weights.safetensors").stat().st_size


def both_ways() -> tuple[ZippedNetwork, ZippedNetwork, dict[str, Tensor]]:
    """What `merge` has made, what the façade makes of the same, and the calibration images."""
    params, workspace = load_params(Path("params.yaml")), Workspace(Path())
    traced = {name: load_traced(params, workspace, name) for name in "ab"}
    images = {name: torch.cat(calibration(params, workspace, name, own)) for name, own in traced.items()}
    direct = mtz_core.zip_networks(
        {name: load_network(params, workspace, name) for name in "ab"}, images, params.zip_config()
    )
    return mtz_core.load("merged"), direct, images


def test_the_stages_make_what_the_facade_makes(project: Path) -> None:
    spend(project, size=0.5)
    run("match", "merge")
    staged, direct, images = both_ways()
    for task in "ab":
        torch.testing.assert_close(staged(images[task], task), direct(images[task], task), atol=1e-4, rtol=1e-4)


def test_the_plan_says_to_how_many_bits_weights_are_rounded(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spend(project, size=0.15)
    run("match")
    rows, said = tried(), capsys.readouterr().out
    assert rows[0]["what"] == "round only"
    content = json.loads(Path("pairing/pairing.json").read_text())
    bits = content["bits"]
    assert bits and read_pairings(Workspace(Path())).bits == bits
    assert f"weights are rounded to {', '.join(str(one) for one in sorted({*bits.values()}))} bits" in said

    run("merge")
    merged = mtz_core.load("merged")
    assert merged.report.stored_bytes == content["search"]["bytes"] <= 0.15 * merged.report.original_bytes
    for block, number in merged.structure.bits.items():
        layer, _, rows_, _ = block.split("/")
        assert bits[f"{layer}/scale/{rows_}"] == number
    run("retrain", "evaluate")
    stored = json.loads(Path("metrics.json").read_text())["stored"]
    assert stored["bytes"] == Path("retrained/weights.safetensors").stat().st_size
    assert mtz_core.load("retrained").report.stored_bytes == content["search"]["bytes"]


def test_the_stages_round_as_the_facade_does(project: Path) -> None:
    """But for the rounding of moments on disk, which may turn a code into its neighbour."""
    spend(project, size=0.15, moves=["round"])
    run("match", "merge")
    staged, direct, _ = both_ways()
    assert staged.structure.bits == direct.structure.bits
    for task in "ab":
        for node in staged.structure.networks[task].graph.layers:
            scales = direct.scales(task, node)
            assert scales is not None
            torch.testing.assert_close(staged.scales(task, node), scales)
            steps = (staged.matrix(task, node) - direct.matrix(task, node)).abs() / scales[:, None]
            assert float(steps.max()) < 1.5 and float((steps > 0.5).double().mean()) < 0.02


def test_plans_without_bits_round_nothing(project: Path) -> None:
    """Those of older versions have none."""
    spend(project, size=0.2)
    run("match")
    file = Path("pairing/pairing.json")
    content = json.loads(file.read_text())
    del content["bits"]
    file.write_text(json.dumps(content))
    assert read_pairings(Workspace(Path())).bits == {}
    run("merge")
    assert not mtz_core.load("merged").structure.bits


@pytest.mark.parametrize("bits", [7, 0, 4.0, "4", None, [4], True])
def test_bits_that_are_not_offered_are_refused(project: Path, capsys: pytest.CaptureFixture[str], bits: object) -> None:
    spend(project, size=0.8, moves=["round"])
    run("match")
    file = Path("pairing/pairing.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | {"bits": {"1/scale/a": bits}}))
    assert f"pairing/pairing.json does not hold a pairing: ValueError('{bits!r} bits')" in refused(
        capsys, "merge"
    ).replace('"', "'")


def test_merging_makes_the_network_that_was_measured(project: Path) -> None:
    spend(project, size=0.3)
    run("match", "merge")
    params, workspace = load_params(Path("params.yaml")), Workspace(Path())
    networks = {name: load_traced(params, workspace, name) for name in "ab"}
    moments = {name: read_moments(workspace.hessians(name)) for name in "ab"}
    sensitivity = {name: read_sensitivities(workspace.hessians(name)) for name in "ab"}
    batches = {name: calibration(params, workspace, name, networks[name]) for name in "ab"}
    budget_search = BudgetSearch(joined(networks, moments, sensitivity, batches), params.zip_config(), Budget(size=0.3))
    held_out, merged = budget_search.zip(budget_search.best(0.3)), mtz_core.load("merged")
    assert held_out.state_dict().keys() == merged.state_dict().keys()
    assert all(torch.equal(tensor, merged.state_dict()[name]) for name, tensor in held_out.state_dict().items())


@pytest.mark.parametrize("move", ["share", "drop"])
def test_one_move_alone(project: Path, move: str) -> None:
    spend(project, size=0.8, moves=[move])
    run("match", "merge")
    assert {row["what"].partition(",")[0] for row in tried()} == {f"{move} only"}
    groups = json.loads(Path("pairing/pairing.json").read_text())["groups"]
    dropped = sum(24 + 16 - sum(group["kept"][task] for group in groups.values()) for task in "ab")
    shared = sum(group["shared"] for group in groups.values())
    assert (dropped > 0, shared > 0) == (move == "drop", move == "share")


def test_a_floor_is_kept_by_the_network_that_the_stages_make(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spend(project, floor={"a": 4, "b": 12}, retrain=RETRAIN, moves=["drop"])
    run("match", "merge")
    rows, said = tried(), capsys.readouterr().out
    chosen = {row["task"]: row for row in rows if row["verdict"] == "chosen"}
    assert set(chosen) == {"a", "b"} and chosen["a"]["stored"] == chosen["b"]["stored"]
    stored = float(chosen["a"]["stored"])
    assert stored < 0.9
    assert all(float(row["stored"]) >= stored for row in rows if row["verdict"] == "keeps the floor")
    assert "keeps the floor" in said and "breaks the floor" in said

    run("retrain", "evaluate")
    retrained = mtz_core.load("retrained")
    assert retrained.report.stored_bytes == round(stored * retrained.report.original_bytes)
    for task, floor in (("a", 4), ("b", 12)):
        images, labels = read_examples(Path("data") / task, "validation")
        original = perceptron()
        original.load_state_dict(load_file(f"networks/{task}.safetensors"))
        before, after = (
            error_rate(outputs.argmax(1), labels) for outputs in (original(images), retrained(images, task))
        )
        assert after - before == pytest.approx(float(chosen[task]["loss"]))
        assert after - before <= floor + 1e-9

    _, limit = read_plan(Workspace(Path()))
    broken = [row for row in rows if row["verdict"] == "breaks the floor" and float(row["stored"]) < stored]
    nearest = max(float(row["stored"]) for row in broken)
    assert limit.startswith(f"at {nearest:.3f} of the bytes ") and " points, allowed are " in limit
    assert limit in said


def test_a_search_writes_the_same_again(project: Path) -> None:
    spend(project, size=0.5)
    run("match", "merge")
    first = outputs(project)
    shutil.rmtree("pairing")
    run("match", "merge")
    assert outputs(project) == first


def test_without_a_budget_nothing_is_searched(project: Path) -> None:
    run("match")
    assert tried() == []
    content = json.loads(Path("pairing/pairing.json").read_text())
    assert content["search"] is None and content["keep"] == {}
    figures, limit = read_plan(Workspace(Path()))
    assert limit == "" and figures["1/shared"] == figures["1/kept/a"] == 24


def test_what_is_kept_is_read_back(project: Path) -> None:
    spend(project, size=0.4, moves=["share", "drop"])
    run("match")
    plan = read_pairings(Workspace(Path()))
    assert plan.descent == [] and set(plan.keep) == {"a", "b"} >= set(plan.damping)
    for name, pairing in plan.pairings.items():
        for t, task in enumerate(pairing.tasks):
            own = pairing.members[:, t]
            assert sorted(own[own >= 0]) == list(range(len(plan.keep[task][name])))
            assert (np.diff(plan.keep[task][name]) > 0).all()
    file = Path("pairing/pairing.json")
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"damping": {"b": 0.08}}))
    assert read_pairings(Workspace(Path())).damping == {"b": 0.08}
    run("merge")
    damped = mtz_core.load("merged").tensors()
    del content["damping"]
    file.write_text(json.dumps(content))
    assert read_pairings(Workspace(Path())).damping == {}, "plans of older versions have none"
    run("merge")
    plain = mtz_core.load("merged").tensors()
    changed = {name for name in plain if not torch.equal(plain[name], damped[name])}
    assert changed and all("b" in name for name in changed)


def test_sensitivities_go_from_collect_to_match(project: Path) -> None:
    collected, kept = (
        read_sensitivities(Path(path)) for path in ("activations/a/sensitivities.safetensors", "hessians/a.safetensors")
    )
    assert {layer: len(rows) for layer, rows in collected.items()} == {"1": 24, "3": 16, "5": CLASSES}
    assert all(torch.equal(rows, kept[layer]) and rows.dtype == torch.float64 for layer, rows in collected.items())


def test_moments_without_sensitivities(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file("hessians/a.safetensors")
    save_file({n: t for n, t in tensors.items() if not n.endswith("/sensitivity")}, "hessians/a.safetensors")
    assert "hessians/a.safetensors does not hold sensitivities of layers. Run collect" in refused(capsys, "match")
    Path("activations/b/sensitivities.safetensors").unlink()
    assert "activations/b/sensitivities.safetensors: " in refused(capsys, "hessians", "b")


def test_a_size_that_no_network_has(
    project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    spend(project, size=0.01)
    with monkeypatch.context() as patch:
        patch.setattr("tasks.stages.match.read_traced", None)
        message = refused(capsys, "match", status=EXIT_REFUSED)
    assert "match.budget.size: 0.01 is impossible with moves share and drop" in message
    assert "cannot be stored in less than 0.0" in message
    spend(project, size=0.3, moves=["share"])
    assert "match.budget.size: 0.3 is impossible with moves share: " in refused(capsys, "match", status=EXIT_REFUSED)


def test_a_size_that_no_plan_has(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """What only the planner knows is refused before anything is merged, with the least size."""
    monkeypatch.setattr("tasks.stages.budget_checks._check_size", lambda *_: None)
    monkeypatch.setattr(BudgetSearch, "judged", None)
    spend(project, size=0.01)
    message = refused(capsys, "match", status=EXIT_REFUSED)
    assert "match.budget.size: 0.01 is impossible: the least that these networks can be stored in is 0.0" in message
    assert not Path("pairing").exists()


def test_sizes_are_checked_without_statistics(project: Path) -> None:
    shutil.rmtree("hessians")
    workspace = Workspace(Path())
    networks = {name: load_traced(load_params(workspace.params), workspace, name) for name in "ab"}
    for moves, least in ((["share"], 0.5), (["drop"], 0.05), (["share", "drop"], 0.03)):
        spend(project, size=least, moves=moves)
        with pytest.raises(InvalidConfig, match=r"match\.budget\.size") as caught:
            check_budget(load_params(workspace.params), workspace, networks)
        told = float(str(caught.value).split("less than ")[1].split(" ")[0])
        assert least < told < least + 0.1
        spend(project, size=told + 0.001, moves=moves)
        assert check_budget(load_params(workspace.params), workspace, networks) == {}


def test_a_floor_without_validation_data(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spend(project, floor=1, retrain=RETRAIN)
    shutil.rmtree("hessians")  # all of this is known before they are read
    images, labels = np.zeros((3, 6, 6), np.uint8), np.array([0, 1, 2])
    write_images(Path("data/a/validation.parquet"), images, labels + CLASSES)
    message = refused(capsys, "match")
    assert "the labels of 'a' go from 6 to 8, but the network has 6 classes" in message
    write_images(Path("data/a/validation.parquet"), np.zeros((3, 5, 5), np.uint8), labels)
    assert "models.a.data: validation images have shape [1, 5, 5], training images [1, 6, 6]" in refused(
        capsys, "match"
    )
    write_images(Path("data/a/validation.parquet"), images, labels - 1)
    assert "data/a/validation.parquet has labels that are no class numbers" in refused(capsys, "match")
    Path("data/a/validation.parquet").unlink()
    assert "data/a/validation.parquet: there is no such file" in refused(capsys, "match")
    assert not Path("pairing").exists()


def test_errors_are_measured_as_the_model_says(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = yaml.safe_load((project / "params.yaml").read_text())["models"]
    models["a"]["metric"] = "top5_error"
    change(project, "models", **models)
    run("match", "merge", "retrain", "evaluate")
    tasks = json.loads(Path("metrics.json").read_text())["tasks"]
    assert (tasks["a"]["metric"], tasks["b"]["metric"]) == ("top5_error", "error")
    images, labels = read_examples(Path("data/a"), "test")
    likely = mtz_core.load("merged")(images, "a").topk(5).indices
    wrong = (likely != labels[:, None]).all(dim=1).double().mean()
    assert tasks["a"]["error_zipped"] == pytest.approx(100 * float(wrong))
    assert "a: top5_error " in capsys.readouterr().out
    write_images(Path("data/b/test.parquet"), np.zeros((2, 6, 6), np.uint8), np.array([0, CLASSES]))
    assert "the labels of 'b' go from 0 to 6, but the network has 6 classes" in refused(capsys, "evaluate")


def test_few_calibration_rows_are_warned_of(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(project, "collect", images=20)
    run("match", "merge")
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert any("warning: 1 is fitted on few rows: a has 20 rows for 37 inputs" in line for line in warnings)
