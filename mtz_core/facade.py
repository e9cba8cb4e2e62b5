"""Zip, retrain and evaluate networks in one call each."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import Signature
from typing import Any, TypeVar

from torch import Tensor, nn

from mtz_core.batches import (
    ANY_NAMES,
    Batch,
    NamedTensors,
    call,
    concatenated,
    divided,
    is_finite,
    is_positional,
    labels_of,
    mapped,
    shapes_in_words,
    signature_of,
    tensors_of,
)
from mtz_core.errors import InvalidCalibration, InvalidConfig, MtzError, ZipWarning
from mtz_core.evaluation import (
    Case,
    Function,
    Metric,
    Metrics,
    Model,
    measure,
    measured,
    metric_of,
    metrics_by_task,
    outputs_of,
)
from mtz_core.merging.compatibility import KEPT_SEPARATE, common_part, shared_counts
from mtz_core.merging.judging import HELD_OUT, RUINED, hold_out, judge, warn_of_ruin
from mtz_core.merging.matching import descent, match
from mtz_core.merging.walk import check_task_name, merge, task_module, trace_task, warn_of_unused
from mtz_core.network.graph import Network
from mtz_core.network.tracing import check_paths, evaluation_mode
from mtz_core.planning.planner import Planner
from mtz_core.planning.search import BudgetSearch, FloorSearch, Validation
from mtz_core.retraining import Retraining, RetrainStep, Targets
from mtz_core.settings import MOVES, Budget, Move, RetrainConfig, ZipConfig
from mtz_core.statistics.calibration import as_batch, as_batches, has_several
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.report import LayerReport, ZipReport, noted_in_brief

Given = Tensor | Mapping[str, Tensor] | Iterable[Any]
"""Examples: a tensor; of several inputs, a dict by name, or a tuple in the network's order; or batches of such."""

Labelled = tuple[Any, Tensor | Mapping[str, Tensor]] | Iterable[tuple[Any, Tensor | Mapping[str, Tensor]]]
"""Examples with labels: a pair of both, or batches of pairs, as a ``DataLoader`` gives them. Labels of several outputs
are a dict by name, for some or all of them."""

_HARDLY = 0.05
_BATCH = 500
_log = logging.getLogger("mtz_core")


@dataclass(frozen=True)
class Progress:
    """A step that is done, as callbacks receive it and the logger ``mtz_core`` writes it.

    Attributes:
        stage: ``trace``, ``measure``, ``match``, ``plan``, ``merge`` or ``retrain``.
        what: The task, neuron group, layer, plan or iteration that is done.
        done: How many of the stage are done.
        total: How many there are; None where that depends on what comes out.
    """

    stage: str
    what: str
    done: int
    total: int | None = None

    def __str__(self) -> str:
        """Return a line for people."""
        return f"{self.stage} {self.done}{f' of {self.total}' if self.total is not None else ''}: {self.what}"


OnProgress = Callable[[Progress], None]


@dataclass(frozen=True)
class Evaluation:
    """How good a network is at one task.

    Attributes:
        error: By the metric: in percent, or in the metric's own unit.
        interval: The interval that holds the error with 95 %.
        original_error: The original network's error; None where no originals are given.
        agreement: How far outputs agree with the original network's, in percent; None where no originals are given. See
            `mtz_core.task_loss.TaskLoss.agreements`.
    """

    error: float
    interval: tuple[float, float]
    original_error: float | None = None
    agreement: float | None = None


