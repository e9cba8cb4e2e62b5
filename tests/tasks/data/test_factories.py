"""Tests of data sets that a function gives: what becomes a file, the same each time, and what is refused."""

import hashlib
import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch.utils.data import Dataset, TensorDataset

from tasks.data import factories
from tasks.data.examples import InvalidData, read_examples, read_images, read_labelled
from tasks.data.factories import InvalidDataset, materialise, recall_key
from tasks.data.layout import SPLITS

COUNT = 7


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three examples of two values fit into one."""
    monkeypatch.setattr(factories, "_BATCH_BYTES", 24)


def arrays(split: str, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray | None]:
    values = scale * np.arange(2 * COUNT, dtype=np.float64).reshape(COUNT, 2)
    return values, None if split == "train" else np.arange(COUNT, dtype=np.int32)


def tensors(split: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    values, labels = arrays(split)
    return torch.from_numpy(values).requires_grad_(), None if labels is None else torch.from_numpy(labels)


def pairs(split: str) -> TensorDataset:
    return TensorDataset(torch.from_numpy(arrays(split)[0]), torch.arange(COUNT))


def drawn(split: str) -> tuple[np.ndarray, np.ndarray]:
    values = [[random.random(), np.random.random(), float(torch.rand(()))] for _ in range(3)]
    return np.array(values), np.arange(3)


def name(function: Any) -> str:
    return f"{__name__}:{function.__name__}"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pytest gives this module a name under which it cannot be imported."""
    monkeypatch.setitem(sys.modules, __name__, sys.modules[arrays.__module__])


@pytest.mark.parametrize("function", [arrays, tensors, pairs])
def test_what_a_factory_gives_is_what_is_read(tmp_path: Path, function: Any) -> None:
    materialise(name(function), {}, tmp_path)
    expected = torch.arange(2.0 * COUNT).reshape(COUNT, 2)
    for split in ("validation", "test"):
        inputs, labels = read_examples(tmp_path, split)
        assert torch.equal(inputs, expected)
        assert labels.tolist() == list(range(COUNT))
    assert torch.equal(read_images(tmp_path, "train"), expected)
    with pa.memory_map(str(tmp_path / "test.arrow")) as file:
        assert pa.ipc.open_file(file).num_record_batches == 3


def test_labels_of_the_training_set_may_be_missing(tmp_path: Path) -> None:
    materialise(name(arrays), {"scale": 2.0}, tmp_path)
    assert read_images(tmp_path, "train")[1].tolist() == [4.0, 6.0]
    with pytest.raises(InvalidData, match="has no column 'label'"):
        read_examples(tmp_path, "train")


@pytest.mark.parametrize("dtype", [np.int64, np.uint8])
def test_whole_numbers_are_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: type) -> None:
    tokens = np.arange(12).reshape(6, 2)
    materialise(giving(monkeypatch, (tokens.astype(dtype), np.arange(6))), {}, tmp_path)
    inputs = read_images(tmp_path, "train")
    assert inputs.dtype == torch.int64 and inputs.tolist() == tokens.tolist()


