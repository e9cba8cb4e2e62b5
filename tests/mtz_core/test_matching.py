"""Functional difference and assignments against slow oracles, and the laws of matching."""

from collections.abc import Sequence
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtz_core import ZipConfig
from mtz_core.activations import as_batches, original_moments
from mtz_core.errors import IncompatibleNetworks
from mtz_core.graph import trace
from mtz_core.linalg import DenseHessian, RowsHessian
from mtz_core.matching import (
    NOT_A_MEMBER,
    GroupMatch,
    Pairing,
    assign,
    assign_greedily,
    check_compatible,
    functional_difference,
    identity_pairing,
    match,
    relative_balance,
    separate_pairing,
    shared_curvature,
    split_inputs,
)
from mtz_core.settings import Method
from tests.mtz_core.networks import TASKS, Case, hidden_layers, lenet5, mlp, permuted

MLP = Case("mlp", mlp, (12,), (9, 7), (8, 10), dtype=torch.float64)
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


def test_relative_balance_divides_by_the_amplitude_of_the_outputs() -> None:
    rows = torch.randn(30, 4, dtype=torch.float64)
    hessian = DenseHessian(rows.T @ rows / 30)
    matrix = torch.randn(3, 4, dtype=torch.float64)
    amplitude = float((rows @ matrix.T).square().sum() / 30) ** 0.5
    found = relative_balance([0.25, 0.75], [matrix, 10 * matrix], [hessian, hessian])
    assert found == pytest.approx([0.25 / amplitude, 0.75 / (10 * amplitude)])
    assert relative_balance([0.5], [torch.zeros_like(matrix)], [hessian]) == [0.5]


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
    pairing = Pairing.from_pairs(("a", "b"), (4, 3), np.array([[3, 0], [1, 2]]))
    none = NOT_A_MEMBER
    assert pairing.members.tolist() == [[1, 2], [3, 0], [0, none], [2, none], [none, 1]]
    assert pairing.layout == ((("a", "b"), 2), (("a",), 2), (("b",), 1))
    assert pairing.shared == pairing.neurons_shared("a") == pairing.neurons_shared("b") == 2
    assert pairing.neurons("a").tolist() == [1, 3, 0, 2]
    assert pairing.neurons("b").tolist() == [2, 0, 1]


def test_pairings_of_inputs_and_outputs() -> None:
    assert identity_pairing(("a", "b"), 3).layout == ((("a", "b"), 3),)
    assert separate_pairing(("a", "b"), [2, 5]).layout == ((("a",), 2), (("b",), 5))
    assert separate_pairing(("a", "b"), [2, 5]).neurons("b").tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("bias", [True, False])
def test_inputs_split_by_the_neurons_that_feed_them(bias: bool) -> None:
    pairing = Pairing.from_pairs(("a", "b"), (3, 2), np.array([[2, 0]]))
    split = split_inputs(pairing, "a", per_neuron=2, bias=bias)
    assert split.columns.tolist() == [4, 5, 0, 1, 2, 3] + [6] * bias
    assert split.shared.tolist() == [0, 1] + [6] * bias
    assert split.own.tolist() == [2, 3, 4, 5]
    hessian = random_hessian(6 + bias, 20, 0)
    torch.testing.assert_close(
        shared_curvature(hessian, split, compensate=True).dense(), hessian.schur(split.shared, split.own).dense()
    )
    torch.testing.assert_close(
        shared_curvature(hessian, split, compensate=False).dense(), hessian.select(split.shared).dense()
    )


def run_match(networks: dict[str, nn.Module], calibration: dict[str, Tensor], config: ZipConfig) -> list[GroupMatch]:
    batches = {task: as_batches(data, task) for task, data in calibration.items()}
    traced = {task: trace(network, batches[task][0]) for task, network in networks.items()}
    moments = {task: original_moments(network, batches[task], config) for task, network in traced.items()}
    return list(match(traced, moments, config))


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
    before = run_match(networks, calibration, config)
    after = run_match(networks | {TASKS[1]: changed}, calibration, config)
    for found, again in zip(before, after, strict=True):
        order = orders[found.group].tolist()
        assert pairs(found) == {(i, order[j]) for i, j in pairs(again)}
        assert again.cost == pytest.approx(found.cost, rel=1e-6)
        assert again.curve == pytest.approx(found.curve, rel=1e-6)


@pytest.mark.parametrize("method", ["paper", "refit"])
@pytest.mark.parametrize("case", [MLP, LENET5], ids=lambda case: case.name)
def test_the_order_of_the_tasks_does_not_matter(case: Case, method: Method) -> None:
    networks, calibration = case.pair(), case.calibration(20)
    config = ZipConfig(method=method, share=0.6, balance={TASKS[0]: 1.0, TASKS[1]: 3.0})
    before = run_match(networks, calibration, config)
    after = run_match(dict(reversed(networks.items())), dict(reversed(calibration.items())), config)
    for found, again in zip(before, after, strict=True):
        assert pairs(found) == pairs(again, order=(1, 0))
        assert again.cost == pytest.approx(found.cost, rel=1e-6)


