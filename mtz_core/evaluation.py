"""How good a network is at its task, and how much it agrees with another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from math import isfinite

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mtz_core.errors import InvalidCalibration, InvalidConfig

Classifier = Callable[[Shaped[Tensor, "batch ..."]], Float[Tensor, "batch classes"]]


@torch.no_grad()
def outputs_of(network: Classifier, batches: Iterable[Shaped[Tensor, "_ ..."]]) -> Float[Tensor, "examples classes"]:
    """The outputs for all examples. Raises `InvalidCalibration` without examples."""
    parts = [network(batch) for batch in batches]
    if not parts:
        raise InvalidCalibration("there are no test examples. Give at least one.")
    return torch.cat(parts)


def predict(network: Classifier, batches: Iterable[Shaped[Tensor, "_ ..."]]) -> Int64[Tensor, " examples"]:
    """The most likely class of every example. Raises `InvalidCalibration` without examples."""
    return outputs_of(network, batches).argmax(dim=1)


def error_rate(predicted: Int64[Tensor, " n"], labels: Int64[Tensor, " n"]) -> float:
    """Share of wrong predictions, in percent."""
    return 100 * float((predicted != labels).double().mean())


def agreement(predicted: Int64[Tensor, " n"], original: Int64[Tensor, " n"]) -> float:
    """Share of predictions equal to the original network's, in percent."""
    return 100 - error_rate(predicted, original)


def _top5_error(outputs: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    best = outputs.topk(min(5, outputs.shape[1]), dim=1).indices
    return 100 * float((best != labels[:, None]).all(dim=1).double().mean())


def _balanced_error(outputs: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"]) -> float:
    wrong = (outputs.argmax(dim=1) != labels).double()
    return 100 * float(torch.stack([wrong[labels == label].mean() for label in labels.unique()]).mean())


Metric = Callable[[Float[Tensor, "n classes"], Int64[Tensor, " n"]], float]

METRICS: Mapping[str, Metric] = {
    "error": lambda outputs, labels: error_rate(outputs.argmax(dim=1), labels),
    "top5_error": _top5_error,
    "balanced_error": _balanced_error,
}
"""Errors in percent, the less the better: of the likeliest class, of the five likeliest, of the mean over classes."""


def measure(metric: str, outputs: Float[Tensor, "n classes"], labels: Int64[Tensor, " n"], task: str) -> float:
    """A task's error by a metric, in percent. Raises `InvalidConfig` if there is no such metric or it is no number."""
    if metric not in METRICS:
        raise InvalidConfig(f"the metric of {task!r}, {metric!r}, is unknown. Metrics: {', '.join(METRICS)}.")
    value = METRICS[metric](outputs, labels)
    if not isfinite(value):
        raise InvalidConfig(
            f"the metric {metric!r} of {task!r} is {value}. Check that there are labels, and outputs that are finite."
        )
    return value


def check_labels(labels: Shaped[Tensor, "..."], examples: int, classes: int, task: str) -> None:
    """Raises `InvalidCalibration` unless every example has a label that is one of the classes."""
    if labels.ndim != 1:
        raise InvalidCalibration(
            f"the labels of {task!r} have shape {list(labels.shape)}. Give each example one number, its class."
        )
    if len(labels) != examples:
        raise InvalidCalibration(f"{task!r} has {len(labels)} labels for {examples} examples. Give one for each.")
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InvalidCalibration(
            f"the labels of {task!r} go from {labels.min()} to {labels.max()}, but its network has {classes} classes. "
            f"Allowed: whole numbers from 0 to {classes - 1}."
        )
