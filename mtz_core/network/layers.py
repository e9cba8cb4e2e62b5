"""Layers as matrices: what each type of layer with weights computes, and how its weights are read and written.

Every layer is seen as ``y = W x`` on *rows*. A linear layer's rows are its inputs at every position, a convolution's
are its unfolded patches (channel first, then the kernel), an embedding's are one-hot tokens. The bias, where there is
one, is the last column of ``W`` and meets a trailing 1 in every row. So later mathematics has no cases: a *neuron* owns
rows of ``W``, and the neurons that it reads own columns.

A grouped convolution is several such layers of equal size, side by side. The number of these is `conv_groups`; their
matrices are stacked, and the rows of their inputs lie side by side. A depthwise convolution has as many groups as
channels.

To teach zipping a new type of layer, add one entry to `LAYERS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64, Shaped
from torch import Tensor

Arguments = Mapping[str, Any]
"""An operator's arguments beside tensors, by name."""


class Layer(Protocol):
    """One type of layer."""

    @property
    def input(self) -> str:
        """The name of the operator's argument for the layer's input."""
        ...

    @property
    def weight(self) -> str:
        """The name of the operator's argument for the weight."""
        ...

    @property
    def bias(self) -> str | None:
        """The name of the operator's argument for the bias; None if it takes none."""
        ...

    def matrix(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "out columns"]:
        """The weight as a matrix."""
        ...

    def from_matrix(self, matrix: Float[Tensor, "out columns"], like: tuple[int, ...]) -> Float[Tensor, "..."]:
        """Turn a matrix back into a weight.

        Args:
            matrix: The matrix, without bias, of any number of neurons.
            like: The shape of the traced weight.

        Returns:
            The weight.
        """
        ...

    def channel_axis(self, ndim: int) -> int:
        """The axis of the neurons in an input or output that has `ndim` axes."""
        ...

    def conv_groups(self, arguments: Arguments) -> int:
        """The number of layers that lie side by side."""
        ...

    def positions(self, x: Shaped[Tensor, "batch ..."], weight: tuple[int, ...], arguments: Arguments) -> int:
        """Count the rows that one example contributes.

        Args:
            x: The layer's input.
            weight: The shape of the layer's weight.
            arguments: The operator's other arguments.

        Returns:
            The number of positions.
        """
        ...

    def rows(
        self,
        x: Shaped[Tensor, "batch ..."],
        weight: tuple[int, ...],
        arguments: Arguments,
        positions: Int64[Tensor, " p"],
    ) -> Float[Tensor, "n columns"]:
        """Take the rows at some positions of every example.

        Args:
            x: The layer's input.
            weight: The shape of the layer's weight.
            arguments: The operator's other arguments.
            positions: The positions.

        Returns:
            The rows, example by example, without the trailing 1. Those of several conv_groups lie side by side.
        """
        ...

    def output_rows(self, y: Float[Tensor, "batch ..."], positions: Int64[Tensor, " p"]) -> Float[Tensor, "n out"]:
        """Take the outputs at some positions of every example.

        Args:
            y: The layer's output.
            positions: The positions.

        Returns:
            The outputs, in the order of `rows`.
        """
        ...


@dataclass(frozen=True)
class LinearLayer:
    """``y = x Wᵀ + b`` on the last axis.

    Attributes:
        input: The name of the operator's argument for the input.
        weight: The name of the operator's argument for the weight.
        bias: The name of the operator's argument for the bias.
        transposed: Whether the operator holds ``Wᵀ``.
    """

    input: str = "input"
    weight: str = "weight"
    bias: str | None = "bias"
    transposed: bool = False

    def matrix(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "out columns"]:
        """The weight as a matrix."""
        return weight.T if self.transposed else weight

    def from_matrix(self, matrix: Float[Tensor, "out columns"], like: tuple[int, ...]) -> Float[Tensor, "..."]:
        """A matrix as a weight."""
        return matrix.T.contiguous() if self.transposed else matrix

    def channel_axis(self, ndim: int) -> int:
        """The last axis."""
        return ndim - 1

    def conv_groups(self, arguments: Arguments) -> int:
        """Always 1."""
        return 1

    def positions(self, x: Float[Tensor, "batch ... in"], weight: tuple[int, ...], arguments: Arguments) -> int:
        """The number of positions along all axes between the batch and the last."""
        return prod(x.shape[1:-1])

    def rows(
        self,
        x: Float[Tensor, "batch ... in"],
        weight: tuple[int, ...],
        arguments: Arguments,
        positions: Int64[Tensor, " p"],
    ) -> Float[Tensor, "n in"]:
        """The inputs at these positions."""
        return _at(x, positions)

    def output_rows(self, y: Float[Tensor, "batch ... out"], positions: Int64[Tensor, " p"]) -> Float[Tensor, "n out"]:
        """The outputs at these positions."""
        return _at(y, positions)


