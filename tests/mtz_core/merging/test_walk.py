"""The laws of zipping on every network of the table, and merged layers against brute-force least squares."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import Budget, LayerReport, MtzError, ZipConfig, ZippedNetwork, zip_networks
from mtz_core.errors import (
    IncompatibleNetworks,
    InvalidCalibration,
    InvalidConfig,
    InvalidWeights,
    UnsupportedModule,
)
from mtz_core.merging.difference import weigh_by_sensitivity
from mtz_core.merging.pairing import Pairing
from mtz_core.merging.walk import finish, merge
from mtz_core.network.graph import Network
from mtz_core.settings import Method
from mtz_core.statistics.calibration import as_batches
from mtz_core.zipped.ownership import positions_of
from tests.support.networks import (
    CASES,
    TASKS,
    Case,
    Residual,
    hidden_layers,
    joined,
    lenet5,
    mlp,
    permuted,
    sensitivities_of_traced,
    strided,
    traced_pair,
    zip_traced,
)

pytestmark = pytest.mark.slow

METHODS: tuple[Method, ...] = ("paper", "refit")
MLP = Case("mlp", mlp, (12,), (9, 7), (8, 10), other_classes=5, dtype=torch.float64)
LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), (5, 4, 12), dtype=torch.float64)
RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6), (4, 6, 5), dtype=torch.float64)
STRIDED = Case("strided", strided, (2, 9, 8), (4, 5, 3), (3, 6, 5), dtype=torch.float64)

on_all_networks = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
with_both_methods = pytest.mark.parametrize("method", METHODS)


@with_both_methods
@on_all_networks
def test_sharing_nothing_gives_back_both_originals_exactly(case: Case, method: Method) -> None:
    networks = case.pair()
    zipped = zip_traced(traced_pair(case), case.calibration(20), ZipConfig(method=method, share=0.0))
    for task, network in networks.items():
        x = case.examples(7, seed=99)
        assert torch.equal(zipped(x, task), network(x))
        plain = zipped.network(task)
        assert torch.equal(plain(x), network(x))
        assert plain.state_dict().keys() == network.state_dict().keys()
        assert all(torch.equal(value, network.state_dict()[name]) for name, value in plain.state_dict().items())
    report = zipped.report
    assert report.stored_parameters == report.original_parameters
    assert report.stored_bytes == report.original_bytes
    assert all(layer.cost == 0 and set(layer.error.values()) == {0.0} for layer in report.layers)


@with_both_methods
@on_all_networks
def test_a_network_zipped_with_itself_keeps_its_outputs_at_half_the_size(case: Case, method: Method) -> None:
    network, data, traced = case.network(1), case.examples(30), traced_pair(case)[TASKS[0]]
    zipped = zip_traced({"a": traced, "b": traced}, {"a": data, "b": data}, ZipConfig(method=method))
    x = case.examples(7, seed=99)
    for task in ("a", "b"):
        torch.testing.assert_close(zipped(x, task), network(x), rtol=0, atol=1e-4)
        torch.testing.assert_close(zipped.network(task)(x), network(x), rtol=0, atol=1e-4)
    *_, last = (part for part in network.modules() if isinstance(part, nn.Linear))
    one = sum(p.numel() for p in network.parameters())
    assert zipped.report.stored_parameters == one + sum(p.numel() for p in last.parameters())
    assert sum(p.numel() for p in zipped.parameters()) == zipped.report.stored_parameters
    assert zipped.report.original_parameters == 2 * one
    assert all(error < 1e-8 for layer in zipped.report.layers for error in layer.error.values())


@with_both_methods
@on_all_networks
def test_what_is_shared_is_stored_once(case: Case, method: Method) -> None:
    networks = case.pair()
    zipped = zip_traced(traced_pair(case), case.calibration(20), ZipConfig(method=method, share=1.0))
    report = zipped.report
    blocks = zipped.tensors()
    assert report.stored_parameters == sum(block.numel() for block in blocks.values())
    assert report.stored_bytes == sum(block.numel() * block.element_size() for block in blocks.values())
    assert report.original_parameters == sum(p.numel() for n in networks.values() for p in n.parameters())
    assert [layer.layer for layer in report.layers] == [node.name for node in zipped.structure.layers]
    assert sum(layer.parameters for layer in report.layers) == report.stored_parameters
    assert sum(sum(layer.original_parameters.values()) for layer in report.layers) == report.original_parameters
    assert report.stored_fraction == report.stored_bytes / report.original_bytes
    *hidden, output = report.layers
    assert [layer.layer for layer in hidden] == hidden_layers(case)
    assert all(layer.shared == min(layer.neurons.values()) for layer in hidden)
    assert output.shared == 0
    for task, network in networks.items():
        dense = {name: tuple(value.shape) for name, value in network.state_dict().items()}
        assert {name: tuple(value.shape) for name, value in zipped.network(task).state_dict().items()} == dense
        assert bool(torch.isfinite(zipped(case.examples(5), task)).all())


@on_all_networks
def test_zipping_twice_gives_equal_blocks_and_changes_no_input(case: Case) -> None:
    networks, calibration = case.pair(), case.calibration(12)
    networks[TASKS[0]].train()
    states = {task: copy.deepcopy(network.state_dict()) for task, network in networks.items()}
    modes = {task: [part.training for part in network.modules()] for task, network in networks.items()}
    data = {task: x.clone() for task, x in calibration.items()}
    config = ZipConfig(share=0.6, patches=3)
    first = zip_networks(networks, calibration, config, validation=calibration)
    second = zip_traced(traced_pair(case), calibration, config).judged(first.report.tasks)
    assert first.report == second.report
    assert first.tensors().keys() == second.tensors().keys()
    assert all(torch.equal(block, second.tensors()[name]) for name, block in first.tensors().items())
    for task, network in networks.items():
        assert modes[task] == [part.training for part in network.modules()]
        assert all(torch.equal(value, states[task][name]) for name, value in network.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in network.parameters())
        assert torch.equal(calibration[task], data[task])
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.add_(1)
    assert all(
        torch.equal(value, states[task][name])
        for task, network in networks.items()
        for name, value in network.state_dict().items()
    )


@with_both_methods
@pytest.mark.parametrize("case", [MLP, LENET5], ids=lambda case: case.name)
def test_how_calibration_data_are_split_makes_no_difference(case: Case, method: Method) -> None:
    networks, calibration = case.pair(), case.calibration(50)
    config = ZipConfig(method=method, share=0.7, patches=4)
    whole = zip_traced(traced_pair(case), calibration, config)
    split = zip_networks(
        networks, {task: iter(torch.split(x, 13)) for task, x in calibration.items()}, config, validation=calibration
    )
    for name, block in whole.tensors().items():
        torch.testing.assert_close(block, split.tensors()[name], rtol=1e-6, atol=1e-8)


@with_both_methods
@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("case", [MLP, LENET5], ids=lambda case: case.name)
def test_permuting_neurons_changes_no_output(case: Case, share: float, method: Method) -> None:
    networks, calibration, x = case.pair(), case.calibration(20), case.examples(7, seed=99)
    layers = [name for name, part in networks[TASKS[1]].named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    changed, _ = permuted(networks[TASKS[1]], layers, seed=5)
    torch.testing.assert_close(changed(x), networks[TASKS[1]](x))
    config = ZipConfig(method=method, share=share)
    zipped = zip_traced(traced_pair(case), calibration, config)
    again = zip_networks(networks | {TASKS[1]: changed}, calibration, config, validation=calibration)
    for task in TASKS:
        torch.testing.assert_close(again(x, task), zipped(x, task), rtol=1e-6, atol=1e-8)


@with_both_methods
@pytest.mark.parametrize("case", [MLP, LENET5, STRIDED], ids=lambda case: case.name)
def test_the_order_of_the_tasks_makes_no_difference_and_their_names_change_no_output(
    case: Case, method: Method
) -> None:
    networks, calibration, x = traced_pair(case), case.calibration(20), case.examples(7, seed=99)
    config = ZipConfig(method=method, share=0.7, balance={TASKS[0]: 2.0, TASKS[1]: 1.0})
    zipped = zip_traced(networks, calibration, config)
    again = zip_networks(dict(reversed(case.pair().items())), calibration, config, validation=calibration)
    assert again.tasks == zipped.tasks == TASKS
    assert again.report == zipped.judged(again.report.tasks).report
    assert all(torch.equal(tensor, again.tensors()[name]) for name, tensor in zipped.tensors().items())
    other = dict(zip(TASKS, reversed(TASKS), strict=True))
    config = replace(config, balance={TASKS[0]: 1.0, TASKS[1]: 2.0})
    renamed = zip_traced(
        {other[t]: n for t, n in networks.items()}, {other[t]: x for t, x in calibration.items()}, config
    )
    for task in TASKS:
        torch.testing.assert_close(renamed(x, other[task]), zipped(x, task), rtol=1e-6, atol=1e-8)


@with_both_methods
def test_counts_per_layer_are_honoured(method: Method) -> None:
    networks = LENET5.pair()
    config = ZipConfig(method=method, share={"3": 2, "7": 9})
    zipped = zip_traced(traced_pair(LENET5), LENET5.calibration(), config)
    assert {layer.layer: layer.shared for layer in zipped.report.layers} == {"0": 0, "3": 2, "7": 9, "9": 0}
    assert [(run.owners, run.size) for run in zipped.structure.rows["3"].segments] == [
        (TASKS, 2),
        (TASKS[:1], 4),
        (TASKS[1:], 2),
    ]
    for task, network in networks.items():
        for name in ("0.weight", "0.bias"):
            assert torch.equal(zipped.network(task).state_dict()[name], network.state_dict()[name])


def test_a_heavier_task_keeps_more_of_its_function() -> None:
    def error(weight: float) -> float:
        config = ZipConfig(balance={TASKS[0]: weight, TASKS[1]: 1.0})
        return zip_traced(traced_pair(MLP), MLP.calibration(), config).report.layers[0].error[TASKS[0]]

    assert error(100) < error(1) < error(0.01)


def test_refitting_fits_better_than_the_paper() -> None:
    networks, calibration = traced_pair(MLP), MLP.calibration(200)
    reports = {m: zip_traced(networks, calibration, ZipConfig(method=m)).report.layers[-1] for m in METHODS}
    assert all(reports["refit"].error[task] < reports["paper"].error[task] for task in TASKS)


@with_both_methods
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_few_calibration_examples_are_enough(count: int, share: float, method: Method) -> None:
    networks, calibration = MLP.pair(), MLP.calibration(count)
    zipped = zip_traced(traced_pair(MLP), calibration, ZipConfig(method=method, share=share))
    for task, network in networks.items():
        assert bool(torch.isfinite(zipped(MLP.examples(9), task)).all())
        if share == 0:
            assert torch.equal(zipped(calibration[task], task), network(calibration[task]))


def test_few_examples_are_fitted_almost_exactly() -> None:
    networks, calibration = MLP.pair(), MLP.calibration(3)
    zipped = zip_traced(traced_pair(MLP), calibration, ZipConfig(damping=1e-9, refit_rounds=0))
    for task, network in networks.items():
        torch.testing.assert_close(zipped(calibration[task], task), network(calibration[task]), rtol=1e-4, atol=1e-4)


@with_both_methods
@pytest.mark.parametrize("count", [3, 40])
@pytest.mark.parametrize("bias", [True, False])
def test_dead_inputs_are_normal(bias: bool, count: int, method: Method) -> None:
    networks = {task: mlp((9, 7), 3, bias=bias) for task in TASKS}
    data = torch.zeros(count, 12)
    half = torch.cat([data[:, :6], torch.randn(count, 6)], dim=1)
    for calibration in ({TASKS[0]: data, TASKS[1]: data}, {TASKS[0]: half, TASKS[1]: data}):
        zipped = zip_networks(networks, calibration, ZipConfig(method=method))
        for task, network in networks.items():
            assert bool(torch.isfinite(zipped(half, task)).all())
            if method == "refit" and not bias:
                torch.testing.assert_close(zipped(data, task), network(data))


# Merged layers against least squares


def random_pairings(networks: Mapping[str, Network], share: float, seed: int) -> dict[str, Pairing]:
    generator = np.random.default_rng(seed)
    pairings = {}
    for group in networks[TASKS[0]].graph.hidden_groups:
        widths = [network.graph.widths[group.name] for network in networks.values()]
        count = round(share * min(widths))
        pairs = np.stack([generator.permutation(width)[:count] for width in widths], axis=1)
        pairings[group.name] = Pairing.from_tuples(TASKS, widths, pairs)
    return pairings


@dataclass
class Side:
    """One task's rows of a layer: read in the original and in the zipped network, and what the original puts out."""

    original: np.ndarray
    fed: np.ndarray
    outputs: np.ndarray
    prior: np.ndarray
    zipped: np.ndarray
    shared: np.ndarray
    sensitivity: Tensor

    def damping(self, rows: np.ndarray, relative: float) -> float:
        return relative * float((rows**2).sum() / rows.size)


