"""What it costs to *round* each layer's weights to a few bits, and to how many they are best rounded at a price.

The damage that rounding a layer's matrix does to a task is ``½ Σ_r f_r Σ_j R_jj² (w_rj − q_rj)²``: errors of single
weights, as far as the weights after them cannot make up for them (`mtz_core.merging.rounding`), in the loss's units. It
is measured once on the original, weight by weight on average. Rows and columns that are dropped take their part of it
along, and a row that several tasks share does its damage to each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np
import torch
from jaxtyping import Float64, Int64

from mtz_core.merging.rounding import Rounder, choose_scales
from mtz_core.planning.options import Prices
from mtz_core.planning.sizes import Bits, Counts, Sizes
from mtz_core.settings import BITS
from mtz_core.statistics.linalg import DenseHessian
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.codes import SCALES, nearest
from mtz_core.zipped.structure import scale_name

SAMPLED = 128
"""The number of a layer's rows on which the damage of rounding is measured."""


class Precisions:
    """The bits to which every layer's rows can be rounded, and the damage it does.

    Attributes:
        offered: The numbers of bits, the original's first.
        rounds: Whether weights may be rounded.
    """

    def __init__(
        self, traced: Sequence[Traced], sizes: Sizes, damping: float, rounds: bool, known: Precisions | None = None
    ) -> None:
        """Measure the damage of rounding.

        Args:
            traced: The networks in the order of the tasks, with moments and sensitivities.
            sizes: The stored bytes, given counts and bits.
            damping: ``λ`` relative to the mean diagonal of a layer's Hessian.
            rounds: Whether weights may be rounded.
            known: The same networks' precisions with other sizes, whose measurement of the damage is taken over.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        self._sizes, self.rounds = sizes, rounds
        self.offered = (sizes.full_bits, *(BITS if rounds else ()))
        self._each: Float64[np.ndarray, "layers tasks precisions"] = (
            np.stack(
                [[_damage_per_weight(own, name, self.offered[1:], damping) for own in traced] for name in sizes.layers]
            )
            if known is None
            else known._each
        )
        self._number = {layer: i for i, layer in enumerate(sizes.layers)}
        biases = np.array([sizes.bias_bytes(layer) for layer in sizes.layers])
        scales = np.array([0, *(SCALES.itemsize for _ in self.offered[1:])])
        self._per_row = biases[:, None] + scales
        self._per_value = np.array(self.offered) / 8

    def none(self) -> Bits:
        """The bits of originals for all layers."""
        return self._sizes.bits_of(self.offered[0])

    def least(self) -> Bits:
        """The fewest bits for all layers."""
        return self._sizes.bits_of(self.offered[-1])

    def best(self, counts: Counts, price: float, prices: Prices) -> Bits:
        """Choose the bits of least ``damage + price · bytes``.

        Args:
            counts: For every group, how many neurons each set of owners has.
            price: The price of a byte.
            prices: How damage counts.

        Returns:
            The bits of every layer.
        """
        if not self.rounds:
            return self.none()
        damage, bytes_ = self._tables(counts, prices)
        chosen = np.array(self.offered)[(damage + price * bytes_).argmin(axis=2)]
        return dict(zip(self._sizes.layers, chosen, strict=True))

    def damage(self, counts: Counts, bits: Bits, prices: Prices) -> float:
        """Compute the weighted damage of rounding all layers, over all tasks."""
        if not self.rounds:
            return 0.0
        damage, _ = self._tables(counts, prices)
        return float(np.take_along_axis(damage, self._indices(bits)[..., None], axis=2).sum())

    def by_task(self, counts: Counts, bits: Bits) -> Float64[np.ndarray, " tasks"]:
        """The damage that rounding all layers does to each task."""
        return np.array([self.damage(counts, bits, Prices(one)) for one in np.eye(len(self._sizes.tasks))])

    def finer(self, counts: Counts, bits: Bits, spare: float, prices: Prices) -> Iterator[tuple[str, int, int, float]]:
        """List the ways to round the rows of one set of owners in one layer less, for so many more bytes at most.

        Args:
            counts: For every group, how many neurons each set of owners has.
            bits: The bits of every layer.
            spare: The most bytes that this may cost.
            prices: How damage counts.

        Yields:
            The layer, the number of the set of owners, the bits that its rows get, and the damage that this saves.
        """
        if not self.rounds:
            return
        damage, bytes_ = self._tables(counts, prices)
        now = self._indices(bits)[..., None]
        more = bytes_ - np.take_along_axis(bytes_, now, axis=2)
        saved = np.take_along_axis(damage, now, axis=2) - damage
        saved = np.where((more <= spare) & (saved > 0), saved, 0.0)
        for layer, owners in np.argwhere(saved.max(axis=2) > 0).tolist():
            best = int(saved[layer, owners].argmax())
            yield self._sizes.layers[layer], owners, self.offered[best], float(saved[layer, owners, best])

    def around(
        self, group: str, counts: Counts, bits: Bits, prices: Prices
    ) -> tuple[Float64[np.ndarray, " states"], Float64[np.ndarray, " states"]]:
        """Compute the bytes and the weighted damage of rounding that depend on a group, in each of its states.

        A layer's rows and columns are linear in the counts of their groups. So is the rest, but in layers that both
        read and write the group.

        Args:
            group: The group.
            counts: How many neurons each set of owners has, of the group in every state, of its neighbours in one.
            bits: The bits of every layer.
            prices: How damage counts.

        Returns:
            The bytes, but for what packing rounds up, and the damage.
        """
        states, owners = counts[group], self._sizes.owners
        slopes, total = np.zeros((2, len(owners))), np.zeros((2, 1))
        here = {**counts, group: 0 * states[:1]}
        for layer in self._sizes.layers_around(group):
            number, chosen = self._number[layer], self._index(bits[layer])
            per_row, per_value = self._per_row[number, chosen], self._per_value[chosen]
            felt = prices.rounding * owners * (prices.tasks[:, None] * self._each[number][:, chosen]).T
            row_slots, column_slots = self._sizes.slots(layer, group)
            rows, columns = self._sizes.extents(layer, here if row_slots is None or column_slots is None else counts)
            of_row = np.stack([per_row + per_value * (columns @ self._sizes.meet), (columns @ owners) @ felt.T])
            total = total + (rows * of_row).sum(axis=-1).reshape(2, -1)
            if column_slots is None:
                slopes += of_row.reshape(2, -1) @ row_slots.T
            elif row_slots is None:
                own = rows.reshape(-1)
                slopes += np.stack([self._sizes.meet @ (own * per_value), owners @ (own @ felt)]) @ column_slots.T
        bytes_, damage = total + (states @ slopes.T).T
        return bytes_ + self._sizes.fixed_around(group, counts), damage

    def _index(self, bits: Int64[np.ndarray, "*some"]) -> Int64[np.ndarray, "*some"]:
        return np.searchsorted(-np.array(self.offered), -bits)

    def _indices(self, bits: Bits) -> Int64[np.ndarray, "layers owners"]:
        return self._index(np.stack(list(bits.values())))

    def _extents(self, layer: str, counts: Counts) -> tuple[Any, Any, Any]:
        """The rows of every set of owners in a layer, the weights in them, and the columns of every task."""
        rows, columns = self._sizes.extents(layer, counts)
        return rows, rows * (columns @ self._sizes.meet), columns @ self._sizes.owners

    def _tables(
        self, counts: Counts, prices: Prices
    ) -> tuple[Float64[np.ndarray, "layers owners precisions"], Float64[np.ndarray, "layers owners precisions"]]:
        """The weighted damage and, but for what packing rounds up, the bytes of every layer in every precision."""
        parts = [self._extents(layer, counts) for layer in self._sizes.layers]
        rows, values, columns = (np.stack(part) for part in zip(*parts, strict=True))
        weighed = prices.rounding * prices.tasks[:, None] * self._each
        damage = rows[:, :, None] * ((columns[:, None] * self._sizes.owners) @ weighed)
        return damage, rows[:, :, None] * self._per_row[:, None] + values[:, :, None] * self._per_value

    def names(self, counts: Counts, bits: Bits) -> dict[str, int]:
        """The bits of all rows that are rounded, by the names of their scales."""
        found = {}
        for layer, own in bits.items():
            rows, _ = self._sizes.extents(layer, counts)
            for owners, number, some in zip(self._sizes.owners, own.tolist(), rows.tolist(), strict=True):
                if some and number != self.offered[0]:
                    found[scale_name(layer, tuple(compress(self._sizes.tasks, owners)))] = number
        return found

    def named(self, names: Mapping[str, int]) -> Bits:
        """The bits of all layers, given those of rows that are rounded by the names of their scales."""
        owners = [tuple(compress(self._sizes.tasks, own)) for own in self._sizes.owners]
        return {
            layer: np.array([names.get(scale_name(layer, own), self.offered[0]) for own in owners])
            for layer in self._sizes.layers
        }


def _damage_per_weight(
    own: Traced, layer: str, offered: Sequence[int], damping: float
) -> Float64[np.ndarray, " precisions"]:
    """Measure the damage of rounding a layer, on `SAMPLED` of its rows at most.

    Args:
        own: The network.
        layer: The layer.
        offered: Numbers of bits.
        damping: ``λ`` relative to the mean diagonal of the layer's Hessian.

    Returns:
        The damage by each weight on average: 0 for the original's precision, then that of each number of bits. All 0
            for a network that lacks the layer.
    """
    found = np.zeros(1 + len(offered))
    node = own.network.graph.layers_by_name.get(layer)
    if node is None or not offered:
        return found
    assert own.sensitivity is not None
    moments, matrix = own.moments[layer], own.network.matrix(node).to(torch.float64)
    step = -(-len(matrix) // SAMPLED)
    rows = torch.arange(0, len(matrix), step)
    weights, sensitivity = matrix[rows], own.sensitivity[layer][rows].to(torch.float64)
    hessian, free = moments.hessian(damping), int(node.bias is not None)
    if moments.conv_groups > 1:
        assert isinstance(hessian, DenseHessian)
        importance = Rounder(
            DenseHessian(hessian.matrix[rows // (len(matrix) // moments.conv_groups)]), free
        ).importance
        weights = weights[:, None]
    else:
        importance = Rounder(hessian, free).importance
    left = weights.shape[-1] - free
    weights, importance = weights[..., :left], importance[..., :left]
    for i, bits in enumerate(offered, start=1):
        scales = choose_scales(weights, importance, bits)
        errors = (nearest(weights, scales[..., None], bits) - weights).square() @ importance[..., None]
        found[i] = 0.5 * float((sensitivity * errors.flatten()).sum()) / max(len(rows) * left, 1)
    return found
