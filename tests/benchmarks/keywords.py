"""Keyword heads of unequal widths, zipped: ``python -m tests.benchmarks.keywords`` (`make bench-keywords`).

Four networks, each of which tells one keyword by one sigmoid output, read sixteen frames of 96 features, as wake-word
heads do. Features are made up from seeds: a keyword is a path through a few directions, other speech is paths through
others, and no two frames are without noise. Counted are hits of the originals that the zipped networks miss, and what
they hear that the originals do not. Writes `docs/benchmarks/keywords.md`.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mtz_core import Budget, ZipConfig, ZippedNetwork, retrain, zip_networks
from mtz_core.errors import InvalidConfig
from mtz_core.evaluation import outputs_of
from mtz_core.settings import RetrainConfig
from tasks.files import whole_file
from tests.benchmarks.records import DOCS

WIDTHS: Mapping[str, int] = {"alpha": 128, "bravo": 64, "charlie": 32, "delta": 128}
"""The width of the hidden layers of each keyword's head."""

SIZES = (0.9, 0.75, 0.5)
FRAMES, FEATURES = 16, 96
SOUNDS, STEPS_OF_A_WORD = 12, 5
STEPS, BATCH, PEAK = 600, 64, 2e-3
CALIBRATION, TESTED = 800, 4000
RETRAINING = RetrainConfig(iterations=100)
PAGE = DOCS / "keywords.md"


class Head(nn.Sequential):
    """Two hidden layers, with or without layer normalisation, and one output."""

    def __init__(self, width: int, normalised: bool) -> None:
        norms = [nn.LayerNorm(width) if normalised else nn.Identity() for _ in range(2)]
        super().__init__(
            *(nn.Flatten(), nn.Linear(FRAMES * FEATURES, width), norms[0], nn.ReLU()),
            *(nn.Linear(width, width), norms[1], nn.ReLU(), nn.Linear(width, 1), nn.Sigmoid()),
        )


@dataclass(frozen=True)
class Speech:
    """Made-up features of speech, and which of it is the keyword."""

    features: Float[Tensor, "n FRAMES FEATURES"]
    keyword: Bool[Tensor, " n"]


def speech(word: str, count: int, seed: int) -> Speech:
    """Draw speech, half of it the keyword: spoken faster or slower, earlier or later, with noise."""
    sounds = np.random.default_rng(0).normal(size=(SOUNDS, FEATURES))
    words = {name: np.random.default_rng(1 + i).permutation(SOUNDS)[:STEPS_OF_A_WORD] for i, name in enumerate(WIDTHS)}
    draw = np.random.default_rng(1000 + 10 * seed + list(WIDTHS).index(word))
    keyword = draw.random(count) < 0.5
    features = draw.normal(0, 1.0, size=(count, FRAMES, FEATURES))
    for own, hit in zip(features, keyword, strict=True):
        path = words[word] if hit else _other(draw, words, word)
        start, end = draw.integers(0, 4), FRAMES - draw.integers(0, 4)
        steps = np.linspace(0, STEPS_OF_A_WORD - 1e-6, end - start).astype(int)
        own[start:end] += draw.uniform(0.6, 1.3) * sounds[path[steps]]
    return Speech(torch.from_numpy(features.astype(np.float32)), torch.from_numpy(keyword))


def _other(draw: np.random.Generator, words: Mapping[str, np.ndarray], word: str) -> np.ndarray:
    """Another keyword, the keyword with one sound changed, or any sounds."""
    kind = draw.integers(3)
    if kind == 0:
        return words[draw.choice([name for name in words if name != word])]
    if kind == 1:
        changed = words[word].copy()
        changed[draw.integers(STEPS_OF_A_WORD)] = draw.choice(np.setdiff1d(np.arange(SOUNDS), changed))
        return changed
    return draw.integers(0, SOUNDS, size=STEPS_OF_A_WORD)


def head(word: str, normalised: bool) -> nn.Module:
    """Train the head of a keyword; the same each time on one machine."""
    torch.manual_seed(list(WIDTHS).index(word))
    network, data = Head(WIDTHS[word], normalised), speech(word, 8000, 0)
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK, total_steps=STEPS)
    for _ in range(STEPS):
        index = torch.randint(len(data.features), (BATCH,))
        optimiser.zero_grad(set_to_none=True)
        F.binary_cross_entropy(network(data.features[index])[:, 0], data.keyword[index].float()).backward()
        optimiser.step()
        schedule.step()
    return network.eval()


