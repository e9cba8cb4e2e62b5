"""Tables and figures out of the measurements: `fleets.md`, `accuracy.md`, `floors.md`, with figures and Parquet beside.

The full setting writes to `docs/benchmarks`, and what README shows of it between its marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tasks.files import whole_file
from tasks.studies.charts import Curve, Panel, draw_curves
from tests.benchmarks import floors
from tests.benchmarks.accuracy import METHODS, PAIRS
from tests.benchmarks.fleet_curves import DROP, FLEETS, MIXTURE, PAPER, SHARE, SIZES
from tests.benchmarks.fleets import DISTORTIONS, LABELLINGS
from tests.benchmarks.records import DOCS, Records, Setting
from tests.benchmarks.training import CACHE

OURS = "this project, planned"
CURVES = {MIXTURE: "share and drop", DROP: "drop only", SHARE: "share only", PAPER: "MTZ as published"}


def spread(values: Iterable[float]) -> str:
    """Mean and standard deviation, or the value if there is one."""
    found = list(values)
    return f"{np.mean(found):.2f} ({np.std(found):.2f})" if len(found) > 1 else f"{found[0]:.2f}"


def seeds_of(rows: Sequence[Mapping[str, Any]]) -> str:
    seeds = sorted({row["seed"] for row in rows})
    return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''} ({', '.join(map(str, seeds))})"


# --- fleets of related networks ---


def fleet_panels(records: Records, fleet: str, column: str) -> list[Panel]:
    """A panel for each number of networks: how much the mean error rises against bytes."""
    panels = []
    for count in sorted({row["networks"] for row in records.where(fleet=fleet)}):
        curves = []
        for method, name in CURVES.items():
            points = []
            for size in SIZES:
                rises = [
                    row[column] - row["original"]
                    for row in records.where(fleet=fleet, networks=count, size=size, method=method)
                ]
                if rises:
                    points.append((100 * size, float(np.mean(rises))))
            if points:
                curves.append(Curve(name, *zip(*points, strict=True)))
        panels.append(Panel(f"{count} networks", curves))
    return panels


def draw_fleets(records: Records, out: Path) -> None:
    """The figures of every fleet, before and after light retraining."""
    titles = {"labellings": "other labels", "images": "other images"}
    for fleet in {row["fleet"] for row in records.rows}:
        for column, when in (("error", "no retraining"), ("retrained", "after 50 iterations of light retraining")):
            draw_curves(
                out / f"fleets-{fleet}-{column}.svg",
                fleet_panels(records, fleet, column),
                title=f"Many related networks in the bytes of one: LeNet-300-100 for {titles[fleet]}, {when}",
                x_label="stored bytes of the whole fleet, % of one original",
                y_label="mean error rise, points",
            )


def fleet_lines(records: Records) -> list[str]:
    sizes = {size: f"{size:g} × one" for size in SIZES}
    lines = [
        "# Where sharing pays: fleets of related networks",
        "",
        "LeNet-300-100, fine-tuned from one ancestor that was trained on MNIST's digits (6 epochs), 2 epochs each, "
        "hidden layers included, with a new output layer. *labellings*: the same images, other labels "
        f"({', '.join(LABELLINGS)}). *images*: the same labels, other images ({', '.join(DISTORTIONS)}). Fleets of 2 "
        "and 4 are the first of the 8.",
        "",
        "Rise of the mean test error over the originals', in points; mean over seeds (standard deviation). Bytes of "
        "the whole fleet, relative to *one* original. Behind the arrow: after 50 iterations of light retraining "
        "(distillation, no labels). 2,000 calibration images per network. Blank cells: this size cannot be "
        "reached by sharing alone.",
        "",
        "Made by `make bench-full`.",
        "",
    ]
    for fleet in FLEETS:
        for count in sorted({row["networks"] for row in records.where(fleet=fleet)}):
            rows = list(records.where(fleet=fleet, networks=count))
            before = spread({row["seed"]: row["original"] for row in rows}.values())
            lines += [
                f"## {fleet}, {count} networks",
                "",
                f"Originals: {before} %; {seeds_of(rows)}.",
                "",
                f"| | {' | '.join(sizes.values())} |",
                "|---|" + "---|" * len(sizes),
            ]
            for method, name in CURVES.items():
                cells = []
                for size in sizes:
                    found = [row for row in rows if row["size"] == size and row["method"] == method]
                    pairs = [
                        "+" + spread(row[key] - row["original"] for row in found)
                        for key in ("error", "retrained")
                        if found
                    ]
                    cells.append(" → ".join(pairs).replace("+-", "−"))
                lines.append(f"| {name} | {' | '.join(cells)} |")
            lines.append("")
        lines += [f"![{fleet}](fleets-{fleet}-error.svg)", "", f"![{fleet}](fleets-{fleet}-retrained.svg)", ""]
    return lines


# --- two networks in the bytes of one ---


def accuracy_lines(records: Records) -> list[str]:
    lines = [
        "# Accuracy per byte: two networks in the bytes of one",
        "",
        "Test error in percent on the full test sets, mean over seeds (standard deviation). Every method gets the "
        "bytes that are left when all hidden neurons are shared, the same calibration images, and the same light "
        "retraining: 50 iterations of distillation from the originals, no labels. Hard parameter sharing is trained "
        "from scratch with labels, the smaller networks are distilled on all training images, each for as many "
        "iterations as an original was trained. What has no standard deviation beside it was measured on one seed.",
        "",
        "Made by `make bench-full`; the rival methods are in `tests/benchmarks/rivals`.",
        "",
    ]
    for pair in PAIRS:
        rows = list(records.where(pair=pair.name))
        if not rows:
            continue
        originals = {row["seed"]: row["original"] for row in rows}
        lines += [
            f"## {pair.name}",
            "",
            f"{seeds_of(rows)}; {pair.images:,} calibration images per task; originals "
            f"{' / '.join(spread(errors) for errors in zip(*originals.values(), strict=True))}.",
            "",
            "| method | stored | no retraining | light retraining | seconds |",
            "|---|---|---|---|---|",
        ]
        for method in METHODS:
            found = [row for row in rows if row["method"] == method]
            if found:
                name = f"**{method}**" if method == OURS else method
                lines.append(
                    f"| {name} | {100 * np.mean([row['stored'] for row in found]):.0f} % | {both(found, 'error')} | "
                    f"{both(found, 'retrained')} | {np.mean([row['seconds'] for row in found]):.0f} |"
                )
        lines += ["", *verdict(rows), ""]
    return lines


def both(rows: Sequence[Mapping[str, Any]], key: str) -> str:
    return " / ".join(spread(errors) for errors in zip(*(row[key] for row in rows), strict=True))


def verdict(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Who is ahead of the planned network after light retraining, in the mean of both errors on the same seeds."""
    ours = {row["seed"]: float(np.mean(row["retrained"])) for row in rows if row["method"] == OURS}
    ahead = []
    for method in METHODS:
        theirs = {row["seed"]: float(np.mean(row["retrained"])) for row in rows if row["method"] == method}
        seeds = sorted(ours.keys() & theirs.keys())
        if method != OURS and seeds:
            difference = float(np.mean([theirs[seed] - ours[seed] for seed in seeds]))
            if difference < 0:
                name = method.removeprefix("this project, ")
                ahead.append(f"'{name}' is ahead of the planned network, by {-difference:.2f} points of mean error")
    told = f"only {'; '.join(ahead)}" if ahead else "no method is ahead of the planned network in mean error"
    return [f"After light retraining, {told}."] if ours else []


