"""The dual form against the dense one, and both against explicit inverses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtz_core.errors import MtzError
from mtz_core.statistics.linalg import DenseHessian, Hessian, RowsHessian, SingularHessian, weighted_sum

sizes = st.tuples(st.integers(1, 9), st.integers(1, 8), st.integers(0, 1000))
"""Inputs, rows and a seed."""


def draw(size: tuple[int, int, int]) -> tuple[RowsHessian, Tensor, Tensor, Tensor]:
    """A Hessian in rows, vectors, and a split of the inputs in two, in no order."""
    inputs, rows, seed = size
    generator = torch.Generator().manual_seed(seed)
    hessian = RowsHessian(torch.randn(rows, inputs, generator=generator, dtype=torch.float64), 0.1 + seed % 7)
    vectors = torch.randn(inputs, 3, generator=generator, dtype=torch.float64)
    order = torch.randperm(inputs, generator=generator)
    to_blocks = int(torch.randint(0, inputs + 1, (), generator=generator))
    return hessian, vectors, order[:to_blocks], order[to_blocks:]


def dense(hessian: RowsHessian) -> Tensor:
    """``XᵀX + λ I``, one entry after the other."""
    rows, n = hessian.rows.tolist(), hessian.size
    entries = [[sum(row[i] * row[j] for row in rows) + hessian.damping * (i == j) for j in range(n)] for i in range(n)]
    return torch.tensor(entries, dtype=torch.float64)


@given(sizes)
def test_rows_and_matrix_are_the_same_hessian(size: tuple[int, int, int]) -> None:
    hessian, vectors, *_ = draw(size)
    matrix = dense(hessian)
    torch.testing.assert_close(hessian.dense(), matrix)
    for form in (hessian, DenseHessian(matrix)):
        assert form.size == len(matrix)
        torch.testing.assert_close(form.product(vectors), matrix @ vectors)
        torch.testing.assert_close(form.solve(vectors), torch.linalg.inv(matrix) @ vectors)


@given(sizes)
def test_select_takes_the_principal_block_in_order(size: tuple[int, int, int]) -> None:
    hessian, _, shared, _ = draw(size)
    matrix = dense(hessian)
    for form in (hessian, DenseHessian(matrix)):
        torch.testing.assert_close(form.select(shared).dense(), matrix[shared][:, shared])


@given(sizes)
def test_schur_complement_and_answer(size: tuple[int, int, int]) -> None:
    hessian, _, shared, own = draw(size)
    matrix = dense(hessian)
    change = torch.arange(2.0 * len(shared), dtype=torch.float64).reshape(len(shared), 2) - 1
    inverse = torch.linalg.inv(matrix[own][:, own])
    schur = matrix[shared][:, shared] - matrix[shared][:, own] @ inverse @ matrix[own][:, shared]
    answer = -inverse @ matrix[own][:, shared] @ change
    for form in (hessian, DenseHessian(matrix)):
        torch.testing.assert_close(form.eliminate(shared, own).curvature.dense(), schur)
        torch.testing.assert_close(form.eliminate(shared, own).answer(change), answer)


def test_own_inputs_give_the_cheapest_answer() -> None:
    hessian, _, _, _ = draw((6, 9, 3))
    shared, own = torch.tensor([4, 0]), torch.tensor([1, 2, 3, 5])
    change = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)

    def cost(answer: Tensor) -> float:
        whole = torch.zeros(6, 1, dtype=torch.float64)
        whole[shared], whole[own] = change, answer
        return float((whole * hessian.product(whole)).sum())

    left = hessian.eliminate(shared, own)
    best = left.answer(change)
    assert cost(best) == pytest.approx(float((change * left.curvature.product(change)).sum()))
    for _ in range(20):
        assert cost(best + 0.1 * torch.randn_like(best)) > cost(best)


@given(sizes, sizes, st.floats(0.01, 3), st.floats(0.01, 3))
def test_weighted_sum(first: tuple[int, int, int], second: tuple[int, int, int], alpha: float, beta: float) -> None:
    a, vectors, *_ = draw(first)
    b, *_ = draw((first[0], *second[1:]))
    expected = alpha * dense(a) + beta * dense(b)
    pairs: list[tuple[Hessian, Hessian]] = [(a, b), (a, DenseHessian(dense(b))), (DenseHessian(dense(a)), b)]
    for pair in pairs:
        before = [h.dense().clone() for h in pair]
        total = weighted_sum(pair, [alpha, beta])
        torch.testing.assert_close(total.dense(), expected)
        torch.testing.assert_close(total.solve(vectors), torch.linalg.inv(expected) @ vectors)
        for h, matrix in zip(pair, before, strict=True):
            assert torch.equal(h.dense(), matrix)


def test_weighted_sum_stays_in_rows_while_they_are_few() -> None:
    def rows(count: int) -> RowsHessian:
        return RowsHessian(torch.randn(count, 10, dtype=torch.float64), 0.5)

    assert isinstance(weighted_sum([rows(4), rows(5)], [0.5, 0.5]), RowsHessian)
    assert isinstance(weighted_sum([rows(5), rows(5)], [0.5, 0.5]), DenseHessian)


def test_a_batch_of_hessians_is_each_by_itself() -> None:
    matrices = [dense(draw((4, 6, seed))[0]) for seed in range(3)]
    vectors = torch.randn(3, 4, 2, dtype=torch.float64)
    batch = DenseHessian(torch.stack(matrices))
    assert batch.size == 4
    for i, matrix in enumerate(matrices):
        torch.testing.assert_close(batch.product(vectors)[i], matrix @ vectors[i])
        torch.testing.assert_close(batch.solve(vectors)[i], torch.linalg.inv(matrix) @ vectors[i])


def test_a_singular_hessian_is_refused_with_its_size_and_a_remedy() -> None:
    singular = DenseHessian(torch.ones(4, 4, dtype=torch.float64) - torch.eye(4, dtype=torch.float64))
    index = torch.arange(4)
    for ask in (
        lambda: singular.solve(torch.ones(4, 1, dtype=torch.float64)),
        lambda: singular.eliminate(index[:1], index[1:]),
        lambda: DenseHessian(torch.stack([torch.eye(4).double(), singular.matrix])).solve(torch.ones(2, 4, 1).double()),
    ):
        with pytest.raises(SingularHessian, match=r"size \d.*not positive definite.*[Rr]aise `damping`") as refusal:
            ask()
        assert isinstance(refusal.value, MtzError)


def test_wide_hessians_are_never_squared() -> None:
    wide = RowsHessian(torch.randn(3, 200_000, dtype=torch.float64), 0.5)
    vectors = torch.randn(200_000, 2, dtype=torch.float64)
    torch.testing.assert_close(wide.product(wide.solve(vectors)), vectors)
    shared, own = torch.arange(100_000), torch.arange(100_000, 200_000)
    left = weighted_sum([wide.eliminate(shared, own).curvature, wide.select(shared)], [0.5, 0.5])
    assert left.solve(vectors[shared]).shape == (100_000, 2)
