"""Assignments against slow oracles, and the pairings that they become."""

from itertools import combinations, permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtz_core.merging.pairing import Pairing, assign, assign_greedily
from mtz_core.zipped.ownership import NOT_A_MEMBER

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
