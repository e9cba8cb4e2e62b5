"""Streaming second moments of a layer's input rows.

Rows are folded as they come: sums of outer products once there are at least as many rows as inputs, the rows themselves
before that (the dual form, see `mtz_core.statistics.linalg`). The result does not depend, but for rounding, on how the
rows were split into batches, and two accumulators can be merged.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mtz_core.errors import InvalidCalibration
from mtz_core.statistics.linalg import DenseHessian, Hessian, RowsHessian


class Moments:
    """Second moment ``E[x xᵀ]`` of rows ``x``.

    `gram` is ``Σ x xᵀ`` (float64) once folded; until then `rows` are kept as they came. A layer of several
    `conv_groups` side by side has one moment for each, its rows lie side by side, and they are folded at once.
    """

    def __init__(self, inputs: int, conv_groups: int = 1) -> None:
        self.inputs = inputs
        self.conv_groups = conv_groups
        self.count = 0
        self.gram: Float[Tensor, "... inputs inputs"] | None = None
        self._rows: list[Float[Tensor, "batch inputs"]] = []

    @classmethod
    def from_rows(cls, rows: Float[Tensor, "count inputs"]) -> Moments:
        moments = cls(rows.shape[1])
        moments.add(rows)
        return moments

    @classmethod
    def from_gram(cls, gram: Float[Tensor, "... inputs inputs"], count: int) -> Moments:
        moments = cls(gram.shape[-1], gram.shape[0] if gram.ndim == 3 else 1)
        moments.gram, moments.count = gram.to(torch.float64, copy=True), count
        return moments

    @property
    def rows(self) -> Float[Tensor, "count inputs"]:
        """The rows themselves; only while they are fewer than the inputs."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.inputs)

    def add(self, rows: Float[Tensor, "batch groups*inputs"]) -> None:
        """Fold a batch of rows in."""
        self.count += rows.shape[0]
        self._rows.append(rows)
        if self.gram is not None or self.count >= self.inputs or self.conv_groups > 1:
            self._fold()

    def merge(self, other: Moments) -> None:
        """Fold another accumulator of the same layer in."""
        for rows in other._rows:
            self.add(rows)
        if other.gram is not None:
            self.count += other.count
            self._fold()
            assert self.gram is not None
            self.gram += other.gram

    def _fold(self) -> None:
        if self.gram is None:
            shape = (
                (self.inputs, self.inputs) if self.conv_groups == 1 else (self.conv_groups, self.inputs, self.inputs)
            )
            self.gram = torch.zeros(shape, dtype=torch.float64)
        for rows in self._rows:
            if self.conv_groups > 1:
                rows = rows.unflatten(1, (self.conv_groups, self.inputs)).transpose(0, 1)
            self.gram += (rows.mT @ rows).to(torch.float64)
        self._rows.clear()

    @property
    def _mean_diagonal(self) -> float:
        if self.count == 0:
            raise InvalidCalibration("no calibration rows: give at least one example.")
        if self.gram is not None:
            return float(self.gram.diagonal(dim1=-2, dim2=-1).mean()) / self.count
        return float(self.rows.to(torch.float64).square().sum()) / (self.count * self.inputs)

    def damping(self, relative: float) -> float:
        """``λ``: `relative` to the mean diagonal of ``E[x xᵀ]``. Raises `InvalidCalibration` without rows."""
        scale = self._mean_diagonal
        return relative * (scale if scale > 0 else 1.0)  # a layer whose inputs are all dead: any λ will do

    def hessian(self, damping: float) -> Hessian:
        """``E[x xᵀ] + λ I`` with ``λ = self.damping(damping)``. Raises `InvalidCalibration` without rows."""
        absolute = self.damping(damping)
        if self.gram is None:
            return RowsHessian(self.rows.to(torch.float64) / self.count**0.5, absolute)
        matrix = self.gram / self.count
        matrix.diagonal(dim1=-2, dim2=-1).add_(absolute)
        return DenseHessian(matrix)
