"""The stages on a small real project: what they write, that it is the same again, and how they refuse bad input."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

import mtz_core
from tasks.__main__ import main
from tasks.faults import EXIT_REFUSED, EXIT_TRY_AGAIN
from tasks.models.example_networks import lenet_300_100
from tests.support.stages import Aside, change, make_lenets, outputs, refused, write_images

pytestmark = pytest.mark.slow

STAGES: list[tuple[str, ...]] = [("collect", "a"), ("collect", "b"), ("hessians", "a"), ("hessians", "b")]
STAGES += [("match",), ("merge",), ("retrain",), ("evaluate",)]
ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two LeNet-300-100 on images of noise, no stage run yet."""
    root = tmp_path_factory.mktemp("template")
    make_lenets(root)
    return root


def test_all_stages_write_their_files_and_write_the_same_again(project: Path) -> None:
    for stage in STAGES:
        assert main(list(stage)) == 0
    first = outputs(project)
    for path in ("activations/a/1.arrow", "hessians/b.safetensors", "pairing/pairing.json", "pairing/curves.csv"):
        assert path in first
    for path in ("merged/weights.safetensors", "retrained/manifest.json", "metrics.json", "plots/learning_curve.csv"):
        assert path in first
    for path in first:
        (project / path).unlink()
    for stage in STAGES:
        assert main(list(stage)) == 0
    assert outputs(project) == first


def test_staged_and_direct_zipping_agree(project: Path) -> None:
    """The stages compute what the façade computes, but for the rounding of moments on disk."""
    for stage in STAGES[:6]:
        assert main(list(stage)) == 0
    from tasks.artifacts.paths import Workspace
    from tasks.models.calibration import calibration
    from tasks.models.load import load_network, load_traced
    from tasks.params import load_params

    params, workspace = load_params(Path("params.yaml")), Workspace(Path())
    traced = {name: load_traced(params, workspace, name) for name in "ab"}
    images = {name: torch.cat(calibration(params, workspace, name, own)) for name, own in traced.items()}
    networks = {name: load_network(params, workspace, name) for name in "ab"}
    direct = mtz_core.zip_networks(networks, images, params.zip_config(), validation=images)
    staged = mtz_core.load("merged")
    for task in "ab":
        torch.testing.assert_close(staged(images[task], task), direct(images[task], task), atol=1e-4, rtol=1e-4)


def test_what_no_output_depends_on_is_left_out_and_said(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"network.{name}": tensor for name, tensor in load_file("networks/a.safetensors").items()}
    save_file({**Aside().state_dict(), **state}, "networks/a.safetensors")
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["models"]["a"]["network"] = "tests.support.stages:Aside"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    assert main(["collect", "a"]) == 0
    said = capsys.readouterr().out
    assert (
        "networks/a.safetensors: parameters are left out, as no output depends on them: aside.weight, aside.bias"
        in said
    )
    assert {path.name for path in Path("activations/a").glob("*.arrow")} == {f"network.{i}.arrow" for i in (1, 3, 5)}


def test_metrics_tell_true_sizes(project: Path) -> None:
    for stage in STAGES:
        assert main(list(stage)) == 0
    stored = json.loads(Path("metrics.json").read_text())["stored"]
    assert stored["bytes"] == Path("retrained/weights.safetensors").stat().st_size
    assert stored["parameters"] == sum(t.numel() for t in load_file("retrained/weights.safetensors").values())
    payload = mtz_core.load("retrained").report.stored_bytes
    assert payload < stored["bytes"] < payload * 1.01
    assert stored["fraction"] == pytest.approx(0.5, abs=0.01)


