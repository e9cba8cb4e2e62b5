"""Stage `evaluate`: the errors of every task before and after zipping, and sizes."""

from __future__ import annotations

from functools import partial

import torch

from mtz_core.evaluation import agreement, check_labels, measure, outputs_of
from mtz_core.zipped.format import WEIGHTS
from mtz_core.zipped.module import load
from tasks.artifacts.paths import Workspace
from tasks.data.examples import read_examples
from tasks.files import write_json, write_table
from tasks.models.load import load_network
from tasks.params import Params
from tasks.progress import show_progress


def run(params: Params, workspace: Workspace) -> None:
    """Write `metrics.json` and a table of errors, measured on the test splits.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.

    Raises:
        MtzError: A network or its test data cannot be used.
    """
    merged, retrained = load(workspace.merged), load(workspace.retrained)
    tasks: dict[str, dict[str, float | str]] = {}
    for model, block in params.models.items():
        images, labels = read_examples(workspace.root / block.data, "test")
        batches = torch.split(images, params.evaluate.batch_size)
        networks = (load_network(params, workspace, model), partial(merged, task=model), partial(retrained, task=model))
        original, zipped, final = (outputs_of(network, batches) for network in networks)
        check_labels(labels, len(images), original.shape[1], model)
        before, after, later = (measure(block.metric, outputs, labels, model) for outputs in (original, zipped, final))
        classes = original.argmax(dim=1)
        tasks[model] = {
            "metric": block.metric,
            "error_original": before,
            "error_zipped": after,
            "error_retrained": later,
            "agreement_zipped": agreement(zipped.argmax(dim=1), classes),
            "agreement_retrained": agreement(final.argmax(dim=1), classes),
        }
        show_progress(
            f"{model}: {block.metric} {before:.2f} % before, {after:.2f} % zipped, {later:.2f} % after light retraining"
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
