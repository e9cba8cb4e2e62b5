"""How good a network is at its task, with labels or against its original."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from math import isfinite, prod, sqrt
from numbers import Real
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mtz_core.batches import Batch, NamedTensors, concatenated, flattened, tensors_of
from mtz_core.errors import InvalidCalibration, InvalidConfig

Model = Callable[..., Any]

Function = Callable[[Any, Any], float]
"""A metric of one's own: of outputs and labels, or the original's outputs where there are no labels. Several outputs
are a dict by name."""

_SURE = 1.959964
"""The 97.5 % quantile of the normal distribution: intervals hold with 95 %."""

_RESAMPLES = 200

_NO_CLASSES = "If they are no classes, take another metric, such as mean_absolute_error."


@torch.no_grad()
def outputs_of(network: Model, batches: Iterable[Batch]) -> Any:
    """The outputs for all examples, several as `NamedTensors`. Raises `InvalidCalibration` without examples."""
    parts = [flattened(network(batch)) for batch in batches]
    if not parts:
        raise InvalidCalibration("there are no test examples. Give at least one.")
    return concatenated(parts)


def predict(network: Model, batches: Iterable[Batch]) -> Int64[Tensor, " examples"]:
    """The most likely class of every example. Raises `InvalidCalibration` without examples."""
    found: Tensor = outputs_of(network, batches).argmax(dim=1)
    return found


def error_rate(predicted: Int64[Tensor, " n"], labels: Int64[Tensor, " n"]) -> float:
    """Share of wrong predictions, in percent."""
    return 100 * float((predicted != labels).double().mean())


@dataclass(frozen=True)
class Case:
    """What a metric compares.

    Attributes:
        outputs: The network's outputs.
        labels: The label of every example, or its true outputs; of several outputs `NamedTensors`, for some or all of
            them. None where there are none.
        targets: The original network's outputs.
        loss: The task's loss, which knows the kind of the outputs.
    """

    outputs: Any
    labels: Any
    targets: Any
    loss: Any

    def part(self, index: Int64[Tensor, " m"]) -> Case:
        """Some of the examples."""
        labels = None if self.labels is None else self.labels[index]
        return Case(self.outputs[index], labels, self.targets[index], self.loss)

    def output(self, name: str) -> Case:
        """One of several outputs."""
        labels = None if self.labels is None else tensors_of(self.labels).get(name)
        return Case(self.outputs.tensors[name], labels, self.targets.tensors[name], self.loss.losses[name])

    @property
    def truth(self) -> Any:
        """The labels, or else the original's outputs."""
        return self.targets if self.labels is None else self.labels


@dataclass(frozen=True)
class Metric:
    """An error, the less the better.

    Attributes:
        of: Computes one error for each example, from 0 to 1, or a single number for all.
        reads: ``labels`` where it cannot do without, else ``outputs``.
        unit: ``%``, or nothing for a number in units of its own.
        joint: Whether it can measure several outputs together.
        by_value: Whether it compares every value of the outputs with one of the labels, where there are some.
    """

    of: Callable[[Case], Float[Tensor, " n"] | float]
    reads: Literal["labels", "outputs"] = "outputs"
    unit: Literal["%", ""] = "%"
    joint: bool = False
    by_value: bool = False

    @property
    def factor(self) -> float:
        """What turns a computed error into the unit."""
        return 100.0 if self.unit == "%" else 1.0


@dataclass(frozen=True)
class Measured:
    """An error and the interval that holds it with 95 %, both in the metric's unit."""

    value: float
    low: float
    high: float


def _wrong(case: Case) -> Tensor:
    assert case.labels is not None
    return (case.outputs.argmax(dim=1) != case.labels).double().reshape(len(case.labels), -1).mean(dim=1)


def _wrong_of_five(case: Case) -> Tensor:
    assert case.labels is not None
    best = case.outputs.topk(min(5, case.outputs.shape[1]), dim=1).indices
    return (best != case.labels[:, None]).all(dim=1).double()


def _wrong_by_class(case: Case) -> float:
    assert case.labels is not None
    wrong = _wrong(case)
    return float(torch.stack([wrong[case.labels == label].mean() for label in case.labels.unique()]).mean())


def _distance(case: Case) -> float:
    truth = case.truth.to(case.outputs.dtype).reshape(case.outputs.shape)
    return float((case.outputs - truth).abs().double().mean())


