"""How well tasks come through zipping, on examples to which nothing was fitted."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mtz_core.batches import Batch, concatenated, divided
from mtz_core.errors import ZipWarning
from mtz_core.evaluation import outputs_of
from mtz_core.network.graph import run
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.report import TaskReport

HELD_OUT = 5
"""One calibration example in this many is held out."""

RUINED = 0.5
"""The share of its information whose loss a warning tells."""

_MOST_HELD_OUT = 200

Examples = Mapping[str, Sequence[Batch]]
"""Batches of every task's examples."""


def hold_out(batches: Sequence[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Hold the last calibration examples of a task out: one in `HELD_OUT`, and 200 at most.

    Args:
        batches: Its calibration data.

    Returns:
        Batches of the rest, and the examples that are held out, in one batch; of fewer than `HELD_OUT` none are.
    """
    held = min(sum(map(len, batches)) // HELD_OUT, _MOST_HELD_OUT)
    if not held:
        return list(batches), []
    examples = concatenated(batches)
    return list(divided(examples[:-held], len(batches[0]))), [examples[-held:]]


def targets_of(traced: Mapping[str, Traced], examples: Examples) -> dict[str, Any]:
    """The originals' outputs. Raises `InvalidCalibration` if a task has no examples."""
    networks = {task: traced[task].network for task in examples}
    return {t: outputs_of(partial(run, n.graph, n.state), examples[t]) for t, n in networks.items()}


@torch.no_grad()
def judge(
    zipped: ZippedNetwork,
    traced: Mapping[str, Traced],
    examples: Examples,
    targets: Mapping[str, Any] | None = None,
) -> dict[str, TaskReport]:
    """Compare a zipped network with its originals.

    Args:
        zipped: The zipped network.
        traced: The originals by task, with their calibration data.
        examples: Batches of other examples, by task.
        targets: The originals' outputs for these, if they are known already.

    Returns:
        The report on every task.

    Raises:
        InvalidCalibration: If a task has no examples.
    """
    targets = targets_of(traced, examples) if targets is None else targets
    reports = {}
    for task, batches in examples.items():
        loss, aims = traced[task].loss, targets[task]
        outputs = outputs_of(partial(zipped, task=task), batches)
        reports[task] = TaskReport.of(loss, outputs, aims)
    return reports


def warn_of_ruin(tasks: Mapping[str, TaskReport], remedy: str, stacklevel: int) -> None:
    """Warn of tasks that have lost more than `RUINED` of what they knew.

    Args:
        tasks: The reports on the tasks.
        remedy: What is expected to keep a task as a whole.
        stacklevel: As for `warnings.warn`, from the caller of this function on.

    Warns:
        ZipWarning: For each of these tasks.
    """
    for task, judged in tasks.items():
        output, lost = judged.worst
        if lost <= RUINED:
            continue
        heavier = f"Let {output!r} count more: declare it with a greater weight" if judged.lost <= RUINED else remedy
        warnings.warn(
            f"{task!r} has lost {100 * lost:.0f} % of what it knew{f' of {output!r}' if output else ''} "
            f"({judged.agreement:.1f} % agreement with its "
            f"original, on {judged.examples} held-out examples; its outputs are {judged.kinds}"
            f"{f', guessed, as {judged.guessed}' if judged.guessed else ''}). {heavier}.",
            ZipWarning,
            stacklevel=stacklevel + 1,
        )
