"""Smaller networks, one for each task, that learn from the originals on unlabelled images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor, nn

from mtz_core.network.tracing import evaluation_mode
from mtz_core.settings import RetrainConfig
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.rivals.assemble import assemble, matrices_of, traced
from tests.benchmarks.rivals.learning import draws, iterations, learn
from tests.benchmarks.rivals.sizes import largest_below, stored_bytes
from tests.benchmarks.training import Recipe
from tests.support.distillation import distillation_loss


def distilled(
    networks: Mapping[str, nn.Module],
    images: Mapping[str, Tensor],
    builds: Mapping[str, Callable[[float], nn.Module]],
    fraction: float,
    recipe: Recipe,
    temperature: float = RetrainConfig.temperature,
    seed: int = 0,
) -> ZippedNetwork:
    """Each network distilled to at most `fraction` of its bytes, for as many iterations as `recipe` has for its set.

    `builds[task]` makes an untrained network whose hidden widths are scaled by a fraction, as `sizes.scaling` does. The
    largest that fits is trained by `distillation_loss` (Hinton, Vinyals, Dean 2015). Nothing is
    shared. Raises `InvalidConfig` if no network is that small.
    """
    students = {
        task: _student(network, images[task], builds[task], fraction, recipe, temperature, seed + i)
        for i, (task, network) in enumerate(sorted(networks.items()))
    }
    found = traced(students, images)
    return assemble(found, {}, matrices_of(found), "distilled", traced(networks, images))


def _student(
    network: nn.Module,
    images: Tensor,
    build: Callable[[float], nn.Module],
    fraction: float,
    recipe: Recipe,
    temperature: float,
    seed: int,
) -> nn.Module:
    torch.manual_seed(seed)
    student = largest_below(build, int(fraction * stored_bytes(network)))
    with evaluation_mode(network):
        targets = torch.cat([network(part) for part in torch.split(images, 500)])
    batches = draws(len(images), seed)

    def losses() -> Iterator[Tensor]:
        index = next(batches)
        yield distillation_loss(student(images[index]), targets[index], temperature)

    student.train()
    learn(student.parameters(), recipe, iterations(recipe, len(images)), losses)
    return student.eval()
