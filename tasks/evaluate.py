"""Stage `evaluate`: errors of every task before and after zipping, and sizes."""

from __future__ import annotations

from functools import partial

import torch

import mtz_core
from mtz_core.evaluate import agreement, error_rate, predict
from mtz_core.format import WEIGHTS
from tasks.data import read_examples
from tasks.files import write_json, write_table
from tasks.models import load_network
from tasks.params import Params
from tasks.progress import say
from tasks.workspace import Workspace


def run(params: Params, workspace: Workspace) -> None:
    """Write `metrics.json` and a table of errors, measured on the test splits. Raises `MtzError`."""
    merged, retrained = mtz_core.load(workspace.merged), mtz_core.load(workspace.retrained)
    tasks: dict[str, dict[str, float]] = {}
    for model, block in params.models.items():
        images, labels = read_examples(workspace.root / block.data, "test")
        batches = torch.split(images, params.evaluate.batch_size)
        original = predict(load_network(params, workspace, model), batches)
        zipped, final = (predict(partial(network, task=model), batches) for network in (merged, retrained))
        tasks[model] = {
            "error_original": error_rate(original, labels),
            "error_zipped": error_rate(zipped, labels),
            "error_retrained": error_rate(final, labels),
            "agreement_zipped": agreement(zipped, original),
            "agreement_retrained": agreement(final, original),
        }
        say(
            f"{model}: error {tasks[model]['error_original']:.2f} % before, {tasks[model]['error_zipped']:.2f} % "
            f"zipped, {tasks[model]['error_retrained']:.2f} % after light retraining"
        )
    report = retrained.report
    write_json(
        workspace.metrics,
        {
            "tasks": tasks,
            "stored": {
                "parameters": report.stored_parameters,
                "original_parameters": report.original_parameters,
                "fraction": report.stored_fraction,
                "bytes": (workspace.retrained / WEIGHTS).stat().st_size,
                "original_bytes": sum(
                    (workspace.root / block.weights).stat().st_size for block in params.models.values()
                ),
            },
        },
    )
    write_table(
        workspace.plots / "errors.csv",
        ("network", "task", "error"),
        [
            (name, task, values[f"error_{name}"])
            for name in ("original", "zipped", "retrained")
            for task, values in tasks.items()
        ],
    )
