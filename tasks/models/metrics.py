"""The metrics of a model: one of the core's for each output, or functions of the project's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mtz_core.batches import Batch, NamedTensors, tensors_of
from mtz_core.evaluation import METRICS, Case, Metric, measured, metric_of
from tasks.data.examples import InvalidData
from tasks.data.layout import LABEL, LABEL_OF
from tasks.models.factories import InvalidFactory, import_named
from tasks.params import InvalidParams, Params

Named = Mapping[str, tuple[str, Metric]]
"""For every output that is measured, the metric's name and the metric; an empty name stands for all outputs."""


def find_metrics(params: Params, model: str, outputs: Sequence[str], labels: Batch | None) -> Named:
    """Find the metrics of a model.

    Args:
        params: The parameters of the group.
        model: The model's name.
        outputs: The names of its network's outputs if there are several.
        labels: The labels of its data; of several outputs by name. None where there are none. They decide where the
            settings name no metric.

    Returns:
        The metrics.

    Raises:
        InvalidFactory: A function cannot be imported.
        InvalidParams: The settings name an output that the network has not.
        InvalidData: A metric needs labels, and there are none, or labels are for other outputs.
    """
    _check_labels(model, outputs, labels)
    known: Mapping[str, Tensor] = {} if labels is None else tensors_of(labels)
    found = {}
    for output, name in _declared(params, model, outputs).items():
        own = known.get(output)
        if name is None:
            name = "agreement" if own is None else "mean_absolute_error" if own.is_floating_point() else "error"
        metric = metric_of(name if name in METRICS else find_function(name, model))
        if metric.reads == "labels" and own is None:
            column = f"{LABEL_OF}{output}" if output else LABEL
            raise InvalidData(
                f"models.{model}.metric: {name} needs labels, and a split that it is measured on has none. Give labels "
                f"(column {column}), or a metric without, such as agreement."
            )
        found[output] = name, metric
    return found


def cases_of(metrics: Named, case: Case, model: str) -> dict[str, tuple[str, Metric, Case]]:
    """Say what is measured of a model, by the model's name, or as ``model.output``.

    Args:
        metrics: Its metrics.
        case: The outputs and what they are compared with.
        model: The model's name.

    Returns:
        The metric's name, the metric, and what it compares.

    Raises:
        MtzError: Metrics or labels do not fit the outputs.
    """
    found = measured(case, {output: metric for output, (_, metric) in metrics.items()}, model)
    return {title: (name, *own) for (name, _), (title, own) in zip(metrics.values(), found.items(), strict=True)}


def names_of(params: Params, model: str, outputs: Sequence[str]) -> list[str]:
    """Return the names of what is measured of a model: the model, or its outputs as ``model.output``.

    Args:
        params: The parameters of the group.
        model: The model's name.
        outputs: The names of its network's outputs if there are several.

    Returns:
        The names.

    Raises:
        InvalidParams: The settings name an output that the network has not.
    """
    return [f"{model}.{output}" if output else model for output in _declared(params, model, outputs)]


def _declared(params: Params, model: str, outputs: Sequence[str]) -> dict[str, str | None]:
    """Return the metric that settings name for every output that is measured, if they name any."""
    declared = params.models[model].metric
    if isinstance(declared, Mapping):
        for name in declared:
            if name not in outputs:
                raise InvalidParams(
                    f"models.{model}.metric.{name}: there is no such output. "
                    + (f"Outputs: {', '.join(outputs)}." if outputs else "There is one: give its metric alone.")
                )
        return {name: declared.get(name) for name in outputs}
    if not outputs:
        return {"": declared}
    each: dict[str, str | None] = dict.fromkeys(outputs, declared if declared in METRICS else None)
    return each if declared is None or declared in METRICS else {"": declared, **each}


def _check_labels(model: str, outputs: Sequence[str], labels: Batch | None) -> None:
    named = [*labels.tensors] if isinstance(labels, NamedTensors) else []
    unknown = [name for name in named if name not in outputs]
    if unknown or (outputs and isinstance(labels, Tensor)):
        column = f"{LABEL_OF}{unknown[0]}" if unknown else LABEL
        names = ", ".join(f"{LABEL_OF}{name}" for name in outputs)
        raise InvalidData(
            f"models.{model}.data: column {column} is for no output of the network. "
            + (f"Labels of its outputs are columns {names}, some or all of them." if outputs else f"Call it {LABEL}.")
        )


def find_function(name: str, model: str) -> Callable[[Any, Any], float]:
    """Import a metric of the project's own.

    Args:
        name: The function, as `package.module:function`.
        model: The model's name, for errors.

    Returns:
        The function.

    Raises:
        InvalidFactory: The function cannot be imported, or is none.
    """
    function: Callable[[Any, Any], float] = import_named(name, f"models.{model}.metric")
    if not callable(function):
        raise InvalidFactory(f"models.{model}.metric: {name} is a {type(function).__name__}, not a function.")
    return function
