"""What it costs to *round* each layer's weights to a few bits, and to how many they are best rounded at a price.

The damage that rounding a layer's matrix does to a task is ``½ Σ_r f_r Σ_j R_jj² (w_rj − q_rj)²``: errors of single
weights, as far as the weights after them cannot make up for them (`mtz_core.merging.rounding`), in the loss's units. It
is measured once on the original, weight by weight on average. Rows and columns that are dropped take their part of it
along, and a row that several tasks share does its damage to each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import compress

import numpy as np
import torch
from jaxtyping import Float64

from mtz_core.merging.rounding import Rounder, choose_scales, nearest
from mtz_core.planning.options import Prices
from mtz_core.planning.sizes import Bits, Counts, Sizes
from mtz_core.settings import BITS
from mtz_core.statistics.linalg import DenseHessian
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.structure import scale_name

SAMPLED = 128
"""The number of a layer's rows on which the damage of rounding is measured."""


class Precisions:
    """The bits to which every layer's rows can be rounded, and the damage it does.

    Attributes:
        offered: The numbers of bits, the original's first.
    """

    def __init__(self, traced: Sequence[Traced], sizes: Sizes, damping: float, rounds: bool) -> None:
        """Measure the damage of rounding.

        Args:
            traced: The networks in the order of the tasks, with moments and sensitivities.
            sizes: The stored bytes, given counts and bits.
            damping: ``λ`` relative to the mean diagonal of a layer's Hessian.
            rounds: Whether weights may be rounded.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        self._sizes = sizes
        self.offered = (sizes.full_bits, *(BITS if rounds else ()))
        self._each = {
            layer: np.stack([_damage_per_weight(own, layer, self.offered[1:], damping) for own in traced])
            for layer in sizes.layers
        }

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
        if len(self.offered) == 1:
            return self.none()
        found = {}
        for layer, each in self._each.items():
            damage = np.stack([self._damage(layer, each[:, i], counts, prices) for i in range(len(self.offered))])
            bytes_ = np.stack([self._sizes.bytes_by_owners(layer, counts, bits) for bits in self.offered])
            found[layer] = np.array(self.offered)[(damage + price * bytes_).argmin(axis=0)]
        return found

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
        for layer, each in self._each.items() if len(self.offered) > 1 else ():
            damage = np.stack([self._damage(layer, each[:, i], counts, prices) for i in range(len(self.offered))])
            bytes_ = np.stack([self._sizes.bytes_by_owners(layer, counts, own) for own in self.offered])
            for owners, own in enumerate(bits[layer].tolist()):
                now = self.offered.index(own)
                fits = bytes_[:now, owners] - bytes_[now, owners] <= spare
                if fits.any():
                    best = int(np.flatnonzero(fits)[0])
                    yield layer, owners, self.offered[best], float(damage[now, owners] - damage[best, owners])

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

    def damage(self, layers: Sequence[str], counts: Counts, bits: Bits, prices: Prices) -> Float64[np.ndarray, "..."]:
        """Compute the weighted damage of rounding layers.

        Args:
            layers: The layers.
            counts: For every group, how many neurons each set of owners has; of some, in each of several states.
            bits: The bits of every layer.
            prices: How damage counts.

        Returns:
            The damage over all tasks, in each state.
        """
        total: Float64[np.ndarray, "..."] = np.zeros(())
        for layer in layers if len(self.offered) > 1 else ():
            chosen = self._each[layer][:, [self.offered.index(own) for own in bits[layer].tolist()]]
            total = total + self._damage(layer, chosen, counts, prices).sum(axis=-1)
        return total

    def by_task(self, counts: Counts, bits: Bits) -> Float64[np.ndarray, " tasks"]:
        """The damage that rounding all layers does to each task."""
        tasks = len(self._sizes.tasks)
        parts = [Prices((np.arange(tasks) == t).astype(np.float64)) for t in range(tasks)]
        return np.array([float(self.damage(tuple(self._each), counts, bits, part)) for part in parts])

    def _damage(
        self, layer: str, each: Float64[np.ndarray, "tasks *owners"], counts: Counts, prices: Prices
    ) -> Float64[np.ndarray, "*states owners"]:
        """The damage by the rows of every set of owners, given that by a weight."""
        rows, columns = self._sizes.extents(layer, counts)
        owners = self._sizes.owners.astype(np.float64)
        each = each[:, None] if each.ndim == 1 else each
        felt = (prices.tasks[:, None] * each).T * owners  # [owners, tasks]
        found: Float64[np.ndarray, "*states owners"] = prices.rounding * rows * ((columns @ owners) @ felt.T)
        return found


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
