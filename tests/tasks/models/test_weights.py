"""Tests of weights: however people store them, they become the state of the network, and nothing is guessed."""

import json
from collections.abc import Mapping
from errno import EACCES
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from mtz_core.errors import InvalidWeights
from tasks.files import InvalidArtifact
from tasks.models.weights import join_weights, read_weights, state_for

State = Mapping[str, Tensor]


class Tied(nn.Module):
    """Two layers of one weight, and a normalisation."""

    def __init__(self, tied: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c, self.norm = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.BatchNorm1d(8)
        if tied:
            self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.c(self.norm(self.b(self.a(x))))
        return y


@pytest.fixture
def network() -> Tied:
    """A network that has seen a batch."""
    torch.manual_seed(0)
    made = Tied()
    made(torch.randn(9, 4))
    return made


def fresh(state: State, path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """What another network of this kind gets out of a file with a state."""
    save_file(dict(state), path)
    return state_for(Tied(), read_weights(path), "here")


def separate(network: nn.Module) -> dict[str, Tensor]:
    """The state, no two tensors of which share their memory."""
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(found: State, expected: State) -> bool:
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "model.", "module._orig_mod.", "model.module.model."])
def test_prefixes_that_all_names_have_are_left_out_and_said(network: Tied, tmp_path: Path, prefix: str) -> None:
    found, notes = fresh({prefix + n: t for n, t in separate(network).items()}, tmp_path / "a.safetensors")
    assert same(found, network.state_dict())
    assert notes == ([f"all names begin with {prefix!r}, which is left out"] if prefix else [])


def test_a_prefix_that_the_network_has_itself_is_kept(network: Tied, tmp_path: Path) -> None:
    wrapped = nn.ModuleDict({"model": network})
    save_file({f"module.{n}": t for n, t in separate(wrapped).items()}, tmp_path / "a.safetensors")
    found, _ = state_for(nn.ModuleDict({"model": Tied()}), read_weights(tmp_path / "a.safetensors"), "here")
    assert same(found, wrapped.state_dict())


def test_a_prefix_that_some_names_lack_is_no_prefix(network: Tied, tmp_path: Path) -> None:
    state = {f"model.{n}": t for n, t in separate(network).items()} | {"loss.weight": torch.ones(1)}
    with pytest.raises(InvalidWeights, match=r"'a\.bias' of shape \(8,\) is missing in the weights\. "):
        fresh(state, tmp_path / "a.safetensors")


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("told", [True, False])
@pytest.mark.parametrize("stored", ["b.weight", "c.weight"])
def test_tied_tensors_that_are_stored_once(network: Tied, tmp_path: Path, prefix: str, told: bool, stored: str) -> None:
    (alias,) = {"b.weight", "c.weight"} - {stored}
    state = {prefix + n: t for n, t in separate(network).items() if n != alias}
    save_file(state, tmp_path / "a.safetensors", {prefix + alias: prefix + stored} if told else {"format": "pt"})
    found, notes = state_for(Tied(), read_weights(tmp_path / "a.safetensors"), "here")
    assert same(found, network.state_dict())
    assert notes[-1] == f"'{alias}' is stored once, as '{stored}'"


def test_what_safetensors_itself_writes_of_tied_tensors(network: Tied, tmp_path: Path) -> None:
    save_model(network, str(tmp_path / "a.safetensors"))
    for tied in (True, False):
        found, _ = state_for(Tied(tied), read_weights(tmp_path / "a.safetensors"), "here")
        assert same(found, network.state_dict())


def test_tensors_that_differ_cannot_be_tied(tmp_path: Path) -> None:
    state = separate(Tied(tied=False))
    with pytest.raises(
        InvalidWeights, match=r"'b\.weight' and 'c\.weight' differ, .* Build the network without that tie"
    ):
        fresh(state, tmp_path / "a.safetensors")
    assert same(state_for(Tied(tied=False), read_weights(tmp_path / "a.safetensors"), "here")[0], state)


def test_counters_may_be_missing(network: Tied, tmp_path: Path) -> None:
    state = {name: tensor for name, tensor in separate(network).items() if not name.endswith("batches_tracked")}
    found, notes = fresh(state, tmp_path / "a.safetensors")
    assert found.keys() == network.state_dict().keys() and notes == []
    assert all(torch.equal(found[name], state[name]) for name in state)