def _at(x: Float[Tensor, "batch ... features"], positions: Int64[Tensor, " p"]) -> Float[Tensor, "n features"]:
    if x.ndim == 2:
        return x
    flat = x.flatten(1, -2)
    return (flat if len(positions) == flat.shape[1] else flat[:, positions]).flatten(0, 1)


@dataclass(frozen=True)
class EmbeddingLayer:
    """A table of tokens. The rows are one-hot, and a token's vector is a column of the matrix.

    Attributes:
        input: The name of the operator's argument for the input.
        weight: The name of the operator's argument for the weight.
        bias: None; embeddings have no bias.
    """

    input: str = "indices"
    weight: str = "weight"
    bias: str | None = None

    def matrix(self, weight: Float[Tensor, "tokens out"]) -> Float[Tensor, "out tokens"]:
        """The table, transposed."""
        return weight.T

    def from_matrix(self, matrix: Float[Tensor, "out tokens"], like: tuple[int, ...]) -> Float[Tensor, "tokens out"]:
        """A matrix as a table."""
        return matrix.T.contiguous()

    def channel_axis(self, ndim: int) -> int:
        """The last axis."""
        return ndim - 1

    def conv_groups(self, arguments: Arguments) -> int:
        """Always 1."""
        return 1

    def positions(self, x: Int[Tensor, "batch ..."], weight: tuple[int, ...], arguments: Arguments) -> int:
        """The number of tokens in one example."""
        return prod(x.shape[1:])

    def rows(
        self,
        x: Int[Tensor, "batch ..."],
        weight: tuple[int, ...],
        arguments: Arguments,
        positions: Int64[Tensor, " p"],
    ) -> Float[Tensor, "n tokens"]:
        """The tokens at these positions, one-hot."""
        tokens = x.reshape(len(x), -1)[:, positions].flatten().long()
        return F.one_hot(tokens, weight[0]).to(torch.get_default_dtype())

    def output_rows(self, y: Float[Tensor, "batch ... out"], positions: Int64[Tensor, " p"]) -> Float[Tensor, "n out"]:
        """The tokens' vectors at these positions."""
        return y.reshape(len(y), -1, y.shape[-1])[:, positions].flatten(0, 1)


