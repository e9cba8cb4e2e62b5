"""Layers as matrices, and the operations between them: what each type computes.

Every layer with weights is seen as ``y = W x`` on *rows*: a linear layer's rows are its inputs, a convolution's
rows are its unfolded patches (``C_in · k_h · k_w`` values, channel first). The bias, where there is one, is the
last column of ``W`` and meets a trailing 1 in every row. So later mathematics has no cases: a *neuron* is a row of
``W``, and the neurons of the layer before own equally wide, contiguous blocks of its columns.

To teach zipping a new operation without weights, add one entry to `OPERATIONS`; a new weighted layer, one to `LAYERS`
and, if it has settings, how `mtz_core.graph` reads them from an exported program.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

Settings = Mapping[str, Any]
"""What configures a layer or an operation beside its weights; JSON values only."""


class Layer(Protocol):
    """One type of layer with weights."""

    settings: frozenset[str]
    """What configures a layer of this type."""

    def run(self, settings: Settings, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output for `weight` in the shape torch gives it."""
        ...

    def weight_shape(self, settings: Settings, inputs: int) -> tuple[int, ...]:
        """The shape torch gives to the weights of one neuron with this many `inputs` columns."""
        ...

    def positions(self, settings: Settings, x: Tensor) -> int:
        """How many rows one example contributes."""
        ...

    def rows(self, settings: Settings, x: Tensor, positions: Tensor) -> Tensor:
        """The rows of some positions of every example."""
        ...

    def output_rows(self, y: Tensor, positions: Tensor) -> Tensor:
        """The outputs at the same positions, as rows."""
        ...

    def module(self, settings: Settings, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """The plain torch module that does the same."""
        ...


class LinearLayer:
    """``torch.nn.Linear`` on inputs of shape ``[batch, features]``."""

    settings: frozenset[str] = frozenset()

    def run(
        self, settings: Settings, x: Float[Tensor, "batch in"], weight: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "batch out"]:
        return F.linear(x, weight, bias)

    def weight_shape(self, settings: Settings, inputs: int) -> tuple[int, ...]:
        return (inputs,)

    def positions(self, settings: Settings, x: Float[Tensor, "batch in"]) -> int:
        return 1

    def rows(
        self, settings: Settings, x: Float[Tensor, "batch in"], positions: Int64[Tensor, " p"]
    ) -> Float[Tensor, "batch in"]:
        return x

    def output_rows(self, y: Float[Tensor, "batch out"], positions: Int64[Tensor, " p"]) -> Float[Tensor, "batch out"]:
        return y

    def module(self, settings: Settings, weight: Tensor, bias: Tensor | None) -> nn.Module:
        layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        return _with_weights(layer, weight, bias)


class Conv2dLayer:
    """``torch.nn.Conv2d`` with stride, padding and dilation on ``[batch, channels, height, width]``."""

    settings: frozenset[str] = frozenset({"kernel_size", "stride", "padding", "dilation"})

    def run(
        self, settings: Settings, x: Float[Tensor, "batch c h w"], weight: Tensor, bias: Tensor | None
    ) -> Float[Tensor, "batch out h2 w2"]:
        return F.conv2d(x, weight, bias, settings["stride"], settings["padding"], settings["dilation"])

    def weight_shape(self, settings: Settings, inputs: int) -> tuple[int, ...]:
        height, width = settings["kernel_size"]
        return (inputs // (height * width), height, width)

    def _patches(self, settings: Settings, x: Tensor) -> Float[Tensor, "batch h2 w2 c kh kw"]:
        """All patches as a view on the padded input; nothing is copied but the padding."""
        (kh, kw), (sh, sw) = settings["kernel_size"], settings["stride"]
        (ph, pw), (dh, dw) = settings["padding"], settings["dilation"]
        if ph or pw:
            x = F.pad(x, (pw, pw, ph, ph))
        batch, channels, height, width = x.shape
        out_h, out_w = (height - dh * (kh - 1) - 1) // sh + 1, (width - dw * (kw - 1) - 1) // sw + 1
        b, c, h, w = x.stride()
        return x.as_strided((batch, out_h, out_w, channels, kh, kw), (b, h * sh, w * sw, c, h * dh, w * dw))

    def positions(self, settings: Settings, x: Float[Tensor, "batch c h w"]) -> int:
        _, out_h, out_w, *_ = self._patches(settings, x[:1]).shape
        return out_h * out_w

    def rows(
        self, settings: Settings, x: Float[Tensor, "batch c h w"], positions: Int64[Tensor, " p"]
    ) -> Float[Tensor, "batch*p in"]:
        patches = self._patches(settings, x)
        width = patches.shape[2]
        return patches[:, positions // width, positions % width].flatten(0, 1).flatten(1)

    def output_rows(
        self, y: Float[Tensor, "batch out h2 w2"], positions: Int64[Tensor, " p"]
    ) -> Float[Tensor, "batch*p out"]:
        return y.flatten(2)[:, :, positions].transpose(1, 2).flatten(0, 1)

    def module(self, settings: Settings, weight: Tensor, bias: Tensor | None) -> nn.Module:
        layer = nn.Conv2d(
            weight.shape[1],
            weight.shape[0],
            tuple(settings["kernel_size"]),
            stride=tuple(settings["stride"]),
            padding=tuple(settings["padding"]),
            dilation=tuple(settings["dilation"]),
            bias=bias is not None,
            device="meta",
        )
        return _with_weights(layer, weight, bias)


def _with_weights(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias)
    return layer


LAYERS: Mapping[str, Layer] = {"linear": LinearLayer(), "conv2d": Conv2dLayer()}
"""Layers with weights, by the name of their ATen operator."""


@dataclass(frozen=True)
class Operation:
    """An operation without weights, and what it does to neurons.

    `neurons`: `kept` acts on each channel alone; `flattened` lays the values of each channel side by side;
    `mixed` lets channels see each other, which is allowed only behind the last layer. Inputs below `floor` all give
    the same output. `spatial` operations take ``[batch, channels, height, width]``.
    """

    neurons: Literal["kept", "flattened", "mixed"] = "kept"
    floor: float = -math.inf
    spatial: bool = False

    @property
    def clips(self) -> bool:
        """Whether different inputs can give the same output."""
        return self.floor > -math.inf

    def nearest_target(self, y: Tensor, y_hat: Tensor) -> Tensor:
        """Of all values from which the operation makes the same as of `y`, the one nearest to `y_hat`."""
        return torch.where(y > self.floor, y, y_hat.clamp(max=self.floor))

    def run(self, kind: str, settings: Settings, x: Tensor, training: bool) -> Tensor:
        if kind == "flatten":
            return x.flatten(1)
        if kind in DROPOUT:
            settings = {**settings, "train": training}
        output: Tensor = getattr(torch.ops.aten, kind)(x, **settings)
        return output


OPERATIONS: Mapping[str, Operation] = {
    **dict.fromkeys(
        (
            *("leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "sigmoid", "tanh", "softplus"),
            *("hardtanh", "hardswish", "hardsigmoid", "hardshrink", "softshrink", "log_sigmoid", "relu6"),
            *("dropout", "feature_dropout", "alpha_dropout"),
        ),
        Operation("kept"),
    ),
    "relu": Operation("kept", floor=0.0),
    **dict.fromkeys(("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"), Operation("kept", spatial=True)),
    "flatten": Operation("flattened"),
    "softmax": Operation("mixed"),
    "log_softmax": Operation("mixed"),
}
"""Operations without weights, by the name of their ATen operator."""

DROPOUT: Mapping[str, type[nn.Module]] = {
    "dropout": nn.Dropout,
    "feature_dropout": nn.Dropout2d,
    "alpha_dropout": nn.AlphaDropout,
}
"""Operations that act in training mode only, and their modules."""


def to_matrix(weight: Float[Tensor, "out ..."], bias: Float[Tensor, " out"] | None) -> Float[Tensor, "out columns"]:
    """A layer's weights as one matrix, the bias (if any) as its last column."""
    matrix = weight.flatten(1)
    return matrix if bias is None else torch.cat([matrix, bias[:, None]], dim=1)


def from_matrix(
    matrix: Float[Tensor, "out columns"], bias: bool
) -> tuple[Float[Tensor, "out inputs"], Float[Tensor, " out"] | None]:
    """Weights and bias of a matrix; the inverse of `to_matrix` but for the weights' shape."""
    return (matrix[:, :-1].contiguous(), matrix[:, -1].contiguous()) if bias else (matrix, None)


def with_ones(rows: Float[Tensor, "n inputs"], bias: bool) -> Float[Tensor, "n columns"]:
    """Rows with the trailing 1 that a bias meets."""
    return torch.cat([rows, rows.new_ones(rows.shape[0], 1)], dim=1) if bias else rows
