"""Round rows of a layer to a grid of a few bits, the rest of each row answering: optimal brain quantisation.

Rounding weights ``w`` to ``q`` costs ``½ eᵀ H e`` with ``e = w − q``. Let ``H = R Rᵀ`` with ``R`` upper triangular, so

    eᵀ H e = Σ_j R_jj² (e_j + Σ_{i<j} R_ij e_i / R_jj)².

So the columns are rounded one after the other, each to the level nearest to ``w_j + Σ_{i<j} R_ij e_i / R_jj``: what
earlier columns lost, later ones make up for. This is what GPTQ computes (Frantar et al. 2023), without an inverse.
Columns that are not rounded, such as a bias, come last and take exactly that value. Weights of the other columns are
taken in the order of their mean squares, the largest first.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtz_core.statistics.linalg import Hessian, RowsHessian, factorise
from mtz_core.zipped.codes import SCALES, middle, nearest

WIDEST = 4096
"""The most inputs whose Hessian is factorised as a whole; a wider one is held as its rows, and taken in strips."""

_STRIP = 64
"""The columns that are rounded one after the other before the others are told."""

_WIDE_STRIP = 1024
"""The inputs of a strip of a Hessian that is held as its rows."""

_FACTORS = {8: (0.8, 6), 6: (0.6, 10), 5: (0.5, 12), 4: (0.4, 14), 3: (0.3, 16), 2: (0.2, 18)}
"""For each number of bits, the least scale that is tried, relative to the one that clips nothing, and how many are."""


class Rounder:
    """Rounds rows that read the same inputs."""

    def __init__(self, hessian: Hessian, free: int = 0) -> None:
        """Factorise the Hessian.

        Args:
            hessian: The layer's damped Hessian, or several of layers that lie side by side.
            free: How many inputs, the last ones, have weights that are not rounded.

        Raises:
            SingularHessian: If it cannot be factorised.
        """
        self._hessian, self._free = hessian, free
        self._wide = isinstance(hessian, RowsHessian) and hessian.size > WIDEST

    @cached_property
    def _order(self) -> Int64[Tensor, " n"]:
        """The inputs that are rounded in the order in which they are, then the free ones."""
        size = self._hessian.size
        if isinstance(self._hessian, RowsHessian):
            diagonal = self._hessian.rows.square().sum(dim=0)
        else:
            diagonal = self._hessian.matrix.diagonal(dim1=-2, dim2=-1).reshape(-1, size).mean(dim=0)
        order = diagonal[: size - self._free].argsort(descending=True, stable=True)
        return torch.cat([order, torch.arange(size - self._free, size)])

    @cached_property
    def _factor(self) -> Float[Tensor, "... n n"]:
        """``R``, in this order: the flipped factor of the flipped matrix."""
        backwards = self._order.flip(0)
        matrix = self._hessian.dense()[..., backwards, :][..., backwards]
        return factorise(matrix).flip(-1, -2)

    @cached_property
    def importance(self) -> Float[Tensor, "... n"]:
        """``R_jj²`` of every input: what an error in its weight costs where the inputs after it make up for it."""
        if self._wide:
            found = torch.zeros(self._hessian.size, dtype=torch.float64)
            for strip, _, _, factor in self._strips():
                found[strip] = factor.diagonal().square()
            return found
        found = self._factor.diagonal(dim1=-2, dim2=-1).square()
        return torch.empty_like(found).index_copy_(-1, self._order, found)

    def round(
        self, weights: Float[Tensor, "... r n"], scales: Float[Tensor, "... r"], bits: int
    ) -> Float[Tensor, "... r n"]:
        """Round rows.

        Args:
            weights: The rows, in float64.
            scales: The step of every row.
            bits: Bits of a code.

        Returns:
            The rows on their grids; the weights of free inputs answer.
        """
        if self._wide:
            return self._round_wide(weights, scales, bits)
        ordered = weights[..., self._order]
        found = self._in_order(ordered, self._factor, scales, bits, self._free)
        return torch.empty_like(weights).index_copy_(-1, self._order, found)

    @staticmethod
    def _in_order(
        weights: Float[Tensor, "... r n"],
        factor: Float[Tensor, "... n n"],
        scales: Float[Tensor, "... r"],
        bits: int,
        free: int = 0,
    ) -> Float[Tensor, "... r n"]:
        size = weights.shape[-1]
        pull = factor / factor.diagonal(dim1=-2, dim2=-1)[..., None, :]
        rounded, errors = torch.empty_like(weights), torch.zeros_like(weights)
        for start in range(0, size, _STRIP):
            end = min(start + _STRIP, size)
            aims = weights[..., start:end] + errors[..., :start] @ pull[..., :start, start:end]
            for column in range(start, end):
                aim = aims[..., column - start]
                own = nearest(aim, scales, bits) if column < size - free else aim
                rounded[..., column] = own
                error = weights[..., column] - own
                errors[..., column] = error
                if column + 1 < end:
                    answer = error[..., None] * pull[..., column, None, column + 1 : end]
                    aims[..., column + 1 - start :] += answer
        return rounded

    def _round_wide(
        self, weights: Float[Tensor, "r n"], scales: Float[Tensor, " r"], bits: int
    ) -> Float[Tensor, "r n"]:
        """Do the same where the Hessian is held as its rows ``X``: strip by strip; the rest answers in their space.

        With ``δ`` the change of a strip and ``X_r`` the rows of the inputs after it, these change by
        ``−δ X_sᵀ (X_r X_rᵀ + λ I)⁻¹ X_r``. The coefficients of ``X_r`` add up over the strips.

        Args:
            weights: The rows.
            scales: The step of every row.
            bits: Bits of a code.

        Returns:
            The rows on their grids.
        """
        assert isinstance(self._hessian, RowsHessian)
        rows, last = self._hessian.rows, self._order[self._hessian.size - self._free :]
        coefficients = weights.new_zeros(len(weights), len(rows))
        rounded = weights.clone()
        for strip, own, inner, factor in self._strips():
            present = weights[:, strip] - coefficients @ own
            rounded[:, strip] = self._in_order(present, factor, scales, bits)
            change = rounded[:, strip] - present
            coefficients += torch.cholesky_solve((change @ own.T).T, inner).T
        rounded[:, last] = weights[:, last] - coefficients @ rows[:, last]
        return rounded

    def _strips(self) -> Iterator[tuple[Int64[Tensor, " m"], Float[Tensor, "r m"], Tensor, Tensor]]:
        """Yield inputs by strips, their rows, and the factors of what the rest leaves of the Hessian.

        Yields:
            The inputs of a strip, their rows ``X_s``, the lower factor of ``X_r X_rᵀ + λ I`` of the inputs after it,
                and the upper one of ``λ X_sᵀ (X_r X_rᵀ + λ I)⁻¹ X_s + λ I``.
        """
        hessian = self._hessian
        assert isinstance(hessian, RowsHessian)
        rows, damping = hessian.rows, hessian.damping
        strips = self._order[: hessian.size - self._free].split(_WIDE_STRIP)
        last = rows[:, self._order[hessian.size - self._free :]]
        kernels = [last @ last.T]
        kernels[0].diagonal().add_(damping)
        for strip in reversed(strips[1:]):
            kernels.append(kernels[-1] + rows[:, strip] @ rows[:, strip].T)
        for strip, kernel in zip(strips, reversed(kernels), strict=True):
            own, inner = rows[:, strip], factorise(kernel)
            half = torch.linalg.solve_triangular(inner, own, upper=False) * damping**0.5
            left = half.T @ half
            left.diagonal().add_(damping)
            yield strip, own, inner, factorise(left.flip(0, 1)).flip(0, 1)


def choose_scales(
    weights: Float[Tensor, "... r n"], importance: Float[Tensor, "... n"], bits: int
) -> Float[Tensor, "... r"]:
    """Choose the scale of every row by the weighted squared error of rounding to nearest.

    Args:
        weights: The rows.
        importance: What a squared error in the weight of every input costs.
        bits: Bits of a code.

    Returns:
        The scales, in float64, as they can be stored; 0 of rows that are all zero.
    """
    least, tries = _FACTORS[bits]
    largest = weights.abs().amax(dim=-1) / middle(bits)
    best, lowest = storable(largest), torch.full(largest.shape, torch.inf, dtype=weights.dtype)
    for factor in torch.linspace(1.0, least, tries).tolist():
        scales = storable(factor * largest)
        errors = nearest(weights, scales[..., None], bits).sub_(weights).square_()
        error = (errors @ importance[..., None])[..., 0]
        better = error < lowest
        best, lowest = torch.where(better, scales, best), torch.where(better, error, lowest)
    return best


def storable(scales: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Scales as they can be stored."""
    return scales.clamp(max=torch.finfo(SCALES).max).to(SCALES).to(scales.dtype)
