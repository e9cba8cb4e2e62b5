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
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

import mtz_core
from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.errors import InvalidZippedFile
from tests.support.networks import TASKS, Case, lenet5, strided, traced_pair, zip_traced

LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), (5, 4, 12))
STRIDED = Case("strided", strided, (2, 9, 8), (4, 5, 3))
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"


@pytest.fixture(scope="module")
def zipped() -> ZippedNetwork:
    return zip_traced(traced_pair(LENET5), LENET5.calibration(20), ZipConfig(share=0.5, patches=8))


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
    assert blocks.keys() == zipped.tensors().keys()
    assert all(torch.equal(blocks[name], block) for name, block in zipped.tensors().items())


def test_the_manifest_is_plain_json_with_the_digest_of_the_weights(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    assert manifest["weights_sha256"] == hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    assert list(manifest["networks"]) == list(TASKS)
    assert (manifest["format"], manifest["version"]) == ("mtz-zipped-network", 5)


def test_the_same_network_gives_the_same_bytes(zipped: ZippedNetwork, folder: Path, tmp_path: Path) -> None:
    zipped.save(tmp_path / "deep" / "again")
    for name in (MANIFEST, WEIGHTS):
        assert (tmp_path / "deep" / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_saving_again_replaces_the_files(zipped: ZippedNetwork, folder: Path) -> None:
    other = zip_traced(traced_pair(LENET5), LENET5.calibration(20), ZipConfig(share=0.0))
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
    assert_refused(folder, r"not a zipped network of format version 3 to 5")


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
        (
            lambda blocks: blocks.update({BLOCK: blocks[BLOCK].double()}),
            rf"'{BLOCK}' has dtype torch\.float64, not".replace("+", r"\+"),
        ),
        (lambda blocks: blocks.update({BLOCK: blocks[BLOCK].half()}), r"has dtype torch\.float16, not"),
    ],
    ids=["missing", "surplus", "shape", "double", "half"],
)
def test_weights_that_do_not_fit_are_refused_by_name(
    folder: Path, change: Callable[[dict[str, torch.Tensor]], object], message: str
) -> None:
    replace_weights(folder, changed_blocks(change, folder))
    assert_refused(folder, message)


def test_parameters_that_cannot_learn_are_refused(folder: Path) -> None:
    def change(manifest: dict[str, Any]) -> None:
        manifest["dtypes"]["extra/own/fashion"] = "int64"
        network(manifest)["shapes"]["extra"] = [3]
        network(manifest)["parameters"].append("extra")

    replace_weights(folder, changed_blocks(lambda b: b.update({"extra/own/fashion": torch.ones(3).long()}), folder))
    rewrite(folder, change)
    assert_refused(folder, "extra")


