"""The table of fleets, two or three small networks of one topology, for the laws of sizes and of plans."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from itertools import compress

import numpy as np
import torch
from torch import Tensor, nn

from mtz_core import Budget, ZipConfig, ZippedNetwork
from mtz_core.merging.compatibility import why_separate
from mtz_core.merging.pairing import Pairing
from mtz_core.merging.walk import finish, merge
from mtz_core.network.graph import Network
from mtz_core.network.narrowing import LEAST, Dropper
from mtz_core.network.tracing import trace
from mtz_core.planning.planner import Planner
from mtz_core.planning.sizes import Bits, Sizes, owner_sets
from mtz_core.settings import BITS, Move
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.ownership import NOT_A_MEMBER
from mtz_core.zipped.structure import scale_name
from tests.support.networks import Residual, joined, lenet5, mlp, sensitivities_of_traced

BOTH: tuple[Move, ...] = ("share", "drop")


@dataclass(frozen=True)
class Fleet:
    """Networks by task, made anew at every call, and the shape of what each reads."""

    name: str
    make: Callable[[], Mapping[str, nn.Module]]
    shapes: tuple[tuple[int, ...], ...]
    keep_separate: tuple[str, ...] = ()
    dtype: torch.dtype = torch.float32

    def examples(self, count: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        return {
            task: torch.randn(count, *shape, generator=generator, dtype=self.dtype)
            for task, shape in zip("abc", self.shapes, strict=False)
        }


class Depthwise(nn.Module):
    """Channels are widened, convolved one by one, normalised, and narrowed onto a residual stream."""

    def __init__(self, stream: int, inner: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, stream, 3)
        self.widen, self.each = nn.Conv2d(stream, inner, 1), nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.norm, self.narrow = nn.BatchNorm2d(inner), nn.Conv2d(inner, stream, 1, bias=False)
        self.head = nn.Linear(stream, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        x = x + self.narrow(self.norm(self.each(self.widen(x).relu())).relu())
        out: Tensor = self.head(x.mean((2, 3)))
        return out


class Beside(nn.Module):
    """A layer that reads flattened positions beside pooled ones."""

    def __init__(self, pixels: int, flat: int, pooled: int) -> None:
        super().__init__()
        self.flat, self.pooled = nn.Conv2d(1, flat, 1), nn.Conv2d(1, pooled, 3, padding=1)
        self.hidden, self.head = nn.Linear(flat * pixels + pooled, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.flat(x).relu().flatten(1), self.pooled(x).relu().mean((2, 3))], dim=1)
        out: Tensor = self.head(self.hidden(both).relu())
        return out


class Normalised(nn.Module):
    """A residual stream that is normalised; in groups, its neurons can be shared but not dropped."""

    def __init__(self, norm: nn.Module, stream: int, inner: int) -> None:
        super().__init__()
        self.stem, self.norm = nn.Linear(7, stream), norm
        self.up, self.down, self.head = nn.Linear(stream, inner), nn.Linear(inner, stream), nn.Linear(stream, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out: Tensor = self.head(x + self.down(self.up(self.norm(x)).relu()))
        return out


def coloured(channels: int, widths: tuple[int, ...]) -> nn.Module:
    network = Residual(widths, 3)
    network.stem[0] = nn.Conv2d(channels, widths[0], 3, padding=1)
    return network


IMAGE, SMALL = (1, 20, 20), (1, 6, 5)
FLEETS = {
    fleet.name: fleet
    for fleet in (
        Fleet("two mlps", lambda: {t: mlp((9, 7), 3) for t in "ab"}, ((12,), (12,))),
        Fleet("three mlps", lambda: {t: mlp((9, 7), 3) for t in "abc"}, ((12,),) * 3),
        Fleet(
            "other widths and classes",
            lambda: {"a": mlp((9, 7), 3), "b": mlp((6, 10), 5), "c": mlp((8, 8), 4)},
            ((12,),) * 3,
            dtype=torch.float64,
        ),
        Fleet(
            "no bias, other inputs",
            lambda: {"a": mlp((9, 7), 3, bias=False), "b": mlp((8, 9), 3, inputs=8, bias=False)},
            ((12,), (8,)),
        ),
        Fleet("lenet-5", lambda: {"a": lenet5((4, 6, 10), 3), "b": lenet5((5, 4, 12), 4)}, (IMAGE, IMAGE)),
        Fleet("residual", lambda: {"a": Residual((5, 4, 6), 3), "b": Residual((6, 5, 4), 3)}, (SMALL, SMALL)),
        Fleet(
            "three residual, other channels",
            lambda: {"a": coloured(1, (5, 4, 6)), "b": coloured(3, (5, 6, 4)), "c": coloured(1, (6, 4, 5))},
            (SMALL, (3, 6, 5), SMALL),
        ),
        Fleet(
            "kept separate",
            lambda: {t: Residual((5, 4, 6), 3) for t in "ab"},
            (SMALL, SMALL),
            keep_separate=("branches.0.0",),
        ),
        Fleet("depthwise", lambda: {"a": Depthwise(4, 6, 3), "b": Depthwise(5, 7, 3)}, (SMALL, (1, 7, 7))),
        Fleet(
            "concatenated, other sizes",
            lambda: {"a": Beside(20, 3, 4), "b": Beside(24, 4, 5)},
            ((1, 4, 5), (1, 4, 6)),
        ),
        Fleet(
            "layer norm",
            lambda: {t: Normalised(nn.LayerNorm(6), 6, inner) for t, inner in (("a", 8), ("b", 9))},
            ((7,), (7,)),
        ),
        Fleet(
            "norm of groups",
            lambda: {t: Normalised(nn.GroupNorm(2, 6), 6, inner) for t, inner in (("a", 8), ("b", 9))},
            ((7,), (7,)),
        ),
    )
}


@cache
def traced_fleet(name: str) -> Mapping[str, Network]:
    fleet = FLEETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(2)
        modules = {task: module.to(fleet.dtype).eval() for task, module in fleet.make().items()}
    examples = fleet.examples(2)
    return {task: trace(module, examples[task], fleet.keep_separate) for task, module in modules.items()}


@cache
def droppable(name: str) -> frozenset[str]:
    """The groups that all networks of a fleet can lose neurons of."""
    examples = FLEETS[name].examples(4)
    found = [Dropper(network).droppable(examples[task]) for task, network in traced_fleet(name).items()]
    return frozenset.intersection(*map(frozenset, found))


CONFIG = ZipConfig(budget=Budget(size=0.5), patches=9, refit_rounds=1)
EXAMPLES = 30


@cache
def statistics(name: str) -> tuple[dict[str, dict[str, Moments]], dict[str, Sensitivities]]:
    networks, examples = traced_fleet(name), FLEETS[name].examples(EXAMPLES)
    moments = {task: original_moments(n, as_batches(examples[task], task), CONFIG) for task, n in networks.items()}
    return moments, sensitivities_of_traced(networks, examples)


@cache
def measured_fleet(name: str) -> Mapping[str, Traced]:
    """The networks of a fleet, with all statistics."""
    batches = {task: as_batches(examples, task) for task, examples in FLEETS[name].examples(EXAMPLES).items()}
    return joined(traced_fleet(name), *statistics(name), batches)


@cache
def planner(name: str, moves: tuple[Move, ...] = BOTH) -> Planner:
    return Planner(measured_fleet(name), CONFIG, moves)


# Drawn at random


Kept = dict[str, dict[str, np.ndarray]]


def drawn(
    name: str, seed: int, drop: bool = True, share: bool = True, some: bool = False
) -> tuple[Kept, dict[str, Pairing]]:
    """Neurons that each task keeps, and tuples of those that are one, of all tasks or of some."""
    networks, generator = traced_fleet(name), np.random.default_rng(seed)
    graph = next(iter(networks.values())).graph
    keep: Kept = {task: {} for task in networks}
    pairings = {}
    for group in graph.hidden_groups:
        left = []
        for task, network in networks.items():
            width = network.graph.widths[group.name]
            count = width
            if drop and group.name in droppable(name) and width > LEAST:
                count = int(generator.integers(LEAST, width + 1))
            keep[task][group.name] = np.sort(generator.permutation(width)[:count])
            left.append(count)
        writers = [node for node in graph.layers if node.name in group.writers]
        possible = share and any(why_separate(networks, node) is None for node in writers)
        shared = int(generator.integers(0, min(left) + 1)) if possible else 0
        tuples = np.stack([generator.permutation(count)[:shared] for count in left], axis=1)
        if some:  # tuples of two and more tasks
            absent = generator.integers(0, len(left), shared)
            tuples[np.arange(shared), absent] = np.where(len(left) > 2, NOT_A_MEMBER, tuples[np.arange(shared), absent])
        pairings[group.name] = Pairing.from_tuples(tuple(networks), left, tuples)
    return keep, pairings


def drawn_bits(sizes: Sizes, seed: int) -> dict[str, np.ndarray]:
    """Bits for the rows of every set of owners in every layer, some of them not rounded."""
    generator = np.random.default_rng(seed)
    offered = (sizes.full_bits, *BITS)
    return {layer: generator.choice(offered, len(sizes.owners)) for layer in sizes.layers}


def names_of(sizes: Sizes, bits: Bits) -> dict[str, int]:
    """The bits of rows by the names of their scales."""
    return {
        scale_name(layer, tuple(compress(sizes.tasks, owners))): number
        for layer, own in bits.items()
        for owners, number in zip(sizes.owners, own.tolist(), strict=True)
        if number < sizes.full_bits
    }


@dataclass(frozen=True, eq=False)
class RoundedFleet:
    """A fleet of which some neurons are shared and dropped, and some rows rounded, all drawn at random."""

    sizes: Sizes
    counts: Mapping[str, np.ndarray]
    bits: Bits
    zipped: ZippedNetwork


@cache
def rounded_fleet(name: str, seed: int, bits: int | None = None) -> RoundedFleet:
    """Merge a fleet; all rows are rounded to `bits` if they are given."""
    keep, pairings = drawn(name, seed, some=bool(seed % 2))
    sizes = Sizes(traced_fleet(name), owner_sets(pairing.members for pairing in pairings.values()))
    chosen = drawn_bits(sizes, seed) if bits is None else sizes.bits_of(bits)
    config = ZipConfig(patches=2, refit_rounds=0, damping=0.1)
    zipped = finish(merge(measured_fleet(name), pairings, config, keep=keep, bits=names_of(sizes, chosen)))
    return RoundedFleet(sizes, {g: sizes.count(pairing.members) for g, pairing in pairings.items()}, chosen, zipped)