def zip_networks(
    networks: Mapping[str, nn.Module],
    calibration: Mapping[str, Given],
    config: ZipConfig | None = None,
    *,
    validation: Mapping[str, Validation | Given] | None = None,
    retraining: RetrainConfig | None = None,
    on_progress: OnProgress | None = None,
) -> ZippedNetwork:
    """Zip pre-trained networks into one (He, Zhou, Thiele 2018; see `ZipConfig.method`).

    The networks are not modified, and the order in which they are listed makes no difference.

    Args:
        networks: The network of each task.
        calibration: Examples of each task's inputs, ``[batch, *input shape]``: one tensor, or batches, such as a
            ``DataLoader``. A dict, as a whole or as a batch, has several inputs by their names in the forward pass. So
            has a tuple, in its order, if the network cannot do with one input. Labels in pairs ``(inputs, labels)``
            are ignored.
        config: What to share, or the budget, and how; by default everything that can be shared.
        validation: Examples of each task: with labels, on which a floor is kept, or, with or without them, on which the
            result is judged and by which light retraining is validated. Without them, one calibration example in five
            is held out for that.
        retraining: Light retraining after zipping, by distillation on the calibration data. The search for a floor
            retrains in any case.
        on_progress: Called after each step.

    Returns:
        The zipped network, in evaluation mode.

    Raises:
        UnsupportedModule: A network does something that zipping does not understand.
        IncompatibleNetworks: The networks have no part in common, or differ outside of what is kept separate.
        InvalidWeights: Weights are not finite.
        InvalidCalibration: Data is missing, not finite, or does not fit.
        InvalidConfig: A setting is impossible. All of these come before any work where they can be known.

    Warns:
        ZipWarning: A task has lost most of what it knew, layers that were to be shared stay separate, calibration data
            is too little for some, or no output of a network depends on some of its parameters.
    """
    config = ZipConfig() if config is None else config
    _check_request(networks, calibration, config, validation, retraining)
    networks = {task: task_module(task, module) for task, module in networks.items()}
    budget, steps = config.budget, _Steps(on_progress)
    floor = budget is not None and budget.floor is not None
    taken = {task: signature_of(networks[task]) for task in sorted(networks)}
    batches = {task: as_batches(calibration[task], task, own) for task, own in taken.items()}
    labelled = {task: _validation(own, task, taken[task]) for task, own in (validation or {}).items()} if floor else {}
    others, held_out = _held_out(batches, validation, taken)
    if retraining is not None and not floor:
        retraining.balance_of(tuple(batches))
        _check_held_out(batches, held_out)
    if budget is None or retraining is not None:
        batches = others
    traced = _traced(networks, batches, config, steps)
    for task, own in traced.items():
        warn_of_unused(task, own.network, stacklevel=2)
        if budget is None and not own.loss.tells and config.shared_fraction != 0:
            warnings.warn(
                f"the network of {task!r} puts out the same for all calibration examples, so that nothing tells what "
                "it loses. Give examples as it meets them in use.",
                ZipWarning,
                stacklevel=2,
            )
    if budget is None:
        zipped = _share(traced, config, steps)
    else:
        search = BudgetSearch(traced, config, budget, held_out if validation is not None else None)
        if floor:
            training = {task: concatenated(own) for task, own in batches.items()}
            zipped = _keep_floors(
                FloorSearch(search, networks, training, labelled, retraining or RetrainConfig()), steps
            )
        else:
            zipped = _spend(search, steps)
    if retraining is not None and not floor:
        fitting, rest = ({task: concatenated(own) for task, own in data.items()} for data in (batches, held_out))
        run = Retraining(zipped, networks, fitting, rest, retraining)
        for _ in steps.count("retrain", run.steps(), None, _iteration):
            pass
    if not zipped.report.tasks or retraining is not None:
        zipped.judged(judge(zipped, traced, held_out))
    _warn(zipped.report, wanted=budget is not None or config.shared_fraction is None or config.shared_fraction > 0)
    if any(judged.worst[1] > RUINED for judged in zipped.report.tasks.values()):
        warn_of_ruin(zipped.report.tasks, _enough(traced, config, zipped.report), stacklevel=2)
    return zipped


def retrain(
    zipped: ZippedNetwork,
    originals: Mapping[str, nn.Module],
    training: Mapping[str, Given],
    validation: Mapping[str, Given],
    config: RetrainConfig | None = None,
    *,
    labels: Targets | None = None,
    on_progress: OnProgress | None = None,
) -> tuple[RetrainStep, ...]:
    """Retrain a zipped network lightly, in place; it ends as the best network that was seen.

    Args:
        zipped: The zipped network.
        originals: The original network of each task, from which the zipped one is distilled.
        training: Examples of each task, as in `zip_networks`.
        validation: Examples that take no part in training, by which the best network is chosen.
        config: How to retrain.
        labels: Labels of the examples, read if ``config.labels`` is above 0.
        on_progress: Called after each validation.

    Returns:
        The learning curve, one step for each validation; the first is the network as it was given.

    Raises:
        InvalidCalibration: Examples, outputs or labels are missing or impossible, or a loss is not finite.
        InvalidConfig: A task is unknown, or settings contradict what is given.
    """
    _check_type("zipped", zipped, ZippedNetwork)
    _check_type("config", config, RetrainConfig)
    _check_by_task(originals=originals, training=training, validation=validation)
    splits = [
        {task: concatenated(as_batches(data, task, _taken(zipped, task))) for task, data in given.items()}
        for given in (training, validation)
    ]
    run = Retraining(zipped, originals, splits[0], splits[1], config or RetrainConfig(), labels=labels)
    return tuple(_Steps(on_progress).count("retrain", run.steps(), None, _iteration))


