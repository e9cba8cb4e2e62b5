"""Stage `evaluate`: the errors of every task before and after zipping, and sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

from mtz_core.batches import Batch, call, concatenated
from mtz_core.evaluation import Case, Model, measure, outputs_of
from mtz_core.zipped.format import WEIGHTS
from mtz_core.zipped.module import load
from tasks.artifacts.paths import Workspace
from tasks.data.examples import read_batches
from tasks.files import write_json, write_table
from tasks.models.load import load_network
from tasks.models.metrics import cases_of, find_metrics
from tasks.models.shards import weight_files
from tasks.params import Params
from tasks.progress import show_progress

_STATES = ("original", "zipped", "retrained")


def run(params: Params, workspace: Workspace) -> None:
    """Write `metrics.json` and a table of errors, measured on the test splits.

    Tasks are measured as a whole, or by each of several outputs, which are called ``task.output``.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.

    Raises:
        MtzError: A network or its test data cannot be used.
    """
    merged, retrained = load(workspace.merged), load(workspace.retrained)
    tasks: dict[str, dict[str, Any]] = {}
    for model, block in params.models.items():
        networks = (
            partial(call, load_network(params, workspace, model)),
            partial(merged, task=model),
            partial(retrained, task=model),
        )
        batches = read_batches(workspace.root / block.data, "test", params.evaluate.batch_size)
        outputs, labels = _outputs(dict(zip(_STATES, networks, strict=True)), batches)
        original = outputs["original"]
        loss = retrained.loss_of(model, original)
        metrics = find_metrics(params, model, retrained.structure.networks[model].graph.outputs, labels)
        found: dict[str, dict[str, Any]] = {}
        for state, own in outputs.items():
            for title, (name, metric, case) in cases_of(metrics, Case(own, labels, original, loss), model).items():
                head = {"metric": name, "unit": metric.unit, "output": case.loss.kind, "examples": len(original)}
                error = measure(metric, case, title)
                found.setdefault(title, head)
                found[title] |= {f"error_{state}": error.value, f"interval_{state}": [error.low, error.high]}
                if state != "original":
                    found[title] |= {
                        f"agreement_{state}": case.loss.agreement(case.outputs, case.targets),
                        f"lost_{state}": 100 * float(case.loss(case.outputs, case.targets)),
                    }
        for title, errors in found.items():
            show_progress(f"{title}: {_line(errors)}")
        tasks |= found
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
                    file.stat().st_size
                    for block in params.models.values()
                    for file in weight_files(workspace.root / block.weights)
                ),
            },
        },
    )
    write_table(
        workspace.plots / "errors.csv",
        ("network", "task", "error"),
        [(name, task, values[f"error_{name}"]) for name in _STATES for task, values in tasks.items()],
    )


def _outputs(
    networks: Mapping[str, Model], batches: Iterable[tuple[Batch, Batch | None]]
) -> tuple[dict[str, Any], Batch | None]:
    """Return what each network puts out, and the labels; of the inputs, one batch at a time is in memory."""
    outputs: dict[str, list[Batch]] = {name: [] for name in networks}
    labels: list[Batch] = []
    for inputs, own in batches:
        for name, network in networks.items():
            outputs[name].append(outputs_of(network, [inputs]))
        labels += [] if own is None else [own]
    return {name: concatenated(parts) for name, parts in outputs.items()}, concatenated(labels) if labels else None


def _line(errors: Mapping[str, Any]) -> str:
    """Return the errors of a task for people."""
    unit = errors["unit"]
    before, after, later = (
        f"{errors[f'error_{state}']:.2f} [{errors[f'interval_{state}'][0]:.2f}, {errors[f'interval_{state}'][1]:.2f}]"
        for state in _STATES
    )
    return (
        f"{errors['metric']}{f' in {unit}' if unit else ''} {before} before, {after} zipped, {later} after light "
        f"retraining; {errors['agreement_retrained']:.1f} % agreement with the original"
    )