# --- floors ---


def floor_lines(records: Records) -> list[str]:
    lines = [
        "# The smallest network that loses at most half a point of each task",
        "",
        "MNIST + Fashion-MNIST. The same search for every method, 50 iterations of light retraining (batch 128 per "
        "task); `lost` on the first half of the test images, where the floor is kept, `fresh` on the second half, "
        "which nothing has seen. Mean over seeds (standard deviation).",
        "",
        "Made by `make bench-full`.",
        "",
        "| networks | method | stored | lost | fresh | iterations, times fewer than one network's training |",
        "|---|---|---|---|---|---|",
    ]
    for pair in PAIRS:
        for method in floors.METHODS:
            if not (rows := list(records.where(pair=pair.name, method=method))):
                continue
            fewer = np.mean([row["trained"] / max(row["iterations"], 1) for row in rows])
            stored = spread(100 * row["stored"] for row in rows)
            lines.append(
                f"| {pair.name} | {method} | {stored} % | {both(rows, 'lost')} | {both(rows, 'rise')} | "
                f"{np.mean([row['iterations'] for row in rows]):.0f}, {fewer:.0f} × |"
            )
    return lines


# --- README ---


def readme_accuracy(records: Records) -> list[str]:
    shown = ("MTZ as published", "RegMean after matching", "ZipIt!", "pruned by torch-pruning", OURS)
    names = {OURS: "**this project**"}
    pairs = [pair for pair in PAIRS if records.has(pair=pair.name, method=OURS)]
    lines = [
        f"| {'half the bytes, no retraining'} | originals | {' | '.join(names.get(m, m) for m in shown)} |",
        "|---|---|" + "---|" * len(shown),
    ]
    for pair in pairs:
        rows = list(records.where(pair=pair.name))
        cells = [
            " / ".join(
                f"{np.mean(errors):.2f}"
                for errors in zip(*(row["error"] for row in rows if row["method"] == method), strict=True)
            )
            for method in shown
        ]
        cells[-1] = f"**{cells[-1]}**"
        originals = {row["seed"]: row["original"] for row in rows}
        before = " / ".join(f"{np.mean(errors):.2f}" for errors in zip(*originals.values(), strict=True))
        lines.append(f"| {pair.name} | {before} | {' | '.join(cells)} |")
    return lines


