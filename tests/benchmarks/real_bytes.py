"""Error against real bytes: rounding, deltas, dropping and sharing, alone and together (`make bench-bytes`).

Fleets of four related networks (`tests.benchmarks.fleets`) and pairs of unrelated ones (`tests.benchmarks.accuracy`).
Bytes are all that is stored: weights or codes, scales, biases. Nothing is retrained, and no labels are read.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from mtz_core.merging.rounding import choose_scales
from mtz_core.merging.walk import finish, merge
from mtz_core.planning.search import BudgetSearch
from mtz_core.settings import MOVES, Budget, Move, ZipConfig
from mtz_core.zipped.codes import SCALES, nearest, packed_bytes
from mtz_core.zipped.structure import scale_name
from tasks.files import whole_file
from tasks.studies.charts import Curve, Panel, draw_curves
from tests.benchmarks.accuracy import PAIRS
from tests.benchmarks.fleet_curves import budget_search
from tests.benchmarks.fleets import fleet_networks, member_split
from tests.benchmarks.full_data import FOLDERS, Split, data_folder, read_split, test_error
from tests.benchmarks.records import DOCS, Records
from tests.benchmarks.training import trained

FLEET_SIZES = (0.5, 0.38, 0.26, 0.13)
"""Bytes of four related networks, relative to one original."""

PAIR_SIZES = (0.25, 0.125, 0.0625)
"""Bytes of two unrelated networks, relative to both originals."""

BY_MOVES: Mapping[str, tuple[Move, ...]] = {
    "this project, all moves": MOVES,
    "this project, drop and round": ("drop", "round"),
    "this project, round only": ("round",),
    "this project, share and drop": ("share", "drop"),
}
FAMILIES = {"each alone, ": "to nearest", "each alone": "optimal brain quantisation", "mean in 8 bits": "deltas"}
"""Ways with a size of their own: how their names begin, and what tells them apart."""

HIGHEST = 0.5
"""Points that rise more are not in the figure."""

PAGE, FIGURE = DOCS / "real-bytes.md", DOCS / "real-bytes.svg"


@dataclass(frozen=True)
class Case:
    """Networks that are to be stored, with what every way is given."""

    name: str
    networks: Mapping[str, nn.Module]
    calibration: Mapping[str, Tensor]
    test: Mapping[str, Split]
    seed: int

    @property
    def original_bytes(self) -> int:
        return sum(own.numel() * own.element_size() for n in self.networks.values() for own in n.parameters())

    def error(self, networks: Mapping[str, Callable[[Tensor], Tensor]]) -> float:
        """The mean test error, in percent."""
        return float(np.mean([test_error(networks[task], own) for task, own in self.test.items()]))


State = dict[str, Tensor]
Networks = dict[str, Callable[[Tensor], Tensor]]


def to_nearest(state: Mapping[str, Tensor], bits: Callable[[str], int]) -> tuple[State, int]:
    """A state with weights rounded to nearest, row by row, each scale of least squared error; and its bytes."""
    found, stored = {}, 0
    for name, tensor in state.items():
        if tensor.ndim < 2:
            found[name] = tensor
            stored += tensor.numel() * tensor.element_size()
            continue
        rows = tensor.flatten(1).double()
        if bits(name) == 1:
            scales = 2 * rows.abs().mean(dim=1)  # of one bit, the best levels are the mean, up and down
        else:
            scales = choose_scales(rows, torch.ones(rows.shape[1], dtype=torch.float64), bits(name))
        found[name] = nearest(rows, scales[:, None], bits(name)).reshape(tensor.shape).to(tensor.dtype)
        stored += packed_bytes(tensor.numel(), bits(name)) + len(rows) * SCALES.itemsize
    return found, stored


def rounded_alone(case: Case, bits: int) -> tuple[Networks, int]:
    """Each network rounded to nearest by itself, without data."""
    found = {task: to_nearest(network.state_dict(), lambda _: bits) for task, network in case.networks.items()}
    networks: Networks = {
        task: partial(functional_call, case.networks[task], state) for task, (state, _) in found.items()
    }
    return networks, sum(stored for _, stored in found.values())


def mean_and_deltas(case: Case, bits: int) -> tuple[Networks, int]:
    """The mean of the hidden layers in 8 bits, each network's difference from it in few; output layers in 8 bits."""
    states = {task: network.state_dict() for task, network in case.networks.items()}
    *hidden, _, _ = next(iter(states.values()))
    mean = {name: torch.stack([state[name] for state in states.values()]).mean(dim=0) for name in hidden}
    base, stored = to_nearest({name: own for name, own in mean.items() if own.ndim > 1}, lambda _: 8)
    networks: Networks = {}
    for task, state in states.items():
        rest = {name: own - base[name] if name in base else own for name, own in state.items()}
        delta, more = to_nearest(rest, lambda name: bits if name in base else 8)
        stored += more
        whole = {name: own + base[name] if name in base else own for name, own in delta.items()}
        networks[task] = partial(functional_call, case.networks[task], whole)
    return networks, stored