@pytest.mark.parametrize("method", ["paper", "refit"])
def test_a_network_is_matched_with_itself(method: Method) -> None:
    network, data = MLP.network(1), MLP.examples(60)
    for found in run_match({"a": network, "b": network}, {"a": data, "b": data}, ZipConfig(method=method)):
        assert all(i == j for i, j in pairs(found))
        assert found.cost == pytest.approx(0, abs=1e-9)


def test_curves_rise_to_the_cost_of_sharing_everything() -> None:
    for found in run_match(MLP.pair(), MLP.calibration(), ZipConfig()):
        assert len(found.curve) == found.pairing.shared
        assert found.curve[-1] == pytest.approx(found.cost)
        steps = np.diff([0.0, *found.curve])
        assert bool((steps >= 0).all() and (np.diff(steps) >= -1e-12).all())


def test_optimal_matching_costs_no_more_than_any_other_pairs() -> None:
    networks, calibration = MLP.pair(), MLP.calibration()
    (first, *_) = run_match(networks, calibration, ZipConfig(share={"0": 4}))
    assert first.group == "0"
    assert first.pairing.shared == 4
    assert first.cost <= first.curve[3] + 1e-12


def test_the_matrix_of_costs_is_the_functional_difference_of_the_rows() -> None:
    """The first hidden layer, where all inputs are shared, from the calibration data alone."""
    networks, calibration = MLP.pair(), MLP.calibration(40)
    damping = 0.01
    matrices, hessians, energies = [], [], []
    for task, network in networks.items():
        layer = network.get_submodule("0")
        assert isinstance(layer, nn.Linear)
        x = torch.cat([calibration[task], torch.ones(40, 1, dtype=torch.float64)], dim=1)
        hessian = x.T @ x / 40
        hessian += damping * hessian.diagonal().mean() * torch.eye(13)
        matrix = torch.cat([layer.weight, layer.bias[:, None]], dim=1).detach()
        matrices.append(matrix)
        hessians.append(hessian)
        energies.append(float(torch.einsum("oi,ij,oj->", matrix, hessian, matrix)))
    inverse = torch.linalg.inv
    parallel = inverse(sum(inverse(h) * e**0.5 / 0.5 for h, e in zip(hessians, energies, strict=True)))
    difference = matrices[0][:, None] - matrices[1][None]
    cost = 0.5 * torch.einsum("abi,ij,abj->ab", difference, parallel, difference).numpy()
    found, *_ = run_match(networks, calibration, ZipConfig(damping=damping, share=0.5))
    expected = assign(cost, 4)
    assert pairs(found) == {(int(i), int(j)) for i, j in expected}
    assert found.cost == pytest.approx(total(cost, expected))


def traced(*networks: nn.Module, shape: tuple[int, ...] = (12,), dtype: torch.dtype = torch.float32) -> dict:
    return {
        task: trace(network, torch.randn(2, *shape, dtype=dtype)) for task, network in zip("ab", networks, strict=False)
    }


def test_networks_of_other_widths_and_classes_fit_together() -> None:
    graph = check_compatible(traced(mlp((9, 7), 3), mlp((5, 8), 4)))
    assert [layer.name for layer in graph.layers] == ["0", "2", "4"]


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (
            traced(mlp((9,), 3), mlp((9,), 3, activation=nn.Tanh)),
            r"a has relu 'relu:1' where b has tanh 'tanh:1'.*same topology",
        ),
        (traced(mlp((9,), 3), mlp((9, 9), 3)), r"b has relu 'relu:3' where a has ended.*same topology"),
        (traced(mlp((9,), 3), mlp((9,), 3, bias=False)), r"a has linear '0'.* where b has linear '0'"),
        (
            traced(nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3, stride=2), shape=(1, 9, 9)),
            r"stride=\[1, 1\].*b has .*stride=\[2, 2\]",
        ),
        (
            traced(mlp((9,), 3)) | {"b": trace(mlp((9,), 3, inputs=5), torch.randn(2, 5))},
            r"a \[12\], b \[5\].*one shape",
        ),
        (traced(mlp((9,), 3)), r"two networks, not 1 \(a\)"),
        ({}, r"two networks, not 0 \(none\)"),
        (traced(mlp((9,), 3), mlp((9,), 3)) | {"c": traced(mlp((9,), 3))["a"]}, r"two networks, not 3 \(a, b, c\)"),
        (
            traced(mlp((9,), 3)) | {"b": traced(mlp((9,), 3).double(), dtype=torch.float64)["a"]},
            r"mix float32 and float64",
        ),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_networks_that_do_not_fit_are_refused_with_both_names(networks: dict, message: str) -> None:
    with pytest.raises(IncompatibleNetworks, match=message):
        check_compatible(networks)


def test_a_missing_bias_is_named() -> None:
    with pytest.raises(IncompatibleNetworks, match="bias"):
        check_compatible(traced(mlp((9,), 3), mlp((9,), 3, bias=False)))
