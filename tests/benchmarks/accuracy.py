"""Accuracy per byte: every way to unite two networks in the bytes of one, side by side.

All networks of a row have at most the bytes that remain when every hidden neuron of the pair is shared, see the same
calibration images, and are retrained lightly in the same way: distillation from the originals, no labels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtz_core import Budget, ZippedNetwork, zip_networks
from mtz_core.retraining import original_outputs, retrain_steps
from mtz_core.settings import Move, RetrainConfig, ZipConfig
from tasks.models.example_networks import lenet5, lenet_300_100
from tests.benchmarks.full_data import FOLDERS, Split, read_split, test_error
from tests.benchmarks.records import Records, Setting
from tests.benchmarks.residual_networks import residual_network
from tests.benchmarks.rivals.averaging import averaged
from tests.benchmarks.rivals.distilled import distilled
from tests.benchmarks.rivals.hard_sharing import hard_sharing
from tests.benchmarks.rivals.library_pruning import pruned
from tests.benchmarks.rivals.regmean import regmean
from tests.benchmarks.rivals.sizes import scaling
from tests.benchmarks.rivals.statistics import reestimate
from tests.benchmarks.rivals.zipit import ZipItConfig, zipit
from tests.benchmarks.training import Recipe, trained
from tests.benchmarks.vgg_like import vgg_like

RETRAINING = RetrainConfig(iterations=50)


@dataclass(frozen=True)
class Pair:
    """Two networks of one kind: how they are built and trained, for which sets, and calibration images per task."""

    network: str
    build: Callable[[], nn.Module]
    recipe: Recipe
    sets: tuple[str, str]
    images: int

    @property
    def name(self) -> str:
        return f"{self.network}, {' + '.join(self.sets)}"

    @property
    def tasks(self) -> dict[str, str]:
        """The set of every task."""
        if len(set(self.sets)) == len(self.sets):
            return {name: name for name in self.sets}
        return {f"{name}-{letter}": name for name, letter in zip(self.sets, "ab", strict=True)}


LENETS = Recipe(epochs=6, peak=2e-3)
PAIRS = tuple(
    Pair(name, build, recipe, sets, images)
    for sets in (("digits", "fashion"), ("digits", "digits"))
    for name, build, recipe, images in (
        ("LeNet-300-100", lenet_300_100, LENETS, 5000),
        ("LeNet-5", lenet5, LENETS, 2000),
        ("VGG-like", vgg_like, Recipe(epochs=2, peak=2e-3), 1000),
        ("residual", partial(residual_network, 10), Recipe(epochs=4, peak=5e-3), 2000),
    )
    if len({*sets}) > 1 or name.startswith("LeNet")
)


@dataclass(frozen=True)
class Case:
    """What a method is given."""

    pair: Pair
    seed: int
    networks: Mapping[str, nn.Module]
    calibration: Mapping[str, Tensor]
    training: Mapping[str, Split]
    fraction: float

    def zipped(self, method: str = "refit", moves: tuple[Move, ...] | None = None) -> ZippedNetwork:
        """Zipped by this project: everything shared, or what is planned for the same bytes with some moves."""
        share = 1.0 if moves is None else Budget(size=self.fraction, moves=moves)
        config = ZipConfig(method=method, share=share, seed=self.seed)  # type: ignore[arg-type]
        return zip_networks(self.networks, self.calibration, config)


def _zipit(case: Case) -> ZippedNetwork:
    # Features are best taken where it suits the network: as read behind normalisations, as written elsewhere.
    normalised = any(isinstance(part, nn.BatchNorm2d) for part in case.networks[min(case.networks)].modules())
    config = ZipItConfig(beta=1.0, place="read" if normalised else "written")
    zipped = zipit(case.networks, case.calibration, config)
    reestimate(zipped, case.calibration)
    return zipped


def _paper_reestimated(case: Case) -> ZippedNetwork:
    zipped = case.zipped("paper")
    reestimate(zipped, case.calibration)
    return zipped


def _hard_sharing(case: Case) -> ZippedNetwork:
    builds = dict.fromkeys(case.networks, case.pair.build)
    return hard_sharing(builds, case.training, case.pair.recipe, case.seed)


def _distilled(case: Case) -> ZippedNetwork:
    images = {task: split.images for task, split in case.training.items()}
    builds = {task: scaling(n, case.calibration[task][:4], case.seed) for task, n in case.networks.items()}
    return distilled(case.networks, images, builds, case.fraction, case.pair.recipe, seed=case.seed)


METHODS: Mapping[str, Callable[[Case], ZippedNetwork]] = {
    "averaging": lambda case: averaged(case.networks, case.calibration),
    "averaging after matching": lambda case: averaged(case.networks, case.calibration, matched=True),
    "RegMean": lambda case: regmean(case.networks, case.calibration),
    "RegMean after matching": lambda case: regmean(case.networks, case.calibration, matched=True),
    "ZipIt!": _zipit,
    "MTZ as published": lambda case: case.zipped("paper"),
    "MTZ as published, statistics re-estimated": _paper_reestimated,
    "pruned by torch-pruning": lambda case: pruned(case.networks, case.calibration, case.fraction, seed=case.seed),
    "smaller networks, distilled": _distilled,
    "hard parameter sharing, from scratch": _hard_sharing,
    "this project, everything shared": lambda case: case.zipped(),
    "this project, drop only": lambda case: case.zipped(moves=("drop",)),
    "this project, planned": lambda case: case.zipped(moves=("share", "drop")),
}
"""Every way to get there, by its name in the tables."""

TRAINED = ("smaller networks, distilled", "hard parameter sharing, from scratch")
"""Those that train networks from scratch, which takes minutes."""


def measure(pair: Pair, seed: int, data: Mapping[tuple[str, str], Split], records: Records, methods: list[str]) -> None:
    """Measure the methods on the networks of one seed."""
    known = {row["method"] for row in records.where(pair=pair.name, seed=seed)}
    has_statistics = pair.network == "residual"
    todo = [m for m in methods if m not in known and (has_statistics or not m.endswith("re-estimated"))]
    if not todo:
        return
    networks, calibration, light, held_out = {}, {}, {}, {}
    training = {task: data[name, "train"] for task, name in pair.tasks.items()}
    for number, (task, name) in enumerate(pair.tasks.items()):
        own = training[task]
        networks[task] = trained(f"{pair.network}-{name}", pair.build, own, pair.recipe, 10 * seed + number)
        order = torch.randperm(len(own.images), generator=torch.Generator().manual_seed(100 * seed + number))
        calibration[task] = own.images[order[: pair.images]]
        light[task], held_out[task] = own.images[order[:8000]], own.images[order[8000:9000]]
    outputs = original_outputs(networks, light, held_out)

    tests = {task: data[name, "t10k"] for task, name in pair.tasks.items()}

    def errors(zipped: ZippedNetwork) -> list[float]:
        return [test_error(partial(zipped, task=task), test) for task, test in tests.items()]

    before = [test_error(networks[task], test) for task, test in tests.items()]
    shared = zip_networks(networks, {task: x[:20] for task, x in calibration.items()}, ZipConfig(refit_rounds=0))
    case = Case(pair, seed, networks, calibration, training, shared.report.stored_bytes / shared.report.original_bytes)
    for method in todo:
        started = time.perf_counter()
        zipped = METHODS[method](case)
        seconds = time.perf_counter() - started
        row: dict[str, Any] = {
            "pair": pair.name,
            "seed": seed,
            "method": method,
            "original": before,
            "seconds": round(seconds, 1),
        }
        row |= {"stored": zipped.report.stored_bytes / zipped.report.original_bytes}
        row["error"] = errors(zipped)
        for _ in retrain_steps(zipped, networks, light, held_out, RETRAINING, outputs=outputs):
            pass
        row["retrained"] = errors(zipped)
        records.add(row)
        shown = " → ".join(
            " / ".join(f"{error:.2f}" for error in row[key]) for key in ("original", "error", "retrained")
        )
        print(f"{pair.name}, seed {seed}: {method} ({row['stored']:.1%}, {seconds:.0f} s) {shown}", flush=True)


def run(source: Path, setting: Setting, fresh: bool) -> None:
    """Measure everything that is missing; the quick setting trains nothing from scratch but the originals."""
    records = Records("accuracy", setting, fresh)
    data = {(name, split): read_split(source, name, split) for name in FOLDERS for split in ("train", "t10k")}
    pairs, seeds, methods = PAIRS, 3, list(METHODS)
    if setting == "quick":
        pairs, seeds, methods = PAIRS[:1], 1, [method for method in METHODS if method not in TRAINED]
    for pair in pairs:
        for seed in range(seeds):
            measure(pair, seed, data, records, methods)
