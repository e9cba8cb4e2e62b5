"""The damage of dropping neurons against least squares with their columns forced to zero."""

from collections.abc import Sequence
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtz_core import ZipConfig
from mtz_core.merging.pairing import Pairing
from mtz_core.network.graph import Network, run
from mtz_core.network.narrowing import LEAST, Dropper
from mtz_core.network.tracing import trace
from mtz_core.planning import dropping
from mtz_core.planning.dropping import AT_ONCE, Reader, eliminate, readers
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.linalg import DenseHessian, Hessian, RowsHessian
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities, sensitivities
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.ownership import positions_of
from tests.support.networks import Case, Residual, lenet5, mlp
from tests.support.zoo.laws import traced as traced_zoo
from tests.support.zoo.table import OWN

pytestmark = pytest.mark.slow

MLP = Case("mlp", mlp, (12,), (9, 7), dtype=torch.float64)
WIDE = Case("wide mlp", mlp, (12,), (200, 4), dtype=torch.float64)
LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), dtype=torch.float64)
RESIDUAL = Case("residual", Residual, (1, 7, 6), (7, 4, 6), dtype=torch.float64)
CONFIG = ZipConfig(damping=0.02, patches=9)
GROUPS = {
    "mlp": (MLP, "0"),
    "behind a flatten": (LENET5, "3"),
    "convolution": (LENET5, "0"),
    "stream": (RESIDUAL, "stem.0"),
}
on_all_groups = pytest.mark.parametrize("name", GROUPS)


@cache
def given_network(case: Case, examples: int = 40) -> tuple[Network, dict[str, Moments], Sensitivities]:
    network = trace(case.network(1), case.examples(2))
    batches = as_batches(case.examples(examples, seed=4), "a")
    return network, original_moments(network, batches, CONFIG), sensitivities(network, batches)


def reading(name: str) -> list[Reader]:
    case, group = GROUPS[name]
    network, moments, sensitivity = given_network(case)
    return readers(network, group, moments, sensitivity, CONFIG.fixed_damping)


def brute_force(case: Case, group: str, neurons: Sequence[int]) -> float:
    """``½ Σ_o f_o min_w E(w)`` over all readers: the columns of the neurons zeroed, the other weights solved anew."""
    network, moments, sensitivity = given_network(case)
    total = 0.0
    for node in network.graph.layers:
        if group not in network.graph.columns[node.name].groups:
            continue
        hessian = moments[node.name].hessian(CONFIG.fixed_damping).dense().numpy()
        lost = positions_of(network.graph.columns[node.name], group)[list(neurons)].ravel()
        left = np.setdiff1d(np.arange(len(hessian)), lost)
        for row, weight in zip(network.matrix(node).numpy(), sensitivity[node.name].numpy(), strict=True):
            best = np.zeros_like(row)
            best[left] = np.linalg.solve(hessian[np.ix_(left, left)], hessian[left] @ row)
            total += 0.5 * weight * float((best - row) @ hessian @ (best - row))
    return total


def index(*neurons: int) -> Tensor:
    return torch.tensor(neurons, dtype=torch.int64)


@on_all_groups
def test_one_neuron_costs_what_the_other_weights_cannot_make_up_for(name: str) -> None:
    case, group = GROUPS[name]
    width = given_network(case)[0].graph.widths[group]
    found = sum(reader.damages(torch.arange(width)) for reader in reading(name))
    expected = [brute_force(case, group, [neuron]) for neuron in range(width)]
    np.testing.assert_allclose(found, expected, rtol=1e-7)


@on_all_groups
@given(st.data())
def test_a_block_of_neurons_costs_what_all_of_them_do_together(name: str, data: st.DataObject) -> None:
    case, group = GROUPS[name]
    width = given_network(case)[0].graph.widths[group]
    order = data.draw(st.permutations(range(width)))
    ends = sorted(data.draw(st.sets(st.integers(1, width - 1), min_size=1, max_size=3)))
    blocks, spent = reading(name), 0.0
    for start, end in zip([0, *ends], ends, strict=False):
        own = index(*order[start:end])
        alone = [reader.copy() for reader in blocks]
        if end - start == 1:
            expected = sum(float(reader.damages(own)) for reader in alone)
            assert sum(reader.drop(own) for reader in alone) == pytest.approx(expected, rel=1e-7)
        spent += sum(reader.drop(own) for reader in blocks)
        assert spent == pytest.approx(brute_force(case, group, order[:end]), rel=1e-6)


@on_all_groups
def test_costs_count_by_the_sensitivity_of_rows(name: str) -> None:
    case, group = GROUPS[name]
    network, moments, sensitivity = given_network(case)
    tenfold = {layer: 10 * rows for layer, rows in sensitivity.items()}
    nothing = {layer: 0 * rows for layer, rows in sensitivity.items()}
    before = sum(float(reader.damages(index(1))) for reader in reading(name))
    for other, expected in ((tenfold, 10 * before), (nothing, 0.0)):
        found = readers(network, group, moments, other, CONFIG.fixed_damping)
        assert sum(float(reader.damages(index(1))) for reader in found) == pytest.approx(expected)


