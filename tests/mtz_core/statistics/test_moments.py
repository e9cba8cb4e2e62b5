"""Second moments do not know how their rows came."""

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtz_core.errors import InvalidCalibration
from mtz_core.statistics.linalg import DenseHessian, RowsHessian
from mtz_core.statistics.moments import Moments

INPUTS = 6
cuts = st.lists(st.integers(0, 20), max_size=4)
counts = st.integers(1, 20)


def data(count: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(count, INPUTS, generator=torch.Generator().manual_seed(count), dtype=dtype)


def folded(rows: Tensor, at: Sequence[int] = ()) -> Moments:
    moments = Moments(INPUTS)
    edges = [0, *sorted(min(to_blocks, len(rows)) for to_blocks in at), len(rows)]
    for start, end in itertools.pairwise(edges):
        moments.add(rows[start:end])
    return moments


def assert_same(found: Moments, expected: Moments) -> None:
    assert found.count == expected.count
    assert type(found.hessian(0.01)) is type(expected.hessian(0.01))
    torch.testing.assert_close(found.hessian(0.01).dense(), expected.hessian(0.01).dense())


@given(counts, cuts)
def test_moments_ignore_how_batches_are_split(count: int, at: list[int]) -> None:
    assert_same(folded(data(count), at), folded(data(count)))


@given(counts, counts, cuts, cuts)
def test_merging_equals_adding(count: int, more: int, at: list[int], other_at: list[int]) -> None:
    merged, other = folded(data(count), at), folded(data(more), other_at)
    merged.merge(other)
    assert_same(merged, folded(torch.cat([data(count), data(more)])))
    assert_same(other, folded(data(more)))


@pytest.mark.parametrize("count", [4, 12], ids=["rows", "gram"])
def test_merging_into_an_empty_accumulator_and_with_an_empty_one(count: int) -> None:
    moments = Moments(INPUTS)
    moments.merge(folded(data(count)))
    moments.merge(Moments(INPUTS))
    assert_same(moments, folded(data(count)))


@given(counts, st.sampled_from([1e-4, 1e-2, 1.0]))
def test_the_damped_hessian(count: int, damping: float) -> None:
    rows = data(count)
    hessian = folded(rows).hessian(damping)
    expected = sum(torch.outer(x, x) for x in rows) / count
    assert isinstance(expected, Tensor)
    expected += damping * expected.diagonal().mean() * torch.eye(INPUTS)
    assert isinstance(hessian, RowsHessian if count < INPUTS else DenseHessian)
    torch.testing.assert_close(hessian.dense(), expected)


@pytest.mark.parametrize("count", [4, 12], ids=["rows", "gram"])
def test_single_precision_rows_are_summed_in_double(count: int) -> None:
    rows = data(count, torch.float32)
    hessian = folded(rows, [2]).hessian(1e-3)
    assert hessian.dense().dtype == torch.float64
    expected = folded(rows.double()).hessian(1e-3)
    torch.testing.assert_close(hessian.dense(), expected.dense(), rtol=1e-5, atol=1e-6)


def test_rows_are_kept_while_they_are_fewer_than_inputs() -> None:
    rows = data(8)
    moments = Moments.from_rows(rows[:5])
    assert moments.gram is None
    assert torch.equal(moments.rows, rows[:5])


def test_rows_are_summed_once_they_are_as_many_as_inputs() -> None:
    rows = data(8)
    moments = Moments.from_rows(rows[:5])
    moments.add(rows[5:])
    assert moments.gram is not None
    torch.testing.assert_close(moments.gram, rows.T @ rows)
    assert len(moments.rows) == 0


def test_stored_forms_come_back() -> None:
    rows = data(9)
    whole = Moments.from_rows(rows)
    assert whole.gram is not None
    again = Moments.from_gram(whole.gram, whole.count)
    assert torch.equal(again.hessian(0.1).dense(), whole.hessian(0.1).dense())
    few = Moments.from_rows(rows[:3])
    assert torch.equal(Moments.from_rows(few.rows).hessian(0.1).dense(), few.hessian(0.1).dense())


def test_merging_leaves_a_stored_gram_alone() -> None:
    gram = torch.eye(INPUTS, dtype=torch.float64)
    Moments.from_gram(gram, 9).merge(Moments.from_gram(gram.clone(), 9))
    assert torch.equal(gram, torch.eye(INPUTS, dtype=torch.float64))


@pytest.mark.parametrize("count", [2, 20], ids=["rows", "gram"])
def test_dead_inputs_are_normal(count: int) -> None:
    hessian = Moments.from_rows(torch.zeros(count, INPUTS)).hessian(1e-3)
    solved = hessian.solve(torch.ones(INPUTS, 1, dtype=torch.float64))
    assert bool(torch.isfinite(solved).all())


def test_no_rows_are_refused() -> None:
    with pytest.raises(InvalidCalibration, match="no calibration rows"):
        Moments(INPUTS).hessian(1e-3)


@given(st.integers(1, 12), st.integers(1, 4), cuts)
def test_groups_side_by_side_are_moments_each_by_itself(count: int, groups: int, at: list[int]) -> None:
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, groups * INPUTS, generator=generator, dtype=torch.float64)
    moments = Moments(INPUTS, groups)
    edges = [0, *sorted(min(to_blocks, count) for to_blocks in at), count]
    for start, end in itertools.pairwise(edges):
        moments.add(rows[start:end])
    assert moments.count == count
    each = [folded(part) for part in rows.chunk(groups, 1)]
    expected = torch.stack([part.T @ part for part in rows.chunk(groups, 1)])
    if groups > 1:
        assert moments.gram is not None
        torch.testing.assert_close(moments.gram, expected)
    found = moments.hessian(0.0).dense().reshape(groups, INPUTS, INPUTS)
    torch.testing.assert_close(found, torch.stack([one.hessian(0.0).dense() for one in each]))
    mean = sum(one.damping(1.0) for one in each) / groups
    assert moments.damping(0.1) == pytest.approx(0.1 * mean)