OneMetric = str | Function
"""A name from `mtz_core.evaluation.METRICS`, or a function of outputs and labels."""


def evaluate(
    zipped: ZippedNetwork,
    test: Mapping[str, Labelled | Given],
    *,
    originals: Mapping[str, nn.Module] | None = None,
    metric: OneMetric | Mapping[str, OneMetric | Mapping[str, OneMetric]] = "error",
) -> dict[str, Evaluation]:
    """Measure the errors of a zipped network.

    Args:
        zipped: The zipped network.
        test: Examples of each task that is to be measured, with labels where the metric needs them.
        originals: The original network of each of these tasks, to compare with.
        metric: A name from `mtz_core.evaluation.METRICS`, such as ``error`` (of the likeliest class), ``agreement`` or
            ``mean_absolute_error``; or a function of outputs and labels, or the original's outputs where there are no
            labels, that returns an error, the less the better. Of several outputs, ``{output: metric}``. Either holds
            for all tasks in `test`, or is given for each: ``{task: metric}``. A dict with the name of a task is by
            task.

    Returns:
        What was measured, for each task in `test`; with a metric for each output, for each ``task.output``.

    Raises:
        InvalidConfig: A task, the metric or an output is unknown, an original is missing, or the metric is no finite
            number.
        InvalidCalibration: There are no examples, or labels that do not fit.
    """
    _check_type("zipped", zipped, ZippedNetwork)
    _check_by_task(test=test, originals=originals or {})
    metrics = metrics_by_task(metric, tuple(test), zipped.tasks)
    known = {task: _known(own) for task, own in metrics.items()}
    for task in test:
        if task not in zipped.tasks:
            raise InvalidConfig(f"task {task!r} is not in this zipped network. Tasks: {', '.join(zipped.tasks)}.")
        if originals is not None and task not in originals:
            raise InvalidConfig(f"there is no original network for {task!r}. Give one for every task, or none at all.")
    found = {}
    with evaluation_mode(zipped):
        for task, data in test.items():
            taken = zipped.signature(task)
            given, labelled = _opened(data, taken)
            read, needs_originals = _needs(known[task], labelled)
            inputs, labels = _labelled(given, task, taken) if read else (_examples(given, task, taken), None)
            batches = divided(inputs, _BATCH)
            outputs = _outputs(partial(zipped, task=task), batches, task)
            before = None
            if originals is not None:
                with evaluation_mode(originals[task]):
                    before = _outputs(partial(call, originals[task]), batches, task)
            elif needs_originals:
                raise InvalidConfig(
                    f"the metric {metrics[task]!r} compares with the original networks. Give originals."
                )
            targets = outputs if before is None else before
            case = Case(outputs, labels, targets, zipped.loss_of(task, targets))
            for name, (own, part) in measured(case, metrics[task], task).items():
                error = measure(own, part, name)
                found[name] = Evaluation(error.value, (error.low, error.high))
                if before is not None:
                    original = measure(own, replace(part, outputs=part.targets), name)
                    agreement = part.loss.agreement(part.outputs, part.targets)
                    found[name] = replace(found[name], original_error=original.value, agreement=agreement)
    return found


def _check_by_task(**arguments: object) -> None:
    """Raises `InvalidConfig` unless these are dicts."""
    for name, given in arguments.items():
        if not isinstance(given, Mapping):
            raise InvalidConfig(
                f"{name} is a {type(given).__name__}. Give a dict by task, as {{'digits': …, 'fashion': …}}."
            )


