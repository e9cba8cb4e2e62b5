"""Zipped networks on disk: exact sizes, and every kind of damage refused by name."""

import hashlib
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import mtz_core
from mtz_core import ZipConfig, ZippedNetwork, zip_networks
from mtz_core.errors import InvalidZippedFile
from tests.mtz_core.networks import TASKS, Case, lenet5, strided

LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), (5, 4, 12))
STRIDED = Case("strided", strided, (2, 9, 8), (4, 5, 3))
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"


@pytest.fixture(scope="module")
def zipped() -> ZippedNetwork:
    return zip_networks(LENET5.pair(), LENET5.calibration(20), ZipConfig(share=0.5, patches=8))


@pytest.fixture
def folder(zipped: ZippedNetwork, tmp_path: Path) -> Path:
    zipped.save(tmp_path / "zipped")
    return tmp_path / "zipped"


def rewrite(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the manifest, and leave everything else in order."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    canonical = json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    (folder / MANIFEST).write_text(json.dumps(content | {"manifest_sha256": hashlib.sha256(canonical).hexdigest()}))


def replace_weights(folder: Path, content: bytes) -> None:
    """Other weights with the digest that the manifest states."""
    (folder / WEIGHTS).write_bytes(content)
    rewrite(folder, lambda manifest: manifest.update(weights_sha256=hashlib.sha256(content).hexdigest()))


def assert_refused(folder: Path, message: str) -> None:
    with pytest.raises(InvalidZippedFile, match=message):
        mtz_core.load(folder)


def test_each_value_is_on_disk_once(zipped: ZippedNetwork, folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    header = int.from_bytes(content[:8], "little")
    assert len(content) - 8 - header == zipped.report.stored_bytes
    blocks = load_tensors(content)
    assert blocks.keys() == zipped.blocks().keys()
    assert all(torch.equal(blocks[name], block) for name, block in zipped.blocks().items())


def test_the_manifest_is_plain_json_with_the_digest_of_the_weights(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["weights_sha256"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert manifest["tasks"] == list(TASKS)
    assert (manifest["format"], manifest["version"]) == ("mtz-zipped-network", 1)


def test_the_same_network_gives_the_same_bytes(zipped: ZippedNetwork, folder: Path, tmp_path: Path) -> None:
    zipped.save(tmp_path / "deep" / "again")
    for name in (MANIFEST, WEIGHTS):
        assert (tmp_path / "deep" / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_saving_again_replaces_the_files(zipped: ZippedNetwork, folder: Path) -> None:
    other = zip_networks(LENET5.pair(), LENET5.calibration(20), ZipConfig(share=0.0))
    other.save(folder)
    x = LENET5.examples(3)
    assert torch.equal(mtz_core.load(folder)(x, TASKS[0]), other(x, TASKS[0]))


@pytest.mark.parametrize("name", [MANIFEST, WEIGHTS])
def test_missing_files_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    assert_refused(folder, rf"{name}: No such file.*folder with {MANIFEST} and {WEIGHTS}")


def test_a_missing_folder_or_a_file_instead_is_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "nowhere", r"nowhere.*No such file")
    (tmp_path / "file").write_text("{}")
    assert_refused(tmp_path / "file", r"file.*Not a directory")


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_weights_are_refused(folder: Path, keep: int) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[:keep])
    assert_refused(folder, rf"{WEIGHTS} does not have the digest.*damaged")


@pytest.mark.parametrize("position", [0, 8, 200, -1, -1000])
def test_a_flipped_bit_in_the_weights_is_refused(folder: Path, position: int) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[position] ^= 1
    (folder / WEIGHTS).write_bytes(content)
    assert_refused(folder, r"does not have the digest")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"not json", b'{"format": '])
def test_a_manifest_that_is_not_json_is_refused(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    assert_refused(folder, rf"{MANIFEST} is not JSON")


@pytest.mark.parametrize("content", ["[]", "null", "3", "{}", '{"format": "mtz-zipped-network", "version": 2}'])
def test_other_formats_and_versions_are_refused(folder: Path, content: str) -> None:
    (folder / MANIFEST).write_text(content)
    assert_refused(folder, r"not a zipped network of format version 1")


@pytest.mark.parametrize(
    "content",
    [b"", b"weights", (1 << 40).to_bytes(8, "little") + b"{}", pickle.dumps({"weight": [1.0]})],
    ids=["empty", "text", "endless header", "pickle"],
)
def test_weights_of_another_format_are_refused(folder: Path, content: bytes) -> None:
    replace_weights(folder, content)
    assert_refused(folder, rf"{WEIGHTS} is not a safetensors file")


def changed_blocks(change: Callable[[dict[str, torch.Tensor]], object], folder: Path) -> bytes:
    blocks = load_tensors((folder / WEIGHTS).read_bytes())
    change(blocks)
    return save_tensors(blocks)


BLOCK = "9/weight/digits/digits+fashion"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda blocks: blocks.pop(BLOCK),
            rf"'{BLOCK}'.*should have shape \(3, \d\), but has None".replace("+", r"\+"),
        ),
        (lambda blocks: blocks.update(extra=torch.zeros(2)), r"'extra' should have shape None, but has \(2,\)"),
        (lambda blocks: blocks.update({BLOCK: torch.zeros(3, 9)}), r"but has \(3, 9\)"),
        (lambda blocks: blocks.update({BLOCK: blocks[BLOCK].double()}), r"dtype torch\.float64, not torch\.float32"),
        (lambda blocks: blocks.update({BLOCK: blocks[BLOCK].half()}), r"dtype torch\.float16, not torch\.float32"),
    ],
    ids=["missing", "surplus", "shape", "double", "half"],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    replace_weights(folder, changed_blocks(change, folder))
    assert_refused(folder, message)


