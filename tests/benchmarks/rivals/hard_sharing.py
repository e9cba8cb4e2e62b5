"""Hard parameter sharing: one trunk and a head for each task, trained jointly from scratch, with labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.full_data import Split
from tests.benchmarks.rivals.assemble import assemble, common_parts, matrices_of, neuron_by_neuron, traced
from tests.benchmarks.rivals.learning import draws, iterations, learn
from tests.benchmarks.training import Recipe


def hard_sharing(
    builds: Mapping[str, Callable[[], nn.Module]], training: Mapping[str, Split], recipe: Recipe, seed: int = 0
) -> ZippedNetwork:
    """Networks that share every hidden neuron from the start, trained for as long as one of the networks was.

    The trunk starts as the first task's network (in alphabetical order) does; heads and normalisations are each task's.
    Every iteration takes a batch of each task and the sum of their cross-entropies (Caruana, *Multitask Learning*,
    1997); there are as many as `recipe` has for the largest of the sets. Raises `IncompatibleNetworks`.
    """
    zipped = shared_trunk(builds, {task: split.images for task, split in training.items()}, seed)
    batches = {task: draws(len(training[task].images), seed + i) for i, task in enumerate(zipped.tasks)}

    def losses() -> Iterator[Tensor]:
        for task in zipped.tasks:
            index = next(batches[task])
            yield F.cross_entropy(zipped(training[task].images[index], task), training[task].labels[index])

    zipped.train()
    learn(zipped.parameters(), recipe, iterations(recipe, max(len(s.images) for s in training.values())), losses)
    return zipped.eval()


def shared_trunk(
    builds: Mapping[str, Callable[[], nn.Module]], examples: Mapping[str, Tensor], seed: int
) -> ZippedNetwork:
    """Untrained networks that share every hidden neuron."""
    torch.manual_seed(seed)
    networks = {task: builds[task]() for task in sorted(builds)}
    found = traced(networks, examples)
    members = neuron_by_neuron(found)
    matrices = matrices_of(found)
    first = next(iter(found))
    for layer, part in common_parts(found, members).items():
        trunk = part.of(first, matrices[first][layer])
        for task in found:
            matrices[task][layer] = part.put(task, matrices[task][layer], trunk)
    return assemble(found, members, matrices, "hard sharing")
