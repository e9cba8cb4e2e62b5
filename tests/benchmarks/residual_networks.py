"""Small networks with batch normalisation for images ``[batch, 1, 28, 28]``: a residual one and a plain one."""

from __future__ import annotations

from torch import Tensor, nn

WIDTHS = (16, 32, 64)


class BasicBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut, which is a strided 1×1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + self.shortcut(x))


def residual_network(classes: int) -> nn.Module:
    """A strided stem, three stages of two basic blocks (16, 32 and 64 channels), global average pooling."""
    blocks: list[nn.Module] = []
    inputs = WIDTHS[0]
    for stage, width in enumerate(WIDTHS):
        blocks += [BasicBlock(inputs, width, stride=2 if stage else 1), BasicBlock(width, width, stride=1)]
        inputs = width
    return nn.Sequential(
        nn.Conv2d(1, WIDTHS[0], 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(WIDTHS[0]),
        nn.ReLU(),
        *blocks,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(WIDTHS[-1], classes),
    )


def plain_network(classes: int) -> nn.Module:
    """Three times strided convolution, normalisation, ReLU (16, 32 and 64 channels), then global average pooling."""
    parts: list[nn.Module] = []
    inputs = 1
    for width in WIDTHS:
        parts += [nn.Conv2d(inputs, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(WIDTHS[-1], classes))
