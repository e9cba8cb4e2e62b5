"""The real networks as torch modules, without weights, and a metric of their own.

They compute what their packages compute. Face networks: `face-api`'s FaceExpressionNet and FaceLandmark68Net, whose
feature extractors are of one topology. Content types: `magika`'s models of the third generation.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from torch.nn import functional

FACE_SIZE = 112
"""Height and width of a face, in pixels."""

BYTES = 1024
"""How many bytes of a file's beginning, and how many of its end, the content type is told by."""

PADDING = 256
"""The token that stands for no byte."""

_BYTES_TOGETHER = 4
_POSITIONS = 2 * BYTES // _BYTES_TOGETHER


class SeparableConvolution(nn.Module):
    """A depthwise and a pointwise convolution; of stride 2, it pads on the right and at the bottom, as TensorFlow."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(inputs, inputs, 3, stride, 1 if stride == 1 else 0, groups=inputs, bias=False)
        self.pointwise = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs _ _"]:
        """Return the outputs of the pointwise convolution."""
        padded = x if self.depthwise.padding != (0, 0) else functional.pad(x, (0, 1, 0, 1))
        outputs: Tensor = self.pointwise(self.depthwise(padded))
        return outputs


class DenseBlock(nn.Module):
    """Four convolutions; each from the second on adds to the sum of those before it."""

    def __init__(self, inputs: int, outputs: int, first: bool) -> None:
        super().__init__()
        self.first = first
        self.conv0 = nn.Conv2d(inputs, outputs, 3, stride=2) if first else SeparableConvolution(inputs, outputs, 2)
        self.conv1 = SeparableConvolution(outputs, outputs, 1)
        self.conv2 = SeparableConvolution(outputs, outputs, 1)
        self.conv3 = SeparableConvolution(outputs, outputs, 1)

    def forward(self, x: Float[Tensor, "n inputs h w"]) -> Float[Tensor, "n outputs _ _"]:
        """Return the rectified sum of all four."""
        first = functional.relu(self.conv0(functional.pad(x, (0, 1, 0, 1)) if self.first else x))
        total = first + self.conv1(first)
        total = total + self.conv2(functional.relu(total))
        total = total + self.conv3(functional.relu(total))
        return functional.relu(total)


class FaceNetwork(nn.Module):
    """Four dense blocks and one linear layer on colours less their mean."""

    mean: Tensor

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(3, 1, 1))
        self.dense0 = DenseBlock(3, 32, first=True)
        self.dense1 = DenseBlock(32, 64, first=False)
        self.dense2 = DenseBlock(64, 128, first=False)
        self.dense3 = DenseBlock(128, 256, first=False)
        self.fc = nn.Linear(256, outputs)

    def forward(self, x: Float[Tensor, "n 3 112 112"]) -> Float[Tensor, "n outputs"]:
        """Return the outputs for colours from 0 to 1."""
        features = self.dense3(self.dense2(self.dense1(self.dense0(x - self.mean))))
        outputs: Tensor = self.fc(functional.avg_pool2d(features, 7).flatten(1))
        return outputs


def face(outputs: int) -> nn.Module:
    """Return a network on faces: 7 outputs for expressions, 136 for 68 landmarks (x and y, from 0 to 1)."""
    return FaceNetwork(outputs)


class ContentType(nn.Module):
    """A byte embedding, a convolution over groups of four bytes, the maximum over them, and a linear layer."""

    def __init__(self, types: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(PADDING + 1, 64)
        self.position_norm = nn.LayerNorm(_POSITIONS, eps=1e-6)
        self.convolution = nn.Conv1d(64 * _BYTES_TOGETHER, 512, kernel_size=5)
        self.norm = nn.LayerNorm(512, eps=1e-6)
        self.types = nn.Linear(512, types)

    def forward(self, tokens: Shaped[Tensor, "n tokens"]) -> Float[Tensor, "n types"]:
        """Return the logits for bytes as numbers from 0 to 255, and 256 for none."""
        embedded = functional.gelu(self.embedding(tokens.long()), approximate="tanh")
        positions = embedded.reshape(-1, _POSITIONS, 64 * _BYTES_TOGETHER).transpose(1, 2)
        features = functional.gelu(self.convolution(self.position_norm(positions)), approximate="tanh")
        logits: Tensor = self.types(self.norm(features.amax(dim=2)))
        return logits


def content_type(types: int = 214) -> nn.Module:
    """Return a network that tells the type of a file by the bytes at its beginning and end."""
    return ContentType(types)


def landmark_error(outputs: Float[Tensor, "n 136"], truth: Float[Tensor, "n 136"]) -> float:
    """The mean distance of landmarks from the true ones, in pixels of a face that is 112 pixels wide."""
    return FACE_SIZE * float((outputs - truth).reshape(-1, 2).norm(dim=1).mean())
