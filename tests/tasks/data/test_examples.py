"""Tests of reading examples: both files, both kinds of inputs, samples of them, and what is refused."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from tasks.data import examples
from tasks.data.examples import InvalidData, class_ranges, read_batches, read_examples, read_images, read_labelled


@pytest.fixture(autouse=True)
def few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are read in pieces that end elsewhere than their own batches."""
    monkeypatch.setattr(examples, "_ROWS", 3)


def tensors(values: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))


def write(path: Path, columns: dict[str, Any], rows: int = 4) -> None:
    """Write the columns as the file's name says, in batches of some rows."""
    table = pa.table(columns)
    path.parent.mkdir(exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(table, path, row_group_size=rows)
    else:
        with pa.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table, max_chunksize=rows)


def write_stream(path: Path, columns: dict[str, Any], rows: int = 4) -> None:
    """Write the columns as `save_to_disk` of Hugging Face datasets does."""
    table = pa.table(columns)
    path.parent.mkdir(exist_ok=True)
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=rows)


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((10, 2, 3)).astype(np.float32)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_tensors_are_taken_as_they_are(tmp_path: Path, values: np.ndarray, suffix: str, dtype: str) -> None:
    given = values.astype(dtype)
    write(tmp_path / f"train{suffix}", {"input": tensors(given), "label": np.arange(10)})
    inputs, labels = read_examples(tmp_path, "train")
    assert inputs.dtype == torch.float32
    assert torch.equal(inputs, torch.from_numpy(given.astype(np.float32)))
    assert labels.tolist() == list(range(10))
    sample, sampled = read_examples(tmp_path, "train", 6, seed=3)
    assert len(set(sampled.tolist())) == 6
    assert torch.equal(sample, inputs[sampled])
    assert torch.equal(read_images(tmp_path, "train", 6, seed=3), sample)


def test_images_are_the_same_from_either_file(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (10, 5, 4, 3), dtype=np.uint8)
    encoded = []
    for image in pixels:
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": ""})
    for suffix in (".parquet", ".arrow"):
        folder = tmp_path / suffix
        folder.mkdir()
        write(folder / f"test{suffix}", {"image": encoded, "label": np.arange(10)})
        images = read_images(folder, "test")
        assert torch.equal(images, torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255)
        assert torch.equal(read_images(folder, "test", 4, seed=1), images[read_examples(folder, "test", 4, seed=1)[1]])


def test_labels_need_not_be_there_until_they_are_read(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path / "train.arrow", {"input": tensors(values)})
    assert read_images(tmp_path, "train").shape == (10, 2, 3)
    with pytest.raises(InvalidData, match=r"train\.arrow has no column 'label'"):
        read_examples(tmp_path, "train")


def test_only_the_rows_of_a_sample_are_looked_at(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path / "train.arrow", {"input": tensors(values), "label": np.arange(10)})
    _, labels = read_examples(tmp_path, "train", 3, seed=0)
    values[np.setdiff1d(np.arange(10), labels)] = np.nan
    write(tmp_path / "train.arrow", {"input": tensors(values), "label": np.arange(10)})
    assert read_images(tmp_path, "train", 3, seed=0).isfinite().all()


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers(tmp_path: Path, values: np.ndarray, suffix: str, bad: float) -> None:
    values[7, 1, 2] = bad
    write(tmp_path / f"train{suffix}", {"input": tensors(values)})
    with pytest.raises(InvalidData, match=rf"train\{suffix}, row 7 has NaN or infinite values"):
        read_images(tmp_path, "train")


PICTURES = pa.array([{"bytes": b"no image", "path": ""}])


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"label": [1]}, "no column 'image' or 'input'"),
        ({"image": PICTURES, "input": tensors(np.ones((1, 2)))}, "both columns 'image' or 'input'"),
        ({"image": PICTURES, "label": [1]}, "image 0 is not a readable image"),
        ({"image": [b"1"], "label": [1]}, "column image is binary"),
        ({"input": [["a", "b"]], "label": [1]}, "column input is list"),
        ({"input": [1.0], "label": [1]}, "column input is double"),
        ({"input": [[True]], "label": [1]}, "column input is list.*bool"),
        ({"input": [[1, 2], [3]], "label": [1, 1]}, r"has lists of 1 and 2 values\. Pad them to one length"),
        ({"input": [[1, 2], None], "label": [1, 1]}, "without a value"),
        ({"input": [[1, 2], [3, None]], "label": [1, 1]}, "without a value"),
        ({"input": tensors(np.ones((2, 2))), "label": [1, None]}, "labels that are no class numbers"),
        ({"input": tensors(np.ones((1, 2))), "label": [-1]}, "labels that are no class numbers"),
        ({"input": tensors(np.ones((1, 2))), "label": [0.5]}, "labels that are no class numbers"),
        ({"input": tensors(np.ones((1, 2)))[:0], "label": np.arange(0)}, "is empty"),
    ],
)
def test_what_is_not_in_the_layout(tmp_path: Path, columns: dict[str, Any], said: str) -> None:
    for suffix in (".arrow", ".parquet"):
        folder = tmp_path / suffix
        folder.mkdir()
        write(folder / f"test{suffix}", columns)
        with pytest.raises(InvalidData, match=said):
            read_examples(folder, "test")