def node(manifest: dict[str, Any], kind: str) -> dict[str, Any]:
    found: dict[str, Any] = next(entry for entry in manifest["nodes"] if entry["kind"] == kind)
    return found


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other dtype": (lambda m: m.update(dtype="torch.float64"), r"has dtype torch\.float32, not torch\.float64"),
    "unknown operation": (lambda m: node(m, "relu").update(kind="frobnicate"), r"unknown operation 'frobnicate'"),
    "an operator of torch": (lambda m: node(m, "relu").update(kind="from_file"), r"unknown operation 'from_file'"),
    "a dunder": (lambda m: node(m, "relu").update(kind="__class__"), r"unknown operation '__class__'"),
    "a list as operation": (lambda m: node(m, "relu").update(kind=["relu"]), r"malformed"),
    "an unknown field": (lambda m: node(m, "relu").update(code="1"), r"malformed.*code"),
    "a missing field": (lambda m: node(m, "relu").pop("kind"), r"malformed.*kind"),
    "order": (lambda m: m["nodes"].reverse(), r"out of order"),
    "name twice": (lambda m: m["nodes"][1].update(name=m["nodes"][0]["name"]), r"out of order"),
    "unknown source": (lambda m: m["nodes"][1].update(source="nowhere"), r"out of order"),
    "unknown task": (lambda m: m["groups"][1]["layout"][0][0].append("cats"), r"layout of"),
    "negative run": (lambda m: m["groups"][1]["layout"][0].__setitem__(1, -1), r"layout of"),
    "other run": (lambda m: m["groups"][1]["layout"][0].__setitem__(1, 3), r"should have shape"),
    "no groups": (lambda m: m.update(groups=[]), r"malformed"),
    "no nodes": (lambda m: m.update(nodes=[]), r"should have shape None"),
    "no tasks": (lambda m: m.update(tasks=[]), r"malformed"),
    "tasks a number": (lambda m: m.update(tasks=3), r"malformed"),
    "no report": (lambda m: m.pop("report"), r"malformed.*report"),
    "surplus in report": (lambda m: m["report"].update(extra=1), r"malformed.*extra"),
    "no columns": (lambda m: m["columns_per_neuron"].pop("3"), r"malformed"),
    "other columns": (lambda m: m["columns_per_neuron"].update({"3": 24}), r"should have shape"),
    "inputs a number": (lambda m: m.update(input_shape=4), r"malformed"),
    "missing digest": (lambda m: m.pop("weights_sha256"), r"does not have the digest"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, name: str) -> None:
    change, message = MALFORMED[name]
    rewrite(folder, change)
    assert_refused(folder, message)


NONSENSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no kernel": lambda m: node(m, "conv2d")["settings"].pop("kernel_size"),
    "kernel of another size": lambda m: node(m, "conv2d")["settings"].update(kernel_size=[3, 3]),
    "stride a text": lambda m: node(m, "conv2d")["settings"].update(stride="2"),
    "unknown setting": lambda m: node(m, "max_pool2d")["settings"].update(colour=3),
    "settings a list": lambda m: node(m, "max_pool2d").update(settings=[]),
    "missing setting": lambda m: node(m, "max_pool2d")["settings"].pop("kernel_size"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_settings_that_make_no_sense_are_refused(folder: Path, name: str) -> None:
    rewrite(folder, NONSENSE[name])
    assert_refused(folder, MANIFEST)


@pytest.mark.parametrize(
    ("before", "after"),
    [('"stride": [\n     2,', '"stride": [\n     1,'), ('"version": 1,', '"version": 1, "note": 1,')],
    ids=["stride", "surplus key"],
)
def test_a_manifest_that_was_changed_is_refused(tmp_path: Path, before: str, after: str) -> None:
    zip_networks(STRIDED.pair(), STRIDED.calibration(9), ZipConfig(share=0.5)).save(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    assert before in text
    (tmp_path / MANIFEST).write_text(text.replace(before, after, 1))
    assert_refused(tmp_path, "manifest")


def test_a_count_without_end_is_refused(folder: Path) -> None:
    rewrite(folder, lambda manifest: manifest["columns_per_neuron"].update({"3": float("inf")}))
    assert_refused(folder, "malformed")


@pytest.fixture(scope="module")
def stored(zipped: ZippedNetwork, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("stored")
    zipped.save(folder)
    return folder, (folder / MANIFEST).read_bytes()


@given(data=st.data())
def test_no_damage_to_a_manifest_ends_in_anything_but_a_refusal(
    stored: tuple[Path, bytes], data: st.DataObject
) -> None:
    folder, content = stored
    position = data.draw(st.integers(0, len(content) - 1))
    damaged = bytearray(content)
    match data.draw(st.sampled_from(["replace", "cut", "insert"])):
        case "replace":
            damaged[position] = data.draw(st.integers(0, 255))
        case "cut":
            del damaged[position : position + data.draw(st.integers(1, 50))]
        case "insert":
            damaged[position:position] = data.draw(st.sampled_from([b"0", b"null", b"[]", b'"x":1,', b"-", b"1e9"]))
    (folder / MANIFEST).write_bytes(damaged)
    try:
        mtz_core.load(folder)
    except InvalidZippedFile as refusal:
        assert str(folder) in str(refusal)


def test_nothing_half_written_is_left_when_saving_fails(
    zipped: ZippedNetwork, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        zipped.save(tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_failed_save_leaves_the_old_network(
    zipped: ZippedNetwork, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    other = zip_networks(LENET5.pair(), LENET5.calibration(20), ZipConfig(share=0.0))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        other.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_that_fails_at_the_manifest_leaves_the_old_network(
    zipped: ZippedNetwork, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = zip_networks(LENET5.pair(), LENET5.calibration(20), ZipConfig(share=0.0))
    calls: list[int] = []

    def full_at_last(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_at_last)
    with pytest.raises(OSError, match="No space left"):
        other.save(folder)
    x = LENET5.examples(3)
    assert torch.equal(mtz_core.load(folder)(x, TASKS[0]), zipped(x, TASKS[0]))
