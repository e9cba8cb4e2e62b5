"""Functional difference and assignments against slow oracles, and the laws of matching."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtz_core import ZipConfig
from mtz_core.errors import IncompatibleNetworks
from mtz_core.merging.compatibility import check_compatible
from mtz_core.merging.difference import functional_difference, weigh_by_sensitivity
from mtz_core.merging.matching import Matcher, descent
from mtz_core.merging.pairing import GroupMatch, Pairing, assign, assign_greedily
from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from mtz_core.settings import Method
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.linalg import DenseHessian, RowsHessian
from mtz_core.statistics.sensitivity import Sensitivities
from mtz_core.zipped.ownership import NOT_A_MEMBER
from tests.support.networks import (
    TASKS,
    Case,
    Residual,
    hidden_layers,
    lenet5,
    match_traced,
    mlp,
    permuted,
    sensitivities_of_traced,
    traced_pair,
)

MLP = Case("mlp", mlp, (12,), (9, 7), (8, 10), dtype=torch.float64)
RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6), dtype=torch.float64)
LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), (5, 4, 12), dtype=torch.float64)


def random_hessian(size: int, rows: int, seed: int) -> RowsHessian:
    generator = torch.Generator().manual_seed(seed)
    return RowsHessian(torch.randn(rows, size, generator=generator, dtype=torch.float64), 0.05)


@given(st.integers(1, 6), st.integers(1, 9), st.integers(0, 99), st.floats(0.05, 0.95))
def test_functional_difference(size: int, rows: int, seed: int, alpha: float) -> None:
    m_a, m_b = random_hessian(size, rows, seed), random_hessian(size, rows + 1, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(n, size, generator=generator, dtype=torch.float64) + 3 for n in (4, 3))
    inverse = torch.linalg.inv
    parallel = inverse(inverse(m_a.dense()) / alpha + inverse(m_b.dense()) / (1 - alpha))
    for forms in ((m_a, m_b), (DenseHessian(m_a.dense()), DenseHessian(m_b.dense()))):
        found = functional_difference((a, b), forms, (alpha, 1 - alpha))
        for i, s_i in enumerate(a):
            for j, s_j in enumerate(b):
                expected = 0.5 * (s_i - s_j) @ parallel @ (s_i - s_j)
                torch.testing.assert_close(found[i, j], expected, rtol=1e-8, atol=1e-10)


def test_functional_difference_is_the_cost_of_the_best_common_weights() -> None:
    m_a, m_b = random_hessian(4, 9, 0).dense(), random_hessian(4, 9, 1).dense()
    a, b = torch.randn(1, 4, dtype=torch.float64), torch.randn(1, 4, dtype=torch.float64)
    alpha, beta = 0.3, 1.2
    found = functional_difference((a, b), (DenseHessian(m_a), DenseHessian(m_b)), (alpha, beta))

    def cost(s: Tensor) -> Tensor:
        return 0.5 * (alpha * (s - a[0]) @ m_a @ (s - a[0]) + beta * (s - b[0]) @ m_b @ (s - b[0]))

    best = torch.linalg.solve(alpha * m_a + beta * m_b, alpha * m_a @ a[0] + beta * m_b @ b[0])
    torch.testing.assert_close(found[0, 0], cost(best))
    assert all(cost(best + 0.1 * torch.randn(4, dtype=torch.float64)) > found[0, 0] for _ in range(20))


def test_functional_difference_of_equal_neurons_is_zero_and_never_negative() -> None:
    rows = 1e3 + torch.randn(5, 4, dtype=torch.float64)
    hessian = random_hessian(4, 9, 0)
    found = functional_difference((rows, rows), (hessian, hessian), (0.5, 0.5))
    assert bool((found >= 0).all())
    torch.testing.assert_close(found.diagonal(), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-9)


def test_functional_difference_of_neurons_with_several_rows_is_the_sum_over_their_rows() -> None:
    hessians = random_hessian(4, 9, 0), random_hessian(4, 7, 1)
    a, b = torch.randn(3, 2, 4, dtype=torch.float64), torch.randn(5, 2, 4, dtype=torch.float64)
    found = functional_difference((a.flatten(0, 1), b.flatten(0, 1)), hessians, (0.3, 0.7), slots=2)
    parts = [functional_difference((a[:, slot], b[:, slot]), hessians, (0.3, 0.7)) for slot in range(2)]
    torch.testing.assert_close(found, parts[0] + parts[1])


@given(st.lists(st.tuples(st.floats(0.1, 9.0), st.floats(1e-6, 1e6)), min_size=2, max_size=4), st.integers(1, 5))
def test_tasks_weigh_by_the_root_of_what_their_losses_feel(sides: list[tuple[float, float]], rows: int) -> None:
    balance = [alpha for alpha, _ in sides]
    sensitivity = [level * torch.rand(rows, dtype=torch.float64) for _, level in sides]
    found = weigh_by_sensitivity(balance, sensitivity)
    pulls = [alpha * float(np.sqrt(own.numpy().mean())) for alpha, own in zip(balance, sensitivity, strict=True)]
    assert found == pytest.approx([pull / sum(pulls) for pull in pulls])
    assert sum(found) == pytest.approx(1)
    assert weigh_by_sensitivity(balance, [9.0 * own for own in sensitivity]) == pytest.approx(found)


def test_tasks_that_feel_nothing_weigh_as_they_were_given() -> None:
    silent = torch.zeros(4, dtype=torch.float64)
    assert weigh_by_sensitivity([0.3, 0.7], [silent, silent]) == [0.3, 0.7]
    assert weigh_by_sensitivity([0.3, 0.7], [silent, silent + 1]) == [0.0, 1.0]


small_costs = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 9999), st.booleans())


def draw_cost(shape: tuple[int, int, int, bool]) -> np.ndarray:
    """Random costs, with many ties if the last entry says so."""
    rows, columns, seed, ties = shape
    generator = np.random.default_rng(seed)
    return generator.integers(0, 3, (rows, columns)).astype(float) if ties else generator.random((rows, columns))


def total(cost: np.ndarray, pairs: np.ndarray) -> float:
    return float(cost[pairs[:, 0], pairs[:, 1]].sum())


def assert_disjoint(pairs: np.ndarray, count: int) -> None:
    assert pairs.shape == (count, 2)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == count


@given(small_costs)
def test_assign_finds_the_cheapest_pairs_of_every_cardinality(shape: tuple[int, int, int, bool]) -> None:
    cost = draw_cost(shape)
    rows, columns = cost.shape
    for count in range(min(rows, columns) + 1):
        cheapest = min(
            sum(cost[i, j] for i, j in zip(chosen, partners, strict=True))
            for chosen in combinations(range(rows), count)
            for partners in permutations(range(columns), count)
        )
        pairs = assign(cost, count)
        assert_disjoint(pairs, count)
        assert total(cost, pairs) == pytest.approx(cheapest)


def naive_greedy(cost: np.ndarray, count: int) -> list[tuple[int, int]]:
    found: list[tuple[int, int]] = []
    for _ in range(count):
        free = [
            (cost[i, j], i, j)
            for i in range(cost.shape[0])
            for j in range(cost.shape[1])
            if i not in {a for a, _ in found} and j not in {b for _, b in found}
        ]
        found.append(min(free)[1:])
    return found


@given(st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(0, 9999), st.booleans()))
def test_greedy_assignment_is_the_naive_loop(shape: tuple[int, int, int, bool]) -> None:
    cost = draw_cost(shape)
    for count in range(min(cost.shape) + 1):
        pairs, naive = assign_greedily(cost, count), naive_greedy(cost, count)
        assert_disjoint(pairs, count)
        assert [cost[i, j] for i, j in pairs] == [cost[i, j] for i, j in naive]
        if not shape[3]:
            assert [(int(i), int(j)) for i, j in pairs] == naive


def test_assignments_never_need_the_greedy_choice() -> None:
    cost = np.array([[0.0, 1.0], [1.0, 10.0]])
    assert total(cost, assign(cost, 2)) == 2
    assert total(cost, assign_greedily(cost, 2)) == 10


def test_pairing_holds_shared_neurons_first_and_every_neuron_once() -> None:
    pairing = Pairing.from_tuples(("a", "b"), (4, 3), np.array([[3, 0], [1, 2]]))
    none = NOT_A_MEMBER
    assert pairing.members.tolist() == [[1, 2], [3, 0], [0, none], [2, none], [none, 1]]
    assert pairing.shared == 2


def test_pairing_of_three_networks_orders_by_who_owns_the_neuron() -> None:
    none = NOT_A_MEMBER
    tuples = np.array([[none, 4, 0], [1, 2, none], [2, 0, 2], [0, 1, none], [none, 3, 1]])
    expected = [[2, 0, 2], [0, 1, none], [1, 2, none], [none, 3, 1], [none, 4, 0], [3, none, none]]
    pairing = Pairing.from_tuples(("a", "b", "c"), (4, 5, 3), tuples)
    assert pairing.members.tolist() == expected
    assert pairing.shared == 5
    shuffled = Pairing.from_tuples(("a", "b", "c"), (4, 5, 3), tuples[::-1])
    assert shuffled.members.tolist() == expected


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
    assert found.cost == pytest.approx(total(cost, expected))


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


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("name", ["two", "three"])
@pytest.mark.parametrize("method", ["paper", "refit"])
def test_the_cost_of_a_pairing_is_summed_over_all_layers_that_write_it(method: Method, name: str, group: str) -> None:
    modules, networks = residual_case(name)
    data = {task: RESIDUAL.examples(12, seed=i) for i, task in enumerate(modules)}
    config = ZipConfig(method=method, damping=0.02, patches=10_000)
    moments = {task: original_moments(n, as_batches(data[task], task), config) for task, n in networks.items()}
    sensitivity = sensitivities_of_traced(networks, data)
    matcher = Matcher(networks, moments, config, sensitivity)
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
    matcher = Matcher(networks, moments, config, sensitivities_of_traced(networks, data))
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


# Networks that fit together, and those that do not


def traced(*networks: nn.Module, shape: tuple[int, ...] = (12,), dtype: torch.dtype = torch.float32) -> dict:
    return {
        task: trace(network, torch.randn(2, *shape, dtype=dtype))
        for task, network in zip("abc", networks, strict=False)
    }


def test_networks_of_other_widths_and_classes_fit_together() -> None:
    graph = check_compatible(traced(mlp((9, 7), 3), mlp((5, 8), 4), mlp((7, 7), 2)))
    assert [layer.name for layer in graph.layers] == ["0", "2", "4"]


def test_networks_of_other_input_sizes_fit_together() -> None:
    check_compatible(traced(mlp((9,), 3)) | {"b": trace(mlp((9,), 3, inputs=5), torch.randn(2, 5))})


class Wired(nn.Module):
    """The sum of what two layers put out, the second of which reads the first or the input."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.chained = chained

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        out: Tensor = self.last(first + self.second(first if self.chained else x))
        return out


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (
            (mlp((9,), 3), mlp((9,), 3, activation=nn.Tanh)),
            "a has relu reading step 0 where b has tanh reading step 0. Zip networks of the same topology.",
        ),
        (
            (mlp((9,), 3), mlp((9, 9), 3)),
            "a has nothing more where b has relu reading step 2. Zip networks of the same topology.",
        ),
        (
            (mlp((9,), 3), mlp((9,), 3, bias=False)),
            "a has linear '0' reading input where b has linear '0' without bias reading input.",
        ),
        (
            (mlp((9,), 3), nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Identity(), nn.Linear(9, 3))),
            "a has linear '2' reading step 1 where b has linear '3' reading step 1.",
        ),
        (
            (Wired(True), Wired(False)),
            "a has linear 'second' reading step 0 where b has linear 'second' reading input.",
        ),
        (
            (mlp((9,), 3), mlp((9,), 3), mlp((9,), 3, activation=nn.Tanh)),
            "a has relu reading step 0 where c has tanh reading step 0.",
        ),
    ],
    ids=["activation", "depth", "bias", "name", "wiring", "the third"],
)
def test_networks_of_other_topology_are_refused_with_the_first_difference(
    networks: tuple[nn.Module, ...], message: str
) -> None:
    with pytest.raises(IncompatibleNetworks, match="differ in structure: " + re.escape(message)):
        check_compatible(traced(*networks))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Conv2d(1, 2, 3, stride=2), "stride=[2, 2]"),
        (nn.Conv2d(1, 2, 3, padding=1), "padding=[1, 1]"),
        (nn.Conv2d(1, 2, 3, dilation=2), "dilation=[2, 2]"),
    ],
    ids=["stride", "padding", "dilation"],
)
def test_kernels_that_move_otherwise_are_refused(other: nn.Module, words: str) -> None:
    networks = [nn.Sequential(layer, nn.ReLU()) for layer in (nn.Conv2d(1, 2, 3), other)]
    with pytest.raises(
        IncompatibleNetworks, match=re.escape(f"a has conv2d '0' reading input where b has conv2d '0' ({words})")
    ):
        check_compatible(traced(*networks, shape=(1, 9, 9)))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_networks_are_refused(count: int) -> None:
    with pytest.raises(
        IncompatibleNetworks, match=rf"two or more networks, not {count} \({'a' if count else 'none'}\)"
    ):
        check_compatible(traced(*[mlp((9,), 3)] * count))


def test_networks_of_mixed_precision_are_refused() -> None:
    networks = traced(mlp((9,), 3)) | {"b": trace(mlp((9,), 3).double(), torch.randn(2, 12).double())}
    with pytest.raises(IncompatibleNetworks, match="mix float32 and float64"):
        check_compatible(networks)
