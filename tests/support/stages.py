"""Small projects for the stages, and what their tests look at."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from tasks.__main__ import main
from tasks.models.example_networks import lenet_300_100

SIZES = {"train": 60, "validation": 30, "test": 40}


def make_lenets(root: Path) -> None:
    """Write a project of two LeNet-300-100 on images of noise into `root`."""
    for number, name in enumerate("ab"):
        draw = np.random.default_rng(number)
        for split, count in SIZES.items():
            images = draw.integers(0, 256, (count, 28, 28), dtype=np.uint8)
            write_images(root / f"data/{name}/{split}.parquet", images, draw.integers(0, 10, count))
        torch.manual_seed(number)
        (root / "networks").mkdir(exist_ok=True)
        save_file(lenet_300_100().state_dict(), root / f"networks/{name}.safetensors")
    model = {"network": "tasks.models.example_networks:lenet_300_100"}
    params = {
        "group": "small",
        "models": {name: model | {"weights": f"networks/{name}.safetensors", "data": f"data/{name}"} for name in "ab"},
        "collect": {"images": 50},
        "retrain": {"iterations": 4, "validate_every": 2, "batch_size": 16},
        "register": {"name": "small"},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))


def perceptron() -> nn.Module:
    """A small network for images of 6 × 6 in six classes."""
    hidden = (nn.Linear(36, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU())
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(16, 6))


class Aside(nn.Module):
    """A LeNet-300-100 and a layer that no output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.aside = lenet_300_100(), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for images `[n, 1, 28, 28]`."""
        logits: Tensor = self.network(x)
        return logits


def wide(inputs: int) -> nn.Module:
    """A network whose inputs are much larger than all else of it."""
    return nn.Sequential(nn.Linear(inputs, 4), nn.ReLU(), nn.Linear(4, 2))


class TokenClassifier(nn.Module):
    """A small network for texts of any length, in tokens, in three classes."""

    def __init__(self, words: int = 40) -> None:
        super().__init__()
        self.words = nn.Embedding(words, 12)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.ReLU())
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits for tokens `[n, length]`."""
        logits: Tensor = self.head(self.body(self.words(x)).mean(1))
        return logits


def write_images(path: Path, images: np.ndarray, labels: np.ndarray) -> None:
    """Write a split as Parquet, its images as PNG."""

    def encode(pixels: np.ndarray) -> dict[str, Any]:
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "png")
        return {"bytes": buffer.getvalue(), "path": None}

    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [encode(pixels) for pixels in images], "label": pa.array(labels, pa.int64())})
    pq.write_table(table, path)


def outputs(root: Path) -> dict[str, bytes]:
    """All files that stages have written."""
    return {
        str(path.relative_to(root)): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in ("data", "networks", "params.yaml")
    }


def change(root: Path, block: str, **values: object) -> None:
    """Set some values in a block of params.yaml."""
    content = yaml.safe_load((root / "params.yaml").read_text())
    content.setdefault(block, {}).update(values)
    (root / "params.yaml").write_text(yaml.safe_dump(content))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 1) -> str:
    """The one error line of a stage that refuses; nothing else may be on standard error."""
    capsys.readouterr()
    assert main(list(arguments)) == status
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]