def _check_type(name: str, given: object, wanted: type) -> None:
    """Raises `InvalidConfig` unless an argument that is given is of a type."""
    if given is not None and not isinstance(given, wanted):
        raise InvalidConfig(f"{name} is a {type(given).__name__}. Give a {wanted.__name__}.")


def _known(metrics: Metrics) -> list[Metric | Function]:
    """Metrics instead of their names; functions as they are."""
    each = metrics.values() if isinstance(metrics, Mapping) else [metrics]
    return [own if callable(own) else metric_of(own) for own in each]


def _needs(metrics: Sequence[Metric | Function], labelled: bool) -> tuple[bool, bool]:
    """Whether metrics read labels, which there may be, and whether they need the original's outputs."""
    known = [metric for metric in metrics if isinstance(metric, Metric)]
    functions = len(known) < len(metrics)  # which are given labels where there are some
    optional = functions or any(metric.by_value for metric in known)
    read = any(metric.reads == "labels" for metric in known) or (labelled and optional)
    return read, any(metric.reads == "outputs" for metric in known) or (functions and not read)


_Item = TypeVar("_Item")


class _Steps:
    """Reports steps to a callback and to the log."""

    def __init__(self, on_progress: OnProgress | None) -> None:
        self._on_progress = on_progress

    def count(
        self, stage: str, items: Iterable[_Item], total: int | None, name: Callable[[_Item], str]
    ) -> Iterator[_Item]:
        """Yield items, and report each when the next one is asked for: then it is done."""
        for done, item in enumerate(items, start=1):
            yield item
            step = Progress(stage, name(item), done, total)
            _log.info("%s", step)
            if self._on_progress is not None:
                self._on_progress(step)

    def merged(self, layers: Iterator[LayerReport | ZippedNetwork], traced: Mapping[str, Traced]) -> ZippedNetwork:
        """Merge to the end, layer by layer."""
        total = len({node.name for own in traced.values() for node in own.network.graph.layers})
        last: LayerReport | ZippedNetwork | None = None

        def reports() -> Iterator[LayerReport]:
            nonlocal last
            for last in layers:
                if not isinstance(last, ZippedNetwork):
                    yield last

        for _ in self.count("merge", reports(), total, lambda report: report.layer):
            pass
        assert isinstance(last, ZippedNetwork)
        return last


def _check_request(
    networks: Mapping[str, nn.Module],
    calibration: Mapping[str, Given],
    config: ZipConfig,
    validation: Mapping[str, Validation | Given] | None,
    retraining: RetrainConfig | None,
) -> None:
    """Check that the arguments of `zip_networks` are of one kind and speak of the same tasks."""
    _check_type("config", config, ZipConfig)
    _check_type("retraining", retraining, RetrainConfig)
    _check_by_task(networks=networks, calibration=calibration, validation=validation or {})
    for task in networks:
        check_task_name(task)
    tasks = sorted(networks)
    if tasks != sorted(calibration):
        raise InvalidConfig(f"calibration is given for {sorted(calibration)}, but the networks are {tasks}.")
    if validation is not None and tasks != sorted(validation):
        raise InvalidConfig(f"validation data is given for {sorted(validation)}, but the tasks are {tasks}.")
    if validation is None and config.budget is not None and config.budget.floor is not None:
        raise InvalidConfig("a floor needs validation data with labels: give validation.")
    if retraining is not None and retraining.labels:
        raise InvalidConfig(
            "retraining.labels: zipping retrains by distillation. Set it to 0, or use `retrain` with labels afterwards."
        )
    for task in config.outputs or {}:
        if task not in networks:
            raise InvalidConfig(f"outputs: names {task!r}, but the tasks are {tasks}.")


def _traced(
    networks: Mapping[str, nn.Module], batches: Mapping[str, list[Batch]], config: ZipConfig, steps: _Steps
) -> dict[str, Traced]:
    """Trace the networks, find what they have in common, and measure them."""
    check_paths({"keep_separate": config.keep_separate}, *networks.values())
    graphs = {
        task: trace_task(task, networks[task], data[0], config)
        for task, data in steps.count("trace", batches.items(), len(batches), lambda item: item[0])
    }
    graphs = common_part(graphs)
    shared_counts(graphs, config)
    return {
        task: _measured(task, network, batches[task], config)
        for task, network in steps.count("measure", graphs.items(), len(graphs), lambda item: item[0])
    }


