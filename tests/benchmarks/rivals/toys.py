"""Small random networks for images ``[batch, 1, 8, 8]``, on which the rivals are tested."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A strided convolution, a residual block with batch normalisations, a linear head."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.act = nn.LeakyReLU(0.1)
        self.stem = nn.Sequential(nn.Conv2d(1, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6), self.act)
        self.block = nn.Sequential(
            *(nn.Conv2d(6, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), self.act),
            *(nn.Conv2d(8, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)),
        )
        self.head = nn.Linear(6, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(self.act(x + self.block(x)).mean(dim=(2, 3)))
        return out


def perceptron(classes: int) -> nn.Module:
    """Two hidden layers of 12 and 9 neurons."""
    act = nn.LeakyReLU(0.1)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 12), act, nn.Linear(12, 9), act, nn.Linear(9, classes))


def convolutional(classes: int) -> nn.Module:
    """A convolution of 5 channels, pooled, and a hidden layer of 10 neurons behind a flatten."""
    act = nn.LeakyReLU(0.1)
    return nn.Sequential(
        *(nn.Conv2d(1, 5, 3), act, nn.MaxPool2d(2), nn.Flatten()), *(nn.Linear(45, 10), act, nn.Linear(10, classes))
    )


BUILDS: Mapping[str, Callable[[int], nn.Module]] = {
    "perceptron": perceptron,
    "convolutional": convolutional,
    "residual": Residual,
}

ORDERS: Mapping[str, tuple[Mapping[str, int], Mapping[str, int]]] = {
    "perceptron": ({"1": 0, "3": 1}, {"3": 0, "5": 1}),
    "convolutional": ({"0": 0, "4": 1}, {"4": 0, "6": 1}),
    "residual": (
        {"stem.0": 0, "stem.1": 0, "block.0": 1, "block.1": 1, "block.3": 0, "block.4": 0},
        {"block.0": 0, "block.3": 1, "head": 0},
    ),
}
"""Which neuron group's order a module's outputs, and its inputs, are in."""

WIDTHS: Mapping[str, tuple[int, int]] = {"perceptron": (12, 9), "convolutional": (5, 10), "residual": (6, 8)}


def networks(name: str, tasks: Iterable[str], classes: int = 3, seed: int = 0) -> dict[str, nn.Module]:
    """Networks with weights, and statistics, of their own, in evaluation mode."""
    made = {}
    for number, task in enumerate(tasks):
        torch.manual_seed(seed + number)
        made[task] = BUILDS[name](classes).eval()
        for part in made[task].modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None and part.running_var is not None
                nn.init.uniform_(part.weight, 0.5, 1.5)
                nn.init.uniform_(part.bias, -0.5, 0.5)
                nn.init.normal_(part.running_mean, std=0.1)
                nn.init.uniform_(part.running_var, 0.5, 1.5)
    return made


def images(tasks: Iterable[str], count: int = 60) -> dict[str, Tensor]:
    """Images of noise, other ones for every task."""
    generator = torch.Generator().manual_seed(7)
    return {task: torch.randn(count, 1, 8, 8, generator=generator) for task in tasks}


def permuted(name: str, network: nn.Module) -> nn.Module:
    """A copy that computes the same, its hidden neurons in another order."""
    generator = torch.Generator().manual_seed(3)
    orders = [torch.randperm(width, generator=generator) for width in WIDTHS[name]]
    copied = copy.deepcopy(network)
    outputs, inputs = ORDERS[name]
    with torch.no_grad():
        for path, number in outputs.items():
            for tensor in copied.get_submodule(path).state_dict().values():
                if tensor.ndim:
                    tensor.copy_(tensor[orders[number]].clone())
        for path, number in inputs.items():
            weight = copied.get_submodule(path).weight
            assert isinstance(weight, Tensor)
            each = weight.unflatten(1, (len(orders[number]), -1))  # behind a flatten, a neuron has several inputs
            weight.copy_(each[:, orders[number]].flatten(1, 2).clone())
    return copied
