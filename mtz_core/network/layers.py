"""Layers as matrices: what each type of layer with weights computes, and how it is read and written.

Every layer is seen as ``y = W x`` on *rows*: a linear layer's rows are its inputs at every position, a convolution's
are its unfolded patches (channel first, then the kernel), an embedding's are one-hot tokens. The bias, where there is
one, is the last column of ``W`` and meets a trailing 1 in every row. So later mathematics has no cases: a *neuron* owns
rows of ``W``, and the neurons that it reads own columns.

A grouped convolution is several such layers side by side, of equal size: `conv_groups` of them, their matrices stacked,
the rows of their inputs side by side. A depthwise convolution has as many groups as channels.

To teach zipping a new type of layer, add one entry to `LAYERS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

Arguments = Mapping[str, Any]
"""What an operator is given beside tensors."""


class Layer(Protocol):
    """One type of layer."""

    @property
    def input(self) -> str:
        """The name of the operator's argument for its input."""
        ...

    @property
    def weight(self) -> str:
        """The name of the one for its weight."""
        ...

    @property
    def bias(self) -> str | None:
        """The name of the one for its bias; None if it has none."""
        ...

    def matrix(self, weight: Tensor) -> Float[Tensor, "out columns"]:
        """The weight as a matrix."""
        ...

    def from_matrix(self, matrix: Float[Tensor, "out columns"], like: tuple[int, ...]) -> Tensor:
        """A matrix of any number of neurons as a weight; `like` is the shape of the traced weight."""
        ...

    def channel_axis(self, ndim: int) -> int:
        """Where the neurons lie in an input or output of that many axes."""
        ...

    def conv_groups(self, arguments: Arguments) -> int:
        """How many layers stand side by side."""
        ...

    def positions(self, x: Tensor, weight: tuple[int, ...], arguments: Arguments) -> int:
        """How many rows one example contributes."""
        ...

    def rows(
        self, x: Tensor, weight: tuple[int, ...], arguments: Arguments, positions: Int64[Tensor, " p"]
    ) -> Float[Tensor, "n groups*inputs"]:
        """The rows of some positions of every example; `weight` is the weight's shape."""
        ...

    def output_rows(self, y: Tensor, positions: Int64[Tensor, " p"]) -> Float[Tensor, "n out"]:
        """The outputs at the same positions."""
        ...


@dataclass(frozen=True)
class LinearLayer:
    """``y = x Wᵀ + b`` on the last axis; `transposed` for operators that hold ``Wᵀ``."""

    input: str = "input"
    weight: str = "weight"
    bias: str | None = "bias"
    transposed: bool = False

    def matrix(self, weight: Tensor) -> Float[Tensor, "out columns"]:
        return weight.T if self.transposed else weight

    def from_matrix(self, matrix: Float[Tensor, "out columns"], like: tuple[int, ...]) -> Tensor:
        return matrix.T.contiguous() if self.transposed else matrix

    def channel_axis(self, ndim: int) -> int:
        return ndim - 1

    def conv_groups(self, arguments: Arguments) -> int:
        return 1

    def positions(self, x: Float[Tensor, "batch ... in"], weight: tuple[int, ...], arguments: Arguments) -> int:
        return prod(x.shape[1:-1])

    def rows(
        self, x: Float[Tensor, "batch ... in"], weight: tuple[int, ...], arguments: Arguments, positions: Tensor
    ) -> Float[Tensor, "n in"]:
        return _at(x, positions)

    def output_rows(self, y: Float[Tensor, "batch ... out"], positions: Tensor) -> Float[Tensor, "n out"]:
        return _at(y, positions)


def _at(x: Float[Tensor, "batch ... features"], positions: Int64[Tensor, " p"]) -> Float[Tensor, "n features"]:
    if x.ndim == 2:
        return x
    flat = x.flatten(1, -2)
    return (flat if len(positions) == flat.shape[1] else flat[:, positions]).flatten(0, 1)


@dataclass(frozen=True)
class EmbeddingLayer:
    """A table of tokens: the rows are one-hot, a token's vector is a column of the matrix."""

    input: str = "indices"
    weight: str = "weight"
    bias: str | None = None

    def matrix(self, weight: Float[Tensor, "tokens out"]) -> Float[Tensor, "out tokens"]:
        return weight.T

    def from_matrix(self, matrix: Float[Tensor, "out tokens"], like: tuple[int, ...]) -> Float[Tensor, "tokens out"]:
        return matrix.T.contiguous()

    def channel_axis(self, ndim: int) -> int:
        return ndim - 1

    def conv_groups(self, arguments: Arguments) -> int:
        return 1

    def positions(self, x: Int64[Tensor, "batch ..."], weight: tuple[int, ...], arguments: Arguments) -> int:
        return prod(x.shape[1:])

    def rows(
        self, x: Int64[Tensor, "batch ..."], weight: tuple[int, ...], arguments: Arguments, positions: Tensor
    ) -> Float[Tensor, "n tokens"]:
        return F.one_hot(x.reshape(len(x), -1)[:, positions].flatten(), weight[0]).to(torch.get_default_dtype())

    def output_rows(self, y: Float[Tensor, "batch ... out"], positions: Tensor) -> Float[Tensor, "n out"]:
        return y.reshape(len(y), -1, y.shape[-1])[:, positions].flatten(0, 1)


