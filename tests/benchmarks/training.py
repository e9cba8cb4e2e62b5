"""Networks trained once and kept, so that benchmarks start from the same ones."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from tasks.files import whole_file
from tests.benchmarks.full_data import Split

CACHE = Path(".mtz/benchmarks")
BATCH = 128


@dataclass(frozen=True)
class Recipe:
    """Adam on cross-entropy with a one-cycle schedule that rises to `peak`."""

    epochs: int
    peak: float


def trained(name: str, build: Callable[[], nn.Module], training: Split, recipe: Recipe, seed: int) -> nn.Module:
    """A network trained from scratch, or the same from an earlier run, by `name` in `CACHE`."""
    path = CACHE / f"{name}-{seed}-{recipe.epochs}-{recipe.peak:g}.safetensors"
    torch.manual_seed(seed)
    network = build()
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval()
    steps = len(training.images) // BATCH
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, recipe.peak, total_steps=recipe.epochs * steps)
    started = time.perf_counter()
    for _ in range(recipe.epochs):
        for index in torch.split(torch.randperm(len(training.images)), BATCH)[:steps]:
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(network(training.images[index]), training.labels[index]).backward()
            optimiser.step()
            schedule.step()
    print(f"trained {name}, seed {seed} ({time.perf_counter() - started:.0f} s)", flush=True)
    with whole_file(path) as temporary:
        save_file(network.state_dict(), temporary)
    return network.eval()