@pytest.mark.parametrize(
    ("dtype", "how"), [(torch.bfloat16, "exactly"), (torch.float16, "exactly"), (torch.float64, "rounded")]
)
def test_other_precisions_become_that_of_the_network_and_it_is_said(
    network: Tied, tmp_path: Path, dtype: torch.dtype, how: str
) -> None:
    network.norm.get_buffer("num_batches_tracked").fill_(100_000)  # more than a half can hold
    state = {name: tensor.to(dtype) for name, tensor in separate(network).items()}
    found, notes = fresh(state, tmp_path / "a.safetensors")
    assert {name: t.dtype for name, t in found.items()} == {n: t.dtype for n, t in network.state_dict().items()}
    assert all(torch.equal(found[n], state[n].float()) for n in state if n != "norm.num_batches_tracked")
    assert f"{dtype} becomes torch.float32, {how}" in notes


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.bool])
@pytest.mark.parametrize("scaled", [True, False])
def test_codes_are_not_read_as_numbers(network: Tied, tmp_path: Path, dtype: torch.dtype, scaled: bool) -> None:
    state = separate(network)
    codes = (state["a.weight"] * 127).round().to(dtype)
    scales = {"a.weight_scale": torch.ones(8)} if scaled else {}
    with pytest.raises(InvalidWeights, match=rf"'a\.weight' holds {dtype} in place of torch\.float32.*scale \*"):
        fresh({**state, "a.weight": codes, **scales}, tmp_path / "a.safetensors")
    advised = 1 / 127 * (codes.float() - 0)
    assert torch.equal(fresh({**state, "a.weight": advised}, tmp_path / "a.safetensors")[0]["a.weight"], advised)


class Masked(nn.Module):
    """Has buffers that hold no floating-point numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("places", torch.arange(4))
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))


def test_whole_numbers_of_another_type(tmp_path: Path) -> None:
    state = {"places": torch.tensor([3.0, 1, 2, 0]), "mask": torch.tensor([0, 1, 1], dtype=torch.uint8)}
    save_file(state, tmp_path / "a.safetensors")
    found, _ = state_for(Masked(), read_weights(tmp_path / "a.safetensors"), "here")
    assert found["places"].tolist() == [3, 1, 2, 0] and found["mask"].tolist() == [False, True, True]
    save_file({**state, "places": state["places"] / 2}, tmp_path / "a.safetensors")
    with pytest.raises(InvalidWeights, match=r"'places' holds torch\.float32 that no torch\.int64 can stand for"):
        state_for(Masked(), read_weights(tmp_path / "a.safetensors"), "here")


def split_up(state: State, folder: Path, index: bool = True) -> dict[str, str]:
    """Write a state as two files."""
    folder.mkdir(exist_ok=True)
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(state)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    if index:
        write_index(folder, places)
    return places


def write_index(folder: Path, places: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


@pytest.mark.parametrize("index", [True, False])
def test_several_files_are_one_network(network: Tied, tmp_path: Path, index: bool) -> None:
    state = {f"model.{n}": t for n, t in separate(network).items() if n != "c.weight"}
    split_up(state, tmp_path / "many", index)
    found, _ = state_for(Tied(), read_weights(tmp_path / "many"), "here")
    assert same(found, network.state_dict())
    join_weights(tmp_path / "many", tmp_path / "one.safetensors")
    assert same(read_weights(tmp_path / "one.safetensors").tensors, state)


def test_several_files_that_do_not_belong_together(network: Tied, tmp_path: Path) -> None:
    folder = tmp_path / "many"
    places = split_up(separate(network), folder)
    first, second = sorted(set(places.values()))

    def refused(said: str) -> None:
        with pytest.raises(InvalidArtifact, match=said):
            read_weights(folder)

    with pytest.raises(InvalidArtifact, match=rf"is an index\. Name its folder, {folder}"):
        read_weights(folder / "model.safetensors.index.json")
    write_index(folder, {**places, "a.weight": second})
    refused(rf"'a\.weight' is in {first}, but model\.safetensors\.index\.json names {second}")
    write_index(folder, {**places, "d": first})
    refused(rf"'d' is in None, but model\.safetensors\.index\.json names {first}")
    write_index(folder, {name: file for name, file in places.items() if name != "a.weight"})
    refused(rf"'a\.weight' is in {first}, but .* names None")
    wrong: tuple[object, ...] = ({}, {"a": "../a.safetensors"}, {"a": "model.bin"}, {"a": 1}, [])
    for content in wrong:
        write_index(folder, content)
        refused("is no index of safetensors files beside it")
    write_index(folder, places)
    (folder / second).rename(folder / "other.safetensors")
    refused(rf"{second}: there is no such file, but model\.safetensors\.index\.json names it")
    save_file(separate(network), folder / second)
    refused(r"does not name other\.safetensors, which lies beside it\. Remove")
    (folder / "model.safetensors.index.json").unlink()
    refused(rf"is in {first} and in {second}|is in {second} and in other\.safetensors")
    (tmp_path / "none").mkdir()
    with pytest.raises(InvalidArtifact, match=r"none has no \.safetensors file"):
        read_weights(tmp_path / "none")


def test_a_file_that_may_not_be_read_is_told_from_a_missing_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(InvalidArtifact, match=r"No such file or directory\. Make or fetch the file first\.$"):
        read_weights(file)
    save_file({"a": torch.ones(1)}, file)

    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InvalidArtifact, match=r"Permission denied\. Allow this user to read it\.$"):
        read_weights(file)
