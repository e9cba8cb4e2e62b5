"""Splits of real data have no labels and no picture or package in common."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from examples.real import data
from examples.real.data import UnusableInputs, crop, tokens_of, write_faces, write_files
from tasks.data.examples import read_images, read_labelled
from tasks.data.layout import SPLITS


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("pictures") / "lfw.npy"
    np.save(file, np.random.default_rng(0).random((102, 25, 25)))
    return file


def test_faces(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "CROPS", 2)
    assert write_faces(pictures, tmp_path) == {"train": 140, "validation": 20, "test": 40}
    members = {
        split: {
            row["path"].rpartition("-")[0] for row in pq.read_table(tmp_path / f"{split}.parquet")["image"].to_pylist()
        }
        for split in SPLITS
    }
    assert sum(map(len, members.values())) == len(set.union(*members.values())) == 100
    images, labels = read_labelled(tmp_path, "test")
    assert labels is None
    assert list(images.shape) == [40, 3, 112, 112]
    first = (tmp_path / "train.parquet").read_bytes()
    write_faces(pictures, tmp_path)
    assert (tmp_path / "train.parquet").read_bytes() == first


def test_crops_differ_and_stay_in_range() -> None:
    generator = np.random.default_rng(0)
    face = generator.integers(0, 256, (25, 25)).astype(np.uint8)
    one, other = (np.asarray(crop(face, generator)) for _ in range(2))
    assert one.shape == (112, 112, 3)
    assert (one != other).any()


def test_a_file_without_pictures_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lfw.npy"
    file.write_bytes(b"none")
    with pytest.raises(UnusableInputs, match="holds no pictures"):
        write_faces(file, tmp_path)
    np.save(file, np.zeros((3, 25, 25)))
    with pytest.raises(UnusableInputs, match=r"float64 of shape \[3, 25, 25\]"):
        write_faces(file, tmp_path)
    np.save(file, np.array([{"pickled": True}]), allow_pickle=True)
    with pytest.raises(UnusableInputs, match="holds no pictures"):
        write_faces(file, tmp_path)


def test_tokens() -> None:
    short = tokens_of(b"  abc \n")
    assert short[:5].tolist() == [*b"abc \n"]
    assert short[-5:].tolist() == [*b"  abc"]
    assert set(short[5:-5].tolist()) == {256}
    long = tokens_of(bytes(range(1, 9)) * 1000)
    assert long[:8].tolist() == list(range(1, 9))
    assert long[-8:].tolist() == list(range(1, 9))
    assert 256 not in long


def packages(root: Path) -> dict[str, Path]:
    for number in range(30):
        for name in ("a.py", "b.txt", "__pycache__/c.pyc"):
            file = root / f"package{number}" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{number} {name} " * 20)
        (root / f"package{number}" / "same.py").write_text("the same in all " * 20)
        (root / f"package{number}" / "tiny.py").write_text("")
    return {"purelib": root}


def test_files(tmp_path: Path) -> None:
    counts = write_files(tmp_path / "out", packages(tmp_path / "lib"))
    assert sum(counts.values()) == 61  # two of each package, and what is the same in all
    seen: dict[str, set[str]] = {}
    for split in SPLITS:
        tokens = read_images(tmp_path / "out", split)
        assert list(tokens.shape) == [counts[split], 2048]
        seen[split] = {bytes(row[:2].int().tolist()).decode().strip() for row in tokens}
    numbers = {split: found - {"th"} for split, found in seen.items()}
    assert sum(map(len, numbers.values())) == len(set.union(*numbers.values())) == 30
    with pa.memory_map(str(tmp_path / "out/test.arrow")) as source:
        assert pa.ipc.open_file(source).schema.names == ["input"]


def test_no_files_at_all_are_named(tmp_path: Path) -> None:
    with pytest.raises(UnusableInputs, match="no file for train"):
        write_files(tmp_path / "out", {"purelib": tmp_path})
