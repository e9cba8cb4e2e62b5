"""Streaming second moments of a layer's input rows, and the regression of targets on them.

Rows are folded as they come: sums of outer products once there are at least as many rows as inputs, the rows
themselves before that (the dual form, see `mtz_core.linalg`). The result does not depend, but for rounding, on
how the rows were split into batches, and two accumulators can be merged.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mtz_core.errors import InvalidCalibration
from mtz_core.linalg import DenseHessian, Hessian, RowsHessian


class Moments:
    """Second moment ``E[x xᵀ]`` of rows ``x``, and the cross moment ``E[y xᵀ]`` with targets ``y`` if there are any.

    `gram` is ``Σ x xᵀ`` and `cross` is ``Σ y xᵀ`` (float64) once folded; until then `rows` and `targets` are
    kept as they came.
    """

    def __init__(self, inputs: int, outputs: int = 0) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.count = 0
        self.gram: Float[Tensor, "inputs inputs"] | None = None
        self.cross: Float[Tensor, "outputs inputs"] | None = None
        self._rows: list[Float[Tensor, "batch inputs"]] = []
        self._targets: list[Float[Tensor, "batch outputs"]] = []

    @classmethod
    def from_rows(cls, rows: Float[Tensor, "count inputs"]) -> Moments:
        moments = cls(rows.shape[1])
        moments.add(rows)
        return moments

    @classmethod
    def from_gram(cls, gram: Float[Tensor, "inputs inputs"], count: int) -> Moments:
        moments = cls(gram.shape[0])
        moments.gram, moments.count = gram.to(torch.float64), count
        return moments

    @property
    def rows(self) -> Float[Tensor, "count inputs"]:
        """The rows themselves; only while they are fewer than the inputs."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.inputs)

    def add(self, rows: Float[Tensor, "batch inputs"], targets: Float[Tensor, "batch outputs"] | None = None) -> None:
        """Fold a batch of rows (and their targets) in."""
        self.count += rows.shape[0]
        self._rows.append(rows)
        if targets is not None:
            self._targets.append(targets)
        if self.gram is not None or self.count >= self.inputs:
            self._fold()

    def merge(self, other: Moments) -> None:
        """Fold another accumulator of the same layer in."""
        if other.gram is None:
            for i, rows in enumerate(other._rows):
                self.add(rows, other._targets[i] if other._targets else None)
            return
        self.count += other.count
        self._fold()
        assert self.gram is not None
        self.gram += other.gram
        if other.cross is not None:
            assert self.cross is not None
            self.cross += other.cross

    def _fold(self) -> None:
        if self.gram is None:
            self.gram = torch.zeros(self.inputs, self.inputs, dtype=torch.float64)
            if self.outputs:
                self.cross = torch.zeros(self.outputs, self.inputs, dtype=torch.float64)
        for i, rows in enumerate(self._rows):
            self.gram += (rows.T @ rows).to(torch.float64)
            if self.cross is not None:
                self.cross += (self._targets[i].T @ rows).to(torch.float64)
        self._rows.clear()
        self._targets.clear()

    @property
    def _mean_diagonal(self) -> float:
        """Mean of the diagonal of ``E[x xᵀ]``: the unit in which damping is given."""
        if self.count == 0:
            raise InvalidCalibration("no calibration rows: give at least one image.")
        if self.gram is not None:
            return float(self.gram.diagonal().mean()) / self.count
        return float(self.rows.to(torch.float64).square().sum()) / (self.count * self.inputs)

    def hessian(self, damping: float) -> Hessian:
        """``E[x xᵀ] + λ I`` with ``λ = damping × mean diagonal``. Raises `InvalidCalibration` without rows."""
        scale = self._mean_diagonal
        absolute = damping * (scale if scale > 0 else 1.0)  # a layer whose inputs are all dead: any λ will do
        if self.gram is None:
            return RowsHessian(self.rows.to(torch.float64) / self.count**0.5, absolute)
        matrix = self.gram / self.count
        matrix.diagonal().add_(absolute)
        return DenseHessian(matrix)

    def refit(self, hessian: Hessian, weights: Float[Tensor, "outputs inputs"]) -> Float[Tensor, "outputs inputs"]:
        """``W* = (C + λ W)(H + λ I)⁻¹``: weights that best give the targets from these rows, drawn towards `weights`.

        Computed as ``W + (C − W H)(H + λ I)⁻¹``, which leaves weights that already fit untouched.
        """
        if self.gram is not None:
            assert self.cross is not None
            residual = (self.cross - weights @ self.gram) / self.count
            return weights + hessian.solve(residual.T).T
        rows = self.rows.to(torch.float64)
        error = torch.cat(self._targets).to(torch.float64) - rows @ weights.T
        return weights + hessian.solve(rows.T @ error / self.count).T