@dataclass(frozen=True)
class Heard:
    """Of one keyword: what the original hears, what of it is missed, and what is heard that it does not hear."""

    hits: int
    missed: int
    added: int

    @classmethod
    def of(cls, outputs: Tensor, original: Tensor) -> Heard:
        found, hits = outputs[:, 0] > 0.5, original[:, 0] > 0.5
        return cls(int(hits.sum()), int((hits & ~found).sum()), int((found & ~hits).sum()))

    def __str__(self) -> str:
        return f"{self.missed} of {self.hits}, {self.added}"


@dataclass(frozen=True)
class Row:
    """One way of zipping: stored bytes of the originals', CPU seconds, what is heard before and after retraining."""

    name: str
    stored: float
    seconds: float
    before: Mapping[str, Heard]
    after: Mapping[str, Heard]

    def __str__(self) -> str:
        cells = " | ".join(f"{self.before[word]} → {self.after[word]}" for word in WIDTHS)
        return f"| {self.name} | {100 * self.stored:.1f} % | {cells} | {self.seconds:.0f} |"


def page(tables: Mapping[str, Sequence[str]]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Four keyword heads of unequal widths",
        "",
        "Each tells one keyword by one sigmoid output, with two hidden layers of "
        f"{', '.join(map(str, WIDTHS.values()))} neurons. Features are made up (`tests/benchmarks/keywords.py`). The "
        f"kind of output is guessed. {CALIBRATION} calibration inputs a keyword; {TESTED:,} others are heard.",
        "",
        "Cells: hits of the original that are missed, of how many, and what is heard that the original does not hear; "
        "behind the arrow after light retraining (distillation, no labels). Only *all moves* round weights.",
        "",
        "Made by `make bench-keywords`.",
        "",
    ]
    for title, rows in tables.items():
        lines += [f"## {title}", ""]
        lines += [f"| | stored | {' | '.join(WIDTHS)} | CPU s |", "|---|---|" + "---|" * (len(WIDTHS) + 1), *rows, ""]
    return "\n".join(lines).rstrip() + "\n"


def measure(normalised: bool) -> list[str]:
    """The rows of one kind of head."""
    networks = {word: head(word, normalised) for word in WIDTHS}
    tests = {word: speech(word, TESTED, 2) for word in WIDTHS}
    calibration = {word: speech(word, CALIBRATION, 1).features for word in WIDTHS}
    held_out = {word: speech(word, CALIBRATION // 4, 3).features for word in WIDTHS}
    targets = {word: outputs_of(networks[word], [own.features]) for word, own in tests.items()}
    right = [100 * float(((targets[w][:, 0] > 0.5) == own.keyword).double().mean()) for w, own in tests.items()]
    rows = [f"| originals, % right | 100 % | {' | '.join(f'{share:.1f}' for share in right)} | |"]

    def heard(zipped: ZippedNetwork) -> dict[str, Heard]:
        return {
            word: Heard.of(outputs_of(partial(zipped, task=word), [own.features]), targets[word])
            for word, own in tests.items()
        }

    budgets = {f"to {100 * size:g} %": Budget(size=size, moves=("share", "drop")) for size in SIZES}
    for name, budget in {"to 75 %, all moves": Budget(size=0.75), **budgets, "everything shared": None}.items():
        started = time.process_time()
        try:
            zipped = zip_networks(networks, calibration, ZipConfig(budget=budget))
        except InvalidConfig as error:
            rows.append(f"| {name} | {error} |{' |' * (len(WIDTHS) + 1)}")
            print(rows[-1], flush=True)
            continue
        seconds, before = time.process_time() - started, heard(zipped)
        retrain(zipped, networks, calibration, held_out, RETRAINING)
        stored = zipped.report.stored_bytes / zipped.report.original_bytes
        rows.append(str(Row(name, stored, seconds, before, heard(zipped))))
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    tables = {"Without normalisation": measure(False), "With layer normalisation": measure(True)}
    with whole_file(PAGE) as temporary:
        temporary.write_text(page(tables))
    print(f"table: {PAGE}")


if __name__ == "__main__":
    main()