def quantised_alone(search: BudgetSearch, bits: int) -> tuple[Networks, int]:
    """Each network rounded by itself with its calibration data, every layer to the same bits."""
    plan = search.planner.whole()
    every = {
        scale_name(layer.name, (task,)): bits
        for task, own in search.traced.items()
        for layer in own.network.graph.layers
    }
    zipped = finish(merge(search.traced, plan.pairings, search.config, (), plan.keep, {}, every))
    return {task: partial(zipped, task=task) for task in zipped.tasks}, zipped.report.stored_bytes


def fixed(case: Case, search: BudgetSearch, related: bool) -> Iterator[tuple[str, Networks, int]]:
    """The ways whose sizes cannot be chosen."""
    for bits in (8, 4, 3, 2):
        yield f"each alone, {bits} bits, to nearest", *rounded_alone(case, bits)
        yield f"each alone, {bits} bits, optimal brain quantisation", *quantised_alone(search, bits)
    for bits in (4, 3, 2, 1) if related else ():
        yield f"mean in 8 bits + deltas in {bits}", *mean_and_deltas(case, bits)


def measure(case: Case, sizes: tuple[float, ...], unit: int, related: bool, records: Records) -> None:
    """Measure every way on one case; sizes are relative to the bytes of all networks divided by `unit`."""
    key = {"case": case.name, "seed": case.seed}
    if all(records.has(**key, way=way, size=size) for way in BY_MOVES for size in sizes):
        return
    before = case.error(case.networks)

    def keep(way: str, size: float | None, stored: int, error: float, seconds: float, plan: str = "") -> None:
        share = unit * stored / case.original_bytes
        records.add(
            {
                **key,
                "way": way,
                "size": size,
                "stored": share,
                "rise": error - before,
                "original": before,
                "seconds": seconds,
                "plan": plan,
            }
        )
        print(
            f"{case.name}, seed {case.seed}: {way}, {share:.3f}: {error - before:+.3f} ({seconds:.0f} s) {plan}",
            flush=True,
        )

    for way, moves in BY_MOVES.items():
        search: BudgetSearch | None = None
        for size in sizes:
            if records.has(**key, way=way, size=size):
                continue
            started = time.process_time()
            if search is None:
                config = ZipConfig(budget=Budget(size=1.0, moves=moves), seed=case.seed)
                search = budget_search(case.networks, case.calibration, config)
            if search.planner.least_bytes > size / unit * search.planner.original_bytes:
                continue
            best = search.best_of(search.candidates(size / unit))
            zipped = search.zip(best.plan)
            error = case.error({task: partial(zipped, task=task) for task in zipped.tasks})
            keep(way, size, zipped.report.stored_bytes, error, time.process_time() - started, best.name)
        if moves == ("round",) and search is not None:
            for name, networks, stored in fixed(case, search, related):
                keep(name, None, stored, case.error(networks), 0.0)


def fleet(name: str, count: int, seed: int, data: Mapping[tuple[str, str], Split]) -> Case:
    """Related networks, each with 2,000 calibration images."""
    training = data["digits", "train"]
    networks = fleet_networks(name, count, training, seed)
    images = {task: member_split(name, task, training).images for task in networks}
    test = {task: member_split(name, task, data["digits", "t10k"]) for task in networks}
    return Case(f"{count} networks, {name}", networks, _drawn(images, 2000, 1000 * seed), test, seed)


def pair(number: int, seed: int, data: Mapping[tuple[str, str], Split]) -> Case:
    """Two unrelated networks."""
    own = PAIRS[number]
    networks, images, test = {}, {}, {}
    for place, (task, name) in enumerate(own.tasks.items()):
        images[task], test[task] = data[name, "train"].images, data[name, "t10k"]
        networks[task] = trained(f"{own.network}-{name}", own.build, data[name, "train"], own.recipe, 10 * seed + place)
    return Case(own.name, networks, _drawn(images, own.images, 100 * seed), test, seed)


def _drawn(images: Mapping[str, Tensor], count: int, seed: int) -> dict[str, Tensor]:
    found = {}
    for number, (task, own) in enumerate(images.items()):
        order = torch.randperm(len(own), generator=torch.Generator().manual_seed(seed + number))
        found[task] = own[order[:count]]
    return found


