"""The page of `tests.benchmarks.real_networks`: what every way makes of networks that nobody here trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import hypot
from pathlib import Path
from typing import Any

from tasks.files import whole_file
from tasks.studies.charts import Curve, Panel, draw_curves
from tests.benchmarks.records import DOCS, Records

OURS, UNROUNDED, DROP = "this project, all moves", "this project, share and drop", "this project, drop only"
WEIGHED = "this project, share and drop, landmarks counted 8 times"
ROUNDED = "each network rounded to {} bits"
QUANTISED = "each network quantised to {} bits"
PAGE = DOCS / "real-networks.md"
TITLES = {"faces": "Expression and landmarks of a face", "files": "Two releases of a content-type classifier"}
REMARKS = {
    "files": "The only neurons that can be removed are those of the convolution. Those that are left are normalised by "
    "themselves ([method](../method.md))."
}
NAMES = {
    OURS: "all moves",
    UNROUNDED: "share and drop",
    DROP: "drop only",
    WEIGHED: "landmarks × 8",
    "pruned by torch-pruning": "torch-pruning",
    "neurons pruned by magnitude": "neurons, magnitude",
    "single weights pruned by magnitude": "single weights",
    "this project, everything shared": "all shared",
}
"""Ways in the figures, by their names in the tables."""

AHEAD = 1.1
"""Who is ahead has lost less by this factor: smaller differences are chance."""

WHEN = {"before": "no retraining", "after": "after light retraining"}
Row = Mapping[str, Any]


def error(judged: Mapping[str, float]) -> float:
    """What is missing to full agreement, in points; of landmarks their distance, in pixels."""
    return judged["pixels"] if "pixels" in judged else 100 - judged["agreement"]


def text(judged: Mapping[str, float]) -> str:
    return f"{judged['pixels']:.2f} px" if "pixels" in judged else f"{judged['agreement']:.1f} %"


def percent(share: float) -> str:
    """A share of information with two digits."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def lost(judged: Mapping[str, Mapping[str, float]]) -> float:
    """The root of the summed squares of what the tasks lose: what plans are chosen by."""
    return hypot(*(own["lost"] for own in judged.values()))


def line(row: Row) -> str:
    """One measurement in a line."""
    stages = [row[stage] for stage in WHEN if stage in row]
    told = ", ".join(f"{task} {' → '.join(text(stage[task]) for stage in stages)}" for task in row["before"])
    return f"{row['way']}, {100 * row['stored']:.1f} % of the bytes: {told}"


def measured(records: Records, group: str) -> list[Row]:
    """The rows of a group; where a way was measured with and without retraining, the former."""
    found = sorted(records.where(group=group, impossible=None), key=lambda row: row["retrained"])
    rows = {(row["way"], row["size"]): row for row in found}
    order = [*NAMES, *(way for way, _ in rows if way not in NAMES)]
    return sorted(rows.values(), key=lambda row: order.index(row["way"]))


def table(rows: Sequence[Row]) -> list[str]:
    """Some ways; if they are compared at one size, the best values of a column are bold."""
    tasks = list(rows[0]["before"])
    best = {
        (stage, task): min((error(row[stage][task]) for row in rows if stage in row), default=0.0)
        for stage in WHEN
        for task in tasks
        if rows[0]["size"] is not None
    }

    def cell(row: Row, stage: str, task: str) -> str:
        if stage not in row:
            return ""
        shown = text(row[stage][task])
        shown = f"**{shown}**" if error(row[stage][task]) == best.get((stage, task)) else shown
        return f"{shown}, {percent(row[stage][task]['lost'])}"

    lines = [
        f"| | stored | {' | '.join(f'{task}, {WHEN[stage]}' for task in tasks for stage in WHEN)} |",
        "|---|---|" + "---|" * (2 * len(tasks)),
    ]
    for row in rows:
        cells = [cell(row, stage, task) for task in tasks for stage in WHEN]
        lines.append(f"| {row['way']} | {100 * row['stored']:.1f} % | {' | '.join(cells)} |")
    return [*lines, ""]