@dataclass(frozen=True)
class Convolution:
    """A convolution. A transposed one is a convolution over its input with zeros put in between.

    Attributes:
        spatial: The number of spatial axes.
        transposed: Whether the convolution is transposed.
        input: The name of the operator's argument for the input.
        weight: The name of the operator's argument for the weight.
        bias: The name of the operator's argument for the bias.
    """

    spatial: int
    transposed: bool = False
    input: str = "input"
    weight: str = "weight"
    bias: str | None = "bias"

    def matrix(self, weight: Float[Tensor, "..."]) -> Float[Tensor, "out columns"]:
        """The kernels as a matrix, input channel first, then the kernel's taps."""
        return (self._turn(weight) if self.transposed else weight).flatten(1)

    def from_matrix(self, matrix: Float[Tensor, "out columns"], like: tuple[int, ...]) -> Float[Tensor, "..."]:
        """A matrix as kernels; `like` is the shape of the traced weight."""
        weight = matrix.reshape(len(matrix), -1, *like[2:])
        return self._turn(weight) if self.transposed else weight

    def _turn(self, weight: Tensor) -> Tensor:
        """Convert between ``[in, out, kernel]`` and ``[out, in, mirrored kernel]``."""
        return weight.transpose(0, 1).flip(*range(2, weight.ndim))

    def channel_axis(self, ndim: int) -> int:
        """The axis behind the batch."""
        return 1

    def conv_groups(self, arguments: Arguments) -> int:
        """The number of groups of the convolution."""
        return int(arguments.get("groups", 1))

    def is_pointwise(self, axes: Set[int], weight: tuple[int, ...], arguments: Arguments) -> bool:
        """Whether the kernel takes places along these axes one by one and leaves them where they are.

        Args:
            axes: Axes of the input, counted from the last (−1).
            weight: The shape of the layer's weight.
            arguments: The operator's other arguments.

        Returns:
            Whether it does, along those of the axes that are spatial.
        """
        strides, padding = self._all(arguments, "stride", 1), arguments.get("padding", 0)
        paddings = [0] * self.spatial if isinstance(padding, str) else self._all(arguments, "padding", 0)
        return all((weight[axis], strides[axis], paddings[axis]) == (1, 1, 0) for axis in axes if axis >= -self.spatial)

    def _all(self, arguments: Arguments, name: str, default: int) -> list[int]:
        value = arguments.get(name, default)
        value = [value] if isinstance(value, int) else list(value)
        return value * self.spatial if len(value) == 1 else value

    def _window(self, x: Shaped[Tensor, "batch ..."], weight: tuple[int, ...], arguments: Arguments) -> _Window:
        """The input as the kernel sees it (spread if need be), with the padding, stride and dilation that are left."""
        kernel = weight[2:]
        stride, dilation = self._all(arguments, "stride", 1), self._all(arguments, "dilation", 1)
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        padding = arguments.get("padding", 0)
        if padding == "same":
            before = [r // 2 for r in reach]
            after = [r - b for r, b in zip(reach, before, strict=True)]
        else:
            before = [0] * self.spatial if padding == "valid" else self._all(arguments, "padding", 0)
            after = before
        if self.transposed:
            x = _spread(x, stride)
            before = [r - p for r, p in zip(reach, before, strict=True)]
            extra = self._all(arguments, "output_padding", 0)
            after = [b + e for b, e in zip(before, extra, strict=True)]
            stride = [1] * self.spatial
        sizes = tuple(
            (n + b + a - r - 1) // s + 1
            for n, b, a, r, s in zip(x.shape[2:], before, after, reach, stride, strict=True)
        )
        return _Window(x, before, kernel, stride, dilation, sizes)

    def positions(self, x: Shaped[Tensor, "batch ..."], weight: tuple[int, ...], arguments: Arguments) -> int:
        """The number of positions of the kernel."""
        return prod(self._window(x[:1], weight, arguments).sizes)

    def rows(
        self,
        x: Shaped[Tensor, "batch ..."],
        weight: tuple[int, ...],
        arguments: Arguments,
        positions: Int64[Tensor, " p"],
    ) -> Float[Tensor, "n inputs"]:
        """The unfolded patches at these positions."""
        return self._window(x, weight, arguments).patches(positions).flatten(0, 1).flatten(1)

    def output_rows(self, y: Float[Tensor, "batch ..."], positions: Int64[Tensor, " p"]) -> Float[Tensor, "n out"]:
        """The outputs at these positions."""
        return y.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)


FEW = 0.3
"""The taps, relative to the input's size, up to which it is faster to take them one by one than to turn the input."""