def several(split: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Several inputs, one of them a mask, and labels of two outputs."""
    values, _ = arrays(split)
    inputs = {"x": values, "ids": torch.arange(2 * COUNT).reshape(COUNT, 2), "mask": values > 3}
    return inputs, {"logits": np.arange(COUNT), "found.0": torch.from_numpy(values)}


class Several(Dataset[Any]):
    """The same, one by one."""

    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> Any:
        return tuple({name: own[index] for name, own in part.items()} for part in several("test"))


def several_one_by_one(split: str) -> Several:
    return Several()


@pytest.mark.parametrize("function", [several, several_one_by_one])
def test_several_inputs_and_labels_of_several_outputs(tmp_path: Path, function: Any) -> None:
    materialise(name(function), {}, tmp_path)
    inputs, labels = read_labelled(tmp_path, "test")
    given, known = several("test")
    for found, expected in ((inputs.tensors, given), (labels.tensors, known)):
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[own], expected[own]) for own in expected)
    assert [own.dtype for own in inputs.tensors.values()] == [torch.float32, torch.int64, torch.bool]
    assert [own.dtype for own in labels.tensors.values()] == [torch.int64, torch.float32]


@pytest.mark.parametrize("labels", [None, np.linspace(0, 1, 6, dtype=np.float32), np.ones((6, 2), np.float32)])
def test_labels_are_optional_and_may_be_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, labels: np.ndarray | None
) -> None:
    materialise(giving(monkeypatch, (np.ones((6, 2)), labels)), {}, tmp_path)
    _, found = read_labelled(tmp_path, "test")
    assert (found is None) if labels is None else np.array_equal(found, labels)


def test_the_same_bytes_each_time(tmp_path: Path) -> None:
    for folder in ("first", "second"):
        materialise(name(drawn), {}, tmp_path / folder)
    for split in SPLITS:
        first, second = ((tmp_path / folder / f"{split}.arrow").read_bytes() for folder in ("first", "second"))
        assert first == second


def giving(monkeypatch: pytest.MonkeyPatch, value: Any) -> str:
    """The name of a factory that gives, or raises, a value."""

    def function(split: str) -> Any:
        if isinstance(value, Exception):
            raise value
        return value

    monkeypatch.setattr(sys.modules[__name__], "given", function, raising=False)
    return f"{__name__}:given"


ONES = np.ones((3, 2), np.float32)


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (RuntimeError("no lab"), "split train: it failed .*no lab"),
        (None, "it gave NoneType"),
        ((ONES, np.arange(2)), r"shapes \[3, 2\] and \[2\]"),
        ((np.ones(3), np.arange(3)), r"shapes \[3\] and \[3\]"),
        ((ONES.astype(bool), np.arange(3)), "inputs are bool, not numbers"),
        ((ONES * [[1], [np.nan], [1]], np.arange(3)), "example 1 has NaN"),
        ((ONES, np.arange(3) - 1), "labels are no class numbers"),
        ((ONES, np.array(["a", "b", "c"])), "labels are no class numbers"),
        ((ONES, np.array([0, 1, np.nan])), "example 2 has NaN"),
        (({"ids": ONES, "mask": ONES[:2]}, None), r"shapes ids \[3, 2\], mask \[2, 2\] and None"),
        (({"ids": ONES, "label": ONES}, None), "no input can be called 'label', which is another column"),
        (({"input": ONES, "more": ONES}, None), "no input can be called 'input'"),
        (
            (ONES, {"logits": np.arange(3), "boxes": ONES[:1]}),
            r"\[3, 2\] and label\.logits \[3\], label\.boxes \[1, 2\]",
        ),
        ([({"ids": ONES[0]}, 0), ({"mask": ONES[0]}, 1)], "item 1 has another shape"),
        ((ONES[:0], np.arange(0)), "it gave no example"),
        ([(ONES[0], 0), ONES], "item 1 is no pair"),
        ([(ONES[0], 0), (ONES[:, 0], 1)], "item 1 has another shape"),
        ([(ONES[0], None), (ONES[0], 1)], "item 1 has another shape, or other labels"),
        ([(ONES[0], 0)] * 3 + [(ONES[:, 0], 1)], "example 3 has another shape"),
        ([], "it gave no example"),
    ],
)
def test_what_is_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, value: Any, said: str) -> None:
    with pytest.raises(InvalidDataset, match=said):
        materialise(giving(monkeypatch, value), {}, tmp_path)
    assert not any(file.name.startswith(".") for file in tmp_path.iterdir())


def test_the_key_follows_name_arguments_and_code(tmp_path: Path) -> None:
    (tmp_path / "lab").mkdir()
    code = tmp_path / "lab" / "sets.py"
    (tmp_path / "lab" / "__init__.py").write_text("raise RuntimeError('is not imported')")
    code.write_text("1")
    keys = {
        recall_key("lab.sets:a", {"x": 1, "y": 2}, tmp_path),
        recall_key("lab.sets:a", {"y": 2, "x": 1}, tmp_path),
    }
    assert len(keys) == 1
    keys |= {recall_key("lab.sets:a", {"x": 1}, tmp_path), recall_key("lab.sets:b", {"x": 1}, tmp_path)}
    assert hashlib.sha256(b"1").hexdigest() in min(keys)
    code.write_text("2")
    keys.add(recall_key("lab.sets:a", {"x": 1}, tmp_path))
    assert len(keys) == 4
    for factory in ("lab.none:a", "none:a", "lab.sets.deeper:a"):
        with pytest.raises(InvalidDataset, match=f"{factory}: there is no module"):
            recall_key(factory, {}, tmp_path)


def test_the_command_tells_errors_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert factories.main([name(arrays), json.dumps({"scale": 3.0}), str(tmp_path)]) == 0
    assert read_images(tmp_path, "train")[1].tolist() == [6.0, 9.0]
    assert factories.main(["no.such:module", "{}", str(tmp_path)]) == 1
    assert factories.main([name(arrays), "{", str(tmp_path)]) == 1
    assert factories.main([]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("error: no.such:module cannot be imported")
    assert said[1].startswith("error: Expecting property name")
