"""The networks of the example fleet, as factories that `models.NAME.network` in params.yaml can name."""

from __future__ import annotations

from torch import nn


def lenet5(classes: int = 10) -> nn.Module:
    """Return LeNet-5 in its Caffe form (20 and 50 channels, 500 hidden neurons) for inputs `[batch, 1, 28, 28]`."""
    return nn.Sequential(
        *(nn.Conv2d(1, 20, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(20, 50, kernel_size=5), nn.ReLU(), nn.MaxPool2d(2)),
        nn.Flatten(),
        *(nn.Linear(50 * 4 * 4, 500), nn.ReLU()),
        nn.Linear(500, classes),
    )


def lenet_300_100(classes: int = 10) -> nn.Module:
    """Return LeNet-300-100, a perceptron with two hidden layers, for inputs `[batch, 1, 28, 28]`."""
    return nn.Sequential(
        nn.Flatten(),
        *(nn.Linear(28 * 28, 300), nn.ReLU()),
        *(nn.Linear(300, 100), nn.ReLU()),
        nn.Linear(100, classes),
    )
