"""The metric of a model: one of the core's, or a function of the project's own."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from mtz_core.evaluation import METRICS, Metric, metric_of
from tasks.data.examples import InvalidData
from tasks.models.factories import InvalidFactory, import_named
from tasks.params import Params


def find_metric(params: Params, model: str, labels: Tensor | None) -> tuple[str, Metric]:
    """Find the metric of a model.

    Args:
        params: The parameters of the group.
        model: The model's name.
        labels: The labels of its data; None where there are none. They decide where the settings name no metric.

    Returns:
        The metric's name, and the metric.

    Raises:
        InvalidFactory: The function cannot be imported.
        InvalidData: The metric needs labels, and there are none.
    """
    name = params.models[model].metric
    if name is None:
        name = "agreement" if labels is None else "mean_absolute_error" if labels.is_floating_point() else "error"
    metric = metric_of(name if name in METRICS else find_function(name, model))
    if metric.reads == "labels" and labels is None:
        raise InvalidData(
            f"models.{model}.metric: {name} needs labels, and a split that it is measured on has none. Give labels, or "
            "a metric without, such as agreement."
        )
    return name, metric


def find_function(name: str, model: str) -> Callable[[Tensor, Tensor], float]:
    """Import a metric of the project's own.

    Args:
        name: The function, as `package.module:function`.
        model: The model's name, for errors.

    Returns:
        The function.

    Raises:
        InvalidFactory: The function cannot be imported, or is none.
    """
    function: Callable[[Tensor, Tensor], float] = import_named(name, f"models.{model}.metric")
    if not callable(function):
        raise InvalidFactory(f"models.{model}.metric: {name} is a {type(function).__name__}, not a function.")
    return function