def network(manifest: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = manifest["networks"]["fashion"]
    return found


def node(manifest: dict[str, Any], kind: str) -> dict[str, Any]:
    """The first node of that kind in the second task's network."""
    found: dict[str, Any] = next(entry for entry in network(manifest)["nodes"] if entry["kind"] == kind)
    return found


MALFORMED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "other dtype": (lambda m: m["dtypes"].update({BLOCK: "float64"}), r"has dtype torch\.float32, not"),
    "no dtypes": (lambda m: m.pop("dtypes"), r"has dtype torch\.float32, not"),
    "input dtype of another kind": (lambda m: network(m).update(input_dtype="nn"), r"malformed"),
    "unknown operator": (lambda m: node(m, "relu").update(kind="frobnicate"), r"frobnicate"),
    "a dunder": (lambda m: node(m, "relu").update(kind="__class__"), r"__class__"),
    "a list as operator": (lambda m: node(m, "relu").update(kind=["relu"]), r"malformed"),
    "an unknown argument": (lambda m: node(m, "relu")["arguments"].update(colour=1), r"cannot be run"),
    "an argument of many references": (
        lambda m: node(m, "relu")["arguments"].update(self={"value": "0", "state": "0"}),
        r"malformed|out of order|cannot be run",
    ),
    "an unknown field": (lambda m: node(m, "relu").update(code="1"), r"malformed.*code"),
    "a missing field": (lambda m: node(m, "relu").pop("kind"), r"malformed.*kind"),
    "order": (lambda m: network(m)["nodes"].reverse(), r"out of order"),
    "name twice": (lambda m: network(m)["nodes"][1].update(name=network(m)["nodes"][0]["name"]), r"out of order"),
    "unknown source": (lambda m: node(m, "relu")["arguments"].update(self={"value": "nowhere"}), r"out of order"),
    "unknown tensor": (lambda m: node(m, "conv2d")["arguments"].update(weight={"state": "nope"}), r"malformed"),
    "unknown output": (lambda m: network(m).update(output="nowhere"), r"malformed.*nowhere"),
    "another topology": (lambda m: node(m, "relu").update(kind="tanh"), r"malformed.*relu.*tanh"),
    "no nodes": (lambda m: network(m).update(nodes=[]), r"malformed"),
    "no networks": (lambda m: m.update(networks={}), r"malformed.*no networks"),
    "networks a number": (lambda m: m.update(networks=3), r"malformed"),
    "a task's name that is none": (
        lambda m: m.update(networks={task.replace("digits", "a+b"): n for task, n in m["networks"].items()}),
        r"malformed|should have shape",
    ),
    "parameters that are not there": (lambda m: network(m)["parameters"].append("nope"), r"malformed.*nope"),
    "other shapes": (lambda m: network(m)["shapes"].update({"0.weight": [5, 1, 4, 5]}), r"should have shape|malformed"),
    "negative shape": (lambda m: network(m)["shapes"].update({"0.weight": [-5, 1, 5, 5]}), r"malformed"),
    "no members": (lambda m: m.pop("members"), r"malformed.*members"),
    "members of other groups": (lambda m: m["members"].update({"9": []}), r"malformed.*members"),
    "a neuron of nobody": (lambda m: m["members"]["3"].append([-1, -1]), r"malformed.*nobody"),
    "a neuron twice": (lambda m: m["members"]["3"].append([0, -1]), r"malformed.*members of '3'"),
    "a missing neuron": (lambda m: m["members"]["3"].pop(), r"malformed.*members of '3'"),
    "a neuron that is not there": (lambda m: m["members"]["3"].append([99, -1]), r"malformed.*members of '3'"),
    "a fraction of a neuron": (lambda m: m["members"]["3"][0].__setitem__(0, 0.5), r"malformed"),
    "members without end": (lambda m: m["members"]["3"][0].__setitem__(0, float("inf")), r"malformed"),
    "members of three tasks": (lambda m: m["members"].update({"3": [[0, 0, 0]]}), r"malformed"),
    "no report": (lambda m: m.pop("report"), r"malformed.*report"),
    "surplus in report": (lambda m: m["report"].update(extra=1), r"malformed.*extra"),
    "input a number": (lambda m: network(m).update(input_shape=4), r"malformed"),
    "bytes a text": (lambda m: network(m)["original"].update(bytes="many"), r"malformed"),
    "no size of the original": (lambda m: network(m).pop("original"), r"malformed.*original"),
    "no parameters of the original": (lambda m: network(m)["original"].pop("parameters"), r"malformed.*parameters"),
    "the original a list": (lambda m: network(m).update(original=[1, 2]), r"malformed"),
    "missing digest": (lambda m: m.pop("weights_sha256"), r"does not have the digest"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_manifest_that_makes_no_sense_is_refused(folder: Path, name: str) -> None:
    change, message = MALFORMED[name]
    rewrite(folder, change)
    assert_refused(folder, message)


CONSTANT = {"state": "extra"}
VALUE = {"value": "0"}
INPUT = {"value": ":input"}
FILE = "written by loading"
UNSAFE: dict[str, dict[str, Any]] = {
    "reads a file": {"kind": "from_file", "arguments": {"filename": FILE, "shared": True, "size": 3}},
    "writes a constant into a file": {"kind": "save", "arguments": {"item": CONSTANT, "filename": FILE}},
    "writes a value into a file": {"kind": "save", "arguments": {"item": VALUE, "filename": FILE}},
    "in place": {"kind": "relu_", "arguments": {"self": VALUE}},
    "in place on a stored tensor": {"kind": "fill_.Scalar", "arguments": {"self": CONSTANT, "value": 7}},
    "into an operand": {"kind": "add.out", "arguments": {"self": VALUE, "other": VALUE, "out": VALUE}},
    "into the input": {"kind": "mul.out", "arguments": {"self": INPUT, "other": INPUT, "out": INPUT}},
    "other storage": {"kind": "set_.source_Tensor", "arguments": {"self": CONSTANT, "source": VALUE}},
    "seeds": {"kind": "manual_seed", "arguments": {"seed": 1}},
    "prints": {"kind": "_print", "arguments": {"s": "hello"}},
    "random, as a constant": {"kind": "rand_like", "arguments": {"self": CONSTANT}},
    "random": {"kind": "rand", "arguments": {"size": [3]}},
    "no operator": {"kind": "no_such_operator", "arguments": {"self": VALUE}},
    "a part of torch": {"kind": "__init__", "arguments": {"self": VALUE}},
    "another namespace": {"kind": "prims::add", "arguments": {"self": VALUE}},
}


@pytest.mark.parametrize("separate", [False, True], ids=["", "separate"])
@pytest.mark.parametrize("name", UNSAFE)
def test_operators_that_are_no_functions_of_tensors_are_refused_and_never_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, separate: bool
) -> None:
    entry = {**UNSAFE[name], "name": "unsafe", "module": "", "is_layer": False, "separate": separate}

    def change(manifest: dict[str, Any]) -> None:
        for task in TASKS:
            manifest["dtypes"][f"extra/own/{task}"] = "float32"
            manifest["networks"][task]["shapes"]["extra"] = [3]
            manifest["networks"][task]["nodes"].insert(1, entry)

    extra = {f"extra/own/{task}": torch.ones(3) for task in TASKS}
    replace_weights(folder, changed_blocks(lambda blocks: blocks.update(extra), folder))
    rewrite(folder, change)
    monkeypatch.chdir(tmp_path)
    before, state = sorted(path.name for path in tmp_path.iterdir()), torch.get_rng_state()
    assert_refused(folder, MANIFEST)
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert torch.equal(torch.get_rng_state(), state)


NONSENSE: dict[str, Callable[[dict[str, Any]], object]] = {
    "no weight": lambda m: node(m, "conv2d")["arguments"].pop("weight"),
    "no input": lambda m: node(m, "conv2d")["arguments"].pop("input"),
    "weight of another layer": lambda m: node(m, "conv2d")["arguments"].update(weight={"state": "3.weight"}),
    "stride a text": lambda m: node(m, "conv2d")["arguments"].update(stride="2"),
    "more groups than channels": lambda m: node(m, "conv2d")["arguments"].update(groups=7),
    "unknown setting": lambda m: node(m, "max_pool2d")["arguments"].update(colour=3),
    "arguments a list": lambda m: node(m, "max_pool2d").update(arguments=[]),
    "missing setting": lambda m: node(m, "max_pool2d")["arguments"].pop("kernel_size"),
    "a window of nothing": lambda m: node(m, "max_pool2d")["arguments"].update(kernel_size=[0, 0]),
    "a window beyond the input": lambda m: node(m, "max_pool2d")["arguments"].update(kernel_size=[99, 99]),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_settings_that_make_no_sense_are_refused(folder: Path, name: str) -> None:
    rewrite(folder, NONSENSE[name])
    assert_refused(folder, MANIFEST)


@pytest.mark.parametrize(
    ("before", "after"),
    [('"stride":[2,', '"stride":[1,'), ('"version":5,', '"version":5,"note":1,')],
    ids=["stride", "surplus key"],
)
def test_a_manifest_that_was_changed_is_refused(tmp_path: Path, before: str, after: str) -> None:
    zip_traced(traced_pair(STRIDED), STRIDED.calibration(9), ZipConfig(share=0.5)).save(tmp_path)
    text = (tmp_path / MANIFEST).read_text()
    assert before in text
    (tmp_path / MANIFEST).write_text(text.replace(before, after, 1))
    assert_refused(tmp_path, "does not have the digest that it states")


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


def places(content: Any) -> list[tuple[Any, Any]]:
    """Every container of a manifest with each of its keys; of a long list, the first entries stand for all."""
    keys: list[Any] = []
    if isinstance(content, dict):
        keys = [key for key in content if key not in ("manifest_sha256", "weights_sha256", "report")]
    elif isinstance(content, list):
        keys = list(range(min(len(content), 9)))
    return [(content, key) for key in keys] + [found for key in keys for found in places(content[key])]


STRANGE: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    2,
    1.5,
    float("nan"),
    "",
    "relu",
    "0.weight",
    ":input",
    [],
    [1],
    [[]],
    {},
    {"value": "0"},
)


@pytest.mark.slow
@settings(max_examples=60)
@given(data=st.data())
def test_no_strange_entry_ends_in_anything_but_a_refusal(stored: tuple[Path, bytes], data: st.DataObject) -> None:
    """The digests fit, so that nothing but the entry itself is wrong."""
    folder, content = stored
    (folder / MANIFEST).write_bytes(content)

    def change(manifest: dict[str, Any]) -> None:
        container, key = data.draw(st.sampled_from(places(manifest)))
        match data.draw(st.sampled_from(["replace", "remove", "repeat"])):
            case "replace":
                container[key] = data.draw(st.sampled_from(STRANGE))
            case "remove":
                del container[key]
            case "repeat" if isinstance(container, list):
                container.insert(key, container[key])

    rewrite(folder, change)
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
    other = zip_traced(traced_pair(LENET5), LENET5.calibration(20), ZipConfig(share=0.0))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        other.save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_save_that_fails_at_the_manifest_leaves_the_old_network(
    zipped: ZippedNetwork, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = zip_traced(traced_pair(LENET5), LENET5.calibration(20), ZipConfig(share=0.0))
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


# Rounded


BITS_OF = {
    "0/scale/digits+fashion": 4,
    "0/scale/digits": 3,
    "3/scale/digits+fashion": 6,
    "7/scale/digits+fashion": 2,
    "7/scale/fashion": 5,
    "9/scale/digits": 8,
}
CODES, SCALES = "7/weight/digits+fashion/digits+fashion", "7/scale/digits+fashion"


@pytest.fixture(scope="module")
def rounded() -> ZippedNetwork:
    return zip_traced(traced_pair(LENET5), LENET5.calibration(20), ZipConfig(share=0.5, patches=8), BITS_OF)


@pytest.fixture
def rounded_folder(rounded: ZippedNetwork, tmp_path: Path) -> Path:
    rounded.save(tmp_path / "rounded")
    return tmp_path / "rounded"


def test_codes_are_on_disk_as_they_are_and_scales_in_two_bytes(rounded: ZippedNetwork, rounded_folder: Path) -> None:
    content = (rounded_folder / WEIGHTS).read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == rounded.report.stored_bytes
    blocks, manifest = load_tensors(content), json.loads((rounded_folder / MANIFEST).read_text())
    assert {name for name, block in blocks.items() if block.dtype == torch.uint8} == rounded.structure.bits.keys()
    assert {name for name, block in blocks.items() if block.dtype == torch.bfloat16} == BITS_OF.keys()
    assert manifest["bits"] == rounded.structure.bits
    assert manifest["precision"] == "float32"
    for name, bits in rounded.structure.bits.items():
        layer, _, rows, _ = name.split("/")
        assert bits == BITS_OF[f"{layer}/scale/{rows}"]
    again = mtz_core.load(rounded_folder)
    assert all(torch.equal(again.tensors()[name], tensor) for name, tensor in rounded.tensors().items())
    assert {tensor.dtype for tensor in again.tensors().values()} == {torch.float32, torch.uint8}


BAD_TENSORS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "codes too short": (lambda b: b.update({CODES: b[CODES][:-1]}), rf"'{CODES}' should have shape"),
    "codes too long": (lambda b: b.update({CODES: torch.cat([b[CODES], b[CODES][:1]])}), rf"'{CODES}' should have"),
    "codes not packed": (
        lambda b: b.update({CODES: torch.zeros(5, 12, dtype=torch.uint8)}),
        rf"'{CODES}' should have shape",
    ),
    "codes of the other sign": (
        lambda b: b.update({CODES: b[CODES].to(torch.int8)}),
        rf"'{CODES}' should hold uint8, but holds int8",
    ),
    "codes that are values": (
        lambda b: b.update({CODES: b[CODES].float()}),
        rf"'{CODES}' should hold uint8, but holds float32",
    ),
    "no codes": (lambda b: b.pop(CODES), rf"'{CODES}' should have shape .*, but has None"),
    "no scales": (lambda b: b.pop(SCALES), rf"'{SCALES}' should have shape .*, but has None"),
    "a scale too few": (lambda b: b.update({SCALES: b[SCALES][:-1]}), rf"'{SCALES}' should have shape"),
    "scales of rows and columns": (lambda b: b.update({SCALES: b[SCALES][:, None]}), rf"'{SCALES}' should have shape"),
    "scales of float32": (lambda b: b.update({SCALES: b[SCALES].float()}), rf"'{SCALES}' holds no scales"),
    "scales of float16": (lambda b: b.update({SCALES: b[SCALES].half()}), rf"'{SCALES}' holds no scales"),
    "whole scales": (lambda b: b.update({SCALES: b[SCALES].short()}), rf"'{SCALES}' holds no scales"),
    "a scale below 0": (lambda b: b[SCALES].neg_(), rf"'{SCALES}' holds no scales"),
    "an endless scale": (lambda b: b[SCALES].fill_(torch.inf), rf"'{SCALES}' holds no scales"),
    "a scale that is no number": (lambda b: b[SCALES].fill_(torch.nan), rf"'{SCALES}' holds no scales"),
    "a scale whose levels are endless": (lambda b: b[SCALES].fill_(3e38), rf"'{SCALES}' holds no scales"),
    "weights that are codes": (
        lambda b: b.update({"9/weight/fashion/fashion": b["9/weight/fashion/fashion"].byte()}),
        "'9/weight/fashion/fashion' should hold float32, but holds uint8",
    ),
    "biases that are codes": (
        lambda b: b.update({"7/bias/digits": b["7/bias/digits"].byte()}),
        "7/bias/digits' should hold float32",
    ),
    "weights of another precision": (
        lambda b: b.update({"9/weight/fashion/fashion": b["9/weight/fashion/fashion"].double()}),
        "'9/weight/fashion/fashion' should hold float32, but holds float64",
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_codes_and_scales_that_make_no_sense_are_refused_by_name(rounded_folder: Path, name: str) -> None:
    """The manifest states the types that are found, so that nothing but the tensor itself is wrong."""
    change, message = BAD_TENSORS[name]
    content = changed_blocks(change, rounded_folder)
    replace_weights(rounded_folder, content)
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in load_tensors(content).items()}
    rewrite(rounded_folder, lambda manifest: manifest["dtypes"].update(dtypes))
    assert_refused(rounded_folder, message.replace("+", r"\+"))


def stated(name: str, bits: Any) -> Callable[[dict[str, Any]], object]:
    return lambda manifest: manifest["bits"].update({name: bits})


NOT_OFFERED: tuple[Any, ...] = (0, 1, 7, 9, 16, 32, -2, 2.0, 2.5, True, "2", None, [2], {})
BAD_BITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    **{f"{bits!r} bits": (stated(CODES, bits), rf"malformed.*'{CODES}' in .* bits") for bits in NOT_OFFERED},
    "other bits": (stated(CODES, 3), rf"'{CODES}' should have shape"),
    "bits of a block that is not there": (stated("7/weight/digits/cats", 4), "malformed.*'7/weight/digits/cats' in 4"),
    "bits of a layer that is not there": (stated("8/weight/digits/digits", 4), "malformed.*'8/weight/digits/digits'"),
    "bits of a bias": (stated("7/bias/digits", 8), "malformed.*'7/bias/digits' in 8 bits"),
    "bits of scales": (stated(SCALES, 8), rf"malformed.*'{SCALES}' in 8 bits"),
    "bits of what is not rounded": (
        stated("9/weight/fashion/fashion", 8),
        "'9/scale/fashion' should have shape .*, but has None",
    ),
    "codes without bits": (lambda m: m["bits"].pop(CODES), rf"'{CODES}' should have shape"),
    "no bits": (lambda m: m.pop("bits"), "malformed.*bits"),
    "bits a list": (lambda m: m.update(bits=[4]), "malformed"),
    "bits a number": (lambda m: m.update(bits=4), "malformed"),
    "no precision": (lambda m: m.pop("precision"), "malformed.*precision"),
    "an unknown precision": (lambda m: m.update(precision="float8_e4m3fn"), "malformed.*precision 'float8_e4m3fn'"),
    "whole numbers as precision": (lambda m: m.update(precision="uint8"), "malformed.*precision 'uint8'"),
    "a list as precision": (lambda m: m.update(precision=["float32"]), "malformed.*precision"),
    "another precision": (lambda m: m.update(precision="float64"), "should hold float64, but holds float32"),
    "an older version": (lambda m: m.update(version=4), "should have shape|malformed"),
}


@pytest.mark.parametrize("name", BAD_BITS)
def test_bits_that_make_no_sense_are_refused_by_name(rounded_folder: Path, name: str) -> None:
    change, message = BAD_BITS[name]
    rewrite(rounded_folder, change)
    assert_refused(rounded_folder, message.replace("+", r"\+"))


@given(data=st.data())
def test_no_strange_bits_end_in_anything_but_a_refusal(
    rounded: ZippedNetwork, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("strange")
    rounded.save(folder)
    name = data.draw(st.sampled_from(sorted(rounded.structure.block_shapes())))
    rewrite(folder, stated(name, data.draw(st.sampled_from([*STRANGE, 3, 4, 8]))))
    try:
        mtz_core.load(folder)
    except InvalidZippedFile as refusal:
        assert str(folder) in str(refusal)


def test_a_rounded_network_whose_codes_changed_by_a_bit_is_refused(rounded_folder: Path) -> None:
    content = bytearray((rounded_folder / WEIGHTS).read_bytes())
    codes = load_tensors(bytes(content))[CODES].numpy().tobytes()
    content[content.index(codes)] ^= 1
    (rounded_folder / WEIGHTS).write_bytes(content)
    assert_refused(rounded_folder, "does not have the digest")


# Former versions


FORMER = {version: Path(__file__).parent / f"format-{version}" for version in (4, 5)}
"""Networks in the formats of their time, and the outputs that they had."""


@pytest.mark.parametrize("version", FORMER)
def test_what_was_written_is_read_and_computes_what_it_did(version: int, tmp_path: Path) -> None:
    folder = FORMER[version]
    assert json.loads((folder / "zipped" / MANIFEST).read_text())["version"] == version
    found, expected = mtz_core.load(folder / "zipped"), load_tensors((folder / "outputs.safetensors").read_bytes())
    assert bool(found.structure.bits) == (version >= 5)
    for task in found.tasks:
        torch.testing.assert_close(found(expected["inputs"], task), expected[task], rtol=1e-5, atol=1e-6)
    found.save(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (folder / "zipped" / WEIGHTS).read_bytes()
    again = mtz_core.load(tmp_path)
    assert again.report == found.report
    for task in found.tasks:
        assert torch.equal(again(expected["inputs"], task), found(expected["inputs"], task))
