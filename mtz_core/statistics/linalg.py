"""Damped positive-definite algebra on layer-wise Hessians, in a primal and a dual form.

A layer-wise Hessian is ``A = E[x xᵀ] + λ I`` over the rows ``x`` of a layer's input. With at least as many rows as
inputs it is held as a dense matrix (`DenseHessian`). With fewer, it is held as its rows (`RowsHessian`,
``A = XᵀX + λ I``) and every solve happens in the dual space of the rows (Woodbury identity), so the square of a wide
layer's input is never formed. Both forms offer the same operations, all in float64: product, solve, elimination of own
inputs, and weighted sum.

Numerical failures are never hidden: a factorisation that fails raises `SingularHessian`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtz_core.errors import MtzError


class SingularHessian(MtzError):
    """A damped Hessian could not be factorised."""


def factorise(matrix: Float[Tensor, "... n n"]) -> Float[Tensor, "... n n"]:
    """Return the lower triangular factor ``L`` of ``A = L Lᵀ``, or of each of several matrices.

    Args:
        matrix: ``A``.

    Raises:
        SingularHessian: If a matrix is not positive definite.
    """
    factor: Tensor
    factor, info = torch.linalg.cholesky_ex(matrix)
    if int(info.max()) != 0:
        raise SingularHessian(
            f"a Hessian of size {matrix.shape[-1]} is not positive definite (pivot {int(info.max())}). "
            "Raise `damping`, or give more calibration data."
        )
    return factor


def invert(matrix: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Invert a positive definite matrix, for callers that need single entries of the inverse.

    Args:
        matrix: The matrix.

    Returns:
        Its inverse.

    Raises:
        SingularHessian: If the matrix cannot be factorised.
    """
    return torch.cholesky_inverse(factorise(matrix))


@dataclass(frozen=True, eq=False)
class Elimination:
    """What is left of a Hessian ``A`` on shared inputs (s) when own inputs (p) compensate.

    Both attributes come from one factorisation.

    Attributes:
        curvature: The Schur complement ``A_ss − A_sp A_pp⁻¹ A_ps``.
        answer: Maps a change of the shared inputs' weights to the best change of the own inputs' weights,
            ``δ_p = −A_pp⁻¹ A_ps δ``.
    """

    curvature: Hessian
    answer: Callable[[Float[Tensor, "s m"]], Float[Tensor, "p m"]]


@dataclass(frozen=True, eq=False)
class DenseHessian:
    """A damped Hessian as a dense matrix, or a batch of such matrices for layers that lie side by side.

    Attributes:
        matrix: ``A`` itself, in squared units of the inputs.
    """

    matrix: Float[Tensor, "... n n"]

    @property
    def size(self) -> int:
        """The number of inputs."""
        return self.matrix.shape[-1]

    @cached_property
    def _factor(self) -> Float[Tensor, "... n n"]:
        return factorise(self.matrix)

    def product(self, vectors: Float[Tensor, "... n m"]) -> Float[Tensor, "... n m"]:
        """``A v``."""
        return self.matrix @ vectors

    def energies(self, vectors: Float[Tensor, "... n m"]) -> Float[Tensor, "... m"]:
        """``vᵀ A v`` of every column ``v``."""
        return (vectors * self.product(vectors)).sum(dim=-2)

    def solve(self, vectors: Float[Tensor, "... n m"]) -> Float[Tensor, "... n m"]:
        """Solve for every column.

        Args:
            vectors: The right-hand sides ``v``, as columns.

        Returns:
            ``A⁻¹ v``.

        Raises:
            SingularHessian: If the Hessian cannot be factorised.
        """
        return torch.cholesky_solve(vectors, self._factor)

    def select(self, index: Int64[Tensor, " k"]) -> DenseHessian:
        """The principal block of the indexed inputs, in the given order."""
        return DenseHessian(self.matrix[index][:, index])

    def eliminate(self, shared: Int64[Tensor, " s"], own: Int64[Tensor, " p"]) -> Elimination:
        """Let the own inputs compensate.

        Args:
            shared: The inputs that are kept.
            own: The inputs that compensate.

        Returns:
            The curvature that is left on the shared inputs, and how the own inputs answer a change.

        Raises:
            SingularHessian: If the block of the own inputs cannot be factorised.
        """
        coupling = self.matrix[own][:, shared]
        factor = factorise(self.matrix[own][:, own])
        half = torch.linalg.solve_triangular(factor, coupling, upper=False)
        return Elimination(
            DenseHessian(self.matrix[shared][:, shared] - half.T @ half),
            lambda change: -torch.cholesky_solve(coupling @ change, factor),
        )

    def dense(self) -> Float[Tensor, "... n n"]:
        """The Hessian as a dense matrix."""
        return self.matrix


