"""A small network in the manner of VGG for images ``[batch, 1, 28, 28]``: 3×3 convolutions and two linear layers."""

from __future__ import annotations

from torch import nn

WIDTHS = ((16, 16), (32, 32), (64,))


def vgg_like(classes: int = 10) -> nn.Module:
    """Three stages of 3×3 convolutions (16-16, 32-32, 64), each pooled, then 128 hidden neurons; no normalisation."""
    parts: list[nn.Module] = []
    inputs = 1
    for stage in WIDTHS:
        for width in stage:
            parts += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
        parts.append(nn.MaxPool2d(2))
    return nn.Sequential(
        *parts, nn.Flatten(), *(nn.Linear(3 * 3 * WIDTHS[-1][-1], 128), nn.ReLU()), nn.Linear(128, classes)
    )
