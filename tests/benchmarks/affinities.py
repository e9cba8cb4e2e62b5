"""Do predicted affinities tell which networks go well together: ``python -m tests.benchmarks.affinities``.

Every two of 24 LeNet-300-100 are compared, from weights, Hessians and sensitivities alone: fleets of one ancestor
(`tests.benchmarks.fleets`), networks trained anew from another seed, and networks of other data. Some pairs of each
kind are then really zipped, everything shared and nothing retrained.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from mtz_core import ZipConfig, zip_networks
from mtz_core.grouping.affinity import Affinity, Comparer, Profile
from mtz_core.grouping.groups import LEAST_SIMILARITY
from mtz_core.network.tracing import trace
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import sensitivities
from mtz_core.task_loss import TEMPERATURE
from tasks.files import whole_file
from tasks.models.example_networks import lenet_300_100
from tests.benchmarks.fleets import ANCESTOR, fleet_networks, member_split
from tests.benchmarks.full_data import Split, data_folder, read_split, test_error
from tests.benchmarks.records import DOCS
from tests.benchmarks.training import trained
from tests.support.distillation import distillation_loss

IMAGES, HELD_OUT, ZIPPED = 2000, 2000, 6
"""Calibration images of a model, images to judge it by, and pairs of each kind that are zipped."""

COMMAND = "python -m tests.benchmarks.affinities"


@dataclass(frozen=True, eq=False)
class Model:
    """A network, where its first weights come from, and its data."""

    network: nn.Module
    family: str
    data: str
    training: Split
    test: Split


def models(splits: Mapping[str, Mapping[str, Split]]) -> dict[str, Model]:
    """Fleets of the first ancestor, part of a fleet of the second, ancestors of three seeds, and two of other data."""
    found = {}
    digits = splits["digits"]
    for fleet, count, seed in (("labellings", 8, 0), ("images", 8, 0), ("labellings", 3, 1)):
        for member, network in fleet_networks(fleet, count, digits["train"], seed).items():
            train, test = (member_split(fleet, member, digits[part]) for part in ("train", "t10k"))
            found[f"{fleet} {member} {seed}"] = Model(network, f"digits {10 * seed}", "digits", train, test)
    for data, seed in (("digits", 0), ("digits", 10), ("digits", 20), ("fashion", 1), ("fashion", 11)):
        train, test = splits[data]["train"], splits[data]["t10k"]
        network = trained(f"LeNet-300-100-{data}", lenet_300_100, train, ANCESTOR, seed)
        found[f"{data} {seed}"] = Model(network, f"{data} {seed}", data, train, test)
    return found


def kind(first: Model, second: Model) -> str:
    """How two models are related."""
    if first.family == second.family:
        return "one ancestor"
    return f"{first.data}, other seed" if first.data == second.data else "other data"


def examples(model: Model, seed: int) -> tuple[Tensor, Tensor]:
    """Calibration and held-out images."""
    order = torch.randperm(len(model.training.images), generator=torch.Generator().manual_seed(seed))
    first, second = order[:IMAGES], order[IMAGES : IMAGES + HELD_OUT]
    return model.training.images[first], model.training.images[second]


@dataclass(frozen=True)
class Measured:
    """A pair that was zipped: held-out distillation loss in nats, rise of the test error in points; mean of both."""

    kind: str
    predicted: Affinity
    loss: float
    rise: float


def zip_pair(
    names: tuple[str, str], found: Mapping[str, Model], images: Mapping[str, tuple[Tensor, Tensor]], predicted: Affinity
) -> Measured:
    """Share everything and see what it costs."""
    tasks = dict(zip(("first", "second"), names, strict=True))
    zipped = zip_networks(
        {task: found[name].network for task, name in tasks.items()},
        {task: images[name][0] for task, name in tasks.items()},
        ZipConfig(share=1.0),
    )
    losses, rises = [], []
    with torch.no_grad():
        for task, name in tasks.items():
            model, held = found[name], images[name][1]
            losses.append(float(distillation_loss(zipped(held, task=task), model.network(held), TEMPERATURE)))
            rises.append(test_error(partial(zipped, task=task), model.test) - test_error(model.network, model.test))
    related = kind(*(found[name] for name in names))
    return Measured(related, predicted, float(np.mean(losses)), float(np.mean(rises)))


def chosen(pairs: Mapping[tuple[str, str], Affinity], found: Mapping[str, Model]) -> Iterator[tuple[str, str]]:
    """Pairs to zip: of each kind, from the least to the most similar."""
    kinds: dict[str, list[tuple[str, str]]] = {}
    for pair in sorted(pairs, key=lambda pair: pairs[pair].similarity):
        kinds.setdefault(kind(found[pair[0]], found[pair[1]]), []).append(pair)
    for own in kinds.values():
        numbers = sorted({round(i) for i in np.linspace(0, len(own) - 1, ZIPPED)})
        yield from (own[number] for number in numbers)


def page(pairs: Mapping[tuple[str, str], Affinity], found: Mapping[str, Model], zipped: Sequence[Measured]) -> str:
    """The tables as Markdown."""
    kinds: dict[str, list[Affinity]] = {}
    for pair, affinity in pairs.items():
        kinds.setdefault(kind(found[pair[0]], found[pair[1]]), []).append(affinity)
    lines = [
        "# Which networks go well together",
        "",
        f"Made by `{COMMAND}`. {len(found)} LeNet-300-100, every two compared from weights, Hessians and",
        f"sensitivities ({IMAGES:,} calibration images each); some pairs of each kind then zipped, all hidden neurons",
        f"shared, nothing retrained. Damage is the distillation loss in nats at temperature {TEMPERATURE:g}, per task,",
        f"measured on {HELD_OUT:,} other images; the rise is that of the test error in points. Means of both tasks.",
        "",
        "| | pairs | similarity: least | median | most | zipped | damage predicted (median) | measured | rise |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in sorted(kinds.items(), key=lambda entry: -np.median([a.similarity for a in entry[1]])):
        similarity = [affinity.similarity for affinity in own]
        real = [one for one in zipped if one.kind == name]
        lines.append(
            f"| {name} | {len(own)} | {min(similarity):.2f} | {np.median(similarity):.2f} | {max(similarity):.2f} "
            f"| {len(real)} | {np.median([np.mean(one.predicted.damage) for one in real]):.3f} "
            f"| {np.median([one.loss for one in real]):.3f} | {np.median([one.rise for one in real]):.2f} |"
        )
    damage = [float(np.mean(one.predicted.damage)) for one in zipped]
    apart = [-one.predicted.similarity for one in zipped]
    loss, rise = [one.loss for one in zipped], [one.rise for one in zipped]
    related = min(a.similarity for name, own in kinds.items() if name != "other data" for a in own)
    other = max(affinity.similarity for affinity in kinds["other data"])
    lines += [
        "",
        f"Rank correlation (Spearman) over the {len(zipped)} pairs that were zipped:",
        "",
        "| | with the measured loss | with the rise of the error |",
        "|---|---|---|",
        *(
            f"| {name} | {spearmanr(value, loss).statistic:.2f} | {spearmanr(value, rise).statistic:.2f} |"
            for name, value in (("predicted damage", damage), ("1 − similarity", apart))
        ),
        "",
        f"Networks of the same data have at least {100 * related:.0f} % in common, those of other data at most",
        f"{100 * other:.0f} %. Groups are made from {100 * LEAST_SIMILARITY:.0f} % on, unless a fleet says otherwise.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog=COMMAND, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    source = data_folder(parser)
    torch.set_num_threads(options.threads)
    found = models({t: {s: read_split(source, t, s) for s in ("train", "t10k")} for t in ("digits", "fashion")})
    images = {name: examples(model, number) for number, (name, model) in enumerate(found.items())}
    profiles = {}
    for name, model in found.items():
        batches = as_batches(images[name][0], name)
        traced = trace(model.network, batches[0])
        profiles[name] = Profile.of(
            traced, original_moments(traced, batches, ZipConfig()), sensitivities(traced, batches)
        )
    started, comparer = time.process_time(), Comparer()
    pairs = {pair: comparer.compare(*(profiles[name] for name in pair)) for pair in combinations(sorted(found), 2)}
    print(f"{len(pairs)} pairs compared, {1e3 * (time.process_time() - started) / len(pairs):.0f} ms each", flush=True)
    zipped = []
    for pair in chosen(pairs, found):
        one = zip_pair(pair, found, images, pairs[pair])
        zipped.append(one)
        print(
            f"{pair[0]} + {pair[1]} ({one.kind}): similarity {one.predicted.similarity:.3f}, predicted "
            f"{np.mean(one.predicted.damage):.4f}, measured {one.loss:.4f} nats, {one.rise:+.2f} points",
            flush=True,
        )
    with whole_file(DOCS / "affinities.md") as temporary:
        temporary.write_text(page(pairs, found, zipped))
    print(f"table: {DOCS / 'affinities.md'}")


if __name__ == "__main__":
    main()
