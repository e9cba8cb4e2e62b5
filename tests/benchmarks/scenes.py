"""Small tasks with every kind of output, made up from seeds: glyphs of a few shapes on noisy pictures.

A picture is grey, 24 × 24, with up to three glyphs. Tasks of one kind are told apart by which glyphs they are about, so
that two networks of a kind have something in common, and are not the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mtz_core.settings import Kind

PIXELS, GLYPH, MOST = 24, 7, 3
STEPS, BATCH, PEAK = 500, 64, 4e-3


def _glyphs() -> Float[np.ndarray, "glyphs GLYPH GLYPH"]:
    """Eight shapes: frame, cross, disc, diagonals, bars in two directions, ring, corner."""
    y, x = np.mgrid[:GLYPH, :GLYPH] - GLYPH // 2
    far = np.maximum(abs(x), abs(y))
    shapes = (
        far == 3,
        (x == 0) | (y == 0),
        x**2 + y**2 <= 6,
        abs(x) == abs(y),
        abs(x) <= 1,
        abs(y) <= 1,
        (x**2 + y**2 <= 10) & (x**2 + y**2 >= 5),
        (x == -3) | (y == 3),
    )
    return np.stack(shapes).astype(np.float32)


@dataclass(frozen=True)
class Scenes:
    """Pictures and where their glyphs are.

    Attributes:
        pictures: Grey values, about -0.5 to 1.5.
        places: For every glyph its vertical and horizontal position and its brightness, NaN where it is not there.
    """

    pictures: Float[Tensor, "n 1 PIXELS PIXELS"]
    places: Float[Tensor, "n glyphs 3"]


def scenes(count: int, seed: int, glyphs: tuple[int, ...], several: bool) -> Scenes:
    """Draw pictures with one of the glyphs, or with up to three different ones."""
    draw, shapes = np.random.default_rng(seed), _glyphs()
    pictures = draw.normal(0, 0.25, size=(count, 1, PIXELS, PIXELS)).astype(np.float32)
    places = np.full((count, len(glyphs), 3), np.nan, np.float32)
    for picture, own in zip(pictures, places, strict=True):
        for place in draw.permutation(len(glyphs))[: draw.integers(1, MOST + 1) if several else 1]:
            top, left = draw.integers(0, PIXELS - GLYPH + 1, size=2)
            light = draw.uniform(0.6, 1.2)
            picture[0, top : top + GLYPH, left : left + GLYPH] += light * shapes[glyphs[place]]
            own[place] = (top + GLYPH // 2) / PIXELS, (left + GLYPH // 2) / PIXELS, light
    return Scenes(torch.from_numpy(pictures), torch.from_numpy(places))


class Trunk(nn.Sequential):
    """Three convolutions and a linear layer."""

    def __init__(self, outputs: int, ending: nn.Module | None = None) -> None:
        super().__init__(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
            *(nn.Linear(32 * 9, 64), nn.ReLU(), nn.Linear(64, outputs)),
            *(() if ending is None else (ending,)),
        )


class Direction(nn.Module):
    """Scales vectors to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(x, dim=1)


def dense(channels: int) -> nn.Module:
    """Four convolutions whose outputs are as large as the picture."""
    return nn.Sequential(
        *(nn.Conv2d(1, 16, 5, padding=2), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, channels, 1)),
    )


Loss = Callable[[Tensor, Tensor], Tensor]
Outputs = Callable[[Tensor], Tensor]


def _there(places: Tensor) -> Tensor:
    return (~places[..., 0].isnan()).float()


def _class_loss(outputs: Tensor, places: Tensor) -> Tensor:
    return F.cross_entropy(outputs, _there(places).argmax(dim=1))


def _probability_loss(outputs: Tensor, places: Tensor) -> Tensor:
    return F.nll_loss(outputs.clamp_min(1e-7).log(), _there(places).argmax(dim=1))


def _label_loss(outputs: Tensor, places: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(outputs, _there(places))


def _number_loss(outputs: Tensor, places: Tensor) -> Tensor:
    return F.mse_loss(outputs, places.nan_to_num(0.0).sum(dim=1))


def _map_loss(outputs: Tensor, places: Tensor) -> Tensor:
    """Squared distance from a bump at every glyph, in a channel for each."""
    axis = torch.arange(PIXELS) / PIXELS
    rows, columns = ((axis - places[..., i, None]).square() / (2 * 0.06**2) for i in (0, 1))
    bumps = (-rows[..., :, None] - columns[..., None, :]).exp().nan_to_num(0.0)
    return F.mse_loss(outputs, bumps)


def _direction_loss(outputs: Tensor, places: Tensor) -> Tensor:
    """Pictures of one glyph are to point in one direction, others elsewhere (supervised contrastive)."""
    classes = _there(places).argmax(dim=1)
    alike = (classes[:, None] == classes) & ~torch.eye(len(classes), dtype=torch.bool)
    near = (outputs @ outputs.T / 0.2).masked_fill(torch.eye(len(classes), dtype=torch.bool), -1e9)
    return -(F.log_softmax(near, dim=1) * alike).sum(dim=1).div(alike.sum(dim=1).clamp_min(1)).mean()


@dataclass(frozen=True)
class Kinded:
    """How networks of one kind of output are built and trained."""

    build: Callable[[int], nn.Module]
    loss: Loss
    several: bool = False


KINDED: Mapping[Kind, Kinded] = {
    "logits": Kinded(Trunk, _class_loss),
    "probabilities": Kinded(lambda glyphs: Trunk(glyphs, nn.Softmax(dim=1)), _probability_loss),
    "multi-label": Kinded(Trunk, _label_loss, several=True),
    "regression": Kinded(lambda glyphs: Trunk(3), _number_loss),
    "heatmap": Kinded(dense, _map_loss, several=True),
    "embedding": Kinded(lambda glyphs: Trunk(16, Direction()), _direction_loss),
}

TASKS: Mapping[str, tuple[int, ...]] = {"first": (0, 1, 2, 3, 6), "second": (2, 4, 5, 6, 7)}
"""The glyphs of each task."""


def network(kind: Kind, task: str) -> nn.Module:
    """Train a network of a kind for a task; the same each time on one machine."""
    number, own = list(TASKS).index(task), KINDED[kind]
    torch.manual_seed(number)
    made = own.build(len(TASKS[task]))
    data = scenes(6000, 10 + number, TASKS[task], own.several)
    optimiser = torch.optim.Adam(made.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK, total_steps=STEPS)
    started = time.perf_counter()
    for _ in range(STEPS):
        index = torch.randint(len(data.pictures), (BATCH,))
        optimiser.zero_grad(set_to_none=True)
        loss = own.loss(made(data.pictures[index]), data.places[index])
        loss.backward()
        optimiser.step()
        schedule.step()
    print(f"trained {kind}, {task}: loss {loss.item():.4f} ({time.perf_counter() - started:.0f} s)", flush=True)
    return made.eval()


def pictures(kind: Kind, task: str, count: int, seed: int) -> Tensor:
    """Pictures as a task meets them."""
    return scenes(count, 1000 + seed, TASKS[task], KINDED[kind].several).pictures