def test_all_readers_of_a_stream_are_asked() -> None:
    network, moments, sensitivity = given_network(RESIDUAL)
    assert len(readers(network, "stem.0", moments, sensitivity, 0.1)) == 3
    assert len(readers(network, "branches.0.0", moments, sensitivity, 0.1)) == 1


def test_convolutions_in_groups_say_nothing() -> None:
    (case,) = (case for case in OWN if case.name == "mobilenet-v2")
    network = traced_zoo(case, "narrow")
    batches = as_batches(case.examples(6), "a")
    moments, sensitivity = original_moments(network, batches, CONFIG), sensitivities(network, batches)
    (depthwise,) = [n for n in network.graph.layers if n.name == "3.conv.1.0"]
    assert depthwise.layer.conv_groups(depthwise.arguments) > 1
    found = readers(network, "3.conv.0.0", moments, sensitivity, 0.1)
    assert len(found) == 1
    assert found[0].columns.shape[2] == len(network.matrix(network.graph.node("3.conv.2.0")))


@on_all_groups
def test_a_copy_can_lose_neurons_without_its_original(name: str) -> None:
    for reader in reading(name):
        before = reader.damages(index(0, 1, 2))
        other = reader.copy()
        other.drop(index(1, 2))
        assert torch.equal(reader.damages(index(0, 1, 2)), before)
        assert not torch.equal(other.damages(index(0)), before[:1])


@on_all_groups
def test_layers_with_the_same_columns_are_handled_at_once(name: str) -> None:
    alone, width = reading(name), len(reading(name)[0].slots)
    together = Reader.side_by_side([*alone, *alone])
    assert len(together) == len({reader.slots.numpy().tobytes() for reader in alone})
    neurons = torch.randperm(width, generator=torch.Generator().manual_seed(0))
    for start in range(0, width - 2, 2):  # more than half of the columns go, too
        left = neurons[start:]
        expected = 2 * torch.stack([reader.damages(left) for reader in alone]).sum(dim=0)
        torch.testing.assert_close(sum(reader.damages(left) for reader in together), expected, rtol=1e-9, atol=0)
        spent = 2 * sum(reader.drop(left[:2]) for reader in alone)
        assert sum(reader.drop(left[:2]) for reader in together) == pytest.approx(spent, rel=1e-9)


