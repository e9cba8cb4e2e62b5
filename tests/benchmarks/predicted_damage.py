"""The damage that plans are expected to do against what is measured: ``python -m tests.benchmarks.predicted_damage``.

For every kind of output (`tests.benchmarks.scenes`) and for the real groups of `examples/real`, plans of many sizes and
mixtures are made, merged, and measured on held-out inputs; nothing is retrained. Writes
`docs/benchmarks/predicted-damage.md`.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from examples.real.__main__ import FOLDER
from mtz_core import Budget, Output, ZipConfig
from mtz_core.errors import InvalidConfig
from mtz_core.merging.judging import judge
from mtz_core.merging.walk import trace_task
from mtz_core.planning.planner import NEVER, Plan
from mtz_core.planning.search import BudgetSearch
from mtz_core.settings import Move
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.traced import Traced
from tasks.files import whole_file
from tests.benchmarks import scenes
from tests.benchmarks.real_networks import GROUPS, Case
from tests.benchmarks.records import DOCS, Records

PAGE = DOCS / "predicted-damage.md"
SIZES = (0.95, 0.9, 0.8, 0.7, 0.5, 0.35)
SHARING = (NEVER, 1.0, 0.1)
"""Factors of the damage of sharing: from dropping alone to mostly sharing."""

TOWARDS = (1.0, 8.0, 0.125)
"""Factors of the damage to the second task."""

PICTURES, TESTED = 240, 400
USEFUL = 0.5
"""Plans by which no task loses more than this are what a budget is meant for."""


@dataclass(frozen=True)
class Networks:
    """Networks of one group, with what they are calibrated and tested on."""

    modules: Mapping[str, nn.Module]
    calibration: Mapping[str, Tensor]
    test: Mapping[str, Tensor]
    outputs: Mapping[str, Output]


def of_kind(kind: Any) -> Networks:
    """Two small networks of a kind of output."""
    tasks = list(scenes.TASKS)
    return Networks(
        {task: scenes.network(kind, task) for task in tasks},
        {task: scenes.pictures(kind, task, PICTURES, i) for i, task in enumerate(tasks)},
        {task: scenes.pictures(kind, task, TESTED, 10 + i) for i, task in enumerate(tasks)},
        {task: Output(kind) for task in tasks},
    )


def real(group: str) -> Networks:
    """A group of `examples/real`."""
    case = Case(GROUPS[group])
    return Networks(
        case.networks, case.calibration, {task: torch.cat(own) for task, own in case.test.items()}, case.outputs
    )


def plans(search: BudgetSearch) -> Iterator[tuple[float, float, float, Plan]]:
    """Different plans: of every size, with sharing and the second task counted for more or less."""
    seen: list[Plan] = []
    first, second = search.traced
    for size, sharing, towards in product(SIZES, SHARING, TOWARDS):
        counted = {first: 1.0, second: towards}
        if sharing == NEVER and not search.planner.reaches(size, {"drop"}):
            continue
        try:
            plan = search.planner.plan(size, sharing, counted=counted)
        except InvalidConfig:
            continue
        if not any(plan.same(other) for other in seen):
            seen.append(plan)
            yield size, sharing, towards, plan


def measure(name: str, networks: Networks, records: Records) -> None:
    """Measure a group's plans."""
    moves: tuple[Move, ...] = ("share", "drop")
    config = ZipConfig(budget=Budget(size=0.75, moves=moves), outputs=networks.outputs)
    traced = {}
    for task, module in sorted(networks.modules.items()):
        batches = as_batches(networks.calibration[task], task)
        network = trace_task(task, module, batches[0], config)
        traced[task] = Traced.measured(network, batches, config, config.output_of(task))
    assert config.budget is not None
    search = BudgetSearch(traced, config, config.budget, {task: [own] for task, own in networks.test.items()})
    started = time.perf_counter()
    rows = []
    for size, sharing, towards, plan in plans(search):
        found = judge(search.zip(plan), traced, search.held_out)
        rows.append({"group": name, "size": size, "sharing": sharing, "towards": towards, "bytes": plan.bytes})
        rows[-1] |= {
            "moved": {"sharing": sum(plan.sharing.values()), "dropping": sum(plan.dropping.values())},
            "kinds": {task: report.output for task, report in found.items()},
            "predicted": plan.lost,
            "measured": {task: report.lost for task, report in found.items()},
        }
    for row in rows:
        records.add(row)
    print(f"{name}: {len(rows)} plans in {time.perf_counter() - started:.0f} s; {line(rows)}", flush=True)


