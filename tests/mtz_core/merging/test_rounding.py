"""Optimal brain quantisation against an explicit oracle that inverts the Hessian anew for every column."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtz_core.merging import rounding
from mtz_core.merging.rounding import Rounder, choose_scales, storable
from mtz_core.settings import BITS
from mtz_core.statistics.linalg import DenseHessian, RowsHessian, SingularHessian
from mtz_core.zipped.codes import SCALES, middle, nearest

on_all_bits = pytest.mark.parametrize("bits", BITS)


def correlated(count: int, inputs: int, seed: int) -> Tensor:
    """Rows of inputs that are correlated and of unlike sizes, divided by the root of their number."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, max(inputs // 2, 1), generator=generator, dtype=torch.float64)
    mixed = hidden @ torch.randn(hidden.shape[1], inputs, generator=generator, dtype=torch.float64)
    noise = torch.randn(count, inputs, generator=generator, dtype=torch.float64)
    sizes = torch.rand(inputs, generator=generator, dtype=torch.float64) + 0.2
    return (mixed + 0.5 * noise) * sizes / count**0.5


def dense(inputs: int, seed: int, damping: float = 0.01) -> DenseHessian:
    return DenseHessian(RowsHessian(correlated(3 * inputs, inputs, seed), damping).dense())


def drawn(rows: int, inputs: int, seed: int) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64)


def cost(weights: Tensor, rounded: Tensor, hessian: DenseHessian | RowsHessian) -> float:
    return 0.5 * float(hessian.energies((weights - rounded).T).sum())


def scales_for(weights: Tensor, hessian: DenseHessian | RowsHessian, bits: int, free: int = 0) -> Tensor:
    left = weights.shape[1] - free
    return choose_scales(weights[:, :left], Rounder(hessian, free).importance[..., :left], bits)


def wide_scales(weights: Tensor, bits: int) -> Tensor:
    """Scales so large that nothing is clipped, not even what answers."""
    return storable(4 * weights.abs().amax(dim=1) / middle(bits))


def oracle(weights: Tensor, scales: Tensor, hessian: Tensor, bits: int, free: int, order: Sequence[int] = ()) -> Tensor:
    """Each column to the nearest level; all that are left move by what is then the minimum, found by inverting."""
    rounded, size = weights.numpy().copy(), weights.shape[1]
    matrix, half = hessian.numpy(), middle(bits)
    order = order or sorted(range(size - free), key=lambda j: -matrix[j, j])
    left = [*order, *range(size - free, size)]
    for column in order:
        inverse = np.linalg.inv(matrix[np.ix_(left, left)])
        at = left.index(column)
        for row, scale in enumerate(scales.tolist()):
            now = rounded[row, column]
            code = np.clip(np.round(now / scale + half), 0, 2**bits - 1) if scale else half
            change = (code - half) * scale - now
            rounded[row, left] += change * inverse[:, at] / inverse[at, at]
            rounded[row, column] = (code - half) * scale
        left.remove(column)
    return torch.from_numpy(rounded)


@on_all_bits
@given(inputs=st.integers(1, 9), free=st.integers(0, 2), seed=st.integers(0, 10**6))
def test_it_is_optimal_brain_quantisation(bits: int, inputs: int, free: int, seed: int) -> None:
    size = inputs + free
    hessian, weights = dense(size, seed), drawn(4, size, seed)
    scales = scales_for(weights, hessian, bits, free)
    found = Rounder(hessian, free).round(weights, scales, bits)
    torch.testing.assert_close(found, oracle(weights, scales, hessian.matrix, bits, free), rtol=1e-9, atol=1e-9)