def readme_floors(records: Records) -> list[str]:
    methods = [method for method in floors.METHODS if records.has(method=method)]
    lines = [f"| stored | {' | '.join(methods)} |", "|---|" + "---|" * len(methods)]
    for pair in PAIRS:
        if records.has(pair=pair.name):
            cells = [
                f"{100 * np.mean([row['stored'] for row in records.where(pair=pair.name, method=m)]):.1f} %"
                for m in methods
            ]
            lines.append(f"| {pair.name} | {' | '.join(cells)} |")
    return lines


def put(path: Path, name: str, lines: Sequence[str]) -> None:
    """Replace what a file has between a pair of marks."""
    text = path.read_text()
    mark = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    new, count = mark.subn(lambda found: found.group(1) + "".join(f"{line}\n" for line in lines) + found.group(2), text)
    if not count:
        raise ValueError(f"{path} has no marks for {name}")
    with whole_file(path) as temporary:
        temporary.write_text(new)


def write(path: Path, lines: Sequence[str]) -> None:
    with whole_file(path) as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n")


def run(setting: Setting) -> Path:
    """Write everything; returns the folder."""
    out = DOCS if setting == "full" else CACHE / "quick"
    out.mkdir(parents=True, exist_ok=True)
    fleets, accuracy, floor = (Records(name, setting) for name in ("fleets", "accuracy", "floors"))
    for name, records, lines in (
        ("fleets", fleets, fleet_lines(fleets)),
        ("accuracy", accuracy, accuracy_lines(accuracy)),
        ("floors", floor, floor_lines(floor)),
    ):
        write(out / f"{name}.md", lines)
        records.write_parquet(out / f"{name}.parquet")
    draw_fleets(fleets, out)
    if setting == "full":
        put(Path("README.md"), "accuracy", readme_accuracy(accuracy))
        put(Path("README.md"), "floors", readme_floors(floor))
    return out