def curves(records: Records, case: str) -> Iterator[Curve]:
    """Rise against bytes by every way; of ways with a size of their own, those that differ in bits alone are one."""
    found: dict[str, dict[object, list[tuple[float, float]]]] = {}
    for row in records.where(case=case):
        way = row["way"].removeprefix("this project, ")
        name = next((told for start, told in FAMILIES.items() if way.startswith(start) and told in way), way)
        found.setdefault(name, {}).setdefault((row["way"], row["size"]), []).append((100 * row["stored"], row["rise"]))
    for name in (*(way.removeprefix("this project, ") for way in BY_MOVES), *FAMILIES.values()):
        points = sorted(tuple(np.mean(own, axis=0)) for own in found.get(name, {}).values())
        if points := [point for point in points if point[1] <= HIGHEST]:
            yield Curve(name, *zip(*points, strict=True))


def page(records: Records) -> Path:
    """Write the tables and a figure."""
    lines = [
        "# Real bytes: rounding, deltas, dropping and sharing",
        "",
        "Rise of the mean test error over the originals', in points, without retraining and without labels. Bytes are",
        "all that is stored (weights or codes, scales, biases), relative to *one* original for related networks, to",
        "all originals for pairs. Networks and calibration images are those of [fleets](fleets.md) and",
        "[accuracy](accuracy.md). Means over the seeds that are named. Bold: the least rise at that size. Ways whose",
        "size cannot be chosen are listed below with theirs; one that is *ahead* rises less than all moves together do",
        "at the next larger size.",
        "",
        "Made by `make bench-bytes`.",
        "",
    ]
    ours = next(iter(BY_MOVES))
    cases = [case for case in dict.fromkeys(row["case"] for row in records.rows) if records.has(case=case, way=ours)]
    for case in cases:
        rows = list(records.where(case=case))
        seeds = sorted({row["seed"] for row in rows})
        lines += [
            f"## {case}",
            "",
            f"Originals: {np.mean([row['original'] for row in rows]):.2f} %; seeds {', '.join(map(str, seeds))}.",
            "",
        ]
        sizes = sorted({row["size"] for row in rows if row["size"] is not None}, reverse=True)
        rise = {
            (way, size): float(np.mean([row["rise"] for row in rows if row["way"] == way and row["size"] == size]))
            for way in BY_MOVES
            for size in sizes
            if any(row["way"] == way and row["size"] == size for row in rows)
        }
        lines += [f"| | {' | '.join(f'{size:g} ×' for size in sizes)} |", "|---|" + "---|" * len(sizes)]
        for way in BY_MOVES:
            cells = []
            for size in sizes:
                best = min(value for (_, at), value in rise.items() if at == size)
                shown = f"{rise[way, size]:+.2f}" if (way, size) in rise else ""
                cells.append(f"**{shown}**" if shown and rise[way, size] <= best + 0.005 else shown)
            lines.append(f"| {way} | {' | '.join(cells)} |")
        lines += ["", "| | bytes | rise | |", "|---|---|---|---|"]
        for way in dict.fromkeys(row["way"] for row in rows if row["size"] is None):
            own = [row for row in rows if row["way"] == way]
            stored, found = (float(np.mean([row[key] for row in own])) for key in ("stored", "rise"))
            larger = [value for (by, at), value in rise.items() if by == ours and at >= stored]
            ahead = "ahead" if larger and found < min(larger) - 0.005 else ""
            lines.append(f"| {way} | {stored:.3f} × | {found:+.2f} | {ahead} |")
        lines.append("")
    panels = [
        Panel(case, list(curves(records, case))) for case in sorted(cases, key=lambda case: "networks" not in case)
    ]
    draw_curves(
        FIGURE,
        panels,
        title="Error against real bytes, no retraining",
        x_label="stored bytes, % of one original (of pairs: of both)",
        y_label="rise of the mean error, points",
        columns=2,
    )
    lines += ["![Rise of the error against stored bytes, for every way](real-bytes.svg)", ""]
    with whole_file(PAGE) as temporary:
        temporary.write_text("\n".join(lines))
    return PAGE


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.real_bytes", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--fleets", nargs="*", default=["labellings", "images"])
    parser.add_argument("--pairs", nargs="*", type=int, default=[0, 1], help="numbers in accuracy.PAIRS")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    source = data_folder(parser)
    torch.set_num_threads(options.threads)
    records = Records("real-bytes", "full")
    data = {(name, split): read_split(source, name, split) for name in FOLDERS for split in ("train", "t10k")}
    for seed in range(options.seeds):
        for number in options.pairs:
            measure(pair(number, seed, data), PAIR_SIZES, 1, False, records)
        for name in options.fleets:
            measure(fleet(name, 4, seed, data), FLEET_SIZES, 4, True, records)
    print(f"tables: {page(records)}")


if __name__ == "__main__":
    main()