def unfold(layer: nn.Module, x: Tensor) -> np.ndarray:
    if isinstance(layer, nn.Conv2d):
        padded = F.pad(x, layer._reversed_padding_repeated_twice)
        unfolded = F.unfold(padded, layer.kernel_size, layer.dilation, 0, layer.stride)
        x = unfolded.transpose(1, 2).flatten(0, 1)
    if layer.bias is not None:
        x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], dim=1)
    rows: np.ndarray = x.detach().numpy()
    return rows


def matrix(layer: Any) -> np.ndarray:
    weight = layer.weight.flatten(1)
    if layer.bias is not None:
        weight = torch.cat([weight, layer.bias[:, None]], dim=1)
    found: np.ndarray = weight.detach().numpy()
    return found


def seen(network: nn.Module, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
    """What a layer reads and puts out."""
    found: list[tuple[Tensor, Tensor]] = []
    handle = network.get_submodule(name).register_forward_hook(lambda _, inputs, y: found.append((inputs[0], y)))
    network(x)
    handle.remove()
    return found[0]


def side(
    task: str,
    name: str,
    module: nn.Module,
    zipped: ZippedNetwork,
    plain: nn.Module,
    pairings: Mapping[str, Pairing],
    x: Tensor,
    sensitivity: Tensor,
) -> Side:
    """Rows and columns in the order of the pairing, shared ones first, the bias (if any) last."""
    layer = plain.get_submodule(name)
    graph = zipped.structure.networks[task].graph
    original = matrix(module.get_submodule(name))
    (rows,), (columns,) = graph.rows[name].groups, graph.columns[name].groups
    neurons, _ = own_order(pairings.get(rows), task, len(original))
    table = positions_of(graph.columns[name], columns)
    order, shared = own_order(pairings.get(columns), task, len(table))
    bias = np.arange(table.size, original.shape[1])
    index = np.concatenate([table[order].ravel(), bias])
    read, outputs = seen(module, name, x)
    if outputs.dim() == 4:
        outputs = outputs.permute(0, 2, 3, 1).flatten(0, 2)
    return Side(
        original=unfold(layer, read)[:, index],
        fed=unfold(layer, seen(plain, name, x)[0])[:, index],
        outputs=outputs.detach().numpy()[:, neurons],
        prior=original[neurons][:, index],
        zipped=matrix(layer)[neurons][:, index],
        shared=np.concatenate([np.arange(shared * table.shape[1]), bias]),
        sensitivity=sensitivity,
    )


def own_order(pairing: Pairing | None, task: str, width: int) -> tuple[np.ndarray, int]:
    """A task's neurons with the shared ones first, and how many these are: all of the input's, none of the output's."""
    if pairing is None:
        return np.arange(width), width
    members = pairing.members[:, TASKS.index(task)]
    return members[members >= 0], int((members[: pairing.shared] >= 0).sum())


def effective_balance(sides: list[Side], config: ZipConfig) -> list[float]:
    balance = config.balance_of(TASKS)
    return balance if config.method == "paper" else weigh_by_sensitivity(balance, [part.sensitivity for part in sides])


def ridge(part: Side, config: ZipConfig) -> tuple[np.ndarray, np.ndarray]:
    """``E‖y − W x̂‖² + λ‖W − W₀‖²`` as one least-squares problem: its rows and its targets."""
    absolute = part.damping(part.fed, config.fixed_damping)
    rows = np.concatenate([part.fed / len(part.fed) ** 0.5, absolute**0.5 * np.eye(part.fed.shape[1])])
    targets = np.concatenate([part.outputs / len(part.fed) ** 0.5, absolute**0.5 * part.prior.T])
    return rows, targets


def solve(rows: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Least squares by the normal equation; the rows of the damping keep it regular."""
    a, y = torch.from_numpy(rows), torch.from_numpy(targets)
    solution: np.ndarray = torch.linalg.solve(a.T @ a, a.T @ y).T.numpy()
    return solution


def expected_refit(sides: list[Side], balance: list[float], count: int, config: ZipConfig) -> tuple[list, float]:
    """Every task's best matrix with the first `count` neurons tied on shared inputs, and the cost of tying."""
    problems = [ridge(part, config) for part in sides]
    free = [solve(*problem) for problem in problems]
    own = [np.setdiff1d(np.arange(part.fed.shape[1]), part.shared) for part in sides]
    shared = len(sides[0].shared)
    total = shared + sum(len(columns) for columns in own)
    rows, targets, start = [], [], shared
    for (a, y), part, columns, alpha in zip(problems, sides, own, balance, strict=True):
        wide = np.zeros((len(a), total))
        wide[:, :shared] = a[:, part.shared]
        wide[:, start : start + len(columns)] = a[:, columns]
        start += len(columns)
        rows.append(alpha**0.5 * wide)
        targets.append(alpha**0.5 * y[:, :count])
    tied = solve(np.concatenate(rows), np.concatenate(targets))
    cost, start = 0.0, shared
    for (a, y), part, columns, alpha, best in zip(problems, sides, own, balance, free, strict=True):
        unbound = best[:count].copy()
        best[:count, part.shared] = tied[:, :shared]
        best[:count, columns] = tied[:, start : start + len(columns)]
        start += len(columns)
        loss = [float(((a @ w.T - y[:, :count]) ** 2).sum()) for w in (best[:count], unbound)]
        cost += 0.5 * alpha * (loss[0] - loss[1])
    return free, cost


def expected_paper(sides: list[Side], balance: list[float], count: int, config: ZipConfig) -> tuple[list, float]:
    """Only the shared neurons' weights on shared inputs move, judged on what the originals read."""
    rows, targets = [], []
    for part, alpha in zip(sides, balance, strict=True):
        absolute = part.damping(part.original, config.fixed_damping)
        a = np.concatenate(
            [part.original[:, part.shared] / len(part.original) ** 0.5, absolute**0.5 * np.eye(len(part.shared))]
        )
        rows.append(alpha**0.5 * a)
        targets.append(alpha**0.5 * a @ part.prior[:count, part.shared].T)
    tied = solve(np.concatenate(rows), np.concatenate(targets))
    cost = sum(0.5 * float(((a @ tied.T - y) ** 2).sum()) for a, y in zip(rows, targets, strict=True))
    found = []
    for part in sides:
        weights = part.prior.copy()
        weights[:count, part.shared] = tied
        found.append(weights)
    return found, cost


def merged(
    case: Case, share: float, count: int, config: ZipConfig
) -> tuple[ZippedNetwork, dict[str, Pairing], list[tuple[LayerReport, list[Side]]]]:
    modules, traced = case.pair(), traced_pair(case)
    calibration = {task: case.examples(count + i, seed=10 + i) for i, task in enumerate(TASKS)}
    batches = {task: as_batches(data, task) for task, data in calibration.items()}
    pairings = random_pairings(traced, share, seed=3)
    zipped = finish(merge(joined(traced, batches=batches), pairings, config))
    sensitivity = sensitivities_of_traced(traced, calibration, config.seed)
    plain = {task: zipped.network(task) for task in TASKS}
    layers = []
    for report in zipped.report.layers:
        name = report.layer
        sides = [
            side(t, name, modules[t], zipped, plain[t], pairings, calibration[t], sensitivity[t][name]) for t in TASKS
        ]
        layers.append((report, sides))
    return zipped, pairings, layers


@pytest.mark.parametrize(
    ("share", "count", "damping"), [(0.5, 30, 1e-3), (0.5, 4, 0.3), (1.0, 30, 0.3), (1.0, 4, 1e-3), (0.2, 30, 1e-3)]
)
@pytest.mark.parametrize("case", [MLP, LENET5, STRIDED, RESIDUAL], ids=lambda case: case.name)
@with_both_methods
def test_merged_layers_are_the_least_squares_solution(
    method: Method, case: Case, share: float, count: int, damping: float
) -> None:
    config = ZipConfig(
        method=method, damping=damping, balance={TASKS[0]: 0.3, TASKS[1]: 0.7}, patches=10_000, refit_rounds=0
    )
    oracle = expected_refit if method == "refit" else expected_paper
    examples = count if case is MLP else count // 4  # an image is many rows
    for report, sides in merged(case, share, examples, config)[2]:
        expected, cost = oracle(sides, effective_balance(sides, config), report.shared, config)
        for part, weights in zip(sides, expected, strict=True):
            np.testing.assert_allclose(part.zipped, weights, rtol=1e-5, atol=1e-7, err_msg=report.layer)
        assert report.cost == pytest.approx(cost, rel=1e-5, abs=1e-9)
        for part, task in zip(sides, TASKS, strict=True):
            difference = part.fed @ part.zipped.T - part.outputs
            assert report.error[task] == pytest.approx((difference**2).sum() / (part.outputs**2).sum(), abs=1e-9)


def relaxed_loss(sides: list[Side], balance: list[float], config: ZipConfig) -> float:
    """What the sweeps lower: the squared distance to the nearest targets behind a ReLU, damping included."""
    total = 0.0
    for part, alpha in zip(sides, balance, strict=True):
        found = part.fed @ part.zipped.T
        distance = np.where(part.outputs > 0, part.outputs - found, np.maximum(found, 0))
        drift = part.damping(part.fed, config.fixed_damping) * ((part.zipped - part.prior) ** 2).sum()
        total += alpha * ((distance**2).sum() / len(found) + drift)
    return total


@pytest.mark.parametrize(("share", "count"), [(1.0, 60), (0.5, 60), (1.0, 4)])
def test_sweeps_never_raise_the_loss_behind_a_relu(share: float, count: int) -> None:
    losses = []
    for refit_rounds in (0, 1, 2, 5):
        config = ZipConfig(refit_rounds=refit_rounds)
        report, sides = merged(MLP, share, count, config)[2][0]
        assert report.layer == "0"
        losses.append(relaxed_loss(sides, effective_balance(sides, config), config))
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.99 * losses[0]


def test_layers_that_nothing_clips_are_not_swept() -> None:
    """Max-pooling stands between the convolution and its ReLU; nothing follows the output layer."""
    config = ZipConfig(patches=10_000)
    for report, sides in merged(LENET5, 0.5, 7, config)[2]:
        if report.layer in ("0", "3", "9"):
            expected, _ = expected_refit(sides, effective_balance(sides, config), report.shared, config)
            for part, weights in zip(sides, expected, strict=True):
                np.testing.assert_allclose(part.zipped, weights, rtol=1e-5, atol=1e-7)


# Bad input


class Cumulative(nn.Module):
    """An operator that zipping does not know."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(dim=1)


def good() -> dict[str, nn.Module]:
    return {task: mlp((9, 7), 3) for task in TASKS}


def data() -> dict[str, Any]:
    return {task: torch.randn(20, 12) for task in TASKS}


def spoilt(value: float) -> dict[str, nn.Module]:
    networks = good()
    with torch.no_grad():
        networks["fashion"].get_parameter("2.weight")[1, 2] = value
    return networks


BAD_INPUT: dict[str, tuple[dict[str, nn.Module], dict[str, Any], dict[str, Any], type[MtzError], str]] = {
    "NaN weights": (spoilt(float("nan")), data(), {}, InvalidWeights, r"'2\.weight' has NaN"),
    "infinite weights": (spoilt(float("inf")), data(), {}, InvalidWeights, r"'2\.weight' has NaN or inf"),
    "overflowing weights": (
        spoilt(3e38),
        {t: 1e3 * x for t, x in data().items()},
        {},
        InvalidCalibration,
        r"layer '2'",
    ),
    "empty data": (good(), data() | {"fashion": torch.zeros(0, 12)}, {}, InvalidCalibration, "'fashion' are empty"),
    "NaN data": (good(), data() | {"fashion": torch.full((3, 12), float("nan"))}, {}, InvalidCalibration, "'fashion'"),
    "integers": (good(), data() | {"digits": torch.ones(3, 12).int()}, {}, InvalidCalibration, r"'digits'.*int32"),
    "wrong shape": (good(), data() | {"digits": torch.randn(3, 11)}, {}, InvalidCalibration, r"'digits'.*\[\d+, 11\]"),
    "other dtype": (good(), data() | {"digits": torch.randn(3, 12).double()}, {}, InvalidCalibration, r"float64"),
    "missing data": (good(), {"digits": torch.randn(3, 12)}, {}, InvalidConfig, r"\['digits'\].*'fashion'"),
    "surplus data": (good(), data() | {"cats": torch.randn(3, 12)}, {}, InvalidConfig, r"calibration .*'cats'"),
    "one network": (
        {"a": mlp((9,), 3)},
        {"a": torch.randn(3, 12)},
        {},
        IncompatibleNetworks,
        r"or more networks, not 1",
    ),
    "no network": ({}, {}, {}, IncompatibleNetworks, r"or more networks, not 0"),
    "unsupported": (
        good() | {"fashion": nn.Sequential(nn.Linear(12, 3), Cumulative())},
        data(),
        {},
        UnsupportedModule,
        r"'fashion': '1': operator cumsum.*keep_separate",
    ),
    "other topology": (
        good() | {"fashion": nn.Sequential(nn.Tanh(), nn.Linear(12, 3))},
        data(),
        {},
        IncompatibleNetworks,
        r"digits has linear '0' .* where fashion has tanh .* nothing in common",
    ),
    "other precision": (
        good() | {"fashion": mlp((9, 7), 3).double()},
        data() | {"fashion": torch.randn(9, 12).double()},
        {},
        IncompatibleNetworks,
        r"float32 and float64",
    ),
    "unknown layer": (good(), data(), {"share": {"1": 2}}, InvalidConfig, r"share\.1: .*Hidden layers: 0, 2"),
    "output layer": (good(), data(), {"share": {"4": 2}}, InvalidConfig, r"share\.4: .*Hidden layers: 0, 2"),
    "too many": (good(), data(), {"share": {"0": 10}}, InvalidConfig, r"share\.0: 10 is impossible.*0 to 9"),
    "unknown task": (good(), data(), {"balance": {"digits": 1, "cats": 2}}, InvalidConfig, r"balance: names.*'cats'"),
    "damping lost in rounding": (
        good(),
        {task: torch.ones(20, 12) for task in TASKS},
        {"damping": 1e-18},
        MtzError,
        r"not positive definite.*[Rr]aise `damping`",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_refused_by_name(name: str) -> None:
    networks, calibration, settings, error, message = BAD_INPUT[name]
    with pytest.raises(error, match=message):
        zip_networks(networks, calibration, ZipConfig(**settings))


def test_networks_are_modules() -> None:
    with pytest.raises(MtzError, match="digits"):
        zip_networks(good() | {"digits": torch.relu}, data())  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["NaN weights", "wrong shape", "unsupported"])
def test_refusals_name_the_task(name: str) -> None:
    networks, calibration, *_ = BAD_INPUT[name]
    with pytest.raises(MtzError, match=r"fashion" if name != "wrong shape" else "digits"):
        zip_networks(networks, calibration)


@pytest.mark.parametrize("settings", [{"share": {"nope": 1}}, {"balance": {"digits": 1, "cats": 1}}])
def test_settings_are_refused_before_any_work(settings: dict[str, Any]) -> None:
    networks = good()
    with torch.no_grad():
        networks["fashion"].get_parameter("2.weight").mul_(1e38)
    with pytest.raises(InvalidConfig):
        zip_networks(networks, {task: 1e6 * x for task, x in data().items()}, ZipConfig(**settings))


class PositionMixer(nn.Module):
    """Tolstikhin et al.: mixes positions, alike for every neuron."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.mix, self.back = nn.Linear(8, 12), nn.Linear(5, 9), nn.Linear(9, 5)
        self.second, self.head = nn.Linear(12, 10), nn.Linear(10, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x + self.back(self.mix(x.transpose(1, 2)).relu()).transpose(1, 2)
        out: Tensor = self.head(self.second(x.relu()).relu().mean(1))
        return out


@pytest.mark.filterwarnings("ignore::mtz_core.ZipWarning")
@pytest.mark.parametrize("patches", [4, 64])
def test_layers_that_mix_positions_stay_as_they_are_where_neurons_are_gone(patches: int) -> None:
    torch.manual_seed(0)
    networks = {task: PositionMixer() for task in "ab"}
    data = {task: torch.randn(40, 5, 8) for task in networks}
    config = ZipConfig(patches=patches, budget=Budget(size=0.7, moves=("drop",)))
    zipped = zip_networks(networks, data, config)
    reports = {layer.layer: layer for layer in zipped.report.layers}
    assert min(reports["first"].neurons.values()) < 12
    for layer in ("mix", "back"):
        assert max(reports[layer].error.values()) < 1e-9
        for task, original in networks.items():
            assert torch.equal(
                zipped.network(task).get_parameter(f"{layer}.weight"), original.get_parameter(f"{layer}.weight")
            )