def verdict(rows: Sequence[Row]) -> list[str]:
    """Who is ahead of the planned network at equal bytes: by what both tasks have lost together, and in each."""
    ours = next(row for row in rows if row["way"] == OURS)
    lines = ["Ahead of all moves:", ""]
    for stage, when in WHEN.items():
        others = [row for row in rows if row is not ours and stage in row]
        if stage not in ours or not others:
            continue
        together = [row["way"] for row in others if AHEAD * lost(row[stage]) < lost(ours[stage])]
        said = [f"by what both tasks lose: {_listed(together)}"]
        for task, own in ours[stage].items():
            ahead = [row["way"] for row in others if AHEAD * error(row[stage][task]) < error(own)]
            said.append(f"in {task}: {_listed(ahead)}")
        lines.append(f"- {when}: {'; '.join(said)}.")
    return [*lines, ""]


def in_short(records: Records) -> list[str]:
    """Who has lost least at each size."""
    lines = [
        "| | bytes | least lost, no retraining | least lost, after light retraining | all moves |",
        "|---|---|---|---|---|",
    ]
    for group, title in TITLES.items():
        rows = measured(records, group)
        for size in _sizes(rows):
            at = [row for row in rows if row["size"] == size]
            cells = []
            for stage in WHEN:
                if own := [row for row in at if stage in row]:
                    least = min(own, key=lambda row: lost(row[stage]))
                    cells.append(f"{NAMES[least['way']]}, {percent(lost(least[stage]))}")
                else:
                    cells.append("")
            ours = next((row for row in at if row["way"] == OURS), None)
            shown = "" if ours is None else " → ".join(percent(lost(ours[s])) for s in WHEN if s in ours)
            if any("impossible" in row for row in records.where(group=group, size=size, way=OURS)):
                shown = "impossible"
            lines.append(f"| {title} | {100 * size:g} % | {' | '.join(cells)} | {shown} |")
        for row in (row for row in rows if row["size"] is None and "bits" in row["way"]):
            cells = [f"{row['way']}, {percent(lost(row['before']))}", "", ""]
            lines.append(f"| {title} | {100 * row['stored']:.0f} % | {' | '.join(cells)} |")
    return [*lines, ""]


def _sizes(rows: Sequence[Row]) -> list[float]:
    return sorted({row["size"] for row in rows if row["size"] is not None}, reverse=True)


def smaller_and_better(rows: Sequence[Row]) -> list[str]:
    """At which sizes networks rounded alone are ahead of all moves, although they take fewer bytes."""
    lines = []
    for row in (row for row in rows if row["size"] is None and "bits" in row["way"]):
        larger = [own for own in rows if own["way"] == OURS and own["stored"] > row["stored"]]
        behind = [f"{100 * own['size']:g} %" for own in larger if lost(row["before"]) < lost(own["before"])]
        lines.append(f"- {row['way']}: {', '.join(behind) or 'none'}.")
    return ["Networks by all moves that have lost more, although they are larger (no retraining):", "", *lines, ""]


def _listed(ways: Sequence[str]) -> str:
    return ", ".join(f"*{NAMES[way]}*" for way in ways) or "none"


def panels(records: Records, stage: str) -> list[Panel]:
    """A panel for every task."""
    found = []
    for group in TITLES:
        rows = [row for row in measured(records, group) if stage in row and row["way"] in NAMES]
        for task in rows[0]["before"] if rows else ():
            curves = []
            for way, name in NAMES.items():
                own = sorted((100 * row["stored"], error(row[stage][task])) for row in rows if row["way"] == way)
                if own:
                    curves.append(Curve(name, *zip(*own, strict=True)))
            found.append(Panel(f"{task}, {'pixels' if task == 'landmarks' else 'points'}", curves))
    return found


