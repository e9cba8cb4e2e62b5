"""Labels: every element of every value of a network carries the name of the neuron that it comes from.

A label is a whole number. Two labels are *tied* when elements that carry them are added, multiplied, normalised by one
constant, or read by one weight: then their neurons can only be permuted together. Reshaping, slicing and concatenating
move labels as they move values, so these operators are simply run on the labels. The classes of tied labels that are
left at the end are the neurons of the neuron groups (see `mtz_core.network.groups`).

Labels are those of a batch of one example. `FIXED` (−1) marks what belongs to no neuron, such as padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Bool, Int64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from mtz_core.network.graph import FIXED

THE_INPUT, THE_KERNEL = 0, 1
"""The labels of everything in the network's input, and of the columns of a grouped convolution.

Inputs with names have labels of their own.
"""


@dataclass
class Ties:
    """Labels, and which of them are tied (union-find, by connected components on demand).

    Attributes:
        count: The number of labels.
        inputs: The labels of the network's inputs.
        colours: Labels, and what distinguishes each from labels that are otherwise alike (see `pin`).
    """

    count: int = 2
    inputs: list[int] = field(default_factory=lambda: [THE_INPUT])
    _pairs: list[Int64[Tensor, "2 _n"]] = field(default_factory=list)
    _roots: Int64[Tensor, " labels"] = field(default_factory=lambda: torch.arange(2))
    colours: list[tuple[Int64[Tensor, " n"], Int64[Tensor, " n"]]] = field(default_factory=list)
    """Labels, and what distinguishes each from labels that are otherwise alike (see `pin`)."""

    def fresh(self, count: int) -> Int64[Tensor, " count"]:
        """Make new labels that are tied to nothing."""
        labels = torch.arange(self.count, self.count + count)
        self._roots = torch.cat([self._roots, labels])
        self.count += count
        return labels

    def are_inputs(self, labels: Int64[Tensor, "..."]) -> Bool[Tensor, "..."]:
        """Whether labels are those of an input."""
        return torch.isin(labels, self.resolve(torch.tensor(self.inputs)))

    def tie(self, a: Int64[Tensor, "..."], b: Int64[Tensor, "..."]) -> None:
        """Tie labels element by element, where neither is `FIXED`. Shapes broadcast."""
        a, b = torch.broadcast_tensors(a, b)
        both = (a >= 0) & (b >= 0) & (a != b)
        if bool(both.any()):
            self._pairs.append(torch.stack([a[both], b[both]]).unique(dim=1))

    def resolve(self, labels: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
        """The least label that is tied to each label."""
        if self._pairs:
            first, second = self._roots[torch.cat(self._pairs, dim=1)].numpy()
            links = coo_array((np.ones(len(first), dtype=np.int8), (first, second)), shape=(self.count, self.count))
            part = torch.from_numpy(connected_components(links, directed=False)[1].astype(np.int64))
            least = torch.full((self.count,), self.count).scatter_reduce(0, part, torch.arange(self.count), "amin")
            self._roots = least[part[self._roots]]
            self._pairs.clear()
        return torch.where(labels >= 0, self._roots[labels.clamp(min=0)], labels)

    def pin(self, labels: Int64[Tensor, "..."], colours: Int64[Tensor, "..."]) -> None:
        """Mark labels of different colours as different, whatever else they have in common. Shapes broadcast."""
        labels, colours = torch.broadcast_tensors(labels, colours)
        own = labels >= 0
        self.colours.append((labels[own], colours[own] + 1_000_000_007 * len(self.colours)))

    def uniform(self, labels: Int64[Tensor, "..."], keep: Sequence[int]) -> Int64[Tensor, "..."]:
        """Tie all labels along all axes but some.

        Args:
            labels: The labels.
            keep: The axes along which labels may differ.

        Returns:
            The labels that are left, with size 1 along all other axes.
        """
        labels = self.resolve(labels)
        others = [axis for axis in range(labels.ndim) if axis not in keep and labels.shape[axis] > 1]
        if others:
            representative = labels.amax(dim=others, keepdim=True)
            self.tie(labels, representative)
            labels = self.resolve(representative)
        return labels

    def symmetric(self, labels: Int64[Tensor, "..."], axes: Sequence[int]) -> Int64[Tensor, "..."]:
        """Find the labels that are left when values are summed along some axes, or otherwise treated alike.

        A sum over all neurons belongs to none of them. Where different positions sum different neurons (the heads of an
        attention layer, for example), those that one position sums are tied: they are one neuron, and the sum belongs
        to it.

        Args:
            labels: The labels.
            axes: The axes of the sum.

        Returns:
            The labels of the sums, with size 1 along these axes.
        """
        labels = self.resolve(labels)
        axes = [axis for axis in axes if labels.shape[axis] > 1]
        if not axes:
            return labels
        kept = [axis for axis in range(labels.ndim) if axis not in axes]
        shape = [1 if axis in axes else size for axis, size in enumerate(labels.shape)]
        summed = labels.permute(*kept, *axes).reshape(*[labels.shape[axis] for axis in kept], -1)
        ordered = summed.sort(dim=-1).values.reshape(-1, summed.shape[-1])
        if bool((ordered == ordered[0]).all()):
            return torch.full(shape, FIXED)
        representative = labels.amax(dim=axes, keepdim=True)
        self.tie(labels, representative)
        return self.resolve(representative)


def compress(labels: Int64[Tensor, "..."]) -> Int64[Tensor, "..."]:
    """Reduce labels to size 1 along every axis along which they do not change, `FIXED` ones aside."""
    for axis in range(labels.ndim):
        if labels.shape[axis] > 1:
            most = labels.amax(dim=axis, keepdim=True)
            if bool(((labels == most) | (labels < 0)).all()):
                labels = most
    return labels


def varying(labels: Int64[Tensor, "..."]) -> set[int]:
    """The axes along which labels change, counted from the last (−1)."""
    return {axis - labels.ndim for axis, size in enumerate(labels.shape) if size > 1}
