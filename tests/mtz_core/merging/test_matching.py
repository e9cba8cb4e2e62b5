"""The laws of matching, and the cost of a pairing against a slow oracle."""

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import ZipConfig
from mtz_core.merging.difference import weigh_by_sensitivity
from mtz_core.merging.matching import Matcher, descent
from mtz_core.merging.pairing import GroupMatch, Pairing, assign
from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from mtz_core.settings import Method
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import Sensitivities
from tests.support.networks import (
    TASKS,
    Case,
    Residual,
    hidden_layers,
    joined,
    lenet5,
    match_traced,
    mlp,
    permuted,
    sensitivities_of_traced,
    traced_pair,
)

pytestmark = pytest.mark.slow

MLP = Case("mlp", mlp, (12,), (9, 7), (8, 10), dtype=torch.float64)
RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6), dtype=torch.float64)
LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), (5, 4, 12), dtype=torch.float64)


def pairs(found: GroupMatch, order: Sequence[int] = (0, 1)) -> set[tuple[int, ...]]:
    members = found.pairing.members[: found.pairing.shared]
    return {tuple(int(row[i]) for i in order) for row in members}


@pytest.mark.parametrize("method", ["paper", "refit"])
@pytest.mark.parametrize("case", [MLP, LENET5], ids=lambda case: case.name)
@pytest.mark.parametrize("share", [1.0, 0.5])
def test_permuting_neurons_permutes_the_match(case: Case, method: Method, share: float) -> None:
    networks, calibration = case.pair(), case.calibration(20)
    config = ZipConfig(method=method, share=share)
    layers = [*hidden_layers(case), "last"]
    layers[-1] = [name for name, part in networks[TASKS[1]].named_modules() if isinstance(part, nn.Linear)][-1]
    changed, orders = permuted(networks[TASKS[1]], layers, seed=5)
    before = match_traced(traced_pair(case), calibration, config)
    after = match_traced({**traced_pair(case), TASKS[1]: trace(changed, case.examples(2))}, calibration, config)
    for found, again in zip(before, after, strict=True):
        order = orders[found.group].tolist()
        assert pairs(found) == {(i, order[j]) for i, j in pairs(again)}
        assert again.cost == pytest.approx(found.cost, rel=1e-6)
        assert again.curve == pytest.approx(found.curve, rel=1e-6)


@pytest.mark.parametrize("method", ["paper", "refit"])
@pytest.mark.parametrize("case", [MLP, LENET5], ids=lambda case: case.name)
def test_neither_the_order_nor_the_names_of_two_tasks_matter(case: Case, method: Method) -> None:
    networks, calibration = traced_pair(case), case.calibration(20)
    before = match_traced(
        networks, calibration, ZipConfig(method=method, share=0.6, balance=dict(zip(TASKS, (1.0, 3.0), strict=True)))
    )
    listed = match_traced(
        {task: networks[task] for task in reversed(TASKS)},
        {task: calibration[task] for task in reversed(TASKS)},
        ZipConfig(method=method, share=0.6, balance=dict(zip(TASKS, (1.0, 3.0), strict=True))),
    )
    renamed = match_traced(
        dict(zip(reversed(TASKS), networks.values(), strict=True)),
        dict(zip(reversed(TASKS), calibration.values(), strict=True)),
        ZipConfig(method=method, share=0.6, balance=dict(zip(TASKS, (3.0, 1.0), strict=True))),
    )
    for found, again, mirrored in zip(before, listed, renamed, strict=True):
        assert found.pairing.members.tolist() == again.pairing.members.tolist()
        assert (found.cost, found.curve) == (again.cost, again.curve)
        assert pairs(found) == pairs(mirrored, order=(1, 0))
        assert mirrored.cost == pytest.approx(found.cost, rel=1e-6)


@pytest.mark.parametrize("method", ["paper", "refit"])
def test_a_network_is_matched_with_itself(method: Method) -> None:
    network, data = traced_pair(MLP)[TASKS[0]], MLP.examples(60)
    for found in match_traced({"a": network, "b": network}, {"a": data, "b": data}, ZipConfig(method=method)):
        assert all(i == j for i, j in pairs(found))
        assert found.cost == pytest.approx(0, abs=1e-9)