def page(records: Records) -> list[str]:
    lines = [
        "# Networks that nobody here trained, at equal bytes",
        "",
        "The groups of [real networks](../real-networks.md), made smaller by every way. Bytes are those of files, "
        "relative to the originals' float32: of single weights the mask that says which are left counts, too, and of "
        "rounded ones the scales. Every way is given the same 300 inputs, and then the same light retraining: at most "
        "80 iterations of distillation on 560 crops of faces or 900 files, without labels, at a learning rate of "
        "0.001 that is quartered after each validation without improvement. The best validation is kept, that before "
        "all training among them.",
        "",
        "Cells: agreement with the original on test inputs that nothing has seen (of landmarks their mean distance, in "
        "pixels of a face of 112), and the share of its own information that the task has lost. At one size, the "
        "best are bold. Who is *ahead* has lost less by more than a tenth. Test inputs are 160 crops of 20 faces, and "
        "600 files: one of them is 0.6 % or 0.2 %.",
        "",
        "- *all moves*: one budget for both networks, plans that share, drop and round, the best on held-out inputs. "
        "*Share and drop*: without rounding; where *drop only* has the same figures, the best plan shares nothing. "
        "*Counted 8 times*: by `balance`.",
        "- *pruned by torch-pruning*: each network alone, whole neurons, its `GroupHessianImportance` over all layers.",
        "- *neurons pruned by magnitude*: each alone, whole neurons by the sum of their absolute weights, the same "
        "share of every layer (torch-pruning's `GroupMagnitudeImportance`).",
        "- *single weights pruned by magnitude*: each alone, the smallest weights of all layers become zero. That "
        "saves bytes on disk; the dense network computes as much as before.",
        "- *rounded*: each alone, all weights to the nearest, a scale for each row; no data, no retraining.",
        "- *quantised*: each alone, all weights to the same number of bits, by optimal brain quantisation (as GPTQ) on "
        "the same inputs, layer by layer on what the layers before put out; no retraining.",
        "",
        "Made by `make bench-real`; the rivals are in `tests/benchmarks/rivals`.",
        "",
        "## In short",
        "",
        "What both tasks have lost of their information: the root of the summed squares, by which plans are chosen.",
        "",
        *in_short(records),
    ]
    for group, title in TITLES.items():
        rows = measured(records, group)
        if not rows:
            continue
        lines += [f"## {title}", ""]
        if group in REMARKS:
            lines += [REMARKS[group], ""]
        for size in _sizes(rows):
            at = [row for row in rows if row["size"] == size]
            lines += [f"### {100 * size:g} % of the bytes", "", *table(at)]
            no = {row["way"]: row["impossible"] for row in records.where(group=group, size=size) if "impossible" in row}
            lines += [f"*{NAMES[way]}*: {why}\n" for way, why in no.items()]
            if any(row["way"] == OURS for row in at):
                lines += verdict(at)
        if own := [row for row in rows if row["size"] is None]:
            lines += ["### At a size of their own", "", *table(own), *smaller_and_better(rows)]
    for stage, when in WHEN.items():
        if not panels(records, stage):
            continue
        lines += [f"![What is missing, {when}](real-networks-{stage}.svg)", ""]
    return lines


def write(records: Records) -> Path:
    """Write the page, its figures, and the rows as Parquet; returns the page."""
    with whole_file(PAGE) as temporary:
        temporary.write_text("\n".join(page(records)).rstrip() + "\n")
    for stage, when in WHEN.items():
        if not (found := panels(records, stage)):
            continue
        draw_curves(
            DOCS / f"real-networks-{stage}.svg",
            found,
            title=f"Real networks made smaller, {when}",
            x_label="stored bytes, % of the originals",
            y_label="missing agreement, points; of landmarks pixels",
            columns=2,
        )
    records.write_parquet(DOCS / "real-networks.parquet")
    return PAGE