@on_all_groups
def test_neurons_of_wide_layers_are_measured_alone_and_exactly(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exact = [reader.damages(index(0, 1, 3)) for reader in reading(name)]
    monkeypatch.setattr(dropping, "WIDEST", 0)
    found = reading(name)
    assert not any(reader.exact for reader in found)
    for reader, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(reader.damages(index(0, 1, 3)), expected, rtol=1e-7, atol=0)
        assert reader.copy().drop(index(0, 3)) == pytest.approx(float(expected[0] + expected[2]))


def test_few_rows_of_a_wide_layer_and_the_dense_form_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    network, moments, sensitivity = given_network(WIDE, examples=30)
    (node,) = [node for node in network.graph.layers if node.name == "2"]
    rows = moments["2"].hessian(0.1)
    assert isinstance(rows, RowsHessian)
    hessians: list[Hessian] = [rows, DenseHessian(rows.dense())]
    exact = [Reader(network, node, "0", hessian, sensitivity["2"]).damages(torch.arange(200)) for hessian in hessians]
    monkeypatch.setattr(dropping, "WIDEST", 0)
    once = [Reader(network, node, "0", hessian, sensitivity["2"]).damages(torch.arange(200)) for hessian in hessians]
    for found in (exact[1], *once):
        torch.testing.assert_close(found, exact[0], rtol=1e-7, atol=0)


# The order in which units go


def alone(width: int) -> np.ndarray:
    """Units of one task."""
    return np.arange(width)[:, None]


@on_all_groups
def test_the_costs_of_a_sequence_add_up_to_what_dropping_all_of_it_costs(name: str) -> None:
    case, group = GROUPS[name]
    width = given_network(case)[0].graph.widths[group]
    order, damage = eliminate([reading(name)], alone(width), np.ones(width))
    assert len(order) == len(set(order.tolist())) == len(damage) == width - LEAST
    for end in range(len(order) + 1):
        expected = brute_force(case, group, order[:end].tolist())
        assert damage[:end].sum() == pytest.approx(expected, rel=1e-6, abs=1e-15)


@on_all_groups
@pytest.mark.parametrize("uneven", [False, True])
def test_what_costs_least_for_the_bytes_that_it_frees_goes_next(name: str, uneven: bool) -> None:
    case, group = GROUPS[name]
    width = given_network(case)[0].graph.widths[group]
    freed = np.random.default_rng(0).uniform(1, 30, width) if uneven else np.ones(width)
    order, _ = eliminate([reading(name)], alone(width), freed)
    expected: list[int] = []
    for _ in order:
        spent = brute_force(case, group, expected)
        left = [neuron for neuron in range(width) if neuron not in expected]
        prices = [(brute_force(case, group, [*expected, neuron]) - spent) / freed[neuron] for neuron in left]
        expected.append(left[int(np.argmin(prices))])
    assert order.tolist() == expected


def test_a_few_of_many_go_at_once_and_their_damage_is_exact_together() -> None:
    network, moments, sensitivity = given_network(WIDE, examples=400)
    found = readers(network, "0", moments, sensitivity, CONFIG.fixed_damping)
    order, damage = eliminate([found], alone(200), np.ones(200))
    assert len(order) == 200 - LEAST
    at_once = int(AT_ONCE * 200)
    assert at_once > 1
    alone_costs = found[0].damages(torch.arange(200))
    assert set(order[:at_once].tolist()) == set(alone_costs.argsort()[:at_once].tolist())
    for end in (at_once, 2 * at_once):
        together = found[0].copy().drop(torch.from_numpy(order[:end]))
        assert damage[:end].sum() == pytest.approx(together, rel=1e-6)
    assert bool((damage >= 0).all())


PAIRS = {
    "all shared": ([(i, i) for i in range(7)], (7, 7)),
    "some shared": ([(0, 3), (5, 1)], (7, 5)),
    "nothing shared": ([], (7, 5)),
}
"""Pairs of neurons that are one, and the widths of two networks."""


@pytest.mark.parametrize("name", PAIRS)
def test_shared_neurons_go_in_all_tasks_and_cost_the_sum(name: str) -> None:
    pairs, widths = PAIRS[name]
    units = Pairing.from_tuples(("a", "b"), widths, np.array(pairs, dtype=np.int64).reshape(-1, 2)).members
    cases = [Case(task, mlp, (12,), (width, 3), dtype=torch.float64) for task, width in zip("ab", widths, strict=True)]
    tasks = []
    for case in cases:
        network, moments, sensitivity = given_network(case)
        tasks.append(readers(network, "0", moments, sensitivity, CONFIG.fixed_damping))
    freed = np.random.default_rng(1).uniform(1, 3, len(units))
    before = [reader.damages(index(0)) for task in tasks for reader in task]
    order, damage = eliminate(tasks, units, freed)
    for end in range(len(order) + 1):
        lost = [units[order[:end], t] for t in range(2)]
        expected = sum(brute_force(case, "0", own[own >= 0]) for case, own in zip(cases, lost, strict=True))
        assert damage[:end].sum() == pytest.approx(expected, rel=1e-6, abs=1e-15)
    left = (np.delete(units, order, axis=0) >= 0).sum(axis=0)
    assert bool((left >= LEAST).all())
    assert LEAST in left
    assert all(torch.equal(*pair) for pair in zip(before, [r.damages(index(0)) for t in tasks for r in t], strict=True))


@pytest.mark.parametrize("width", [1, LEAST])
def test_a_group_that_is_as_small_as_can_be_loses_nothing(width: int) -> None:
    case = Case("narrow", mlp, (12,), (width, 5), dtype=torch.float64)
    network, moments, sensitivity = given_network(case)
    order, damage = eliminate([readers(network, "0", moments, sensitivity, 0.1)], alone(width), np.ones(width))
    assert len(order) == len(damage) == 0


class Cut(nn.Module):
    """Of a layer's neurons the first three are normalised, and the others are not; these are worth more."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(10, 7), nn.BatchNorm1d(3), nn.Linear(7, 5)
        self.head.weight.data[:, :3] *= 0.01

    def forward(self, x: Tensor) -> Tensor:
        part, rest = self.first(x).relu().split([3, 4], -1)
        out: Tensor = self.head(torch.cat([self.norm(part), rest], -1))
        return out


def test_a_part_of_a_group_keeps_a_neuron() -> None:
    torch.manual_seed(0)
    x = torch.randn(80, 10)
    network = trace(Cut().eval(), x[:2])
    measured = Traced.measured(network, [x], CONFIG)
    assert measured.sensitivity is not None
    found = readers(network, "first", measured.moments, measured.sensitivity, 0.1)
    order, _ = eliminate([found], alone(7), np.ones(7))
    assert len(order) == 7 - LEAST
    assert len({0, 1, 2} - set(order.tolist())) == 1
    for end in range(len(order) + 1):
        left = Dropper(network).narrow({"first": np.sort(np.delete(np.arange(7), order[:end]))}).network
        assert run(left.graph, left.state, x).shape == (80, 5)


def test_a_task_that_feels_nothing_loses_neurons_for_free() -> None:
    network, moments, sensitivity = given_network(MLP)
    silent = {layer: 0 * rows for layer, rows in sensitivity.items()}
    order, damage = eliminate([readers(network, "0", moments, silent, 0.1)], alone(9), np.ones(9))
    assert len(order) == 9 - LEAST
    assert damage.tolist() == [[0.0]] * len(order)
