"""Rivals that merge trained networks: averaging, RegMean, ZipIt!, statistics anew."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtz_core.errors import IncompatibleNetworks, InvalidCalibration, InvalidConfig
from mtz_core.network.tracing import evaluation_mode
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.residual_table import reestimate as reestimate_module
from tests.benchmarks.rivals.assemble import assemble, matrices_of, neuron_by_neuron, traced
from tests.benchmarks.rivals.averaging import averaged
from tests.benchmarks.rivals.features import correlations, neuron_values
from tests.benchmarks.rivals.regmean import regmean, regression_mean, scaled
from tests.benchmarks.rivals.statistics import reestimate
from tests.benchmarks.rivals.toys import BUILDS, WIDTHS, images, networks, permuted
from tests.benchmarks.rivals.zipit import Zip, ZipItConfig, find_zips, zip_features, zipit

pytestmark = pytest.mark.long

Merger = Callable[[Mapping[str, nn.Module], Mapping[str, Tensor]], ZippedNetwork]
MERGERS: Mapping[str, Merger] = {
    "averaging": averaged,
    "averaging, matched": lambda networks, calibration: averaged(networks, calibration, matched=True),
    "regmean": regmean,
    "regmean, matched": lambda networks, calibration: regmean(networks, calibration, matched=True),
    "zipit": zipit,
}
TWO, THREE = ("a", "b"), ("a", "b", "c")


def outputs(network: nn.Module, x: Tensor) -> Tensor:
    with evaluation_mode(network):
        found: Tensor = network(x)
    return found


def check_same(zipped: ZippedNetwork, originals: Mapping[str, nn.Module], x: Tensor) -> None:
    for task, network in originals.items():
        torch.testing.assert_close(zipped(x, task), outputs(network, x), rtol=1e-4, atol=1e-5)


# All of them


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("merger", ["averaging, matched", "regmean", "zipit"])
def test_all_hidden_neurons_of_three_networks_are_shared_and_no_original_changes(merger: str, name: str):
    tasks = THREE
    originals, calibration = networks(name, tasks), images(tasks)
    before = {task: {n: t.clone() for n, t in net.state_dict().items()} for task, net in originals.items()}
    zipped = MERGERS[merger](originals, calibration)
    assert zipped.report.method == merger
    *hidden, head = zipped.report.layers
    assert all(layer.shared == layer.neurons["a"] for layer in hidden)
    assert head.shared == 0
    assert zipped.report.stored_bytes < 1.4 / len(tasks) * zipped.report.original_bytes
    for task in tasks:
        assert zipped(calibration[task], task).isfinite().all()
        for key, tensor in originals[task].state_dict().items():
            assert torch.equal(tensor, before[task][key])


@pytest.mark.parametrize("merger", MERGERS)
def test_a_network_merged_with_itself_computes_the_same(merger: str):
    network = networks("residual", "a")["a"]
    calibration = images(TWO)
    zipped = MERGERS[merger]({"a": network, "b": network}, calibration)
    check_same(zipped, {"a": network, "b": network}, calibration["a"])


@pytest.mark.parametrize("name", BUILDS)
@pytest.mark.parametrize("merger", ["averaging, matched", "regmean, matched", "zipit"])
def test_a_network_merged_with_its_permuted_copy_computes_the_same(merger: str, name: str):
    network = networks(name, "a")["a"]
    calibration = images(TWO)
    copied = permuted(name, network)
    torch.testing.assert_close(outputs(copied, calibration["b"]), outputs(network, calibration["b"]))
    zipped = MERGERS[merger]({"a": network, "b": copied}, calibration)
    check_same(zipped, {"a": network, "b": copied}, calibration["a"])
    assert zipped.report.stored_bytes < zipped.report.original_bytes * 0.7


@pytest.mark.parametrize("merger", ["averaging", "regmean"])
def test_without_matching_a_permuted_copy_is_lost(merger: str):
    network = networks("convolutional", "a")["a"]
    calibration = images(TWO)
    zipped = MERGERS[merger]({"a": network, "b": permuted("convolutional", network)}, calibration)
    assert not torch.allclose(zipped(calibration["a"], "a"), outputs(network, calibration["a"]), atol=1e-2)


def test_tasks_may_have_heads_of_different_sizes():
    originals = networks("residual", "a", classes=3) | networks("residual", "b", classes=5, seed=1)
    zipped = zipit(originals, images(TWO))
    assert [zipped(torch.zeros(2, 1, 8, 8), task).shape[1] for task in TWO] == [3, 5]


def test_networks_of_different_widths_are_refused():
    narrow = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    wide = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 3))
    with pytest.raises(IncompatibleNetworks, match="'3' has 8, 9 neurons"):
        averaged({"a": narrow, "b": wide}, images(TWO))


def test_every_task_needs_calibration_data():
    with pytest.raises(InvalidCalibration, match="'b'"):
        averaged(networks("perceptron", TWO), images("a"))


# Assembling


def test_networks_without_members_are_the_originals():
    originals, calibration = networks("residual", TWO), images(TWO)
    found = traced(originals, calibration)
    zipped = assemble(found, {}, matrices_of(found), "nothing")
    assert zipped.report.stored_bytes == zipped.report.original_bytes
    for task, network in originals.items():
        assert torch.equal(zipped(calibration[task], task), outputs(network, calibration[task]))


def test_tasks_that_disagree_about_what_they_share_are_refused():
    found = traced(networks("perceptron", TWO), images(TWO))
    with pytest.raises(IncompatibleNetworks, match="disagree about '1/weight"):
        assemble(found, neuron_by_neuron(found), matrices_of(found), "wrong")


# Correlations


@pytest.mark.parametrize("place", ["read", "written"])
@pytest.mark.parametrize("name", BUILDS)
def test_correlations_are_those_of_all_samples(name: str, place):
    calibration = images(TWO)
    found = traced(networks(name, TWO), calibration)
    batches = [calibration["a"][:13], calibration["a"][13:]]
    for group, correlation in correlations(found, batches, place).items():
        samples = [
            torch.cat([values for of, values in neuron_values(network, calibration["a"], place) if of == group])
            for network in found.values()
        ]
        np.testing.assert_allclose(correlation, np.corrcoef(torch.cat(samples, dim=1).numpy().T), atol=1e-5)


def test_neurons_of_a_convolution_are_its_channels():
    calibration = images(TWO)
    network = traced(networks("convolutional", TWO), calibration)["a"]
    read, written = (dict(neuron_values(network, calibration["a"], place)) for place in ("read", "written"))
    assert read["0"].shape == (60 * 3 * 3, 5)
    assert written["0"].shape == (60 * 6 * 6, 5)
    convolved = torch.conv2d(calibration["a"], network.state["0.weight"], network.state["0.bias"])
    torch.testing.assert_close(written["0"], convolved.movedim(1, -1).flatten(0, -2))
    pooled = torch.max_pool2d(nn.functional.leaky_relu(convolved, 0.1), 2)
    torch.testing.assert_close(read["0"].sort(dim=0).values, pooled.movedim(1, -1).flatten(0, -2).sort(dim=0).values)


def test_constant_neurons_correlate_with_nothing():
    originals, calibration = networks("perceptron", TWO), images(TWO)
    with torch.no_grad():
        originals["a"].get_parameter("1.weight")[4] = 0
        originals["a"].get_parameter("1.bias")[4] = 0.3
    correlation = correlations(traced(originals, calibration), [calibration["a"]])["1"]
    assert not correlation[4].any() and not correlation[:, 4].any()
    assert np.isfinite(correlation).all()


def test_images_of_different_shapes_are_refused():
    originals: dict[str, nn.Module] = {
        task: nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
        for task in TWO
    }
    calibration = {"a": torch.randn(5, 1, 8, 8), "b": torch.randn(5, 1, 9, 9)}
    with pytest.raises(InvalidCalibration, match="differ in shape"):
        zipit(originals, calibration)


# Averaging and RegMean


def test_averaging_averages_all_but_the_head():
    originals = networks("perceptron", THREE)
    zipped = averaged(originals, images(THREE))
    for name in ("1.weight", "1.bias", "3.weight", "3.bias"):
        mean = sum(network.get_parameter(name) for network in originals.values()) / 3
        for task in THREE:
            torch.testing.assert_close(zipped.state_of(task)[name], mean)
    for task, network in originals.items():
        assert torch.equal(zipped.state_of(task)["5.weight"], network.get_parameter("5.weight"))


def test_regression_mean_is_the_least_squares_fit_to_all_outputs():
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(4, 6, generator=generator, dtype=torch.float64) for _ in range(3)]
    rows = [scale * torch.randn(20, 6, generator=generator, dtype=torch.float64) for scale in (1, 2, 3)]
    merged = regression_mean(weights, [x.T @ x for x in rows])
    wanted = torch.cat([x @ w.T for x, w in zip(rows, weights, strict=True)])
    solution = torch.linalg.lstsq(torch.cat(rows), wanted).solution.T
    torch.testing.assert_close(merged, solution, rtol=1e-4, atol=1e-5)


def test_regression_mean_averages_where_inputs_are_dead_or_all_alike():
    weights = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    gram = torch.randn(9, 6, dtype=torch.float64).T.cov()
    torch.testing.assert_close(regression_mean(weights, [gram, gram]), (weights[0] + weights[1]) / 2)
    grams = [torch.diag(torch.tensor([one, one, one, one, one, 0.0]).double()) for one in (1.0, 3.0)]
    merged = regression_mean(weights, grams)
    torch.testing.assert_close(merged[:, 5], (weights[0][:, 5] + weights[1][:, 5]) / 2)
    torch.testing.assert_close(merged[:, 0], (weights[0][:, 0] + 3 * weights[1][:, 0]) / 4, rtol=1e-4, atol=1e-5)


def test_scaling_leaves_the_diagonal():
    gram = torch.arange(9.0, dtype=torch.float64).reshape(3, 3)
    expected = torch.tensor([[0, 0.5, 1], [1.5, 4, 2.5], [3, 3.5, 8]], dtype=torch.float64)
    torch.testing.assert_close(scaled(gram, 0.5), expected)


def test_regmean_fits_the_first_layer_to_both_networks_outputs():
    originals, calibration = networks("perceptron", TWO), images(TWO, 200)
    merged = regmean(originals, calibration, scaling=1.0)
    plain = averaged(originals, calibration)

    def error(zipped: ZippedNetwork) -> float:
        total = 0.0
        for task, network in originals.items():
            x, state = calibration[task].flatten(1), zipped.state_of(task)
            y = torch.nn.functional.linear(x, state["1.weight"], state["1.bias"])
            wanted = torch.nn.functional.linear(x, network.get_parameter("1.weight"), network.get_parameter("1.bias"))
            total += float((y - wanted).detach().square().sum())
        return total

    assert error(merged) < error(plain)


# ZipIt!


def random_correlation(features: int, seed: int = 0) -> np.ndarray:
    return np.asarray(np.corrcoef(np.random.default_rng(seed).normal(size=(features, 40))))


def members_of(label: np.ndarray, widths: list[int]) -> np.ndarray:
    """How many neurons of each network every merged feature has."""
    owner = np.repeat(np.arange(len(widths)), widths)
    counts = np.zeros((label.max() + 1, len(widths)), dtype=int)
    np.add.at(counts, (label, owner), 1)
    return counts


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("widths", [[8, 8], [5, 9]])
def test_without_a_budget_nothing_is_merged_within_a_network(widths: list[int], alpha: float):
    label = zip_features(random_correlation(sum(widths)), widths, max(widths), alpha, beta=0)
    assert label.max() + 1 == max(widths)
    assert members_of(label, widths).max() == 1


def test_with_two_networks_and_no_budget_the_pairs_are_the_greedy_ones():
    correlation = random_correlation(12)
    label = zip_features(correlation, [6, 6], 6, alpha=0.3, beta=0)
    across, expected = correlation[:6, 6:].copy(), {}
    for _ in range(6):
        i, j = np.unravel_index(across.argmax(), across.shape)
        expected[i] = j
        across[i], across[:, j] = -np.inf, -np.inf
    assert all(label[i] == label[6 + j] for i, j in expected.items())


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.6, 1.0])
def test_merges_within_a_network_keep_to_its_budget(beta: float):
    correlation = random_correlation(40)
    correlation[:20, :20] = 0.5 + correlation[:20, :20] / 2  # the first network is very redundant
    label = zip_features(correlation, [20, 20], 20, alpha=0.9, beta=beta)
    within = np.maximum(members_of(label, [20, 20]) - 1, 0).sum(axis=0)
    assert (within <= int(beta * 10)).all()
    assert within[0] == int(beta * 10)


@pytest.mark.parametrize(("widths", "count"), [([6, 6], 5), ([6, 6, 6], 6)])
def test_beyond_the_budget_neurons_of_a_network_are_merged_where_nothing_else_is_left(widths: list[int], count: int):
    label = zip_features(random_correlation(sum(widths)), widths, count, alpha=0.3, beta=0)
    members = members_of(label, widths)
    assert len(members) == count
    assert members.sum(axis=0).tolist() == widths


def test_alpha_decides_between_a_third_member_and_a_new_pair():
    correlation = np.eye(5)
    for i, j, value in ((0, 1, 0.9), (0, 2, 0.8), (1, 2, 0.8), (3, 4, 0.5)):
        correlation[i, j] = correlation[j, i] = value
    assert zip_features(correlation, [5], 3, alpha=1.0, beta=1.0).tolist() == [0, 0, 0, 1, 2]
    assert zip_features(correlation, [5], 3, alpha=0.5, beta=1.0).tolist() == [0, 0, 1, 2, 2]


def test_a_merged_feature_correlates_as_the_lesser_of_its_parts():
    correlation = np.eye(5)
    for i, j, value in ((0, 1, 0.9), (0, 2, 0.8), (1, 2, 0.1), (3, 4, 0.5)):
        correlation[i, j] = correlation[j, i] = value
    assert zip_features(correlation, [5], 3, alpha=1.0, beta=1.0).tolist() == [0, 0, 1, 2, 2]


def test_merge_and_unmerge_are_inverse_on_merged_features():
    label = zip_features(random_correlation(18), [6, 6, 6], 6, alpha=0.5, beta=1.0)
    found = Zip(THREE, dict(zip(THREE, np.split(label, 3), strict=True)))
    merge = torch.cat([found.merge(task) for task in THREE], dim=1)
    unmerge = torch.cat([found.unmerge(task) for task in THREE])
    torch.testing.assert_close(merge @ unmerge, torch.eye(6, dtype=torch.float64))
    projection = unmerge @ merge
    torch.testing.assert_close(projection @ projection, projection)
    torch.testing.assert_close(projection, projection.T)
    torch.testing.assert_close(merge.sum(dim=1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize("width", [1.0, 0.6])
def test_layers_are_merged_on_both_sides(width: float):
    originals, calibration = networks("convolutional", TWO), images(TWO)
    config = ZipItConfig(alpha=0.7, beta=1.0, width=width)
    zipped = zipit(originals, calibration, config)
    zips = find_zips(traced(originals, calibration), calibration, config)
    merge = {task: (zips["0"].merge(task).float(), zips["4"].merge(task).float()) for task in TWO}
    unmerge = {task: (zips["0"].unmerge(task).float(), zips["4"].unmerge(task).float()) for task in TWO}
    first, second, bias = torch.zeros(()), torch.zeros(()), torch.zeros(())
    for task, network in originals.items():
        first = first + merge[task][0] @ network.get_parameter("0.weight").flatten(1)
        spread = torch.kron(unmerge[task][0], torch.eye(9))
        second = second + merge[task][1] @ network.get_parameter("4.weight") @ spread
        bias = bias + merge[task][1] @ network.get_parameter("4.bias")
    for task, network in originals.items():
        state = zipped.state_of(task)
        torch.testing.assert_close(state["0.weight"].flatten(1), first)
        torch.testing.assert_close(state["4.weight"], second)
        torch.testing.assert_close(state["4.bias"], bias)
        torch.testing.assert_close(state["6.weight"], network.get_parameter("6.weight") @ unmerge[task][1])
        torch.testing.assert_close(state["6.bias"], network.get_parameter("6.bias"))


def doubled(network: nn.Module) -> nn.Module:
    """The perceptron with the second half of each hidden layer a copy of the first, each half heard half."""
    with torch.no_grad():
        for written, read in (("1", "3"), ("3", "5")):
            weight, bias = network.get_parameter(f"{written}.weight"), network.get_parameter(f"{written}.bias")
            half = len(bias) // 2
            weight[half : 2 * half], bias[half : 2 * half] = weight[:half].clone(), bias[:half].clone()
            columns = network.get_parameter(f"{read}.weight")
            columns[:, half : 2 * half] = 2 * columns[:, :half]
    return network


def test_duplicates_within_networks_are_found():
    originals = {}
    for seed, task in enumerate(TWO):
        torch.manual_seed(seed)
        act = nn.LeakyReLU(0.1)
        plain = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), act, nn.Linear(12, 8), act, nn.Linear(8, 3))
        originals[task] = doubled(plain)
    calibration = images(TWO)
    zipped = zipit(originals, calibration, ZipItConfig(beta=1.0))
    check_same(zipped, originals, calibration["a"])
    for found in find_zips(traced(originals, calibration), calibration, ZipItConfig(beta=1.0)).values():
        for task in TWO:
            first, second = np.split(found.clusters[task], 2)
            assert (first == second).all()
    with_no_budget = zipit(originals, calibration, ZipItConfig(beta=0.0))
    assert not torch.allclose(
        with_no_budget(calibration["a"], "a"), outputs(originals["a"], calibration["a"]), atol=0.01
    )


@pytest.mark.parametrize("name", BUILDS)
def test_the_merged_network_may_be_narrower(name: str):
    zipped = zipit(networks(name, THREE), images(THREE), ZipItConfig(beta=1.0, width=0.5))
    widths = [round(0.5 * width) for width in WIDTHS[name]]
    assert {layer.neurons["a"] for layer in zipped.report.layers[:-1]} == set(widths)
    assert zipped.report.stored_bytes < 0.35 * zipped.report.original_bytes
    assert zipped(torch.randn(2, 1, 8, 8), "b").shape == (2, 3)


def test_partial_zipping_leaves_later_layers_alone():
    originals, calibration = networks("perceptron", TWO), images(TWO)
    zipped = zipit(originals, calibration, ZipItConfig(layers=1))
    assert [layer.shared for layer in zipped.report.layers] == [12, 0, 0]
    assert torch.equal(zipped.state_of("b")["3.bias"], originals["b"].get_parameter("3.bias"))
    with pytest.raises(InvalidConfig, match="Merge more"):  # the residual sum would be merged without its summand
        zipit(networks("residual", TWO), calibration, ZipItConfig(layers=1))


def test_settings_that_are_no_fractions_are_refused():
    with pytest.raises(InvalidConfig, match=r"alpha: 1\.5"):
        ZipItConfig(alpha=1.5)


def test_normalisations_of_merged_features_have_the_mean_of_the_tasks_own_members():
    originals, calibration = networks("residual", TWO), images(TWO)
    config = ZipItConfig(alpha=0.9, beta=1.0)
    zips = find_zips(traced(originals, calibration), calibration, config)
    zipped = zipit(originals, calibration, config)
    label = {task: zips["block.0"].clusters[task] for task in TWO}
    for name in ("block.1.weight", "block.1.running_var"):
        values = {task: network.state_dict()[name] for task, network in originals.items()}
        for task in TWO:
            for feature, merged in enumerate(zipped.state_of(task)[name]):
                own = values[task][label[task] == feature]
                everyone = torch.cat([values[t][label[t] == feature] for t in TWO])
                torch.testing.assert_close(merged, own.mean() if len(own) else everyone.mean())


# Statistics


@pytest.mark.parametrize("merger", ["averaging", "zipit"])
def test_statistics_are_those_of_a_plain_module_that_computes_them_anew(merger: str):
    originals, calibration = networks("residual", TWO), images(TWO)
    zipped = MERGERS[merger](originals, calibration)
    weights = {name: tensor.clone() for name, tensor in zipped.named_parameters()}
    alone = {task: zipped.network(task) for task in TWO}
    reestimate(zipped, calibration)
    for task, network in alone.items():
        reestimate_module(network, calibration[task])
        for name, tensor in network.state_dict().items():
            if "running" in name:
                torch.testing.assert_close(zipped.state_of(task)[name], tensor, rtol=0.01, atol=0.002)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in zipped.named_parameters())


def test_statistics_do_not_depend_on_batches():
    tasks = TWO
    calibration = images(tasks, 250)
    zipped = averaged(networks("residual", tasks), calibration)
    reestimate(zipped, calibration)
    x = torch.conv2d(calibration["a"], zipped.state_of("a")["stem.0.weight"], stride=2, padding=1)
    torch.testing.assert_close(zipped.state_of("a")["stem.1.running_mean"], x.mean(dim=(0, 2, 3)), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(zipped.state_of("a")["stem.1.running_var"], x.var(dim=(0, 2, 3)), rtol=1e-4, atol=1e-6)