def test_moments_of_groups_merge_and_come_back() -> None:
    rows = data(8).repeat(1, 2)
    whole, other = Moments(INPUTS, 2), Moments(INPUTS, 2)
    whole.add(rows[:5])
    other.add(rows[5:])
    whole.merge(other)
    assert whole.gram is not None
    torch.testing.assert_close(whole.gram, torch.stack([data(8).T @ data(8)] * 2))
    again = Moments.from_gram(whole.gram, whole.count)
    assert (again.inputs, again.conv_groups, again.count) == (INPUTS, 2, 8)
    assert torch.equal(again.hessian(0.1).dense(), whole.hessian(0.1).dense())


@pytest.mark.parametrize("scale", [1e-10, 1e-19, 1e-22, 1e-30, 1e-40, 0.0])
@pytest.mark.parametrize("count", [4, 12], ids=["rows", "gram"])
def test_a_damped_hessian_can_be_solved_however_small_the_inputs_are(count: int, scale: float) -> None:
    hessian = folded(data(count, torch.float32) * scale).hessian(1e-3)
    whole = torch.eye(INPUTS, dtype=torch.float64)
    torch.testing.assert_close(hessian.product(hessian.solve(whole)), whole)
    assert hessian.eliminate(torch.arange(3), torch.arange(3, INPUTS)).curvature.dense().isfinite().all()


@pytest.mark.parametrize("count", [4, 12], ids=["rows", "gram"])
def test_asking_for_a_hessian_leaves_the_moments_alone(count: int) -> None:
    moments = folded(data(count))
    first = moments.hessian(0.1).dense().clone()
    assert torch.equal(moments.hessian(0.1).dense(), first)
    moments.add(data(3))
    assert_same(moments, folded(torch.cat([data(count), data(3)])))
