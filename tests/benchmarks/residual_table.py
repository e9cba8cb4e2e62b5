"""Errors of zipped networks with batch normalisation on MNIST and Fashion-MNIST, before any retraining.

Run by `make bench-residual`: two residual networks, five residual networks for five tasks, and two plain ones, by both
methods. Networks are trained once and kept in `.mtz/benchmarks/` (`--train-only` stops there); the tables go to
`docs/benchmarks/residual.md`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn

import mtz_core
from mtz_core.settings import Method, ZipConfig
from tasks.files import whole_file
from tests.benchmarks.full_data import FOLDERS, Split, data_folder, read_split, test_error
from tests.benchmarks.residual_networks import plain_network, residual_network
from tests.benchmarks.training import Recipe, trained

METHODS: tuple[Method, ...] = ("paper", "refit")


@dataclass(frozen=True)
class Task:
    """A classification made from a set: its labels ``classes[c]`` become class ``c``; other images are left out."""

    source: str
    classes: tuple[tuple[int, ...], ...]
    text: str

    def split(self, full: Split) -> Split:
        class_of = torch.full((10,), -1)
        for new, old in enumerate(self.classes):
            class_of[list(old)] = new
        labels = class_of[full.labels]
        return Split(full.images[labels >= 0], labels[labels >= 0])


def _each(*labels: int) -> tuple[tuple[int, ...], ...]:
    return tuple((label,) for label in labels)


TASKS: Mapping[str, Task] = {
    "digits": Task("digits", _each(*range(10)), "MNIST"),
    "fashion": Task("fashion", _each(*range(10)), "Fashion-MNIST"),
    "low": Task("digits", _each(0, 1, 2, 3, 4), "MNIST, only the digits 0 to 4"),
    "high": Task("digits", _each(5, 6, 7, 8, 9), "MNIST, only the digits 5 to 9"),
    "parity": Task("digits", ((0, 2, 4, 6, 8), (1, 3, 5, 7, 9)), "MNIST, all digits relabelled even or odd"),
    "clothes": Task(
        "fashion", _each(0, 1, 2, 3, 4, 6), "Fashion-MNIST, only T-shirt, trouser, pullover, dress, coat, shirt"
    ),
    "accessories": Task("fashion", _each(5, 7, 8, 9), "Fashion-MNIST, only sandal, sneaker, bag, ankle boot"),
}


@dataclass(frozen=True)
class Case:
    """Networks to zip: one for each task, trained from scratch, each from its own seed."""

    title: str
    network: str
    build: Callable[[int], nn.Module]
    recipe: Recipe
    tasks: tuple[str, ...]
    shares: tuple[float, ...]
    images: int
    most_seeds: int

    def seeds(self, wanted: int) -> range:
        return range(min(wanted, self.most_seeds))

    def networks(self, data: Data, seed: int) -> dict[str, nn.Module]:
        return {
            task: trained(
                f"{self.network}-{task}",
                partial(self.build, len(TASKS[task].classes)),
                data.training[task],
                self.recipe,
                10 * seed + i,
            )
            for i, task in enumerate(self.tasks)
        }


CASES = (
    Case(
        "Two residual networks",
        *("residual", residual_network, Recipe(epochs=4, peak=5e-3)),
        tasks=("digits", "fashion"),
        shares=(0.6, 0.75, 1.0),
        images=2000,
        most_seeds=10,
    ),
    Case(
        "Five residual networks for five tasks",
        *("residual", residual_network, Recipe(epochs=4, peak=5e-3)),
        tasks=("low", "high", "parity", "clothes", "accessories"),
        shares=(0.6, 0.75, 1.0),
        images=2000,
        most_seeds=1,
    ),
    Case(
        "Two plain networks",
        *("three-convolutions", plain_network, Recipe(epochs=1, peak=5e-3)),
        tasks=("digits", "fashion"),
        shares=(0.75, 1.0),
        images=1000,
        most_seeds=10,
    ),
)


@dataclass(frozen=True)
class Data:
    """Training and test images of every task."""

    training: Mapping[str, Split]
    test: Mapping[str, Split]

    @classmethod
    def read(cls, source: Path) -> Data:
        training, test = (
            {task: TASKS[task].split(full[TASKS[task].source]) for task in TASKS}
            for full in ({name: read_split(source, name, split) for name in FOLDERS} for split in ("train", "t10k"))
        )
        return cls(training, test)

    def calibration(self, tasks: tuple[str, ...], images: int, seed: int) -> dict[str, Tensor]:
        """Images of every task, drawn from its training images."""
        draw = torch.Generator().manual_seed(seed)
        return {
            task: self.training[task].images[torch.randperm(len(self.training[task].images), generator=draw)[:images]]
            for task in tasks
        }

    def errors(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        """Test errors in percent."""
        return {task: test_error(network, self.test[task]) for task, network in networks.items()}


@dataclass(frozen=True)
class Result:
    """What one method made of the networks of one seed: bytes stored, of how many, test errors in percent."""

    share: float
    method: str
    stored: int
    original: int
    errors: Mapping[str, float]

    def __str__(self) -> str:
        stored = f"{self.stored / self.original:.1%} stored"
        return f"{self.share:.0%} shared by {self.method}, {stored}, {percentages(self.errors)}"


def percentages(errors: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {error:.2f} %" for task, error in errors.items())


@torch.no_grad()
def reestimate(network: nn.Module, images: Tensor) -> None:
    """Replace the statistics of every normalisation by those of what the network itself computes on `images`."""
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.reset_running_stats()
            part.momentum = None  # a plain mean over the batches
    network.train()
    for batch in torch.split(images, 100):
        network(batch)
    network.eval()


@dataclass(frozen=True)
class Run:
    """Everything measured with the networks of one seed, and the originals' test errors."""

    originals: Mapping[str, float]
    results: Sequence[Result]


