"""Fleets of related networks: LeNet-300-100 fine-tuned from one ancestor, for other labels or for other images.

The ancestor is trained on MNIST's ten digits for six epochs. Each member starts from its hidden layers with a new
output layer and is fine-tuned, hidden layers included, for two epochs: in `labellings` on the same images with other
labels, in `images` on differently distorted images with the same ten labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tasks.models.example_networks import lenet_300_100
from tests.benchmarks.full_data import Split
from tests.benchmarks.training import Recipe, trained

ANCESTOR = Recipe(epochs=6, peak=2e-3)
MEMBER = Recipe(epochs=2, peak=1e-3)

LABELLINGS: Mapping[str, tuple[int, ...]] = {
    "digit": tuple(range(10)),
    "parity": tuple(d % 2 for d in range(10)),
    "half": tuple(d // 5 for d in range(10)),
    "modulo-3": tuple(d % 3 for d in range(10)),
    "loops": (1, 0, 0, 0, 0, 0, 1, 0, 2, 1),
    "couple": tuple(d // 2 for d in range(10)),
    "prime": (0, 0, 1, 1, 0, 1, 0, 1, 0, 0),
    "modulo-4": tuple(d % 4 for d in range(10)),
}
"""The class of every digit."""


def _turned(images: Tensor, degrees: float) -> Tensor:
    angle = torch.deg2rad(torch.tensor(degrees))
    turn = torch.stack([angle.cos(), -angle.sin(), angle * 0, angle.sin(), angle.cos(), angle * 0]).reshape(1, 2, 3)
    grid = F.affine_grid(turn, [1, 1, 28, 28], align_corners=False)
    return F.grid_sample(images, grid.expand(len(images), -1, -1, -1), align_corners=False)


def _noisy(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (images + 0.25 * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _shifted(images: Tensor, right: int, down: int) -> Tensor:
    return torch.roll(images, (down, right), dims=(2, 3))


DISTORTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "plain": lambda images: images,
    "turned-left": partial(_turned, degrees=20.0),
    "turned-right": partial(_turned, degrees=-20.0),
    "noisy": _noisy,
    "blurred": lambda images: F.avg_pool2d(images, 5, stride=1, padding=2, count_include_pad=True),
    "thick": lambda images: F.max_pool2d(images, 3, stride=1, padding=1),
    "shifted": partial(_shifted, right=2, down=2),
    "faint": lambda images: images * 0.4,
}


def member_split(fleet: str, member: str, full: Split) -> Split:
    """A member's own images and labels, of a full split of MNIST."""
    if fleet == "labellings":
        return Split(full.images, torch.tensor(LABELLINGS[member])[full.labels])
    return Split(DISTORTIONS[member](full.images), full.labels)


def members(fleet: str, count: int) -> tuple[str, ...]:
    """The first members of a fleet."""
    return tuple(LABELLINGS if fleet == "labellings" else DISTORTIONS)[:count]


def fleet_networks(fleet: str, count: int, training: Split, seed: int) -> dict[str, nn.Module]:
    """The networks of the first members of a fleet, trained once and kept."""
    ancestor = trained("LeNet-300-100-digits", lenet_300_100, training, ANCESTOR, 10 * seed)
    networks = {}
    for number, member in enumerate(members(fleet, count)):
        own = member_split(fleet, member, training)
        build = partial(_descendant, ancestor, int(own.labels.max()) + 1)
        networks[member] = trained(f"fleet-{fleet}-{member}", build, own, MEMBER, 100 * seed + number)
    return networks


def _descendant(ancestor: nn.Module, classes: int) -> nn.Module:
    """The ancestor's hidden layers, with a new output layer."""
    network = lenet_300_100(classes)
    state = network.state_dict()
    last = tuple(state)[-2:]
    network.load_state_dict({name: state[name] if name in last else t for name, t in ancestor.state_dict().items()})
    return network