@dataclass(frozen=True, eq=False)
class _Window:
    """An input, and how a kernel moves over it.

    Attributes:
        x: The input.
        before: The zeros in front of it along every spatial axis. Those behind it are as many as positions need.
        kernel: The size of the kernel along every spatial axis.
        stride: The stride along every spatial axis.
        dilation: The dilation along every spatial axis.
        sizes: The number of positions along every spatial axis.
    """

    x: Float[Tensor, "batch channels ..."]
    before: list[int]
    kernel: tuple[int, ...]
    stride: list[int]
    dilation: list[int]
    sizes: tuple[int, ...]

    def index(self, positions: Int64[Tensor, " p"]) -> tuple[Int64[Tensor, "p taps"], Bool[Tensor, "p taps"]]:
        """Where in the flattened input every tap of the kernel lies at these positions, and whether it lies inside."""
        place, inside = (
            torch.zeros(len(positions), 1, dtype=torch.int64),
            torch.ones(len(positions), 1, dtype=torch.bool),
        )
        corners = torch.unravel_index(positions, self.sizes)
        for corner, size, b, s, d, k in zip(
            corners, self.x.shape[2:], self.before, self.stride, self.dilation, self.kernel, strict=True
        ):
            tap = corner[:, None] * s - b + torch.arange(k) * d
            place = (place[:, :, None] * size + tap.clamp(0, size - 1)[:, None]).flatten(1)
            inside = (inside[:, :, None] & ((tap >= 0) & (tap < size))[:, None]).flatten(1)
        return place, inside

    def patches(self, positions: Int64[Tensor, " p"]) -> Float[Tensor, "batch p channels taps"]:
        """What the kernel sees at these positions."""
        place, inside = self.index(positions)
        x = self.x.flatten(2)
        if not bool(inside.all()):  # taps outside read a zero behind the input
            place = place.where(inside, x.shape[2])
            x = F.pad(x, (0, 1))
        if place.numel() <= FEW * x.shape[2]:
            return x[:, :, place].transpose(1, 2)
        # whole channels are copied at once
        whole = x.transpose(1, 2).index_select(1, place.flatten())
        return whole.unflatten(1, tuple(place.shape)).transpose(2, 3)


def _spread(x: Tensor, stride: list[int]) -> Tensor:
    """The input with ``stride − 1`` zeros between neighbours."""
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    spread = x.new_zeros(*x.shape[:2], *sizes)
    between: Any = (..., *(slice(None, None, s) for s in stride))
    spread[between] = x
    return spread


LAYERS: dict[str, Layer] = {
    "linear": LinearLayer(),
    "addmm": LinearLayer(input="mat1", weight="mat2", bias="self", transposed=True),
    "conv1d": Convolution(1),
    "conv1d.padding": Convolution(1),
    "conv2d": Convolution(2),
    "conv2d.padding": Convolution(2),
    "conv3d": Convolution(3),
    "conv3d.padding": Convolution(3),
    "conv_transpose1d": Convolution(1, transposed=True),
    "conv_transpose2d.input": Convolution(2, transposed=True),
    "conv_transpose3d.input": Convolution(3, transposed=True),
    "embedding": EmbeddingLayer(),
}
"""Layers with weights, by their ATen operator."""


def with_ones(rows: Float[Tensor, "n columns"], conv_groups: int, bias: bool) -> Float[Tensor, "n columns_and_ones"]:
    """Append the 1 that meets a bias to every row.

    Args:
        rows: The rows of a layer; those of several conv_groups lie side by side.
        conv_groups: How many layers lie side by side.
        bias: Whether the layer has a bias.

    Returns:
        The rows with a trailing 1 for each conv_group, or as they are without a bias.
    """
    if not bias:
        return rows
    if conv_groups == 1:
        return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    split = rows.unflatten(1, (conv_groups, -1))
    return torch.cat([split, split.new_ones(len(rows), conv_groups, 1)], dim=2).flatten(1)


def from_rows(
    rows: Float[Tensor, "n columns"], matrix: Float[Tensor, "out in"], conv_groups: int
) -> Float[Tensor, "n out"]:
    """Compute a layer's outputs from the rows of its input.

    Args:
        rows: The rows; those of several conv_groups lie side by side.
        matrix: The layer's matrix.
        conv_groups: How many layers lie side by side.

    Returns:
        The output of every row.
    """
    if conv_groups == 1:
        return rows @ matrix.T
    split = rows.unflatten(1, (conv_groups, -1)).transpose(0, 1)
    return torch.bmm(split, matrix.unflatten(0, (conv_groups, -1)).mT).transpose(0, 1).flatten(1)
