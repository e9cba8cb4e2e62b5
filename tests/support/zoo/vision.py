"""Small convolutional networks with the true structure of their families, on images and signals.

Every factory takes a width multiplier and the number of classes: two networks of one factory have the same topology.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(width: int, classes: int) -> nn.Module:
    """[batch, 1, 12, 12] → [batch, classes]."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(144, 12 * width),
        nn.ReLU(),
        nn.Linear(12 * width, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, classes),
    )


def lenet5(width: int, classes: int) -> nn.Module:
    """[batch, 1, 20, 20] → [batch, classes]; the flatten joins 2 × 2 positions of each channel."""
    return nn.Sequential(
        nn.Conv2d(1, 4 * width, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(4 * width, 6 * width, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(24 * width, 12 * width),
        nn.ReLU(),
        nn.Linear(12 * width, 8 * width),
        nn.ReLU(),
        nn.Linear(8 * width, classes),
    )


def vgg16(width: int, classes: int, normalised: bool = False) -> nn.Module:
    """Simonyan and Zisserman: 13 convolutions and 3 linear layers; [batch, 3, 32, 32] → [batch, classes]."""
    parts: list[nn.Module] = []
    channels = 3
    for repeats, size in ((2, 4), (2, 6), (3, 8), (3, 8), (3, 8)):
        for _ in range(repeats):
            parts.append(nn.Conv2d(channels, size * width, 3, padding=1))
            parts += [nn.BatchNorm2d(size * width)] if normalised else []
            parts.append(nn.ReLU(inplace=True))
            channels = size * width
        parts.append(nn.MaxPool2d(2))
    hidden = 10 * width
    head = (
        *(nn.Flatten(), nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Dropout()),
        *(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(hidden, classes)),
    )
    return nn.Sequential(*parts, *head)


def convolution(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1, activation: nn.Module | None = None
) -> nn.Sequential:
    """Convolution without bias that keeps the size, BatchNorm, activation."""
    parts: list[nn.Module] = [
        nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
    ]
    return nn.Sequential(*parts, *([activation] if activation else []))


def head(channels: int, classes: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


class Residual(nn.Module):
    """ReLU of a branch plus the shortcut, which is a strided 1 × 1 convolution where the shapes differ."""

    def __init__(self, branch: nn.Module, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.branch = branch
        self.downsample = convolution(inputs, outputs, 1, stride) if stride > 1 or inputs != outputs else None
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.branch(x)
        out += shortcut
        result: Tensor = self.relu(out)
        return result


def resnet18(width: int, classes: int) -> nn.Module:
    """He et al.: stem, four stages of two basic blocks; [batch, 3, 32, 32] → [batch, classes]."""
    channels = 4 * width
    stem = convolution(3, channels, 7, stride=2, activation=nn.ReLU(inplace=True))
    blocks: list[nn.Module] = [stem, nn.MaxPool2d(3, stride=2, padding=1)]
    for size, first_stride in ((4, 1), (6, 2), (8, 2), (10, 2)):
        for stride in (first_stride, 1):
            outputs = size * width
            branch = nn.Sequential(
                convolution(channels, outputs, 3, stride, activation=nn.ReLU(inplace=True)),
                convolution(outputs, outputs, 3),
            )
            blocks.append(Residual(branch, channels, outputs, stride))
            channels = outputs
    return nn.Sequential(*blocks, head(channels, classes))


def resnext(width: int, classes: int, cardinality: int = 2) -> nn.Module:
    """Xie et al.: bottlenecks around a grouped convolution; [batch, 3, 16, 16] → [batch, classes]."""
    channels = 6 * width
    blocks: list[nn.Module] = [convolution(3, channels, 3, activation=nn.ReLU())]
    for size, stride in ((6, 1), (8, 2), (8, 1)):
        inner, outputs = 4 * width, size * width
        branch = nn.Sequential(
            convolution(channels, inner, 1, activation=nn.ReLU()),
            convolution(inner, inner, 3, stride, groups=cardinality, activation=nn.ReLU()),
            convolution(inner, outputs, 1),
        )
        blocks.append(Residual(branch, channels, outputs, stride))
        channels = outputs
    return nn.Sequential(*blocks, head(channels, classes))


class DecathlonBlock(nn.Module):
    """Two convolutions; where the size halves, the shortcut is pooled and its missing channels are zeros."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.halves = inputs != outputs
        self.conv1 = convolution(inputs, outputs, 3, stride=2 if self.halves else 1)
        self.conv2 = nn.Sequential(nn.ReLU(inplace=True), convolution(outputs, outputs, 3))
        self.pool = nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        if self.halves:
            shortcut = self.pool(x)
            shortcut = torch.cat((shortcut, shortcut * 0), dim=1)
        out: Tensor = self.conv2(self.conv1(x))
        out += shortcut
        return F.relu(out)


def resnet28(width: int, classes: int) -> nn.Module:
    """Rebuffi et al., Visual Decathlon: three macro blocks of four; [batch, 3, 16, 16] → [batch, classes]."""
    channels = 2 * width
    blocks: list[nn.Module] = [convolution(3, channels, 3)]
    for _ in range(3):
        blocks.append(DecathlonBlock(channels, 2 * channels))
        channels *= 2
        blocks += [DecathlonBlock(channels, channels) for _ in range(3)]
    return nn.Sequential(*blocks, nn.BatchNorm2d(channels), nn.ReLU(inplace=True), head(channels, classes))


class InvertedResidual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = inputs * expansion
        expand = [convolution(inputs, inner, 1, activation=nn.ReLU6(inplace=True))] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            convolution(inner, inner, 3, stride, groups=inner, activation=nn.ReLU6(inplace=True)),
            convolution(inner, outputs, 1),
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(x)
        return x + out if self.residual else out


def mobilenetv2(width: int, classes: int) -> nn.Module:
    """Sandler et al.: inverted residuals with depthwise convolutions; [batch, 3, 16, 16] → [batch, classes]."""
    channels, last = 4 * width, 16 * width
    blocks: list[nn.Module] = [convolution(3, channels, 3, stride=2, activation=nn.ReLU6(inplace=True))]
    for expansion, size, stride in ((1, 4, 1), (3, 6, 2), (3, 6, 1), (3, 8, 1), (3, 8, 1)):
        blocks.append(InvertedResidual(channels, size * width, stride, expansion))
        channels = size * width
    blocks.append(convolution(channels, last, 1, activation=nn.ReLU6(inplace=True)))
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(last, classes))


class SqueezeExcite(nn.Module):
    """Each channel times a gate computed from all channels' means."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.gate = nn.Sequential(nn.Linear(channels, inner), nn.ReLU(), nn.Linear(inner, channels), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        batch, channels = x.shape[:2]
        means = F.adaptive_avg_pool2d(x, 1).view(batch, channels)
        gates: Tensor = self.gate(means).view(batch, channels, 1, 1)
        return x * gates.expand_as(x)


class EfficientChannelAttention(nn.Module):
    """Each channel times a gate computed from its neighbours' means: a kernel slides over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gates: Tensor = self.gate(x.mean((2, 3)).unsqueeze(1)).sigmoid()
        return x * gates.view(x.shape[0], -1, 1, 1)


def squeeze_excite(width: int, classes: int) -> nn.Module:
    """Hu et al.: residual blocks with channel attention; [batch, 3, 16, 16] → [batch, classes]."""
    return gated(width, classes, lambda channels: SqueezeExcite(channels, 4 * width))


def efficient_channel_attention(width: int, classes: int) -> nn.Module:
    """Wang et al.: the same with kernels over channels; [batch, 3, 16, 16] → [batch, classes]."""
    return gated(width, classes, lambda _: EfficientChannelAttention())


def gated(width: int, classes: int, gate: Callable[[int], nn.Module]) -> nn.Module:
    channels = 6 * width
    blocks: list[nn.Module] = [convolution(3, channels, 3, stride=2, activation=nn.ReLU())]
    for size, stride in ((6, 1), (8, 2)):
        outputs = size * width
        branch = nn.Sequential(
            convolution(channels, outputs, 3, stride, activation=nn.ReLU()),
            convolution(outputs, outputs, 3),
            gate(outputs),
        )
        blocks.append(Residual(branch, channels, outputs, stride))
        channels = outputs
    return nn.Sequential(*blocks, head(channels, classes))


class DenseLayer(nn.Module):
    """Appends `growth` channels, computed through a bottleneck."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, 2 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(inner)))], dim=1)


def densenet(width: int, classes: int) -> nn.Module:
    """Huang et al.: two dense blocks and the transition between them; [batch, 3, 16, 16] → [batch, classes]."""
    channels, growth = 6 * width, 4 * width
    parts: list[nn.Module] = [
        nn.Conv2d(3, channels, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
    ]
    for block in range(2):
        if block:
            parts += [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, channels // 2, 1, bias=False)]
            parts.append(nn.AvgPool2d(2))
            channels //= 2
        for _ in range(3):
            parts.append(DenseLayer(channels, growth))
            channels += growth
    return nn.Sequential(*parts, nn.BatchNorm2d(channels), nn.ReLU(), head(channels, classes))


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [batch, channels, height, width]."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXtBlock(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.expand = nn.Linear(channels, 4 * channels)
        self.reduce = nn.Linear(4 * channels, channels)
        self.layer_scale = nn.Parameter(torch.full((channels,), 1e-6))

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        inner = self.layer_scale * self.reduce(F.gelu(self.expand(inner)))
        out: Tensor = x + inner.permute(0, 3, 1, 2)
        return out


class ConvNeXt(nn.Module):
    """Liu et al.: two stages of two blocks; [batch, 3, 16, 16] → [batch, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        first, second = 4 * width, 6 * width
        self.stages = nn.Sequential(
            *(nn.Conv2d(3, first, 4, stride=4), ChannelNorm(first), ConvNeXtBlock(first), ConvNeXtBlock(first)),
            *(ChannelNorm(first), nn.Conv2d(first, second, 2, stride=2), ConvNeXtBlock(second), ConvNeXtBlock(second)),
        )
        self.norm = nn.LayerNorm(second, eps=1e-6)
        self.head = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.norm(self.stages(x).mean([-2, -1])))
        return out


class UNet(nn.Module):
    """Ronneberger et al.: down twice, up twice beside the skips; [batch, 3, 16, 16] → [batch, classes, 16, 16]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        sizes = [4 * width, 6 * width, 8 * width]
        self.down = nn.ModuleList(self.twice(before, after) for before, after in itertools.pairwise([3, *sizes]))
        self.rise = nn.ModuleList(
            nn.ConvTranspose2d(deep, shallow, 2, stride=2) for shallow, deep in itertools.pairwise(sizes)
        )
        self.up = nn.ModuleList(self.twice(2 * size, size) for size in sizes[:-1])
        self.out = nn.Conv2d(sizes[0], classes, 1)

    @staticmethod
    def twice(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(
            convolution(inputs, outputs, 3, activation=nn.ReLU(inplace=True)),
            convolution(outputs, outputs, 3, activation=nn.ReLU(inplace=True)),
        )

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for skip, rise, block in zip(skips[-2::-1], reversed(self.rise), reversed(self.up), strict=True):
            x = block(torch.cat([skip, rise(x)], dim=1))
        out: Tensor = self.out(x)
        return out


class GroupNormBlock(nn.Module):
    """Normalised, activated and convolved twice, plus the input; two groups of channels at any width."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            *(nn.GroupNorm(2, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)),
            *(nn.GroupNorm(2, channels), nn.SiLU(), nn.Conv2d(channels, channels, 3, padding=1)),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branch(x)
        return out


def groupnorm(width: int, classes: int) -> nn.Module:
    """Pre-activated residual blocks with GroupNorm; [batch, 3, 16, 16] → [batch, classes]."""
    first, second = 4 * width, 8 * width
    return nn.Sequential(
        *(nn.Conv2d(3, first, 3, padding=1), GroupNormBlock(first)),
        *(nn.Conv2d(first, second, 3, stride=2, padding=1), GroupNormBlock(second)),
        *(nn.GroupNorm(2, second), nn.SiLU(), head(second, classes)),
    )


class DilatedBlock(nn.Module):
    """A causal convolution over time and a 1 × 1 one, plus the input."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.past = 2 * dilation
        self.conv = nn.Conv1d(channels, 2 * channels, 3, dilation=dilation)
        self.norm = nn.BatchNorm1d(2 * channels)
        self.out = nn.Conv1d(2 * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.leaky_relu(self.norm(self.conv(F.pad(x, (self.past, 0)))), 0.1)
        out: Tensor = x + self.out(inner)
        return out


class Temporal(nn.Module):
    """Dilated convolutions over time; [batch, 2, 24] → [batch, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        channels = 6 * width
        self.stem = nn.Conv1d(2, channels, 3, stride=2, padding=1)
        self.blocks = nn.Sequential(*(DilatedBlock(channels, dilation) for dilation in (1, 2, 4)))
        self.pool = nn.MaxPool1d(2)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.pool(self.blocks(self.stem(x))).mean(dim=-1))
        return out