def test_curves_rise_to_the_cost_of_sharing_everything() -> None:
    for found in match_traced(traced_pair(MLP), MLP.calibration(), ZipConfig()):
        assert len(found.curve) == found.pairing.shared
        assert found.curve[-1] == pytest.approx(found.cost)
        steps = np.diff([0.0, *found.curve])
        assert bool((steps >= 0).all() and (np.diff(steps) >= -1e-12).all())


def test_optimal_matching_costs_no_more_than_any_other_pairs() -> None:
    (first, *_) = match_traced(traced_pair(MLP), MLP.calibration(), ZipConfig(share={"0": 4}))
    assert first.group == "0"
    assert first.pairing.shared == 4
    assert first.cost <= first.curve[3] + 1e-12


def test_the_matrix_of_costs_is_the_functional_difference_of_the_rows() -> None:
    """The first hidden layer, where all inputs are shared, from the calibration data alone."""
    networks, calibration = MLP.pair(), MLP.calibration(40)
    damping = 0.01
    matrices, hessians = [], []
    for task, network in networks.items():
        layer = network.get_submodule("0")
        assert isinstance(layer, nn.Linear)
        x = torch.cat([calibration[task], torch.ones(40, 1, dtype=torch.float64)], dim=1)
        hessian = x.T @ x / 40
        hessian += damping * hessian.diagonal().mean() * torch.eye(13)
        matrix = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
        matrices.append(matrix)
        hessians.append(hessian)
    sensitivity = sensitivities_of_traced(traced_pair(MLP), calibration)
    weights = weigh_by_sensitivity([0.5, 0.5], [sensitivity[task]["0"] for task in TASKS])
    assert abs(weights[0] - weights[1]) > 0.02
    inverse = torch.linalg.inv
    parallel = inverse(sum(inverse(h) / alpha for h, alpha in zip(hessians, weights, strict=True)))
    difference = matrices[0][:, None] - matrices[1][None]
    cost = 0.5 * torch.einsum("abi,ij,abj->ab", difference, parallel, difference).numpy()
    found, *_ = match_traced(traced_pair(MLP), calibration, ZipConfig(damping=damping, share=0.5))
    expected = assign(cost, 4)
    assert pairs(found) == {(int(i), int(j)) for i, j in expected}
    assert found.cost == pytest.approx(cost[expected[:, 0], expected[:, 1]].sum())


# The cost of pairings in a residual network


def random_pairings(networks: Mapping[str, Network], share: float, seed: int) -> dict[str, Pairing]:
    generator = np.random.default_rng(seed)
    pairings = {}
    for group in next(iter(networks.values())).graph.hidden_groups:
        widths = [network.graph.widths[group.name] for network in networks.values()]
        tuples = np.stack([generator.permutation(width)[: round(share * min(widths))] for width in widths], axis=1)
        pairings[group.name] = Pairing.from_tuples(tuple(networks), widths, tuples)
    return pairings


def residual_case(name: str) -> tuple[dict[str, nn.Module], dict[str, Network]]:
    count = 3 if name == "three" else 2
    modules = {task: RESIDUAL.network(i + 1, [5 + i, 4, 6 - i]) for i, task in enumerate(("a", "b", "c")[:count])}
    return modules, {task: trace(module, RESIDUAL.examples(2)) for task, module in modules.items()}


GROUPS = {"stem.0": ["stem.0", "branches.0.3", "branches.1.3"], "branches.0.0": ["branches.0.0"]}
"""The layers that write the neurons; those of the stream are written by three."""
READS = {"stem.0": None, "branches.0.3": "branches.0.0", "branches.1.3": "branches.1.0", "branches.0.0": "stem.0"}
"""The neurons that each layer reads; the stem reads the input."""


