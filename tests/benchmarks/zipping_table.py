"""Errors of zipped LeNets on the full MNIST and Fashion-MNIST, before any retraining: both methods, several counts.

Run by `make bench`. Networks are trained once and kept in `.mtz/benchmarks/`; the table goes to
`docs/benchmarks/zipping.md`.
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mtz_core
from data.build import read_idx
from mtz_core.evaluate import error_rate, predict
from mtz_core.settings import ZipConfig
from tasks.files import whole_file
from tasks.networks import lenet5, lenet_300_100

EPOCHS = 6
BATCH = 128
FOLDERS = {"digits": "mnist", "fashion": "fashion-mnist"}
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
class Split:
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Row:
    """One line of the table: test errors in percent, averaged over seeds, of both tasks."""

    networks: str
    shared: str
    stored: float
    originals: tuple[float, float]
    rises: Mapping[str, list[tuple[float, float]]]
    seconds: Mapping[str, float]


def read_split(source: Path, task: str, split: str) -> Split:
    """A full split from its IDX files, pixels from 0 to 1."""
    folder = source / FOLDERS[task]
    images = read_idx(folder / f"{split}-images-idx3-ubyte.gz", 3)
    labels = read_idx(folder / f"{split}-labels-idx1-ubyte.gz", 1)
    pixels = torch.from_numpy(np.array(images))[:, None].to(torch.float32).div_(255)
    return Split(pixels, torch.from_numpy(np.array(labels)).long())


def trained(case: Case, task: str, seed: int, training: Split, cache: Path) -> nn.Module:
    """A network trained from scratch with Adam and a one-cycle schedule, or the same from an earlier run."""
    path = cache / f"{case.name}-{task}-{seed}-{EPOCHS}.safetensors"
    torch.manual_seed(seed)
    network = case.build()
    if path.exists():
        network.load_state_dict(load_file(path))
        return network.eval()
    steps = len(training.images) // BATCH
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=EPOCHS * steps)
    started = time.perf_counter()
    for _ in range(EPOCHS):
        for index in torch.split(torch.randperm(len(training.images)), BATCH)[:steps]:
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(network(training.images[index]), training.labels[index]).backward()
            optimiser.step()
            schedule.step()
    print(f"trained {case.name} for {task}, seed {seed} ({time.perf_counter() - started:.0f} s)", flush=True)
    with whole_file(path) as temporary:
        save_file(network.state_dict(), temporary)
    return network.eval()


def test_error(network: Callable[[Tensor], Tensor], test: Split) -> float:
    return error_rate(predict(network, torch.split(test.images, 500)), test.labels)


def measure(source: Path, cache: Path, seeds: int) -> Iterator[Row]:
    training = {task: read_split(source, task, "train") for task in FOLDERS}
    test = {task: read_split(source, task, "t10k") for task in FOLDERS}
    for case in CASES:
        for pair in PAIRS:
            for share in case.shares:
                originals, rises = [], {method: list[tuple[float, float]]() for method in METHODS}
                seconds = dict.fromkeys(METHODS, 0.0)
                for seed in range(seeds):
                    networks = {
                        side: trained(case, task, 10 * seed + i, training[task], cache)
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
    source = Path(os.environ.get("MTZ_FULL_DATA", "../shared/data"))
    if not (source / FOLDERS["digits"]).is_dir():
        parser.error(
            f"the full data sets are not in {source}: set MTZ_FULL_DATA to the folder of both (data/README.md)"
        )
    torch.set_num_threads(options.threads)
    rows = []
    for row in measure(source, Path(".mtz/benchmarks"), options.seeds):
        rows.append(row)
        print(as_markdown([row], options.seeds).splitlines()[-1], flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(options.out) as temporary:
        temporary.write_text(as_markdown(rows, options.seeds))


if __name__ == "__main__":
    main()