def _share(traced: Mapping[str, Traced], config: ZipConfig, steps: _Steps) -> ZippedNetwork:
    """Match and merge; no budget has to be kept."""
    matches = list(steps.count("match", match(traced, config), None, lambda found: found.group))
    pairings = {found.group: found.pairing for found in matches}
    return steps.merged(merge(traced, pairings, config, descent(matches)), traced)


def _spend(search: BudgetSearch, steps: _Steps) -> ZippedNetwork:
    """Merge by the plan that loses least within the budget's size."""
    assert search.budget.size is not None
    plans = list(steps.count("plan", search.candidates(search.budget.size), None, lambda candidate: candidate.name))
    best = search.best_of(plans)
    return steps.merged(search.merging(best.plan), search.traced).judged(best.judged)


def _keep_floors(search: FloorSearch, steps: _Steps) -> ZippedNetwork:
    """Return the smallest network that keeps every floor."""
    tried = list(steps.count("plan", search.steps(), None, lambda step: step.what))
    return min((step for step in tried if step.kept), key=lambda step: step.size).zipped


def _measured(task: str, network: Network, batches: Sequence[Batch], config: ZipConfig) -> Traced:
    try:
        return Traced.measured(network, batches, config, config.output_of(task))
    except MtzError as error:
        raise type(error)(f"the network of {task!r}: {error}") from error


def _held_out(
    batches: Mapping[str, list[Batch]],
    validation: Mapping[str, Validation | Given] | None,
    taken: Mapping[str, Signature],
) -> tuple[dict[str, list[Batch]], dict[str, list[Batch]]]:
    """Return the calibration examples that are left, and those on which a result is judged.

    The latter are those for validation, or one calibration example in `HELD_OUT`; of fewer examples none is held out.

    Raises:
        InvalidCalibration: Validation data is of other inputs or of another shape.
    """
    if validation is None:
        split = {task: hold_out(own) for task, own in batches.items()}
        return {task: rest for task, (rest, _) in split.items()}, {
            task: held for task, (_, held) in split.items() if held
        }
    held_out = {task: list(divided(_examples(data, task, taken[task]), _BATCH)) for task, data in validation.items()}
    for task, own in held_out.items():
        shapes = [shapes_in_words(batch) for batch in (own[0], batches[task][0])]
        if shapes[0] != shapes[1]:
            raise InvalidCalibration(
                f"validation examples of {task!r} have shape {shapes[0]}, calibration examples {shapes[1]}. Bring them "
                "to one."
            )
    return dict(batches), held_out


def _check_held_out(batches: Mapping[str, list[Batch]], held_out: Mapping[str, list[Batch]]) -> None:
    for task in sorted(batches.keys() - held_out.keys()):
        raise InvalidCalibration(
            f"{task!r} has {sum(map(len, batches[task]))} calibration examples; light retraining holds one in "
            f"{HELD_OUT} out to validate. Give at least {HELD_OUT}, or validation data."
        )


def _taken(zipped: ZippedNetwork, task: str) -> Signature:
    """What a task's network takes, if it is one of the zipped network's."""
    return zipped.signature(task) if task in zipped.tasks else ANY_NAMES


def _examples(data: Validation | Given, task: str, taken: Signature) -> Batch:
    """Return examples, whatever labels they come with."""
    given: Any = data.examples if isinstance(data, Validation) else data
    if _is_pair(given, taken):
        given = given[0]
    return concatenated(as_batches(given, task, taken))


def _opened(data: Any, taken: Signature) -> tuple[Any, bool]:
    """Return data, an iterator as a list, and whether they come with labels."""
    if _is_pair(data, taken):
        return data, True
    if (
        isinstance(data, (Tensor, NamedTensors, Mapping))
        or is_positional(data, taken)
        or not isinstance(data, Iterable)
    ):
        return data, False
    batches = list(data)
    return batches, bool(batches) and isinstance(batches[0], (tuple, list)) and not is_positional(batches[0], taken)


def _is_pair(data: Any, taken: Signature) -> bool:
    """Whether data is all examples with their labels; otherwise it is examples, or batches of either."""
    return (
        isinstance(data, tuple)
        and len(data) == 2
        and not is_positional(data, taken)
        and (isinstance(data[0], Tensor) or has_several(data[0], taken))
    )


