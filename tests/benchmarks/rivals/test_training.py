"""Rivals that are trained, or pruned by a library: hard sharing, distilled networks, library pruning, sizes."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mtz_core.errors import InvalidConfig
from mtz_core.network.tracing import evaluation_mode
from mtz_core.retraining import original_outputs, retrain_steps
from mtz_core.settings import RetrainConfig
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks import full_data
from tests.benchmarks.full_data import Split
from tests.benchmarks.rivals.distilled import distilled
from tests.benchmarks.rivals.hard_sharing import hard_sharing, shared_trunk
from tests.benchmarks.rivals.learning import draws, iterations
from tests.benchmarks.rivals.library_pruning import Importance, fisher_diagonal, pruned
from tests.benchmarks.rivals.single_weights import rounded, rounded_rows, sparse
from tests.benchmarks.rivals.sizes import largest_below, scaling, stored_bytes
from tests.benchmarks.rivals.toys import BUILDS, WIDTHS, images, networks
from tests.benchmarks.training import Recipe

pytestmark = pytest.mark.long

TASKS = ("a", "b")


def halves(count: int) -> dict[str, Split]:
    """Two tasks: is the left half brighter than the right, and the upper than the lower?"""
    found = {}
    for axis, (task, x) in zip((3, 2), images(TASKS, count).items(), strict=True):
        first, second = x.split(4, dim=axis)
        found[task] = Split(x, (first.mean(dim=(1, 2, 3)) > second.mean(dim=(1, 2, 3))).long())
    return found


def error(zipped: ZippedNetwork, task: str, split: Split) -> float:
    return full_data.test_error(partial(zipped, task=task), split)


# Hard sharing


def test_hard_sharing_learns_both_tasks_in_one_trunk():
    training = halves(512)
    builds = {task: partial(BUILDS["perceptron"], 2) for task in TASKS}
    zipped = hard_sharing(builds, training, Recipe(epochs=12, peak=2e-2))
    assert [layer.shared for layer in zipped.report.layers] == [12, 9, 0]
    assert all(error(zipped, task, training[task]) < 10 for task in TASKS)


def test_hard_sharing_comes_out_the_same_again():
    builds = {task: partial(BUILDS["perceptron"], 2) for task in TASKS}
    first, second = (hard_sharing(builds, halves(256), Recipe(epochs=1, peak=2e-2)) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_the_trunk_is_one_from_the_start_and_statistics_are_each_tasks():
    training = halves(256)
    builds = {task: partial(BUILDS["residual"], 2) for task in TASKS}
    zipped = shared_trunk(builds, {task: split.images for task, split in training.items()}, seed=0)
    a, b = (zipped.state_of(task) for task in TASKS)
    assert torch.equal(a["block.0.weight"], b["block.0.weight"])
    assert not torch.equal(a["head.weight"], b["head.weight"])
    trained = hard_sharing(builds, training, Recipe(epochs=2, peak=1e-2))
    a, b = (trained.state_of(task) for task in TASKS)
    assert torch.equal(a["block.0.weight"], b["block.0.weight"])
    assert not torch.equal(a["stem.1.running_mean"], b["stem.1.running_mean"])
    assert not torch.equal(a["stem.1.running_mean"], zipped.state_of("a")["stem.1.running_mean"])


def test_a_recipe_has_as_many_iterations_as_when_a_network_is_trained_alone():
    assert iterations(Recipe(epochs=3, peak=1e-3), 1000) == 3 * 7


def test_every_example_is_drawn_once_in_an_epoch():
    batches = draws(300, seed=0)
    epoch = torch.cat([next(batches), next(batches)])
    assert len(epoch) == 256 == len(epoch.unique())
    assert len(next(draws(5, seed=0))) == 5


# Library pruning


@pytest.mark.parametrize("importance", ["curvature", "magnitude"])
@pytest.mark.parametrize("name", BUILDS)
def test_pruned_networks_fit_and_share_nothing(name: str, importance: Importance):
    originals, calibration = networks(name, TASKS), images(TASKS)
    before = {task: {n: t.clone() for n, t in net.state_dict().items()} for task, net in originals.items()}
    zipped = pruned(originals, calibration, 0.6, importance=importance)
    assert 0.45 * zipped.report.original_bytes < zipped.report.stored_bytes <= 0.6 * zipped.report.original_bytes
    assert zipped.report.original_bytes == sum(map(stored_bytes, originals.values()))
    assert all(layer.shared == 0 for layer in zipped.report.layers)
    for task, network in originals.items():
        assert zipped(calibration[task], task).shape == (60, 3)
        assert all(torch.equal(t, before[task][n]) for n, t in network.state_dict().items())


def test_neurons_that_nobody_hears_go_first():
    originals, calibration = networks("convolutional", TASKS), images(TASKS)
    with torch.no_grad():
        for network in originals.values():
            network.get_parameter("6.weight")[:, ::2] = 0
    zipped = pruned(originals, calibration, 0.55)
    for task, network in originals.items():
        with evaluation_mode(network):
            torch.testing.assert_close(zipped(calibration[task], task), network(calibration[task]))


def test_no_layer_is_lost_however_little_is_left():
    originals, calibration = networks("perceptron", TASKS), images(TASKS)
    zipped = pruned(originals, calibration, 0.25)
    assert min(layer.neurons["a"] for layer in zipped.report.layers) >= 2
    with pytest.raises(InvalidConfig, match="no network has at most"):
        pruned(originals, calibration, 0.02)


def test_the_curvature_is_the_mean_squared_gradient_of_single_examples():
    network, x = networks("residual", "a")["a"], images("a")["a"]
    found = fisher_diagonal(network, x, seed=5)
    generator = torch.Generator().manual_seed(5)
    expected = {name: torch.zeros_like(parameter) for name, parameter in network.named_parameters()}
    for part in torch.split(x, 50):
        labels = torch.multinomial(network(part).softmax(dim=1), 1, generator=generator)[:, 0]
        for image, label in zip(part, labels, strict=True):
            network.zero_grad()
            F.cross_entropy(network(image[None]), label[None]).backward()
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None
                expected[name] += parameter.grad.square() / len(x)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7)


def test_the_curvature_of_numbers_is_gauss_and_newtons():
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5, bias=False))
    x = images("a")["a"]
    found = fisher_diagonal(network, x, seed=5, outputs="regression")
    torch.testing.assert_close(found["1.weight"], x.flatten(1).square().mean(dim=0).expand(5, -1))


# Single weights


@pytest.mark.parametrize("name", BUILDS)
def test_a_sparse_network_keeps_its_largest_weights_and_its_zeros(name: str):
    originals, calibration = networks(name, TASKS), images(TASKS)
    found = sparse(originals, calibration, 0.6)
    whole = sum(map(stored_bytes, originals.values()))
    assert 0.59 * whole < found.bytes <= 0.6 * whole
    left = {n: tensor for n, tensor in found.zipped.named_parameters() if tensor.ndim > 1}
    weights = sum(tensor.numel() for tensor in left.values())
    zeros = sum(int((tensor == 0).sum()) for tensor in left.values())
    assert found.bytes == whole - 4 * zeros + sum(
        (sum(t.numel() for n, t in net.named_parameters() if t.ndim > 1) + 7) // 8 for net in originals.values()
    )
    assert 0 < zeros < weights
    for task in TASKS:
        state, original = found.zipped.state_of(task), originals[task].state_dict()
        kept = [original[n][t != 0].abs() for n, t in state.items() if t.ndim > 1]
        gone = [original[n][t == 0].abs() for n, t in state.items() if t.ndim > 1]
        assert float(torch.cat(kept).min()) >= float(torch.cat(gone).max())
        assert all(torch.equal(t[t != 0], original[n][t != 0]) for n, t in state.items() if t.ndim > 1)
    before = {n: tensor == 0 for n, tensor in left.items()}
    targets = original_outputs(originals, calibration, calibration)
    config = RetrainConfig(statistics="kept")
    steps = list(retrain_steps(found.zipped, originals, calibration, calibration, config, outputs=targets))
    assert steps[-1].validation_loss["a"] < steps[0].validation_loss["a"]
    after = {n: tensor == 0 for n, tensor in found.zipped.named_parameters() if n in before}
    assert all(bool(after[n][zeros_before].all()) for n, zeros_before in before.items())


def test_a_mask_and_biases_must_fit():
    originals, calibration = networks("perceptron", TASKS), images(TASKS)
    with pytest.raises(InvalidConfig, match="beside its weights"):
        sparse(originals, calibration, 0.04)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("name", BUILDS)
def test_rounded_rows_have_few_values_and_codes_are_counted(name: str, bits: int):
    originals, calibration = networks(name, TASKS), images(TASKS)
    found = rounded(originals, calibration, bits)
    expected = 0
    for task, network in originals.items():
        state = found.zipped.state_of(task)
        for n, parameter in network.named_parameters():
            if parameter.ndim == 1:
                assert torch.equal(state[n], parameter)
                expected += 4 * parameter.numel()
                continue
            rows = state[n].flatten(1)
            expected += (rows.numel() * bits + 7) // 8 + 2 * len(rows)
            assert max(len(row.unique()) for row in rows) <= 2**bits - 1
            error = (rows - parameter.flatten(1)).abs().amax(dim=1)
            assert bool((error <= parameter.flatten(1).abs().amax(dim=1)).all())
        expected += sum(4 * buffer.numel() for buffer in network.buffers() if buffer.is_floating_point())
    assert found.bytes == expected


def test_rows_on_a_grid_stay_as_they_are():
    rows = torch.tensor([[-7.0, 3, 1, 0], [0.5, -3.5, 1.5, 2.0], [0, 0, 0, 0]])
    assert torch.equal(rounded_rows(rows, 4), rows)


# Smaller networks


@pytest.mark.parametrize("name", BUILDS)
def test_scaled_networks_have_a_fraction_of_the_neurons_and_weights_of_their_own(name: str):
    network, x = networks(name, "a")["a"], images("a")["a"]
    before = {n: t.clone() for n, t in network.state_dict().items()}
    build = scaling(network, x)
    half, whole = build(0.5), build(1.0)
    sizes = {getattr(part, "out_features", getattr(part, "out_channels", 0)) for part in half.modules()}
    assert sizes == {0, *(round(width / 2) for width in WIDTHS[name]), 3}
    assert stored_bytes(whole) == stored_bytes(network)
    assert half(x).shape == (60, 3)
    assert all(torch.equal(t, before[n]) for n, t in network.state_dict().items())


def test_the_largest_network_that_fits_is_found():
    def build(fraction: float) -> nn.Module:
        return nn.Linear(10, 1 + int(99 * fraction), bias=False)

    assert stored_bytes(largest_below(build, 1000)) == 1000
    assert stored_bytes(largest_below(build, 1039)) == 1000
    assert stored_bytes(largest_below(build, 10**6)) == 4000
    with pytest.raises(InvalidConfig, match="the smallest has 40"):
        largest_below(build, 39)


def test_students_fit_and_learn_from_the_originals():
    originals, calibration = networks("perceptron", TASKS), images(TASKS, 512)
    builds = {task: scaling(network, calibration[task]) for task, network in originals.items()}

    def distance(epochs: int) -> float:
        zipped = distilled(originals, calibration, builds, 0.6, Recipe(epochs, peak=2e-2))
        assert 0.45 * zipped.report.original_bytes < zipped.report.stored_bytes <= 0.6 * zipped.report.original_bytes
        assert all(layer.shared == 0 for layer in zipped.report.layers)
        return sum(
            float((zipped(x, task).softmax(dim=1) - originals[task](x).softmax(dim=1)).detach().abs().mean())
            for task, x in calibration.items()
        )

    assert distance(40) < 0.4 * distance(1)
