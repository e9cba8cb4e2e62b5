"""Where sharing pays: error against stored bytes for fleets of related networks.

Fleets of 2, 4 and 8 networks (`tests.benchmarks.fleets`) are brought to 2, 1, 0.75 and 0.5 times the bytes of *one*
original: by the planner's mixture of moves, by dropping only, by sharing only, and by sharing with MTZ as published.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mtz_core.errors import InvalidConfig
from mtz_core.network.tracing import trace
from mtz_core.planning.search import BudgetSearch, Candidate
from mtz_core.retraining import original_outputs, retrain_steps
from mtz_core.settings import Budget, RetrainConfig, ZipConfig
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import sensitivities
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.fleets import fleet_networks, member_split
from tests.benchmarks.full_data import Split, read_split, test_error
from tests.benchmarks.records import Records, Setting
from tests.support.networks import joined

FLEETS = ("labellings", "images")
COUNTS = (8, 4, 2)
SIZES = (2.0, 1.0, 0.75, 0.5)
IMAGES = 2000
RETRAINING = RetrainConfig(iterations=50)
MIXTURE, DROP, SHARE, PAPER = "mixture", "drop only", "share only", "paper"


def budget_search(
    networks: Mapping[str, nn.Module], calibration: Mapping[str, Tensor], config: ZipConfig
) -> BudgetSearch:
    """A planner for networks, with everything it needs."""
    batches = {task: as_batches(calibration[task], task) for task in sorted(networks)}
    traced = {task: trace(networks[task], own[0]) for task, own in batches.items()}
    moments = {task: original_moments(network, batches[task], config) for task, network in traced.items()}
    sensitivity = {task: sensitivities(network, batches[task], config.seed) for task, network in traced.items()}
    assert config.budget is not None
    return BudgetSearch(joined(traced, moments, sensitivity, batches), config, config.budget)


def plans(
    networks: Mapping[str, nn.Module],
    calibration: Mapping[str, Tensor],
    size: float,
    ours: BudgetSearch,
    published: BudgetSearch,
) -> Iterator[tuple[str, Candidate, BudgetSearch]]:
    """The plans of every method that reaches a size (relative to the bytes of all originals)."""
    candidates = list(ours.candidates(size))
    yield MIXTURE, ours.best_of(candidates), ours
    for name in (DROP, SHARE):
        yield from ((name, candidate, ours) for candidate in candidates if candidate.name == name)
    try:
        yield PAPER, next(published.candidates(size)), published
    except InvalidConfig:
        return  # sharing alone does not reach this size


def measure(fleet: str, count: int, seed: int, data: Mapping[str, Split], records: Records) -> None:
    """Measure one fleet of one seed at every size."""
    if all(records.has(fleet=fleet, networks=count, seed=seed, size=size) for size in SIZES):
        return
    networks = fleet_networks(fleet, count, data["train"], seed)
    training = {task: member_split(fleet, task, data["train"]).images for task in networks}
    test = {task: member_split(fleet, task, data["test"]) for task in networks}
    calibration, light, held_out = {}, {}, {}
    for number, task in enumerate(networks):
        order = torch.randperm(len(training[task]), generator=torch.Generator().manual_seed(1000 * seed + number))
        calibration[task] = training[task][order[:IMAGES]]
        light[task], held_out[task] = training[task][order[:8000]], training[task][order[8000:9000]]
    outputs = original_outputs(networks, light, held_out)

    def errors(zipped: ZippedNetwork) -> float:
        return float(np.mean([test_error(partial(zipped, task=task), test[task]) for task in networks]))

    before = float(np.mean([test_error(network, test[task]) for task, network in networks.items()]))
    ours = budget_search(networks, calibration, ZipConfig(budget=Budget(size=1.0, moves=("share", "drop")), seed=seed))
    published = budget_search(
        networks, calibration, ZipConfig(method="paper", budget=Budget(size=1.0, moves=("share",)), seed=seed)
    )
    for size in SIZES:
        if records.has(fleet=fleet, networks=count, seed=seed, size=size):
            continue
        rows = []
        for method, candidate, by in plans(networks, calibration, size / count, ours, published):
            zipped = by.zip(candidate.plan)
            row = {
                "fleet": fleet,
                "networks": count,
                "seed": seed,
                "size": size,
                "method": method,
                "plan": candidate.name,
            }
            row |= {"bytes": candidate.plan.bytes, "original": before, "error": errors(zipped)}
            for _ in retrain_steps(zipped, networks, light, held_out, RETRAINING, outputs=outputs):
                pass
            row["retrained"] = errors(zipped)
            rows.append(row)
            print(
                f"{fleet}, {count} networks, seed {seed}, {size:g} × one: {method} ({candidate.name}) "
                f"{row['original']:.2f} → {row['error']:.2f}, retrained {row['retrained']:.2f}",
                flush=True,
            )
        for row in rows:
            records.add(row)


def run(source: Path, setting: Setting, fresh: bool) -> None:
    """Measure everything that is missing."""
    records = Records("fleets", setting, fresh)
    data = {"train": read_split(source, "digits", "train"), "test": read_split(source, "digits", "t10k")}
    fleets, counts, seeds = (FLEETS, COUNTS, 3) if setting == "full" else (FLEETS[:1], COUNTS[1:], 1)
    for fleet in fleets:
        for seed in range(seeds):
            for count in counts:
                measure(fleet, count, seed, data, records)
