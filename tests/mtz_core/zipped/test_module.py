"""The zipped network as a module: per task, in both modes, alone, and on disk and back."""

import copy
import itertools
from dataclasses import fields
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mtz_core
from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.errors import InvalidConfig, UnsupportedModule
from mtz_core.network.tracing import trace
from mtz_core.zipped.structure import ZippedStructure, block_name
from tests.support.networks import CASES, TASKS, Case, Residual, lenet5, mlp, traced_pair, zip_traced

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


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_a_first_layer_in_groups_is_run_for_all_tasks_as_for_each() -> None:
    for groups, seed in itertools.product((2, 4), range(3)):
        torch.manual_seed(seed)
        networks = {
            task: nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.ReLU(), nn.Conv2d(8, 3, 1)) for task in TASKS
        }
        data = {task: torch.randn(10, 4, 5, 5) for task in TASKS}
        zipped, x = mtz_core.zip_networks(networks, data).eval(), torch.randn(5, 4, 5, 5)
        for task, y in zipped.run_all(x).items():
            torch.testing.assert_close(y, zipped(x, task=task), rtol=1e-4, atol=1e-5)


def test_unknown_tasks_are_refused_with_those_there_are() -> None:
    zipped = zipped_pair(CASES[0])
    message = r"task 'cats' is not in this zipped network\. Tasks: digits, fashion"
    with pytest.raises(InvalidConfig, match=message):
        zipped(CASES[0].examples(2), task="cats")
    with pytest.raises(InvalidConfig, match=message):
        zipped.network("cats")


# Mixed batches


MLP = Case("mlp", mlp, (12,), (9, 7))
RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6))


@pytest.mark.parametrize("case", [MLP, RESIDUAL], ids=lambda case: case.name)
def test_every_example_of_a_mixed_batch_gets_its_own_task(case: Case) -> None:
    zipped, x = zipped_pair(case), case.examples(7)
    tasks = [TASKS[i] for i in (1, 0, 0, 1, 1, 0, 1)]
    found = zipped(x, task=tasks)
    alone = torch.cat([zipped(example[None], task) for example, task in zip(x, tasks, strict=True)])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
    assert torch.equal(zipped(x, task=tuple(tasks)), found)
    assert torch.equal(zipped(x, task=[TASKS[1]] * 7), zipped(x, TASKS[1]))


def test_a_mixed_batch_trains_both_tasks() -> None:
    zipped, x = zipped_pair(MLP), MLP.examples(4)
    tasks = [TASKS[0], TASKS[1], TASKS[1], TASKS[0]]
    zipped(x, task=tasks).square().sum().backward()
    found = {name: p.grad.clone() for name, p in zipped.named_parameters() if p.grad is not None}
    zipped.zero_grad()
    for task in TASKS:
        zipped(x[[t == task for t in tasks]], task).square().sum().backward()
    for name, parameter in zipped.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_mixed_batches_that_make_no_sense_are_refused() -> None:
    zipped, x = zipped_pair(MLP), MLP.examples(3)
    with pytest.raises(InvalidConfig, match="2 tasks for 3 examples"):
        zipped(x, task=[TASKS[0], TASKS[1]])
    with pytest.raises(InvalidConfig, match="task 'cats' is not in this zipped network"):
        zipped(x, task=[TASKS[0], "cats", TASKS[1]])
    with pytest.raises(InvalidConfig, match="cannot mix digits, fashion: their outputs differ in shape"):
        other = zipped_pair(CASES[1])
        other(CASES[1].examples(2), task=list(TASKS))


# Training


def statistics(zipped: ZippedNetwork) -> dict[str, Tensor]:
    return {name: buffer.clone() for name, buffer in zipped.named_buffers() if "running" in name}


def test_training_updates_the_statistics_of_the_task_that_ran_as_the_original_does() -> None:
    zipped, x = zip_traced(traced_pair(RESIDUAL), RESIDUAL.calibration(9), ZipConfig(share=0.0)), RESIDUAL.examples(8)
    before = statistics(zipped)
    assert len(before) == 2 * 2 * 5
    zipped(x, TASKS[0])
    assert all(torch.equal(value, before[name]) for name, value in statistics(zipped).items())
    original = RESIDUAL.pair()[TASKS[0]].train()
    assert torch.equal(zipped.train()(x, TASKS[0]), original(x))
    expected = {f"{name}/own/{TASKS[0]}".replace(".", "|"): b for name, b in original.named_buffers() if "run" in name}
    for name, value in statistics(zipped).items():
        if name.endswith(TASKS[0]):
            assert torch.equal(value, expected[name])
            assert not torch.equal(value, before[name])
        else:
            assert torch.equal(value, before[name])


