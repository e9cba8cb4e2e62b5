"""The zipped network as a module: per task, in both modes, alone, and on disk and back."""

import copy
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import mtz_core
from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.errors import InvalidConfig
from mtz_core.structure import ZippedStructure
from tests.mtz_core.networks import CASES, TASKS, Case, lenet5, traced_pair, zip_traced

on_all_networks = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), (5, 4, 12))


@cache
def zipped_once(case: Case) -> ZippedNetwork:
    return zip_traced(traced_pair(case), case.calibration(20), ZipConfig(share=0.5, patches=8))


def zipped_pair(case: Case) -> ZippedNetwork:
    return copy.deepcopy(zipped_once(case))


def assert_same_structure(first: ZippedStructure, second: ZippedStructure) -> None:
    assert first.tasks == second.tasks
    assert first.report == second.report
    assert first.members.keys() == second.members.keys()
    assert all(np.array_equal(rows, second.members[name]) for name, rows in first.members.items())
    for task, network in first.networks.items():
        other = second.networks[task]
        names = [field.name for field in fields(network) if field.name != "graph"]
        assert [getattr(network, name) for name in names] == [getattr(other, name) for name in names]
        a, b = network.graph, other.graph
        assert (a.nodes, a.output, a.groups, a.widths) == (b.nodes, b.output, b.groups, b.widths)
        for axes, others in ((a.rows, b.rows), (a.columns, b.columns)):
            assert axes.keys() == others.keys()
            for name, axis in axes.items():
                assert axis.groups == others[name].groups
                assert np.array_equal(axis.group, others[name].group)
                assert np.array_equal(axis.neuron, others[name].neuron)


@on_all_networks
def test_saved_and_loaded_is_the_same(case: Case, tmp_path: Path) -> None:
    zipped, x = zipped_pair(case), case.examples(5)
    zipped.save(tmp_path / "first")
    again = mtz_core.load(tmp_path / "first")
    again.save(tmp_path / "second")
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == ["manifest.json", "weights.safetensors"]
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert again.tasks == zipped.tasks
    assert again.report == zipped.report
    assert_same_structure(again.structure, zipped.structure)
    assert not again.training
    for task in TASKS:
        assert torch.equal(again(x, task), zipped(x, task))
        assert torch.equal(again.network(task)(x), zipped(x, task))


@on_all_networks
def test_sharing_nothing_survives_the_disk_exactly(case: Case, tmp_path: Path) -> None:
    networks, x = case.pair(), case.examples(5)
    zip_traced(traced_pair(case), case.calibration(9), ZipConfig(share=0.0)).save(tmp_path)
    again = mtz_core.load(tmp_path)
    for task, network in networks.items():
        assert torch.equal(again(x, task), network(x))
        state = again.network(task).state_dict()
        assert state.keys() == network.state_dict().keys()
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in state.items())


@pytest.mark.parametrize("training", [False, True])
@on_all_networks
def test_a_plain_network_does_the_same_in_both_modes(case: Case, training: bool) -> None:
    zipped, x = zipped_pair(case), case.examples(6)
    zipped.train(training)
    for task in TASKS:
        plain = zipped.network(task)
        assert all(part.training == training for part in plain.modules())
        torch.manual_seed(7)
        expected = zipped(x.clone(), task)
        torch.manual_seed(7)
        assert torch.equal(plain(x.clone()), expected)
        assert expected.requires_grad


@on_all_networks
def test_training_mode_drops_out_as_the_original_does(case: Case) -> None:
    networks, x = case.pair(), case.examples(6)
    zipped = zip_traced(traced_pair(case), case.calibration(9), ZipConfig(share=0.0)).train()
    for task, network in networks.items():
        torch.manual_seed(7)
        expected = network.train()(x.clone())
        torch.manual_seed(7)
        assert torch.equal(zipped(x.clone(), task), expected)


def test_a_plain_network_needs_nothing_of_ours_and_shares_nothing(tmp_path: Path) -> None:
    zipped, x = zipped_pair(LENET5), LENET5.examples(5)
    plain = zipped.network(TASKS[0])
    assert all(type(part).__module__.startswith("torch") for part in plain.modules() if part is not plain)
    assert {type(part) for part in plain.modules()} >= {nn.Conv2d, nn.Linear}
    save_file(plain.state_dict(), tmp_path / "plain.safetensors")
    original = LENET5.network(5)
    original.load_state_dict(load_file(tmp_path / "plain.safetensors"))
    torch.testing.assert_close(original(x), zipped(x, TASKS[0]))
    before = zipped(x, TASKS[0])
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert torch.equal(zipped(x, TASKS[0]), before)


def test_shared_blocks_belong_to_both_tasks_and_own_blocks_to_one() -> None:
    zipped, x = zipped_pair(LENET5), LENET5.examples(5)
    gradients = {}
    for task in TASKS:
        zipped.zero_grad()
        zipped(x, task).square().sum().backward()
        gradients[task] = {name.rpartition(".")[2]: p.grad for name, p in zipped.named_parameters()}
    assert gradients[TASKS[0]].keys() == zipped.tensors().keys()
    assert any("+" in name for name in gradients[TASKS[0]])
    for name in gradients[TASKS[0]]:
        for task in TASKS:
            used = all(task in owners.split("+") for owners in name.split("/")[2:])
            assert used == (gradients[task][name] is not None), (name, task)
    first, second = (gradients[task]["7/weight/digits+fashion/digits+fashion"] for task in TASKS)
    assert first is not None
    assert second is not None
    assert not torch.equal(first, second)


def test_it_is_an_ordinary_module() -> None:
    zipped, x = zipped_pair(LENET5), LENET5.examples(5)
    twin = copy.deepcopy(zipped)
    assert torch.equal(twin(x, TASKS[1]), zipped(x, TASKS[1]))
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(2)
    assert not torch.equal(twin(x, TASKS[1]), zipped(x, TASKS[1]))
    twin.load_state_dict(zipped.state_dict())
    assert torch.equal(twin(x, TASKS[1]), zipped(x, TASKS[1]))


def test_another_precision_survives_the_disk(tmp_path: Path) -> None:
    double, x = zipped_pair(LENET5).double(), LENET5.examples(5)
    double.save(tmp_path)
    again = mtz_core.load(tmp_path)
    assert torch.equal(again(x.double(), TASKS[0]), double(x.double(), TASKS[0]))


def test_blocks_are_what_the_network_holds_now() -> None:
    zipped = zipped_pair(LENET5)
    with torch.no_grad():
        for parameter in zipped.parameters():
            parameter.fill_(2)
    assert all(bool((block == 2).all()) and not block.requires_grad for block in zipped.tensors().values())


def test_unknown_tasks_are_refused_with_those_there_are() -> None:
    zipped = zipped_pair(CASES[0])
    message = r"task 'cats' is not in this zipped network\. Tasks: digits, fashion"
    with pytest.raises(InvalidConfig, match=message):
        zipped(CASES[0].examples(2), task="cats")
    with pytest.raises(InvalidConfig, match=message):
        zipped.network("cats")