def expected_cost(
    modules: Mapping[str, nn.Module],
    data: Mapping[str, Tensor],
    pairings: Mapping[str, Pairing],
    group: str,
    config: ZipConfig,
    sensitivity: Mapping[str, Sensitivities],
) -> float:
    """``Σ ½ α_t (s* − s_t)ᵀ M_t (s* − s_t)`` , layer by layer and neuron by neuron."""
    inverse, total = np.linalg.inv, 0.0
    for name in GROUPS[group]:
        reads = READS[name]
        sides = []
        alphas = config.balance_of(tuple(modules))
        if config.method == "refit":
            alphas = weigh_by_sensitivity(alphas, [sensitivity[task][name] for task in modules])
        for t, (task, module) in enumerate(modules.items()):
            layer = module.get_submodule(name)
            assert isinstance(layer, nn.Conv2d)
            rows = patches(module, layer, data[task])
            matrix = layer.weight.detach().flatten(1).numpy()
            if layer.bias is not None:
                matrix = np.column_stack([matrix, layer.bias.detach().numpy()])
            hessian = rows.T @ rows / len(rows)
            hessian += config.fixed_damping * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
            kernel = layer.weight[0, 0].numel()
            neurons = np.arange(layer.in_channels)
            if reads is not None:
                members = pairings[reads].members
                neurons = members[(members >= 0).all(axis=1), t]
            shared = (neurons[:, None] * kernel + np.arange(kernel)).ravel()
            if layer.bias is not None:
                shared = np.append(shared, matrix.shape[1] - 1)
            own = np.setdiff1d(np.arange(matrix.shape[1]), shared)
            left = hessian[np.ix_(shared, shared)]
            if config.method == "refit" and len(own):
                coupling = hessian[np.ix_(shared, own)]
                left = left - coupling @ inverse(hessian[np.ix_(own, own)]) @ coupling.T
            sides.append((alphas[t] * left, matrix[:, shared]))
        for members in pairings[group].members[: pairings[group].shared]:
            own_weights = [matrix[neuron] for (_, matrix), neuron in zip(sides, members, strict=True)]
            pull = sum(left @ weights for (left, _), weights in zip(sides, own_weights, strict=True))
            common = np.linalg.solve(sum(left for left, _ in sides), pull)
            total += sum(
                0.5 * float((common - weights) @ left @ (common - weights))
                for (left, _), weights in zip(sides, own_weights, strict=True)
            )
    return total


def patches(module: nn.Module, layer: nn.Conv2d, x: Tensor) -> np.ndarray:
    """What a layer reads, unfolded, with a trailing 1 where it has a bias."""
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    module(x)
    handle.remove()
    unfolded = F.unfold(F.pad(seen[0], layer._reversed_padding_repeated_twice), layer.kernel_size)
    rows = unfolded.transpose(1, 2).flatten(0, 1)
    if layer.bias is not None:
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    found: np.ndarray = rows.detach().numpy()
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["two", "three"])
@pytest.mark.parametrize("method", ["paper", "refit"])
def test_the_cost_of_a_pairing_is_summed_over_all_layers_that_write_it(method: Method, name: str, group: str) -> None:
    modules, networks = residual_case(name)
    data = {task: RESIDUAL.examples(12, seed=i) for i, task in enumerate(modules)}
    config = ZipConfig(method=method, damping=0.02, patches=10_000)
    moments = {task: original_moments(n, as_batches(data[task], task), config) for task, n in networks.items()}
    sensitivity = sensitivities_of_traced(networks, data)
    matcher = Matcher(joined(networks, moments, sensitivity), config)
    assert {name: [node.name for node in matcher.writers[name]] for name in GROUPS} == GROUPS
    for share in (1.0, 0.5):
        pairings = random_pairings(networks, share, seed=2)
        expected = expected_cost(modules, data, pairings, group, config, sensitivity)
        assert matcher.cost(group, pairings) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_the_descent_ends_where_no_single_pairing_can_be_improved(count: int) -> None:
    networks = residual_case("three" if count == 3 else "two")[1]
    data = {task: RESIDUAL.examples(30, seed=i) for i, task in enumerate(networks)}
    config = ZipConfig(share=0.7, matching_rounds=50, patches=20)
    matches = match_traced(networks, data, config)
    costs = descent(matches)
    assert list(costs) == sorted(costs, reverse=True)
    moments = {task: original_moments(n, as_batches(data[task], task), config) for task, n in networks.items()}
    matcher = Matcher(joined(networks, moments, sensitivities_of_traced(networks, data)), config)
    pairings = {found.group: found.pairing for found in matches}
    total_cost = sum(matcher.cost(name, pairings) for name in pairings)
    assert total_cost == pytest.approx(costs[-1])
    for name in pairings:
        trial = pairings | {name: matcher.match(name, pairings).pairing}
        assert sum(matcher.cost(other, trial) for other in trial) >= total_cost * (1 - 1e-6)


def test_groups_of_a_chain_are_matched_once() -> None:
    matches = match_traced(traced_pair(LENET5), LENET5.calibration(20), ZipConfig(share=0.5))
    assert [found.group for found in matches] == ["0", "3", "7"]
    assert descent(matches) == ()