def _uncorrelated(case: Case) -> float:
    found, truth = (values.double().reshape(len(values), -1) for values in (case.outputs, case.truth))
    found, truth = found - found.mean(dim=0), truth - truth.mean(dim=0)
    scale = found.norm(dim=0) * truth.norm(dim=0)
    return 1 - float((found * truth).sum(dim=0)[scale > 0].div(scale[scale > 0]).mean())


def _imprecise(case: Case) -> float:
    """1 − average precision, mean over the labels that some example has; the original decides without labels."""
    scores = case.loss.natural(case.outputs).double().reshape(len(case.outputs), -1)
    if case.labels is None:
        given = case.loss.natural(case.targets).reshape(scores.shape) > 0
    else:
        given = case.labels.reshape(scores.shape) > 0
    found = []
    for score, hit in zip(scores.T, given.T, strict=True):
        if hit.any():
            ordered = hit[score.argsort(descending=True, stable=True)].double()
            precision = ordered.cumsum(dim=0) / torch.arange(1, len(ordered) + 1)
            found.append(float((precision * ordered).sum() / ordered.sum()))
    return 1 - sum(found) / len(found) if found else float("nan")


METRICS: Mapping[str, Metric] = {
    "error": Metric(_wrong, "labels"),
    "top5_error": Metric(_wrong_of_five, "labels"),
    "balanced_error": Metric(_wrong_by_class, "labels"),
    "agreement": Metric(lambda case: 1 - case.loss.agreements(case.outputs, case.targets), joint=True),
    "output_error": Metric(lambda case: float(case.loss.relative_error(case.outputs, case.targets)), joint=True),
    "mean_absolute_error": Metric(_distance, unit="", by_value=True),
    "correlation": Metric(_uncorrelated, by_value=True),
    "average_precision": Metric(_imprecise, by_value=True),
}
"""The metrics by name. All are errors, the less the better, so that a floor means the same for each: of the likeliest
class, of the five likeliest, of the mean over classes; what is missing to full agreement with the original (see
`TaskLoss.agreements`); the squared error relative to the spread of the original's outputs; the mean distance, in units
of the outputs; what is missing to a correlation, or an average precision, of 1. The last three compare with labels
where there are some, else with the original."""


def metric_of(metric: Metric | str | Function) -> Metric:
    """Look a metric up.

    Args:
        metric: A metric, a name from `METRICS`, or a function of outputs and labels (the original's outputs where there
            are no labels) that returns an error, the less the better.

    Returns:
        The metric.

    Raises:
        InvalidConfig: There is no such metric.
    """
    if isinstance(metric, Metric):
        return metric
    if callable(metric):
        return Metric(partial(_called, metric), unit="", joint=True)
    if not isinstance(metric, str) or metric not in METRICS:
        raise InvalidConfig(f"the metric {metric!r} is unknown. Metrics: {', '.join(METRICS)}.")
    return METRICS[metric]


def _called(metric: Function, case: Case) -> Any:
    """What a function returns. Raises `InvalidConfig` if it fails."""
    try:
        return metric(_copied(case.outputs), _copied(case.truth))
    except Exception as error:
        name = getattr(metric, "__name__", type(metric).__name__)
        reason = next(iter(str(error).splitlines()), "").rstrip(".")
        raise InvalidConfig(
            f"the metric {name} fails ({type(error).__name__}: {reason}). "
            "It is called with the outputs and the labels of all examples, or the original's outputs without labels."
        ) from error


Metrics = Metric | str | Function | Mapping[str, Metric | str | Function]
"""A metric, or one for each of several outputs by their names; an empty name stands for all of them together."""


def metrics_by_task(
    given: Metrics | Mapping[str, Metrics], measured: Sequence[str], tasks: Sequence[str]
) -> dict[str, Metrics]:
    """Take metrics in any form: for all tasks that are measured, or for each of them.

    Args:
        given: The metrics. A dict is by task where a key is one of the tasks, or where a value is a dict.
        measured: The tasks that are measured.
        tasks: All tasks of the zipped network.

    Returns:
        The metrics of each task that is measured.

    Raises:
        InvalidConfig: A dict is empty, or does not name exactly the tasks that are measured.
    """
    by_task: dict[str, Any] = dict.fromkeys(measured, given)
    if isinstance(given, Mapping) and (
        given.keys() & {*tasks} or any(isinstance(own, Mapping) for own in given.values())
    ):
        if given.keys() != {*measured}:
            raise InvalidConfig(
                f"metric: names {sorted(given)}, but the tasks that are measured are {sorted(measured)}."
            )
        by_task = dict(given)
    for task, own in by_task.items():
        if isinstance(own, Mapping) and not own:
            raise InvalidConfig(f"the metric of {task!r} names no output. Give one metric, or {{output: metric}}.")
    return by_task