def line(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rank correlations of a group in a line."""
    return "; ".join(f"{task} {correlation(rows, task):.3f}" for task in rows[0]["predicted"])


def pairs(rows: Sequence[Mapping[str, Any]], task: str) -> np.ndarray:
    """Predicted and measured damage to a task; of all tasks together where it is empty."""
    return np.array(
        [[row[what][task] if task else sum(row[what].values()) for what in ("predicted", "measured")] for row in rows]
    )


def correlation(rows: Sequence[Mapping[str, Any]], task: str) -> float:
    """Spearman's."""
    return float(spearmanr(*pairs(rows, task).T).statistic) if len(rows) > 2 else float("nan")


def useful(rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Plans that ruin no task."""
    return [row for row in rows if max(row["measured"].values()) <= USEFUL]


def page(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The tables as Markdown."""
    lines = [
        "# Predicted and measured damage",
        "",
        "Damage is the share of its own information that a task loses. A plan's is predicted from weights, Hessians "
        "and sensitivities alone. Here it is compared with what held-out inputs show once the plan is merged, before "
        f"any retraining: plans of {len(SIZES)} sizes from {100 * SIZES[-1]:.0f} to {100 * SIZES[0]:.0f} % of the "
        "bytes, from dropping alone to mostly sharing, with one task counted for more or less.",
        "",
        f"Rank correlation (Spearman) over all plans, over those by which no task loses more than {100 * USEFUL:.0f} "
        "%, and over those of them that share nothing; *times*: how much more is measured than predicted, in the "
        "median of plans that are no ruin, and the range from the 10th to the 90th percentile.",
        "",
        "Groups `faces` and `files` are those of [real networks](../real-networks.md), the others pairs of small "
        "networks trained on made-up pictures (`tests/benchmarks/scenes.py`).",
        "",
        "Made by `make bench-damage`.",
        "",
        "| group | task | kind of output | plans | all | no ruin | of these, drop only | times |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, rows in groups.items():
        mild = useful(rows)
        alone = [row for row in mild if not row["moved"]["sharing"]]
        for task in (*rows[0]["predicted"], ""):
            found = np.maximum(pairs(mild, task), 1e-12) if mild else np.ones((1, 2))
            low, middle, high = np.percentile(found[:, 1] / found[:, 0], (10, 50, 90))
            cells = [f"{correlation(own, task):.2f}" if len(own) > 2 else "" for own in (rows, mild, alone)]
            counts = f"{len(rows)}, {len(mild)}, {len(alone)}"
            kind = rows[0]["kinds"][task] if task else ""
            lines.append(
                f"| {name} | {task or '*sum*'} | {kind} | {counts} | {' | '.join(cells)} "
                f"| {middle:.1f} ({low:.1f} to {high:.1f}) |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    groups: dict[str, Callable[[str], Networks]] = dict.fromkeys(GROUPS, real)
    groups |= dict.fromkeys(scenes.KINDED, of_kind)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", nargs="*", choices=groups, default=list(groups), help="what to measure")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    records = Records("predicted-damage", "full", options.fresh)
    for name in options.groups:
        if name in GROUPS and not (FOLDER / "networks").is_dir():
            sys.exit(f"error: {FOLDER} has no networks. Make them: python -m examples.real")
        if not records.has(group=name):
            measure(name, groups[name](name), records)
    found = {name: rows for name in groups if (rows := list(records.where(group=name)))}
    with whole_file(PAGE) as temporary:
        temporary.write_text(page(found))
    print(f"table: {PAGE}")


if __name__ == "__main__":
    main()
