"""Streaming second moments of a layer's input rows.

Rows are folded as they come. As soon as there are at least as many rows as inputs, sums of outer products are kept;
before that the rows themselves (the dual form, see `mtz_core.statistics.linalg`). Up to rounding, the result does not
depend on how the rows were split into batches. Two accumulators can be merged.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mtz_core.errors import InvalidCalibration
from mtz_core.statistics.linalg import DenseHessian, Hessian, RowsHessian

DEAD = 1e-30
"""The mean square below which inputs are dead: the squares of float32 values have lost digits, or are 0."""


class Moments:
    """The second moment ``E[x xᵀ]`` of rows ``x``.

    A convolution with several conv_groups has one moment per group. Its rows lie side by side and are folded at once.

    Attributes:
        inputs: The number of inputs of a row, per conv_group.
        conv_groups: How many layers lie side by side.
        count: The number of rows so far.
        gram: ``Σ x xᵀ`` in float64, one matrix per conv_group if there are several; None while rows are kept as they
            came.
    """

    def __init__(self, inputs: int, conv_groups: int = 1) -> None:
        self.inputs = inputs
        self.conv_groups = conv_groups
        self.count = 0
        self.gram: Float[Tensor, "... inputs inputs"] | None = None
        self._rows: list[Float[Tensor, "batch inputs"]] = []

    @classmethod
    def from_rows(cls, rows: Float[Tensor, "count inputs"]) -> Moments:
        """The moments of these rows."""
        moments = cls(rows.shape[1])
        moments.add(rows)
        return moments

    @classmethod
    def from_gram(cls, gram: Float[Tensor, "... inputs inputs"], count: int) -> Moments:
        """The moments of `count` rows whose ``Σ x xᵀ`` is known."""
        moments = cls(gram.shape[-1], gram.shape[0] if gram.ndim == 3 else 1)
        moments.gram, moments.count = gram.to(torch.float64, copy=True), count
        return moments

    @property
    def rows(self) -> Float[Tensor, "count inputs"]:
        """The rows themselves. Only while they are fewer than the inputs."""
        return torch.cat(self._rows) if self._rows else torch.zeros(0, self.inputs)

    def add(self, rows: Float[Tensor, "batch {self.conv_groups*self.inputs}"]) -> None:
        """Fold in a batch of rows."""
        self.count += rows.shape[0]
        self._rows.append(rows)
        if self.gram is not None or self.count >= self.inputs or self.conv_groups > 1:
            self._fold()

    def merge(self, other: Moments) -> None:
        """Fold in another accumulator of the same layer."""
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
        """Compute the absolute damping ``λ``.

        Args:
            relative: ``λ`` relative to the mean diagonal of ``E[x xᵀ]``.

        Returns:
            ``λ`` in squared units of the inputs; `relative` itself if all inputs are 0, or as good as 0.

        Raises:
            InvalidCalibration: If there are no rows.
        """
        scale = self._mean_diagonal
        return relative * (scale if scale > DEAD else 1.0)  # a layer whose inputs are all dead: any λ will do

    def hessian(self, damping: float) -> Hessian:
        """Compute the damped Hessian ``E[x xᵀ] + λ I``.

        Args:
            damping: ``λ`` relative to the mean diagonal of ``E[x xᵀ]``.

        Returns:
            The Hessian, as rows if these are fewer than the inputs.

        Raises:
            InvalidCalibration: If there are no rows.
        """
        absolute = self.damping(damping)
        if self.gram is None:
            return RowsHessian(self.rows.to(torch.float64) / self.count**0.5, absolute)
        matrix = self.gram / self.count
        matrix.diagonal(dim1=-2, dim2=-1).add_(absolute)
        return DenseHessian(matrix)
