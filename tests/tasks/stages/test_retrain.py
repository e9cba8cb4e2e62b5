"""The stage `retrain`: killed runs go on to the same bytes, stale checkpoints are never used, labels are optional."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

import mtz_core
from mtz_core.retraining import Retraining
from tasks.__main__ import main
from tasks.data.examples import read_images
from tasks.models.example_networks import lenet_300_100
from tests.support.stages import write_images

pytestmark = pytest.mark.slow

CHECKPOINT = Path("checkpoints/retrain.safetensors")
SIZES = {"train": 60, "validation": 30}

KILLED = """
import os, signal
from mtz_core.retraining import Retraining
from tasks.__main__ import main

train, calls = Retraining._train, []

def killed(self):
    calls.append(1)
    found = train(self)
    if len(calls) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return found

Retraining._train = killed
main(["retrain"])
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two LeNet-300-100 on images of noise, merged."""
    root = tmp_path_factory.mktemp("template")
    (root / "networks").mkdir()
    networks, images, models = {}, {}, {}
    for number, name in enumerate("ab"):
        draw = np.random.default_rng(number)
        for split, count in SIZES.items():
            pixels = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            write_images(root / f"data/{name}/{split}.parquet", pixels, draw.integers(0, 10, count))
        torch.manual_seed(number)
        networks[name] = lenet_300_100()
        save_file(networks[name].state_dict(), root / f"networks/{name}.safetensors")
        images[name] = read_images(root / f"data/{name}", "train")
        models[name] = {
            "network": "tasks.models.example_networks:lenet_300_100",
            "weights": f"networks/{name}.safetensors",
            "data": f"data/{name}",
        }
    mtz_core.zip_networks(networks, images, mtz_core.ZipConfig(method="paper")).save(root / "merged")
    retrain = {"iterations": 8, "validate_every": 2, "batch_size": 16, "learning_rate": 1e-4, "patience": 9}
    params = {"group": "small", "models": models, "retrain": retrain, "register": {"name": "small"}}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


@pytest.fixture(scope="module")
def undisturbed(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, bytes]]:
    """What a run writes that nobody disturbs."""
    root = tmp_path_factory.mktemp("undisturbed") / "project"
    shutil.copytree(template, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["retrain"]) == 0
        assert not CHECKPOINT.exists()
        assert written()["retrained/weights.safetensors"] != Path("merged/weights.safetensors").read_bytes()
        yield written()


def written() -> dict[str, bytes]:
    files = [*Path("retrained").iterdir(), Path("plots/learning_curve.csv")]
    return {str(path): path.read_bytes() for path in sorted(files)}


def change(**values: object) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["retrain"].update(values)
    Path("params.yaml").write_text(yaml.safe_dump(content))


class Killed(BaseException):
    """Stands for the end of the process."""


def kill_after(validations: int) -> None:
    """Run the stage until it trains on after so many validations, then end it abruptly."""
    train = Retraining._train

    def killed(self: Retraining) -> tuple[int, dict[str, float]]:
        found = train(self)
        if len(self.curve) == validations:
            raise Killed
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Retraining, "_train", killed)
        with pytest.raises(Killed):
            main(["retrain"])
    assert CHECKPOINT.exists() and not Path("retrained").exists()


@pytest.mark.parametrize("validations", [1, 2, 4])
def test_a_run_that_ends_between_validations_goes_on_to_the_same_bytes(
    project: Path, undisturbed: dict[str, bytes], validations: int, capsys: pytest.CaptureFixture[str]
) -> None:
    kill_after(validations)
    capsys.readouterr()
    assert main(["retrain"]) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == f"resumed from the checkpoint of iteration {2 * (validations - 1)}"
    assert len(told) == 1 + 5 - validations
    assert written() == undisturbed
    assert not CHECKPOINT.exists()


@pytest.mark.long
def test_a_killed_process_goes_on_to_the_same_bytes(
    project: Path, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    path = [str(Path(mtz_core.__path__[0]).parent)]
    code = f"import sys; sys.path[:0] = {path!r}\n{KILLED}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -signal.SIGKILL
    assert CHECKPOINT.exists()
    capsys.readouterr()
    assert main(["retrain"]) == 0
    assert capsys.readouterr().out.startswith("resumed from the checkpoint of iteration 2\n")
    assert written() == undisturbed


@pytest.mark.parametrize("what", ["settings", "weights", "data", "merged"])
def test_a_stale_checkpoint_is_ignored(project: Path, what: str, capsys: pytest.CaptureFixture[str]) -> None:
    kill_after(3)
    if what == "settings":
        change(temperature=1.5)
    elif what == "weights":
        torch.manual_seed(9)
        save_file(lenet_300_100().state_dict(), "networks/b.safetensors")
    elif what == "data":
        shutil.copy("data/a/train.parquet", "data/b/train.parquet")
    else:
        zipped = mtz_core.load("merged")
        with torch.no_grad():
            next(zipped.parameters()).mul_(1.01)
        zipped.save("merged")
    capsys.readouterr()
    assert main(["retrain"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("the checkpoint of an earlier run is ignored: network, data, settings or code have changed")
    assert "iteration 0/8" in told
    resumed = written()
    shutil.rmtree("retrained")
    assert main(["retrain"]) == 0
    assert written() == resumed


def test_a_damaged_checkpoint_is_ignored(
    project: Path, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    kill_after(3)
    CHECKPOINT.write_bytes(CHECKPOINT.read_bytes()[:-100])
    capsys.readouterr()
    assert main(["retrain"]) == 0
    assert "the checkpoint of an earlier run is ignored: it cannot be read" in capsys.readouterr().out
    assert written() == undisturbed


def test_labels_stay_unread_unless_they_count(
    project: Path, undisturbed: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        for split in SIZES:
            path = f"data/{name}/{split}.parquet"
            pq.write_table(pq.read_table(path).drop_columns("label"), path)
    assert main(["retrain"]) == 0
    assert written() == undisturbed
    change(labels=0.5)
    assert main(["retrain"]) == 1
    assert "data/a/train.parquet has no column 'label'" in capsys.readouterr().err


def test_labels_of_a_sample_go_with_its_images(project: Path) -> None:
    """Labels that are the images' own brightness tell whether both are sampled alike."""
    from tasks.data.examples import read_examples

    pixels = np.repeat(np.arange(60, dtype=np.uint8), 28 * 28).reshape(60, 28, 28)
    write_images(project / "data/a/train.parquet", pixels, np.arange(60))
    images, labels = read_examples(project / "data/a", "train", 20, seed=3)
    assert len(labels) == 20
    assert torch.equal((images[:, 0, 0, 0] * 255).round().long(), labels)
    assert torch.equal(images, read_images(project / "data/a", "train", 20, seed=3))


def test_labels_change_the_network(project: Path, undisturbed: dict[str, bytes]) -> None:
    change(labels=0.5)
    assert main(["retrain"]) == 0
    assert written() != undisturbed


def test_labels_out_of_range(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_images(project / "data/b/validation.parquet", np.zeros((2, 28, 28), np.uint8), np.array([3, 10]))
    change(labels=1.0)
    assert main(["retrain"]) == 1
    assert "the validation labels for 'b' go from 3 to 10. Allowed: 0 to 9" in capsys.readouterr().err
    assert not CHECKPOINT.exists() and not Path("retrained").exists()


def test_weights_of_unknown_tasks(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(balance={"a": 1.0, "c": 1.0})
    assert main(["retrain"]) == 1
    assert "balance: names ['a', 'c']" in capsys.readouterr().err