def test_statistics_without_momentum_are_averaged_in_training_or_refused() -> None:
    """`momentum=None` weighs every batch alike, which takes counting them."""
    network = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=None), nn.ReLU(), nn.Linear(5, 3)).eval()
    x = torch.randn(20, 6)
    try:
        traced = trace(network, x)
    except UnsupportedModule as refusal:
        assert "momentum" in str(refusal)
        return
    zipped = zip_traced({"a": traced, "b": traced}, {"a": x, "b": x}, ZipConfig(share=0.0)).train()
    network.train()
    for batch in x.split(10):
        torch.testing.assert_close(zipped(batch, "a"), network(batch))
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(zipped.tensors()[f"1.{name}/own/a"], network.get_buffer(f"1.{name}"))


def test_training_with_shared_neurons_is_training_of_plain_networks_whose_gradients_add_up() -> None:
    zipped, x = zipped_pair(RESIDUAL).train(), RESIDUAL.examples(8)
    plain = {task: zipped.network(task) for task in TASKS}
    for task in TASKS:
        assert plain[task].training
        torch.testing.assert_close(plain[task](x), zipped(x, task), rtol=1e-5, atol=1e-5)
        zipped(x, task).square().sum().backward()
        plain[task](x).square().sum().backward()
    gradients = {name.rpartition(".")[2].replace("|", "."): p.grad for name, p in zipped.named_parameters()}
    for layer in zipped.structure.layers:
        dense = {task: matrix_gradient(network.get_submodule(layer.name)) for task, network in plain.items()}
        for rows in zipped.structure.rows[layer.name].segments:
            for columns in zipped.structure.columns[layer.name].segments:
                owners = [task for task in rows.owners if task in columns.owners]
                if owners:
                    expected = sum(dense[t][rows.places[t]][:, columns.places[t]] for t in owners)
                    found = gradients[block_name(layer.name, rows.owners, columns.owners)]
                    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    for task, network in plain.items():
        for name, parameter in network.named_parameters():
            if f"{name}/own/{task}" in gradients:
                torch.testing.assert_close(gradients[f"{name}/own/{task}"], parameter.grad, rtol=1e-3, atol=1e-4)


def matrix_gradient(layer: nn.Module) -> Tensor:
    gradient = layer.get_parameter("weight").grad
    assert gradient is not None
    return gradient.flatten(1)


def test_trained_values_survive_the_state_and_the_disk(tmp_path: Path) -> None:
    zipped, x = zipped_pair(RESIDUAL).train(), RESIDUAL.examples(8)
    optimiser = torch.optim.SGD(zipped.parameters(), lr=0.05)
    for task in TASKS:
        zipped(x, task).square().sum().backward()
    optimiser.step()
    zipped.eval()
    fresh = zipped_pair(RESIDUAL)
    assert not torch.equal(fresh(x, TASKS[0]), zipped(x, TASKS[0]))
    fresh.load_state_dict(zipped.state_dict())
    zipped.save(tmp_path)
    again = mtz_core.load(tmp_path)
    for task in TASKS:
        assert torch.equal(fresh(x, task), zipped(x, task))
        assert torch.equal(again(x, task), zipped(x, task))
    assert zipped.state_dict().keys() == again.state_dict().keys()
    assert len(zipped.state_dict()) == len(zipped.tensors())


# Where it lies


@pytest.mark.parametrize("case", [MLP, RESIDUAL, LENET5], ids=lambda case: case.name)
def test_a_whole_network_moves(case: Case) -> None:
    zipped, x = zipped_pair(case), case.examples(5)
    shapes = {task: zipped(x, task).shape for task in TASKS}
    moved = zipped.to("meta")
    for task in TASKS:
        assert moved(x.to("meta"), task).shape == shapes[task]
        assert moved(x.to("meta"), task).is_meta
    if shapes[TASKS[0]] == shapes[TASKS[1]]:
        assert moved(x.to("meta"), task=[TASKS[i % 2] for i in range(5)]).is_meta
    assert all(output.is_meta for output in moved.run_all(x.to("meta")).values())


@pytest.mark.parametrize("case", [MLP, RESIDUAL, LENET5], ids=lambda case: case.name)
def test_each_shared_value_is_held_once(case: Case) -> None:
    zipped = zipped_pair(case)
    for task in TASKS:
        zipped(case.examples(3), task)
    held = [*zipped.parameters(), *zipped.buffers()]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in held}
    assert sum(storages.values()) == zipped.report.stored_bytes < zipped.report.original_bytes