def originals(case: Case, seed: int, data: Data) -> tuple[dict[str, nn.Module], dict[str, float]]:
    """The networks of one seed and their test errors."""
    networks = case.networks(data, seed)
    errors = data.errors(networks)
    print(f"{case.title}, seed {seed}: originals, {percentages(errors)}", flush=True)
    return networks, errors


def run(case: Case, seed: int, data: Data) -> Run:
    """Measure with the networks of one seed."""
    networks, errors = originals(case, seed, data)
    results = []
    for result in measure(case, networks, seed, data):
        print(f"{case.title}, seed {seed}: {result}", flush=True)
        results.append(result)
    return Run(errors, results)


def measure(case: Case, networks: Mapping[str, nn.Module], seed: int, data: Data) -> Iterator[Result]:
    """Zip networks by every method and share."""
    calibration = data.calibration(case.tasks, case.images, seed)
    for share in case.shares:
        for method in METHODS:
            zipped = mtz_core.zip_networks(networks, calibration, ZipConfig(method=method, share=share, seed=seed))
            alone = {task: zipped.network(task) for task in case.tasks}
            sizes = zipped.report.stored_bytes, zipped.report.original_bytes
            yield Result(share, method, *sizes, data.errors(alone))
            if method == "paper":
                for task, network in alone.items():
                    reestimate(network, calibration[task])
                yield Result(share, "paper, BN re-estimated", *sizes, data.errors(alone))


def table(case: Case, runs: list[Run]) -> list[str]:
    """A table with a line for every share and method, which are the same in all runs."""
    text = "; ".join(f"`{task}`: {TASKS[task].text} ({len(TASKS[task].classes)} classes)" for task in case.tasks)
    seeds = f"mean over {len(runs)} seeds (standard deviation in brackets)" if len(runs) > 1 else "one seed"
    before = np.array([list(run.originals.values()) for run in runs])
    lines = [
        f"## {case.title}",
        "",
        f"{text}. {case.images:,} calibration images per task; {seeds}.",
        "",
        f"| shared | stored | method | {' | '.join(case.tasks)} | largest rise |",
        "|---|---|---|" + "---|" * (len(case.tasks) + 1),
        f"| | 100 % ({runs[0].results[0].original / 1024:,.0f} KiB) | originals | {_cells(before)} | |",
    ]
    for results in zip(*(run.results for run in runs), strict=True):
        after = np.array([list(result.errors.values()) for result in results])
        stored = float(np.mean([result.stored for result in results]))
        lines.append(
            f"| {100 * results[0].share:.0f} % | {100 * stored / results[0].original:.1f} % ({stored / 1024:,.0f} KiB) "
            f"| {results[0].method} | {_cells(after)} | {(after - before).mean(axis=0).max():+.2f} |"
        )
    return [*lines, ""]


def _cells(errors: Float64[np.ndarray, "seeds tasks"]) -> str:
    pairs = zip(errors.mean(axis=0), errors.std(axis=0), strict=True)
    return " | ".join(f"{mean:.2f} ({spread:.2f})" if len(errors) > 1 else f"{mean:.2f}" for mean, spread in pairs)


def as_markdown(tables: list[str], seeds: int) -> str:
    lines = [
        "# Zipping networks with batch normalisation, without retraining",
        "",
        "Test error in percent on the tasks' full test sets. `shared`: the share of every neuron group's neurons that "
        "is shared; `stored`: bytes of all that is stored, weights and statistics; `largest rise`: of the tasks' rises "
        "over the originals, in points. No labels and no retraining. `BN re-estimated`: the zipped network then "
        "computes the statistics of every normalisation anew on the calibration images.",
        "",
        "The residual network: a strided 3×3 convolution, three stages of two basic blocks (16, 32 and 64 channels; "
        "strided 1×1 convolutions as shortcuts where the shape changes), batch normalisation everywhere, global "
        "average pooling, one linear layer. The plain network: three strided 3×3 convolutions (16, 32 and 64 "
        "channels), each with batch normalisation, and the same end. Every network is trained from scratch, from a "
        "seed of its own: residual ones for 4 epochs, plain ones for one.",
        "",
        f"Made by `make bench-residual` ({seeds} seeds).",
        "",
        *tables,
    ]
    return "\n".join(lines).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3, help="how many times pairs are trained and zipped")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--train-only", action="store_true", help="train the networks that are missing, and stop")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/residual.md"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = Data.read(data_folder(parser))
    if options.train_only:
        for case in CASES:
            for seed in case.seeds(options.seeds):
                originals(case, seed, data)
        return
    tables = [line for case in CASES for line in table(case, [run(case, s, data) for s in case.seeds(options.seeds)])]
    with whole_file(options.out) as temporary:
        temporary.write_text(as_markdown(tables, options.seeds))


if __name__ == "__main__":
    main()