def _iteration(step: RetrainStep) -> str:
    losses = ", ".join(f"{task} {loss:.4g}" for task, loss in step.validation_loss.items())
    return f"iteration {step.iteration}, validation loss {losses}"


def _outputs(network: Model, batches: Sequence[Batch], task: str) -> Any:
    """Return outputs for test data, which may not be what the network is meant for."""
    try:
        outputs = outputs_of(network, batches)
    except (RuntimeError, IndexError, TypeError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InvalidCalibration(
            f"the network of {task!r} cannot run on the test data: {reason}. Give the inputs that it was trained for."
        ) from error
    if not is_finite(outputs):
        raise InvalidCalibration(
            f"the network of {task!r} has outputs that are not finite. Check its inputs and weights."
        )
    return outputs


def _validation(data: Any, task: str, taken: Signature) -> Validation:
    if not isinstance(data, Validation):
        return Validation(*_labelled(data, task, taken))
    labels = labels_of(data.labels, f"the labels of {task!r}")
    return replace(data, examples=_examples(data, task, taken), labels=labels)


def _labelled(data: Any, task: str, taken: Signature) -> tuple[Batch, Batch]:
    """Return all examples and labels of a task."""
    pairs: list[Any] = [data] if _is_pair(data, taken) else list(data) if isinstance(data, Iterable) else [data]
    pairs = [
        (as_batch(pair[0], task, taken), labels_of(pair[1], f"the labels of {task!r}"))
        if isinstance(pair, (tuple, list)) and len(pair) == 2
        else pair
        for pair in pairs
    ]
    for pair in pairs:
        if (
            not isinstance(pair, tuple)
            or len(pair) != 2
            or not all(isinstance(part, (Tensor, NamedTensors)) for part in pair)
        ):
            raise InvalidCalibration(
                f"the data of {task!r} are not examples with labels. Give a pair of tensors, or batches of pairs."
            )
        if len(pair[0]) != len(pair[1]):
            raise InvalidCalibration(
                f"{task!r} has {len(pair[1])} labels for {len(pair[0])} examples. Give one for each."
            )
    if not pairs:
        raise InvalidCalibration(f"there are no examples with labels for {task!r}. Give at least one.")
    if len({tuple(sorted(tensors_of(pair[1]))) for pair in pairs}) > 1:
        raise InvalidCalibration(f"batches of {task!r} have labels of different outputs. Give the same in all.")
    inputs, labels = (concatenated(parts) for parts in zip(*pairs, strict=True))
    return inputs, mapped(lambda own: own if own.is_floating_point() else own.long(), labels)


def _enough(traced: Mapping[str, Traced], config: ZipConfig, report: ZipReport) -> str:
    """Say which size is expected to keep all tasks. Beyond a budget it must be larger than what was stored."""
    silent = ", ".join(repr(task) for task, own in traced.items() if not (own.loss.tells and own.responds))
    if silent:
        return f"No size can be proposed: small changes do not show in the outputs of {silent}"
    moves: tuple[Move, ...] = ("share",) if config.method == "paper" else MOVES
    whole = replace(config, share=None, budget=Budget(size=1.0, moves=moves))
    stored = 0.0 if config.budget is None else report.stored_bytes / report.original_bytes
    size = Planner(traced, whole, moves).size_for(_HARDLY, above=stored)
    if size is None:
        return "These networks have too little in common: leave one out"
    return f"Let a plan decide: ZipConfig(budget=Budget(size={size:g})) is expected to keep all tasks"


def _warn(report: ZipReport, wanted: bool) -> None:
    """Warn of what the report notes, once for each kind: it has the details. Sharing may not have been `wanted`."""
    notes = {layer.layer: layer.note for layer in report.layers if wanted and layer.note not in ("", KEPT_SEPARATE)}
    few_rows = {layer.layer: layer.few_rows for layer in report.layers if layer.few_rows}
    for noted, does, do in (
        (notes, "stays separate", "stay separate"),
        (few_rows, "is fitted to few rows", "are fitted to few rows"),
    ):
        if noted:
            warnings.warn(f"{noted_in_brief(noted, does, do)} (report.layers has all).", ZipWarning, stacklevel=3)