@pytest.mark.parametrize("column", ["row", "value"])
def test_tensors_that_are_not_there(tmp_path: Path, column: str) -> None:
    kind = pa.fixed_shape_tensor(pa.float32(), (2,))
    storage = pa.array([[1, 2], None] if column == "row" else [[1, 2], [3, None]], pa.list_(pa.float32(), 2))
    write(tmp_path / "test.arrow", {"input": pa.ExtensionArray.from_storage(kind, storage)})
    with pytest.raises(InvalidData, match="without a value"):
        read_images(tmp_path, "test")


def test_files_that_cannot_be_read(tmp_path: Path, values: np.ndarray) -> None:
    with pytest.raises(InvalidData, match=r"test\.parquet: there is no such file, and no test\.arrow either"):
        read_images(tmp_path, "test")
    write(tmp_path / "whole.arrow", {"input": tensors(values)})
    for suffix in (".arrow", ".parquet"):
        (tmp_path / f"test{suffix}").write_bytes((tmp_path / "whole.arrow").read_bytes()[:-100])
        with pytest.raises(InvalidData, match=rf"test\{suffix} cannot be read"):
            read_images(tmp_path, "test")
        (tmp_path / f"test{suffix}").rename(tmp_path / f"broken{suffix}")
    (tmp_path / "whole.parquet").write_bytes(b"")
    with pytest.raises(InvalidData, match=r"whole\.parquet and whole\.arrow are both there"):
        read_images(tmp_path, "whole")


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("dtype", ["int64", "int32", "uint8"])
@pytest.mark.parametrize("listed", [True, False])
def test_whole_numbers_are_tokens(tmp_path: Path, suffix: str, dtype: str, listed: bool) -> None:
    tokens = np.random.default_rng(0).integers(0, 200, (10, 6)).astype(dtype)
    column = pa.array(list(tokens)) if listed else tensors(tokens)
    write(tmp_path / f"train{suffix}", {"input": column, "label": np.arange(10)})
    inputs, _ = read_examples(tmp_path, "train")
    assert inputs.dtype == torch.int64
    assert inputs.tolist() == tokens.tolist()


def test_lists_of_one_length_are_tensors(tmp_path: Path, values: np.ndarray) -> None:
    write(tmp_path / "train.arrow", {"input": values.tolist()})
    write(tmp_path / "test.arrow", {"input": pa.array(values.reshape(10, 6).tolist(), pa.list_(pa.float32(), 6))})
    assert torch.equal(read_images(tmp_path, "train"), torch.from_numpy(values))
    assert torch.equal(read_images(tmp_path, "test"), torch.from_numpy(values).flatten(1))


