"""Functional difference against slow oracles, and how tasks weigh in it."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtz_core.merging.difference import functional_difference, weigh_by_sensitivity
from mtz_core.statistics.linalg import DenseHessian, RowsHessian


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
