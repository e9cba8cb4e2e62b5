"""Training as in `tests.benchmarks.training`, for rivals that are trained from scratch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from tests.benchmarks.training import BATCH, Recipe


def iterations(recipe: Recipe, examples: int) -> int:
    """The iterations that the recipe trains a network for."""
    return recipe.epochs * (examples // BATCH)


def draws(examples: int, seed: int) -> Iterator[Int64[Tensor, " batch"]]:
    """Batches of indices without end, every example once before any comes again, but for what is left of an epoch."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.split(torch.randperm(examples, generator=generator), BATCH)[: max(1, examples // BATCH)]


def learn(
    parameters: Iterable[nn.Parameter], recipe: Recipe, steps: int, losses: Callable[[], Iterable[Float[Tensor, ""]]]
) -> None:
    """Adam with the recipe's one-cycle schedule on the sum of `losses()`, which draws a batch each time."""
    optimiser = torch.optim.Adam(parameters)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.peak, total_steps=steps)
    for _ in range(steps):
        optimiser.zero_grad(set_to_none=True)
        for loss in losses():
            loss.backward()
        optimiser.step()
        schedule.step()
