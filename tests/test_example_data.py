"""The example data: layout, counts, class shares, no image in two files, and that the script rebuilds them."""

import io
import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data"
FULL_DATA = Path(os.environ.get("MTZ_FULL_DATA", ROOT.parent / "shared" / "data"))
SETS = ("mnist", "fashion-mnist")
COUNTS = {"train": 14_000, "validation": 1_500, "test": 4_000}
# Images per class in the original sets; Fashion-MNIST is balanced.
MNIST_CLASS_SIZES = {
    "train": [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949],
    "test": [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009],
}

every_file = pytest.mark.parametrize(("name", "split"), [(name, split) for name in SETS for split in COUNTS])


@cache
def read(name: str, split: str) -> pa.Table:
    return pq.read_table(DATA / name / f"{split}.parquet")


def encoded_images(name: str, split: str) -> list[bytes]:
    return read(name, split)["image"].combine_chunks().field("bytes").to_pylist()


def run_build(source: Path, out: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(DATA / "build.py"), "--source", str(source), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True)


@every_file
def test_layout_is_that_of_image_datasets(name: str, split: str) -> None:
    schema = read(name, split).schema
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    assert schema.field("label").type == pa.int64()
    features = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    assert features["image"] == {"_type": "Image"}
    assert features["label"]["_type"] == "ClassLabel"
    assert len(set(features["label"]["names"])) == 10


@every_file
def test_counts_and_class_shares(name: str, split: str) -> None:
    labels = read(name, split)["label"].to_numpy()
    assert len(labels) == COUNTS[split]
    original = np.array(MNIST_CLASS_SIZES["test" if split == "test" else "train"]) if name == "mnist" else np.ones(10)
    expected = COUNTS[split] * original / original.sum()
    assert np.abs(np.bincount(labels, minlength=10) - expected).max() < 1


@every_file
def test_images_are_28_by_28_grey(name: str, split: str) -> None:
    for encoded in encoded_images(name, split)[::97]:
        image = Image.open(io.BytesIO(encoded))
        assert (image.format, image.mode) == ("PNG", "L")
        pixels = np.asarray(image)
        assert pixels.shape == (28, 28)
        assert pixels.dtype == np.uint8
        assert pixels.any()


@pytest.mark.parametrize("name", SETS)
def test_no_image_occurs_twice(name: str) -> None:
    images = [image for split in COUNTS for image in encoded_images(name, split)]
    assert len(set(images)) == len(images)


def test_size_of_the_folder() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) < 12_000_000


@pytest.mark.skipif(not FULL_DATA.is_dir(), reason="the full sets are not there (set MTZ_FULL_DATA to their folder)")
def test_rebuilding_gives_the_same_bytes(tmp_path: Path) -> None:
    result = run_build(FULL_DATA, tmp_path)
    assert result.returncode == 0, result.stderr
    for name in SETS:
        for split in COUNTS:
            file = Path(name) / f"{split}.parquet"
            assert (tmp_path / file).read_bytes() == (DATA / file).read_bytes(), f"{file} differs"


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "is missing"),
        (b"no gzip", "is not a readable gzip file"),
        (b"\x1f\x8b\x08\x00", "is not a readable gzip"),
    ],
)
def test_unusable_source_is_named(tmp_path: Path, content: bytes | None, complaint: str) -> None:
    source = tmp_path / "source"
    (source / "mnist").mkdir(parents=True)
    file = source / "mnist" / "train-images-idx3-ubyte.gz"
    if content is not None:
        file.write_bytes(content)
    result = run_build(source, tmp_path / "out")
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {file} {complaint}")
    assert not (tmp_path / "out").exists()