@dataclass(frozen=True, eq=False)
class RowsHessian:
    """A damped Hessian with fewer rows than inputs, held as its rows: ``A = XᵀX + λ I``.

    Attributes:
        rows: ``X``, the layer's input rows divided by the root of their number.
        damping: ``λ``, in squared units of the inputs.
    """

    rows: Float[Tensor, "r n"]
    damping: float

    @property
    def size(self) -> int:
        """The number of inputs."""
        return self.rows.shape[1]

    @staticmethod
    def _dual(rows: Float[Tensor, "r n"], damping: float) -> Float[Tensor, "r r"]:
        kernel = rows @ rows.T
        kernel.diagonal().add_(damping)
        return factorise(kernel)

    @cached_property
    def _factor(self) -> Float[Tensor, "r r"]:
        return self._dual(self.rows, self.damping)

    def product(self, vectors: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """``A v``."""
        return self.rows.T @ (self.rows @ vectors) + self.damping * vectors

    def energies(self, vectors: Float[Tensor, "n m"]) -> Float[Tensor, " m"]:
        """``vᵀ A v = ‖X v‖² + λ ‖v‖²`` of every column ``v``."""
        return (self.rows @ vectors).square().sum(dim=0) + self.damping * vectors.square().sum(dim=0)

    def solve(self, vectors: Float[Tensor, "n m"]) -> Float[Tensor, "n m"]:
        """Solve for every column, in the dual space of the rows.

        Args:
            vectors: The right-hand sides ``v``, as columns.

        Returns:
            ``A⁻¹ v = (v − Xᵀ (X Xᵀ + λ I)⁻¹ X v) / λ``.

        Raises:
            SingularHessian: If the dual matrix cannot be factorised.
        """
        inner = torch.cholesky_solve(self.rows @ vectors, self._factor)
        return (vectors - self.rows.T @ inner) / self.damping

    def select(self, index: Int64[Tensor, " k"]) -> RowsHessian:
        """The principal block of the indexed inputs, in the given order."""
        return RowsHessian(self.rows[:, index], self.damping)

    def eliminate(self, shared: Int64[Tensor, " s"], own: Int64[Tensor, " p"]) -> Elimination:
        """Let the own inputs compensate; what is left is again rows and damping.

            A_ss − A_sp A_pp⁻¹ A_ps = λ I + X_sᵀ λ(X_p X_pᵀ + λ I)⁻¹ X_s
            −A_pp⁻¹ A_ps = −X_pᵀ (X_p X_pᵀ + λ I)⁻¹ X_s

        Args:
            shared: The inputs that are kept.
            own: The inputs that compensate.

        Returns:
            The curvature that is left on the shared inputs, and how the own inputs answer a change.

        Raises:
            SingularHessian: If the dual matrix of the own inputs cannot be factorised.
        """
        own_rows, shared_rows = self.rows[:, own], self.rows[:, shared]
        factor = self._dual(own_rows, self.damping)
        left = torch.linalg.solve_triangular(factor, shared_rows, upper=False)
        return Elimination(
            RowsHessian(left * self.damping**0.5, self.damping),
            lambda change: -(own_rows.T @ torch.cholesky_solve(shared_rows @ change, factor)),
        )

    def dense(self) -> Float[Tensor, "n n"]:
        """The Hessian as a dense matrix."""
        matrix = self.rows.T @ self.rows
        matrix.diagonal().add_(self.damping)
        return matrix


Hessian = DenseHessian | RowsHessian


CHUNK = 2**24
"""The most weights that are held in float64 at once, where a layer can be taken neuron by neuron."""


def chunks(count: int, values: int) -> Iterator[slice]:
    """Split a range into slices that are small enough to be handled at once.

    Args:
        count: The length of the range.
        values: How many values belong to each element of the range.

    Returns:
        Consecutive slices of ``range(count)``, each with at most `CHUNK` values, but with one element at least.
    """
    step = max(1, CHUNK // max(values, 1))
    return (slice(start, min(start + step, count)) for start in range(0, count, step))


def weighted_sum(hessians: Sequence[Hessian], weights: Sequence[float]) -> Hessian:
    """Compute ``Σ_t α_t A_t``.

    Args:
        hessians: The terms ``A_t``, at least one.
        weights: The weights ``α_t``.

    Returns:
        The sum, in rows if all terms are rows and there are fewer of them together than inputs, dense otherwise.
    """
    rows = [h for h in hessians if isinstance(h, RowsHessian)]
    if len(rows) == len(hessians) and sum(h.rows.shape[0] for h in rows) < rows[0].size:
        stacked = torch.cat([h.rows * a**0.5 for h, a in zip(rows, weights, strict=True)])
        return RowsHessian(stacked, sum(a * h.damping for h, a in zip(rows, weights, strict=True)))
    total = weights[0] * hessians[0].dense()
    for hessian, weight in zip(hessians[1:], weights[1:], strict=True):
        total.add_(hessian.dense(), alpha=weight)
    return DenseHessian(total)