def measured(case: Case, metrics: Metrics, task: str) -> dict[str, tuple[Metric, Case]]:
    """Say what is measured of a task.

    Args:
        case: The outputs and what they are compared with.
        metrics: The metric, or those of several outputs.
        task: The task's name.

    Returns:
        Each metric and what it compares, by the task's name, or ``task.output``.

    Raises:
        InvalidConfig: There is no such metric or output, or a metric measures one output and is given several.
        InvalidCalibration: Labels do not fit the examples, the outputs or the classes.
    """
    names = [*tensors_of(case.outputs)] if isinstance(case.outputs, NamedTensors) else []
    labelled = [*tensors_of(case.labels)] if isinstance(case.labels, NamedTensors) else []
    for name in labelled:
        if name not in names:
            raise InvalidCalibration(
                f"the labels of {task!r} are for an output {name!r}, but its outputs are "
                f"{', '.join(names) or 'one without a name'}. Name them after outputs, or give one tensor for one."
            )
    if not isinstance(metrics, Mapping):
        metrics = {"": metrics}
    elif names and case.labels is not None and not labelled:
        raise InvalidCalibration(
            f"the labels of {task!r} are one tensor, but its network has several outputs. Give labels by their names: "
            f"{', '.join(names)}."
        )
    found = {}
    for name, metric in metrics.items():
        if name and name not in names:
            raise InvalidConfig(
                f"the metric of {task!r} is for an output {name!r}, but its outputs are "
                f"{', '.join(names) or 'one without a name'}."
            )
        title = f"{task}.{name}" if name else task
        known, part = metric_of(metric), case.output(name) if name else case
        _check(known, part, title)
        if isinstance(part.labels, Tensor) and isinstance(part.outputs, Tensor):
            check_labels(known, part.labels, part.outputs.shape, title)
        found[title] = known, part
    return found


def _check(metric: Metric, case: Case, task: str) -> None:
    """Raises `InvalidConfig` if a metric does not fit what it is to compare."""
    if metric.reads == "labels" and case.labels is None:
        raise InvalidConfig(
            f"the metric of {task!r} needs labels, and its data have none. Give labels, or take a metric without: "
            f"{', '.join(name for name, known in METRICS.items() if known.reads != 'labels')}."
        )
    if isinstance(case.outputs, NamedTensors) and not metric.joint:
        names = ", ".join(case.outputs.tensors)
        raise InvalidConfig(
            f"the metric of {task!r} measures one output, but its network has several: {names}. Take agreement or "
            "output_error, a function, which is given a dict, or a metric for each: {output: metric}."
        )
    if metric.reads == "labels" and isinstance(case.outputs, Tensor):
        _check_has_classes(case.outputs.shape, task)


def _check_has_classes(outputs: Sequence[int], task: str) -> None:
    if len(outputs) < 2:
        raise InvalidConfig(
            f"the metric of {task!r} compares classes, but its output is one number. Take mean_absolute_error."
        )


def _copied(values: Batch) -> Any:
    """Values that may be written into, several as a dict by name."""
    if isinstance(values, NamedTensors):
        return {name: own.clone() for name, own in values.tensors.items()}
    return values.clone()


def error_of(metric: Metric, case: Case, task: str) -> float:
    """Measure an error where no interval is asked for, which may cost much more. Raises as `measure` does."""
    return metric.factor * _computed(metric, case, task)[0]


def measure(metric: Metric, case: Case, task: str, seed: int = 0) -> Measured:
    """Measure an error.

    Args:
        metric: The metric.
        case: The outputs and what they are compared with.
        task: The task's name, for errors.
        seed: Seeds the resampling behind the interval, where the error is no mean over the examples.

    Returns:
        The error with an interval: Wilson's for a mean over the examples, else of the percentile bootstrap.

    Raises:
        InvalidConfig: The metric needs labels and there are none, or it is no finite number.
    """
    value, is_mean = _computed(metric, case, task)
    factor, count = metric.factor, len(case.outputs)
    if is_mean:
        low, high = _wilson(value, count)
        return Measured(factor * value, factor * low, factor * high)
    generator = torch.Generator().manual_seed(seed)
    again = []
    for _ in range(_RESAMPLES):
        with suppress(InvalidConfig):  # a sample may leave a class or a label out
            sample = case.part(torch.randint(count, (count,), generator=generator))
            again.append(_number(metric.of(sample), task))
    spread = torch.tensor(again or [value], dtype=torch.float64)
    low, high = (float(spread.quantile(share)) for share in (0.025, 0.975))
    return Measured(factor * value, factor * min(low, value), factor * max(high, value))