@pytest.mark.parametrize("folder", [False, True])
def test_streams_are_read_like_files(tmp_path: Path, values: np.ndarray, folder: bool) -> None:
    columns = {"input": tensors(values), "label": np.arange(10)}
    write(tmp_path / "file" / "train.arrow", columns)
    if folder:
        split = tmp_path / "stream" / "train"
        names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
        split.parent.mkdir()
        for number, name in enumerate(names):
            half = slice(number * 6, number * 6 + 6)
            write_stream(split / name, {"input": tensors(values[half]), "label": np.arange(10)[half]})
        (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
        (split / "dataset_info.json").write_text("{}")
    else:
        write_stream(tmp_path / "stream" / "train.arrow", columns)
    for count in (None, 5):
        found, labels = read_examples(tmp_path / "stream", "train", count, seed=1)
        expected, known = read_examples(tmp_path / "file", "train", count, seed=1)
        assert torch.equal(found, expected) and torch.equal(labels, known)


def test_folders_that_are_not_whole(tmp_path: Path, values: np.ndarray) -> None:
    split = tmp_path / "train"
    split.mkdir()
    (split / "0.png").write_bytes(b"no part of the split")
    with pytest.raises(InvalidData, match=r"train\.parquet: there is no such file"):
        read_images(tmp_path, "train")
    (split / "state.json").write_text("{}")
    with pytest.raises(InvalidData, match="train: every file is missing"):
        read_images(tmp_path, "train")
    write_stream(split / "a.arrow", {"input": tensors(values)})
    assert read_images(tmp_path, "train").shape == (10, 2, 3)
    (split / "state.json").write_text(json.dumps({"_data_files": [{"filename": "a.arrow"}, {"filename": "b.arrow"}]}))
    with pytest.raises(InvalidData, match=r"train: b\.arrow is missing"):
        read_images(tmp_path, "train")
    write_stream(split / "b.arrow", {"input": tensors(values), "label": np.arange(10)})
    with pytest.raises(InvalidData, match=r"b\.arrow has other columns than a\.arrow"):
        read_images(tmp_path, "train")
    write_stream(split / "b.arrow", {"input": tensors(values)})
    assert read_images(tmp_path, "train").shape == (20, 2, 3)
    (split / "b.arrow").write_bytes((split / "b.arrow").read_bytes()[:-100])
    with pytest.raises(InvalidData, match="train cannot be read"):
        read_images(tmp_path, "train")
    write(tmp_path / "train.parquet", {"input": tensors(values)})
    with pytest.raises(InvalidData, match=r"train\.parquet and train are both there"):
        read_images(tmp_path, "train")


def test_the_range_of_class_numbers_is_found_without_inputs(tmp_path: Path) -> None:
    unreadable = pa.array([{"bytes": b"no image"}] * 4, pa.struct({"bytes": pa.binary()}))
    pq.write_table(pa.table({"image": unreadable, "label": [3, 0, 1, 7]}), tmp_path / "test.parquet")
    assert class_ranges(tmp_path, "test") == {"": (0, 7)}
    columns = {"image": unreadable, "label.kind": [1, 0, 1, 1], "label.place": [0.5, 1.5, 2.0, 0.0]}
    pq.write_table(pa.table(columns), tmp_path / "train.parquet")
    assert class_ranges(tmp_path, "train") == {"kind": (0, 1)}
    pq.write_table(pa.table({"image": unreadable}), tmp_path / "validation.parquet")
    assert class_ranges(tmp_path, "validation") == {}


@pytest.mark.parametrize("size", [1, 3, 5, 10, 99])
@pytest.mark.parametrize("labels", [np.arange(10), np.linspace(0, 1, 10), tensors(np.ones((10, 2))), None])
def test_batches_together_are_the_split(tmp_path: Path, values: np.ndarray, size: int, labels: Any) -> None:
    write(tmp_path / "test.parquet", {"input": tensors(values), **({} if labels is None else {"label": labels})})
    inputs, whole = read_labelled(tmp_path, "test")
    batches = list(read_batches(tmp_path, "test", size))
    assert [len(batch) for batch, _ in batches] == [len(part) for part in torch.split(inputs, size)]
    assert torch.equal(torch.cat([batch for batch, _ in batches]), inputs)
    if whole is None:
        assert all(part is None for _, part in batches)
    else:
        assert torch.equal(torch.cat([part for _, part in batches if part is not None]), whole)


def test_labels_of_several_outputs_have_a_column_each(tmp_path: Path, values: np.ndarray) -> None:
    boxes = np.ones((10, 2), np.float32) * np.arange(10)[:, None]
    columns = {"x": tensors(values), "label.logits": np.arange(10), "label.found.0": tensors(boxes)}
    write(tmp_path / "test.parquet", columns)
    inputs, labels = read_labelled(tmp_path, "test")
    assert list(inputs.tensors) == ["x"]
    assert torch.equal(labels.tensors["logits"], torch.arange(10))
    assert torch.equal(labels.tensors["found.0"], torch.from_numpy(boxes))
    for first, (_, part) in zip((0, 4, 8), read_batches(tmp_path, "test", 4), strict=True):
        assert torch.equal(part.tensors["logits"], labels.tensors["logits"][first : first + 4])
        assert torch.equal(part.tensors["found.0"], labels.tensors["found.0"][first : first + 4])
    sample, classes = read_examples(tmp_path, "test", 5, seed=2, several=True)
    assert list(classes) == ["logits"]
    assert torch.equal(inputs.tensors["x"][classes["logits"]], sample.tensors["x"])
    with pytest.raises(InvalidData, match="no column 'label'"):
        read_examples(tmp_path, "test")
    write(tmp_path / "test.parquet", {**columns, "label": np.arange(10)})
    with pytest.raises(InvalidData, match=r"both columns 'label' and 'label\.logits'.*columns label\.NAME"):
        read_labelled(tmp_path, "test")
    write(tmp_path / "test.parquet", {**columns, "label.logits": np.arange(10) - 1})
    with pytest.raises(InvalidData, match="labels that are no class numbers from 0"):
        read_labelled(tmp_path, "test")


PEAK = """
import sys
from pathlib import Path
from tasks.data.examples import read_batches, read_images
from tasks.progress import peak_memory

folder, how = Path(sys.argv[1]), sys.argv[2]
read_images(folder, "validation")
list(read_batches(folder, "validation", 100))
before = peak_memory()
rows = len(read_images(folder, "train", 50)) if how == "sample" else 0
rows = rows or sum(len(batch) for batch, _ in read_batches(folder, "train", 500))
print(rows, (peak_memory() - before) // 1024)
"""


@pytest.mark.long
@pytest.mark.parametrize("how", ["sample", "batches"])
def test_a_split_may_be_larger_than_memory(tmp_path: Path, how: str) -> None:
    """Neither a sample of it nor its batches need it as a whole: 80 MB, of which a quarter may be held."""
    rows = 20_000
    columns = {"input": tensors(np.zeros((rows, 1000), np.float32)), "label": pa.array(np.zeros(rows, np.int64))}
    write(tmp_path / "train.parquet", columns, rows=rows)
    write(tmp_path / "validation.parquet", {name: column[:300] for name, column in columns.items()})
    command, root = [sys.executable, "-c", PEAK, str(tmp_path), how], Path(__file__).parents[3]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    read, kilobytes = map(int, done.stdout.split())
    assert read == (50 if how == "sample" else rows)
    assert kilobytes < 20_000
