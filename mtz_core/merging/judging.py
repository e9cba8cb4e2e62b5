"""How well tasks come through zipping, on examples to which nothing was fitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mtz_core.batches import Batch
from mtz_core.evaluation import outputs_of
from mtz_core.network.graph import run
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.report import TaskReport

HELD_OUT = 5
"""One calibration example in this many is held out."""


Examples = Mapping[str, Sequence[Batch]]
"""Batches of every task's examples."""


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
