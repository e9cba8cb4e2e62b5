"""The smallest network that loses at most half a point of each task, by every method.

The same search for all (`mtz_core.planning.search.FloorSearch`), with 50 iterations of light retraining. The first half
of the test images is the validation data on which the floor is kept; errors are also given on the second half, which
nothing has seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch

from mtz_core import Budget, Validation
from mtz_core.planning.search import FloorSearch
from mtz_core.settings import MOVES, Method, Move, RetrainConfig, ZipConfig
from tests.benchmarks.accuracy import PAIRS, Pair
from tests.benchmarks.fleet_curves import budget_search
from tests.benchmarks.full_data import FOLDERS, Split, read_split, test_error
from tests.benchmarks.records import Records, Setting
from tests.benchmarks.training import BATCH, trained

FLOOR = 0.5
RETRAINING = RetrainConfig(iterations=50)
METHODS: Mapping[str, tuple[Method, tuple[Move, ...]]] = {
    "all moves": ("refit", MOVES),
    "share and drop": ("refit", ("share", "drop")),
    "drop only": ("refit", ("drop",)),
    "share only": ("refit", ("share",)),
    "MTZ as published": ("paper", ("share",)),
}
NETWORKS = ("LeNet-300-100", "LeNet-5")


def measure(pair: Pair, seed: int, data: Mapping[tuple[str, str], Split], records: Records) -> None:
    """Search with every method for the networks of one seed."""
    networks, calibration, training, validation, test = {}, {}, {}, {}, {}
    for number, task in enumerate(pair.tasks):
        own, held = data[task, "train"], data[task, "t10k"]
        networks[task] = trained(f"{pair.network}-{task}", pair.build, own, pair.recipe, 10 * seed + number)
        order = torch.randperm(len(own.images), generator=torch.Generator().manual_seed(100 * seed + number))
        calibration[task], training[task] = own.images[order[: pair.images]], own.images[order[:8000]]
        half = len(held.images) // 2
        validation[task] = Validation(held.images[:half], held.labels[:half])
        test[task] = Split(held.images[half:], held.labels[half:])
    longest = max(len(data[task, "train"].images) for task in pair.tasks) // BATCH * pair.recipe.epochs
    for name, (method, moves) in METHODS.items():
        if records.has(pair=pair.name, seed=seed, method=name):
            continue
        config = ZipConfig(method=method, budget=Budget(floor=FLOOR, moves=moves), seed=seed)
        search = FloorSearch(budget_search(networks, calibration, config), networks, training, validation, RETRAINING)
        steps = list(search.steps())
        best = min((step for step in steps if step.kept), key=lambda step: step.size)
        rise = {
            task: test_error(partial(best.zipped, task=task), test[task]) - test_error(networks[task], test[task])
            for task in networks
        }
        row = {"pair": pair.name, "seed": seed, "method": name, "stored": best.size, "tried": len(steps)}
        row |= {"lost": list(best.lost.values()), "rise": list(rise.values())}
        row |= {"iterations": best.iterations, "trained": longest}
        records.add(row)
        print(f"{pair.name}, seed {seed}: {name} {best.size:.1%}, lost {row['lost']}, test {row['rise']}", flush=True)


def run(source: Path, setting: Setting, fresh: bool) -> None:
    """Measure everything that is missing."""
    records = Records("floors", setting, fresh)
    data = {(name, split): read_split(source, name, split) for name in FOLDERS for split in ("train", "t10k")}
    networks, seeds = (NETWORKS, 3) if setting == "full" else (NETWORKS[:1], 1)
    for pair in PAIRS:
        if pair.network in networks and pair.sets == ("digits", "fashion"):
            for seed in range(seeds):
                measure(pair, seed, data, records)