@on_all_bits
@pytest.mark.parametrize("strip", [1, 3, 64])
def test_it_does_not_matter_by_how_many_columns_it_goes(bits: int, strip: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hessian, weights = dense(14, 0), drawn(5, 14, 0)
    scales = scales_for(weights, hessian, bits, 1)
    expected = oracle(weights, scales, hessian.matrix, bits, 1)
    monkeypatch.setattr(rounding, "_STRIP", strip)
    torch.testing.assert_close(Rounder(hessian, 1).round(weights, scales, bits), expected, rtol=1e-9, atol=1e-9)


@on_all_bits
@pytest.mark.parametrize("free", [0, 1, 3])
@pytest.mark.parametrize("wide", [False, True], ids=["whole", "in strips"])
def test_rounded_weights_lie_on_their_grids(bits: int, free: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if wide:
        monkeypatch.setattr(rounding, "WIDEST", 0)
    hessian, weights = RowsHessian(correlated(6, 20, 1), 0.02), drawn(5, 20, 1)
    scales = scales_for(weights, hessian, bits, free)
    found = Rounder(hessian, free).round(weights, scales, bits)
    left = 20 - free
    assert torch.equal(found[:, :left], nearest(found[:, :left], scales[:, None], bits))
    assert not free or not torch.equal(found[:, left:], weights[:, left:])


@pytest.mark.parametrize("free", [1, 2, 4])
@pytest.mark.parametrize("wide", [False, True], ids=["whole", "in strips"])
def test_free_weights_are_the_exact_best_given_the_rounded_ones(
    free: int, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient of what it costs is 0 there."""
    if wide:
        monkeypatch.setattr(rounding, "WIDEST", 0)
    hessian, weights = RowsHessian(correlated(8, 15, 2), 0.05), drawn(6, 15, 2)
    scales = scales_for(weights, hessian, 3, free)
    found = Rounder(hessian, free).round(weights, scales, 3)
    gradient = hessian.product((found - weights).T)
    assert float(gradient[:-free].abs().max()) > 1e-3
    torch.testing.assert_close(gradient[-free:], torch.zeros_like(gradient[-free:]), rtol=0, atol=1e-12)


@on_all_bits
def test_it_costs_less_than_rounding_to_nearest(bits: int) -> None:
    """With the same scales: on average, and nearly always."""
    costs = []
    for seed in range(40):
        hessian, weights = dense(16, seed), drawn(8, 16, seed)
        scales = scales_for(weights, hessian, bits)
        plain = nearest(weights, scales[:, None], bits)
        costs.append([cost(weights, own, hessian) for own in (Rounder(hessian).round(weights, scales, bits), plain)])
    found, plain_costs = np.array(costs).T
    assert found.mean() < 0.8 * plain_costs.mean()
    assert (found < plain_costs).mean() > 0.9


def test_it_costs_less_with_every_bit() -> None:
    hessian, weights = dense(24, 7), drawn(10, 24, 7)
    costs = []
    for bits in BITS:
        scales = scales_for(weights, hessian, bits, 1)
        costs.append(cost(weights, Rounder(hessian, 1).round(weights, scales, bits), hessian))
    assert all(2 * more < few for more, few in pairwise(costs))


@on_all_bits
def test_importance_tells_what_is_lost_at_most(bits: int) -> None:
    """Where nothing is clipped, every column misses its aim by half a step at most."""
    hessian, weights = dense(10, 5), drawn(1, 10, 5)
    matrix = hessian.matrix.numpy()
    order = np.argsort(-np.diag(matrix), kind="stable")
    importance = Rounder(hessian).importance.numpy()
    for place, column in enumerate(order):
        left = order[place:]
        at = list(left).index(column)
        assert importance[column] == pytest.approx(1 / np.linalg.inv(matrix[np.ix_(left, left)])[at, at])
    scales = wide_scales(weights, bits)
    most = float((scales.square() / 8 * importance.sum()).sum())
    assert most / 20 < cost(weights, Rounder(hessian).round(weights, scales, bits), hessian) <= most


@pytest.mark.parametrize("strip", [3, 7, 100])
@pytest.mark.parametrize("free", [0, 1, 2])
@pytest.mark.parametrize("examples", [1, 5, 30])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_a_wide_hessian_is_taken_in_strips_with_the_same_result(
    bits: int, examples: int, free: int, strip: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hessian, weights = RowsHessian(correlated(examples, 18, 4), 0.03), drawn(5, 18, 4)
    plain = Rounder(hessian, free)
    scales = scales_for(weights, hessian, bits, free)
    expected = plain.round(weights, scales, bits)
    importance = plain.importance[: 18 - free]
    monkeypatch.setattr(rounding, "WIDEST", 17)
    monkeypatch.setattr(rounding, "_WIDE_STRIP", strip)
    wide = Rounder(hessian, free)
    torch.testing.assert_close(wide.importance[: 18 - free], importance, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(wide.round(weights, scales, bits), expected, rtol=1e-8, atol=1e-9)


@on_all_bits
def test_layers_side_by_side_are_rounded_each_by_its_own_hessian(bits: int) -> None:
    hessians = torch.stack([dense(6, seed).matrix * 10.0**seed for seed in range(4)])
    weights = torch.stack([drawn(3, 6, seed) for seed in range(4)])
    rounder = Rounder(DenseHessian(hessians), 1)
    scales = choose_scales(weights[..., :5], rounder.importance[:, :5], bits)
    found = rounder.round(weights, scales, bits)
    order = hessians.diagonal(dim1=1, dim2=2).mean(dim=0)[:5].argsort(descending=True, stable=True).tolist()
    for own, hessian, some, steps in zip(found, hessians, weights, scales, strict=True):
        torch.testing.assert_close(own, oracle(some, steps, hessian, bits, 1, order), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("wide", [False, True], ids=["whole", "in strips"])
def test_inputs_that_are_never_seen_are_rounded_to_nearest(wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only damping tells what their weights cost, and no other weight can make up for them."""
    if wide:
        monkeypatch.setattr(rounding, "WIDEST", 0)
    rows = correlated(5, 12, 6)
    rows[:, [2, 7]] = 0
    hessian, weights = RowsHessian(rows, 1e-3), drawn(4, 12, 6)
    scales = scales_for(weights, hessian, 3)
    found = Rounder(hessian).round(weights, scales, 3)
    torch.testing.assert_close(found[:, [2, 7]], nearest(weights[:, [2, 7]], scales[:, None], 3), rtol=0, atol=1e-12)


@pytest.mark.parametrize("copies", [2, 3])
def test_inputs_that_are_equal_are_rounded_together(copies: int) -> None:
    """With hardly any damping, what one weight loses its twins make up for."""
    one = correlated(40, 1, 8)
    hessian, weights = RowsHessian(one.expand(-1, copies).contiguous(), 1e-9), drawn(50, copies, 8)
    scales = wide_scales(weights, 4)
    missed, plain = (
        ((rounded - weights).sum(dim=1).abs() / scales).amax()
        for rounded in (Rounder(hessian).round(weights, scales, 4), nearest(weights, scales[:, None], 4))
    )
    assert float(missed) <= 0.5 + 1e-6 < float(plain)


def test_a_hessian_that_is_not_positive_definite_is_refused() -> None:
    matrix = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(SingularHessian, match="not positive definite"):
        Rounder(DenseHessian(matrix)).round(drawn(2, 3, 0), torch.ones(2, dtype=torch.float64), 4)
    indefinite = DenseHessian(torch.diag(torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)))
    with pytest.raises(SingularHessian, match="not positive definite"):
        _ = Rounder(indefinite).importance


@on_all_bits
def test_one_input_is_rounded_to_nearest(bits: int) -> None:
    hessian, weights = dense(1, 0), drawn(6, 1, 0)
    scales = scales_for(weights, hessian, bits)
    assert torch.equal(Rounder(hessian).round(weights, scales, bits), nearest(weights, scales[:, None], bits))
    tolerance = 0.005 * weights.abs()  # a row of one weight is its outermost level, but for the scale's few digits
    assert bool(((Rounder(hessian).round(weights, scales, bits) - weights).abs() <= tolerance).all())


@on_all_bits
def test_rows_of_zeros_stay_zero_and_do_not_disturb_others(bits: int) -> None:
    hessian, weights = dense(8, 3), drawn(3, 8, 3)
    weights[1, :7] = 0
    scales = scales_for(weights, hessian, bits, 1)
    assert float(scales[1]) == 0
    found = Rounder(hessian, 1).round(weights, scales, bits)
    assert torch.equal(found[1], weights[1])
    others = [0, 2]
    assert torch.equal(found[others], Rounder(hessian, 1).round(weights[others], scales[others], bits))


# Scales


@on_all_bits
@given(seed=st.integers(0, 10**6))
def test_scales_can_be_stored_and_are_no_worse_than_clipping_nothing(bits: int, seed: int) -> None:
    weights, importance = drawn(5, 12, seed), torch.rand(12, dtype=torch.float64) + 0.01

    def error(scales: Tensor) -> Tensor:
        return (nearest(weights, scales[:, None], bits) - weights).square() @ importance

    scales = choose_scales(weights, importance, bits)
    assert torch.equal(scales, scales.to(SCALES).to(torch.float64))
    assert bool((scales > 0).all())
    assert bool((error(scales) <= error(storable(weights.abs().amax(dim=1) / middle(bits)))).all())


def test_few_bits_clip_what_is_large_and_rare() -> None:
    """No factor that is tried does better, and the best does much better than clipping nothing."""
    weights, importance = drawn(40, 60, 1), torch.rand(60, dtype=torch.float64) + 0.1
    largest = weights.abs().amax(dim=1)
    for bits, (least, tries) in rounding._FACTORS.items():
        factors = torch.linspace(1.0, least, tries, dtype=torch.float64)
        tried = torch.stack([storable(factor * largest / middle(bits)) for factor in factors.float().tolist()])
        errors = (nearest(weights, tried[..., None], bits) - weights).square() @ importance
        scales = choose_scales(weights, importance, bits)
        found = (nearest(weights, scales[:, None], bits) - weights).square() @ importance
        torch.testing.assert_close(found, errors.amin(dim=0), rtol=0.02, atol=0)
        assert float(found.sum()) <= {4: 0.95, 3: 0.8, 2: 0.6}.get(bits, 1.0) * float(errors[0].sum())


@on_all_bits
def test_scales_follow_the_weights(bits: int) -> None:
    """Powers of two change nothing but the scale; signs and the order of columns change nothing at all."""
    weights, importance = drawn(4, 10, 9), torch.rand(10, dtype=torch.float64)
    scales = choose_scales(weights, importance, bits)
    assert torch.equal(choose_scales(-weights, importance, bits), scales)
    for factor in (2.0**-100, 2.0**-10, 4.0, 2.0**100):
        assert torch.equal(choose_scales(factor * weights, importance, bits), factor * scales)
    assert torch.equal(choose_scales(weights, 2.0**20 * importance, bits), scales)
    order = torch.randperm(10)
    torch.testing.assert_close(choose_scales(weights[:, order], importance[order], bits), scales)


@on_all_bits
def test_a_huge_outlier_makes_its_row_coarse_and_no_other(bits: int) -> None:
    hessian, weights = dense(10, 4), drawn(3, 10, 4)
    weights[0, 3] = 1e6
    scales = scales_for(weights, hessian, bits)
    found = Rounder(hessian).round(weights, scales, bits)
    largest = float(scales[0]) * middle(bits)
    assert largest > 0.19e6  # there is no level at 0: with few bits, all others of the row pay for a large step
    assert float(found[0, 3]) == pytest.approx(min(largest, 1e6), abs=float(scales[0]))
    assert torch.equal(found[1:], Rounder(hessian).round(weights[1:], scales[1:], bits))


@pytest.mark.parametrize("magnitude", [1e-45, 1e-39, 1e-30, 1e30])
@on_all_bits
def test_weights_of_any_magnitude_are_rounded(bits: int, magnitude: float) -> None:
    hessian, weights = dense(8, 2), magnitude * drawn(4, 8, 2)
    scales = scales_for(weights, hessian, bits)
    found = Rounder(hessian).round(weights, scales, bits).to(torch.float32)
    assert bool(found.isfinite().all())
    if magnitude > 1e-37:  # others may be too small for a scale, and are all zero then
        assert float((found - weights).abs().amax()) <= 4 * float(scales.max())