@dataclass(frozen=True)
class Convolution:
    """A convolution over `spatial` axes; a transposed one is a convolution over its input with zeros put in between."""

    spatial: int
    transposed: bool = False
    input: str = "input"
    weight: str = "weight"
    bias: str | None = "bias"

    def matrix(self, weight: Tensor) -> Float[Tensor, "out columns"]:
        return (self._turn(weight) if self.transposed else weight).flatten(1)

    def from_matrix(self, matrix: Float[Tensor, "out columns"], like: tuple[int, ...]) -> Tensor:
        weight = matrix.reshape(len(matrix), -1, *like[2:])
        return self._turn(weight) if self.transposed else weight

    def _turn(self, weight: Tensor) -> Tensor:
        """Between ``[in, out, kernel]`` and ``[out, in, mirrored kernel]``."""
        return weight.transpose(0, 1).flip(*range(2, weight.ndim))

    def channel_axis(self, ndim: int) -> int:
        return 1

    def conv_groups(self, arguments: Arguments) -> int:
        return int(arguments.get("groups", 1))

    def _all(self, arguments: Arguments, name: str, default: int) -> list[int]:
        value = arguments.get(name, default)
        value = [value] if isinstance(value, int) else list(value)
        return value * self.spatial if len(value) == 1 else value

    def _window(self, x: Tensor, weight: tuple[int, ...], arguments: Arguments) -> _Window:
        """The input as the kernel sees it: padded (and spread), with what is left of stride and dilation."""
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
        if any(before) or any(after):
            ends = zip(reversed(before), reversed(after), strict=True)
            x = F.pad(x, [end for pair in ends for end in pair])
        sizes = tuple((n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True))
        return _Window(x, kernel, stride, dilation, sizes)

    def positions(self, x: Tensor, weight: tuple[int, ...], arguments: Arguments) -> int:
        return prod(self._window(x[:1], weight, arguments).sizes)

    def rows(
        self, x: Tensor, weight: tuple[int, ...], arguments: Arguments, positions: Int64[Tensor, " p"]
    ) -> Float[Tensor, "n inputs"]:
        window = self._window(x, weight, arguments)
        index = window.index(positions)
        channels_last = window.x.movedim(1, -1).flatten(
            1, -2
        )  # whole channels are copied at once: several times faster
        taken = channels_last.index_select(1, index.flatten()).unflatten(1, tuple(index.shape))
        return taken.transpose(2, 3).flatten(0, 1).flatten(1)

    def output_rows(self, y: Tensor, positions: Int64[Tensor, " p"]) -> Float[Tensor, "n out"]:
        return y.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, eq=False)
class _Window:
    """A padded input, and how a kernel moves over it to as many positions as `sizes` says."""

    x: Float[Tensor, "batch channels ..."]
    kernel: tuple[int, ...]
    stride: list[int]
    dilation: list[int]
    sizes: tuple[int, ...]

    def index(self, positions: Int64[Tensor, " p"]) -> Int64[Tensor, "p taps"]:
        """Where in the flattened input every tap of the kernel lies at these positions."""
        place, tap = torch.zeros_like(positions), torch.zeros(1, dtype=torch.int64)
        corners = torch.unravel_index(positions, self.sizes)
        for corner, size, s, d, k in zip(
            corners, self.x.shape[2:], self.stride, self.dilation, self.kernel, strict=True
        ):
            place = place * size + corner * s
            tap = (tap[:, None] * size + torch.arange(k) * d).flatten()
        return place[:, None] + tap


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


def with_ones(
    rows: Float[Tensor, "n groups*inputs"], conv_groups: int, bias: bool
) -> Float[Tensor, "n groups*columns"]:
    """Rows with the trailing 1 that a bias meets, in every group."""
    if not bias:
        return rows
    if conv_groups == 1:
        return torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
    split = rows.unflatten(1, (conv_groups, -1))
    return torch.cat([split, split.new_ones(len(rows), conv_groups, 1)], dim=2).flatten(1)