def _computed(metric: Metric, case: Case, task: str) -> tuple[float, bool]:
    """An error before its unit, and whether it is a mean over the examples."""
    _check(metric, case, task)
    found = metric.of(case)
    if isinstance(found, Tensor) and found.ndim == 1 and len(found) == len(case.outputs):
        return _number(float(found.double().mean()), task), True
    return _number(found, task), False


def _number(found: object, task: str) -> float:
    if isinstance(found, Tensor) and found.numel() == 1:
        found = found.item()
    if isinstance(found, bool) or not isinstance(found, Real):
        raise InvalidConfig(f"the metric of {task!r} returns a {type(found).__name__}. Let it return a number.")
    if not isfinite(found):
        raise InvalidConfig(
            f"the metric of {task!r} is {float(found)}. Check that outputs and labels are finite, and that the "
            "examples show what it measures."
        )
    return float(found)


def _wilson(share: float, count: int) -> tuple[float, float]:
    """Wilson's score interval of a mean of values from 0 to 1."""
    least = 1 + _SURE**2 / count
    centre = (share + _SURE**2 / (2 * count)) / least
    reach = _SURE * sqrt(max(share * (1 - share), 0.0) / count + _SURE**2 / (4 * count**2)) / least
    low, high = max(centre - reach, 0.0), min(centre + reach, 1.0)
    return 0.0 if share <= 0 else low, 1.0 if share >= 1 else high  # exactly, where rounding leaves 2e-17


def check_labels(metric: Metric, labels: Shaped[Tensor, "..."], outputs: Sequence[int], task: str) -> None:
    """Check that labels are what a metric compares with the outputs.

    Args:
        metric: The metric.
        labels: The labels of all examples, or of some.
        outputs: The shape of the outputs for these examples.
        task: The name of what is measured, for errors.

    Raises:
        InvalidConfig: The metric compares classes, and the outputs are other than one score for each class.
        InvalidCalibration: Labels are no classes of the network, or no number for each value of the outputs.
    """
    if metric.reads == "labels":
        _check_has_classes(outputs, task)
        if len(outputs) > 2:
            raise InvalidConfig(
                f"the metric of {task!r} compares one class for each example, but its outputs have shape "
                f"{list(outputs)}. Take agreement, or a function of your own."
            )
        _check_are_classes(labels, outputs[0], outputs[1], task)
    if metric.by_value and labels.numel() != prod(outputs):
        raise InvalidCalibration(
            f"the labels of {task!r} have shape {list(labels.shape)}, but its outputs {list(outputs)}. Give a number "
            "for each, or take another metric, such as agreement."
        )


def _check_are_classes(labels: Shaped[Tensor, "..."], examples: int, classes: int, task: str) -> None:
    """Raises `InvalidCalibration` unless every example has a label that is one of the classes."""
    if labels.ndim != 1:
        raise InvalidCalibration(
            f"the labels of {task!r} have shape {list(labels.shape)}. Give each example one number, its class. "
            f"{_NO_CLASSES}"
        )
    if len(labels) != examples:
        raise InvalidCalibration(f"{task!r} has {len(labels)} labels for {examples} examples. Give one for each.")
    if labels.is_floating_point():
        raise InvalidCalibration(
            f"the labels of {task!r} are {labels.dtype}, and its metric compares classes. {_allowed(classes)} "
            f"{_NO_CLASSES}"
        )
    check_classes(int(labels.min()), int(labels.max()), classes, f"the labels of {task!r}")


def check_classes(least: int, most: int, classes: int, labels: str) -> None:
    """Check that a network has the classes that labels name.

    Args:
        least: The least class number.
        most: The largest.
        classes: How many classes the network has.
        labels: What the labels are called, for errors.

    Raises:
        InvalidCalibration: It has not.
    """
    if least < 0 or most >= classes:
        raise InvalidCalibration(
            f"{labels} go from {least} to {most}, but the network has {classes} class{'es' * (classes != 1)}. "
            f"{_allowed(classes)}"
        )


def _allowed(classes: int) -> str:
    return f"Allowed: whole numbers from 0 to {classes - 1}."