def test_missing_weights(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("networks/a.safetensors").unlink()
    assert "networks/a.safetensors" in refused(capsys, "collect", "a")


def test_weights_that_are_no_safetensors(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("networks/a.safetensors").write_bytes(b"\x80\x04pickle?")
    assert "networks/a.safetensors is not a readable safetensors file" in refused(capsys, "collect", "a")


def test_weights_that_do_not_fit(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(lenet_300_100(classes=7).state_dict(), "networks/a.safetensors")
    message = refused(capsys, "collect", "a")
    assert "networks/a.safetensors does not fit tasks.models.example_networks:lenet_300_100" in message
    assert "(10,)" in message and "(7,)" in message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(project: Path, capsys: pytest.CaptureFixture[str], value: float) -> None:
    state = load_file("networks/b.safetensors")
    state["3.weight"][0, 0] = value
    save_file(state, "networks/b.safetensors")
    assert "models.b: parameter '3.weight' has NaN or infinite values" in refused(capsys, "collect", "b")
    assert not Path("activations").exists()


def test_activations_that_are_not_finite(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = load_file("networks/a.safetensors")
    save_file({name: tensor * 1e25 for name, tensor in state.items()}, "networks/a.safetensors")
    assert "layer '3' puts out NaN or infinite values" in refused(capsys, "collect", "a")
    assert not list(Path().rglob("*.arrow"))


def test_missing_data(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/a/train.parquet").unlink()
    assert "data/a/train.parquet: there is no such file" in refused(capsys, "collect", "a")


def test_damaged_data(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("data/a/train.parquet").write_bytes(Path("data/a/train.parquet").read_bytes()[:-20])
    assert "data/a/train.parquet cannot be read" in refused(capsys, "collect", "a")


def test_data_without_images(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pq.write_table(pa.table({"label": [1]}), "data/a/train.parquet")
    assert "data/a/train.parquet has no column 'image'" in refused(capsys, "collect", "a")


def test_image_that_is_no_image(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pa.table({"image": [{"bytes": b"no image", "path": None}], "label": [1]})
    pq.write_table(table, "data/a/train.parquet")
    assert "data/a/train.parquet, image 0 is not a readable image" in refused(capsys, "collect", "a")


def test_empty_calibration_data(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pq.read_table("data/a/train.parquet")
    pq.write_table(table.slice(0, 0), "data/a/train.parquet")
    assert "data/a/train.parquet is empty" in refused(capsys, "collect", "a")


def test_calibration_data_of_the_wrong_shape(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(Path("data/a/train.parquet"), np.zeros((3, 20, 20), np.uint8), np.zeros(3, np.int64))
    message = refused(capsys, "collect", "a")
    assert "models.a: Sequential does not accept an input of shape [1, 1, 20, 20]" in message


def test_labels_that_are_no_classes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES[:-1]:
        assert main(list(stage)) == 0
    write_images(Path("data/b/test.parquet"), np.zeros((2, 28, 28), np.uint8), np.array([3, -1]))
    assert "data/b/test.parquet has labels that are no class numbers" in refused(capsys, "evaluate")
    assert not Path("metrics.json").exists()


def test_factory_that_cannot_be_imported(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(
        project,
        "models",
        a={"network": "tasks.models.example_networks:alexnet", "weights": "networks/a.x", "data": "data/a"},
    )
    assert "models.a.network: tasks.models.example_networks:alexnet cannot be imported" in refused(
        capsys, "collect", "a"
    )


def test_unknown_key(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(project, "match", shares=0.5)
    assert "match.shares: unknown key" in refused(capsys, "match")


def test_impossible_count_of_a_layer(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES[:4]:
        assert main(list(stage)) == 0
    change(project, "match", share={"1": 301})
    assert "share.1: 301 is impossible. Allowed: 0 to 300" in refused(capsys, "match", status=EXIT_REFUSED)
    change(project, "match", share={"conv9": 3})
    assert "share.conv9: there is no such hidden layer" in refused(capsys, "match", status=EXIT_REFUSED)
    assert not Path("pairing").exists()


def test_unknown_model(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "there is no model 'c'; models: a, b" in refused(capsys, "collect", "c")


def test_damaged_output_of_an_earlier_stage(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES[:6]:
        assert main(list(stage)) == 0
    content = bytearray(Path("merged/weights.safetensors").read_bytes())
    content[-5] ^= 1
    Path("merged/weights.safetensors").write_bytes(content)
    assert "does not have the digest" in refused(capsys, "retrain")
    assert not Path("retrained").exists()


def test_full_disk(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that fails leaves neither the file nor a part of it."""

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "merged")

    for stage in STAGES[:5]:
        assert main(list(stage)) == 0
    monkeypatch.setattr("mtz_core.zipped.format.os.fsync", full)
    assert "the disk is full (writing merged). Free some space" in refused(capsys, "merge")
    assert not Path("merged").exists() and not list(Path().glob(".merged*"))


def test_stack_trace_only_when_asked_for(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("networks/a.safetensors").unlink()
    assert main(["collect", "a", "--debug"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("Traceback") and told.splitlines()[-1].startswith("error: networks/a.safetensors")


@pytest.mark.parametrize("content", ["{}", '{"tasks": ["a", "b"], "groups": {"1": {}}}', "[]"])
def test_pairing_of_another_layout(project: Path, capsys: pytest.CaptureFixture[str], content: str) -> None:
    Path("pairing").mkdir()
    Path("pairing/pairing.json").write_text(content)
    assert "pairing/pairing.json" in refused(capsys, "merge")


def test_moments_of_another_layout(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hessians").mkdir()
    for name in "ab":
        save_file({"1/moment": torch.eye(3)}, f"hessians/{name}.safetensors")
    assert "hessians/a.safetensors" in refused(capsys, "match")


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, says in ((["collect"], "needs the name of a model"), (["merge", "a"], "takes no model")):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err


def test_a_service_out_of_reach_may_be_tried_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES:
        assert main(list(stage)) == 0
    (project / "dvc.lock").write_text("schema: '2.0'\nstages: {}\n")
    for package in ("mtz_core", "tasks"):
        shutil.copytree(ROOT / package, project / package, ignore=shutil.ignore_patterns("__pycache__"))
    change(project, "storage", endpoint="http://127.0.0.1:9")
    change(project, "register", agreement=0)
    capsys.readouterr()
    assert main(["register"]) == EXIT_TRY_AGAIN
    message = capsys.readouterr().err
    assert message.startswith("error: S3 bucket 'mtz' at http://127.0.0.1:9") and "Traceback" not in message
    assert not Path("registration.json").exists()


NETWORKS = """
import torch
from torch import nn
from mtz_core import register_operation
from mtz_core.network.operations import Operation, pointwise

register_operation("erfinv", Operation(pointwise))


class Block(nn.Module):
    def __init__(self, width, middle):
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(width, middle, 3, padding=1, bias=False), nn.BatchNorm2d(middle), nn.ReLU(),
            nn.Conv2d(middle, middle, 3, padding=1, groups=middle), nn.Conv2d(middle, width, 1),
        )

    def forward(self, x):
        return x + torch.erfinv(0.5 * torch.tanh(self.branch(x)))


def residual(width, classes):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, stride=2), Block(width, 2 * width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(width, classes),
    )
"""


@pytest.mark.long
@pytest.mark.parametrize("match", [{}, {"budget": {"size": 0.6}}], ids=["share", "budget"])
def test_three_residual_networks_of_different_widths(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], match: dict[str, Any]
) -> None:
    """Depthwise convolutions, normalisation, a registered operator, other classes: through all stages but the last."""
    (project / "own_networks.py").write_text(NETWORKS)
    monkeypatch.syspath_prepend(str(project))
    build = __import__("own_networks").residual
    params = yaml.safe_load((project / "params.yaml").read_text())
    shutil.copytree(project / "data/b", project / "data/c")
    params |= {"models": {}, "match": match}
    for number, (name, width) in enumerate({"c": 6, "a": 4, "b": 4}.items()):
        torch.manual_seed(number)
        save_file(build(width, 10 + number).state_dict(), project / f"networks/{name}.safetensors")
        params["models"][name] = {
            "network": "own_networks:residual",
            "arguments": {"width": width, "classes": 10 + number},
            "weights": f"networks/{name}.safetensors",
            "data": f"data/{name}",
        }
    (project / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    for stage in (*STAGES[:2], ("collect", "c"), *STAGES[2:4], ("hessians", "c"), *STAGES[4:]):
        assert main(list(stage)) == 0, capsys.readouterr().err
    zipped = mtz_core.load(project / "retrained")
    assert zipped.tasks == ("a", "b", "c")
    images = torch.rand(5, 1, 28, 28)
    assert [zipped(images, task=task).shape[1] for task in zipped.tasks] == [11, 12, 10]
    assert zipped.report.stored_fraction < 0.7
    metrics = json.loads((project / "metrics.json").read_text())
    assert set(metrics["tasks"]) == {"a", "b", "c"}
    assert metrics["stored"]["bytes"] < metrics["stored"]["original_bytes"]
    descent = json.loads((project / "pairing/pairing.json").read_text())["descent"]
    assert bool(descent) != bool(match) and descent == sorted(descent, reverse=True)
    assert zipped.report.descent == tuple(descent)
