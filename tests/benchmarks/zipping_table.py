"""Errors of zipped LeNets on the full MNIST and Fashion-MNIST, before any retraining: both methods, several counts.

Run by `make bench`. Networks are trained once and kept in `.mtz/benchmarks/`; the table goes to
`docs/benchmarks/zipping.md`.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn

import mtz_core
from mtz_core.settings import ZipConfig
from tasks.files import whole_file
from tasks.networks import lenet5, lenet_300_100
from tests.benchmarks.full_data import FOLDERS, data_folder, read_split, test_error
from tests.benchmarks.training import Recipe, trained

RECIPE = Recipe(epochs=6, peak=2e-3)
METHODS: Mapping[str, ZipConfig] = {
    "paper": ZipConfig(method="paper"),
    "refit, one sweep": ZipConfig(sweeps=0),
    "refit": ZipConfig(),
}


@dataclass(frozen=True)
class Case:
    """Networks to zip: how they are built, calibration images per task, counts to share."""

    name: str
    build: Callable[[], nn.Module]
    images: int
    shares: tuple[float | dict[str, int], ...]


CASES = (
    Case("LeNet-300-100", lenet_300_100, 5000, (1.0, {"1": 250, "3": 80}, {"1": 200, "3": 67})),
    Case("LeNet-5", lenet5, 2000, (1.0, {"0": 15, "3": 38, "7": 375})),
)
PAIRS = (("digits", "fashion"), ("digits", "digits"))


@dataclass(frozen=True)
class Row:
    """One line of the table: test errors in percent, averaged over seeds, of both tasks."""

    networks: str
    shared: str
    stored: float
    originals: tuple[float, float]
    rises: Mapping[str, list[tuple[float, float]]]
    seconds: Mapping[str, float]


def measure(source: Path, seeds: int) -> Iterator[Row]:
    training = {task: read_split(source, task, "train") for task in FOLDERS}
    test = {task: read_split(source, task, "t10k") for task in FOLDERS}
    for case in CASES:
        for pair in PAIRS:
            for share in case.shares:
                originals, rises = [], {method: list[tuple[float, float]]() for method in METHODS}
                seconds = dict.fromkeys(METHODS, 0.0)
                for seed in range(seeds):
                    networks = {
                        side: trained(f"{case.name}-{task}", case.build, training[task], RECIPE, 10 * seed + i)
                        for i, (side, task) in enumerate(zip("ab", pair, strict=True))
                    }
                    tasks = dict(zip("ab", pair, strict=True))
                    before = {side: test_error(network, test[tasks[side]]) for side, network in networks.items()}
                    originals.append(tuple(before.values()))
                    draw = torch.Generator().manual_seed(seed)
                    calibration = {
                        side: training[task].images[
                            torch.randperm(len(training[task].images), generator=draw)[: case.images]
                        ]
                        for side, task in tasks.items()
                    }
                    for method in METHODS:
                        started = time.perf_counter()
                        config = replace(METHODS[method], share=share, seed=seed)
                        zipped = mtz_core.zip_networks(networks, calibration, config)
                        seconds[method] += (time.perf_counter() - started) / seeds
                        after = {
                            side: test_error(partial(zipped, task=side), test[task]) for side, task in tasks.items()
                        }
                        rises[method].append((after["a"] - before["a"], after["b"] - before["b"]))
                first, second = np.mean(originals, axis=0)
                counts = "-".join(str(count) for count in share.values()) if isinstance(share, dict) else "all"
                yield Row(
                    f"{case.name}, {pair[0]} + {pair[1]}",
                    counts,
                    zipped.report.stored_fraction,
                    (float(first), float(second)),
                    rises,
                    seconds,
                )


def as_markdown(rows: list[Row], seeds: int) -> str:
    lines = [
        "# Zipping without retraining",
        "",
        "Test error in percent on the full test sets (10,000 images each), mean over "
        f"{seeds} seeds (standard deviation in brackets) of training, calibration sample and patch sample. "
        "`originals`: the networks before zipping; the other columns: rise over them. Calibration: 5,000 images per "
        "task for LeNet-300-100, 2,000 for LeNet-5. No labels and no retraining.",
        "",
        f"Made by `make bench` with {torch.get_num_threads()} threads, torch {torch.__version__}, "
        f"{platform.machine()}; seconds are of a zip with this method, side by side in one run; "
        "compare within a row only.",
        "",
        f"| networks | shared | stored | originals | {' | '.join(METHODS)} | seconds, same order |",
        "|---|---|---|---|" + "---|" * (len(METHODS) + 1),
    ]
    for row in rows:
        cells = []
        for method in METHODS:
            mean, deviation = np.mean(row.rises[method], axis=0), np.std(row.rises[method], axis=0)
            cells.append(" / ".join(f"{m:+.2f} ({d:.2f})" for m, d in zip(mean, deviation, strict=True)))
        lines.append(
            f"| {row.networks} | {row.shared} | {100 * row.stored:.0f} % | {row.originals[0]:.2f} / "
            f"{row.originals[1]:.2f} | {' | '.join(cells)} | "
            f"{' / '.join(f'{row.seconds[method]:.1f}' for method in METHODS)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="how many times everything is trained and zipped")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks/zipping.md"))
    options = parser.parse_args()
    source = data_folder(parser)
    torch.set_num_threads(options.threads)
    rows = []
    for row in measure(source, options.seeds):
        rows.append(row)
        print(as_markdown([row], options.seeds).splitlines()[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(options.out) as temporary:
        temporary.write_text(as_markdown(rows, options.seeds))


if __name__ == "__main__":
    main()
