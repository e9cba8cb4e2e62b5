"""Checks of outputs before any work: their kinds, metrics, labels and floors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

from torch import Tensor

from mtz_core.batches import Batch, concatenated, tensors_of
from mtz_core.errors import InvalidCalibration, InvalidConfig
from mtz_core.evaluation import Case, check_classes, check_labels, error_of, outputs_of
from mtz_core.network.graph import Network, run
from mtz_core.planning.search import check_informative
from mtz_core.settings import floors_by_name
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.sensitivity import AT_ONCE, sensitivities
from mtz_core.statistics.traced import Traced
from mtz_core.task_loss import Loss
from tasks.artifacts.paths import Workspace
from tasks.data.examples import class_ranges, read_batches, read_examples
from tasks.models.calibration import calibration
from tasks.models.metrics import cases_of, find_metrics, names_of
from tasks.models.outputs import loss_of_outputs, outputs_for
from tasks.params import InvalidParams, Params, task_of

_TRIED = 100
"""Examples on which a check looks at what a network puts out."""


def check_outputs(params: Params, workspace: Workspace, model: str, network: Network, trained: bool) -> None:
    """Check what settings and data say of a network's outputs: their kinds, metrics, labels and floors.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the data.
        model: The model's name.
        network: The model's network, traced.
        trained: Whether the network has its weights, so that its outputs are what they are meant to be.

    Raises:
        InvalidCalibration: The settings declare an output that the network has not, or a kind that does not fit. Or
            labels are not what the metric compares, or name classes that the network has not. Or nothing tells a budget
            what the network may lose.
        InvalidConfig: A metric compares classes, and the outputs have none. Or it fails, or is no finite number.
        InvalidParams: The settings name a metric or a floor of an output that is not there.
        InvalidData: A metric or light retraining needs labels, and there are none, or labels are for other outputs. Or
            the network does not accept the test examples.
    """
    outputs, folder = network.graph.outputs, workspace.root / params.models[model].data
    declared = params.models[model].declared_output
    if trained:
        images, _ = next(read_batches(folder, "train", _TRIED, labelled=False))
        loss = loss_of_outputs(params, model, network, as_batches(images, model))
        _check_informative(params, workspace, model, network, as_batches(images, model))
    elif isinstance(declared, Mapping) and (unknown := declared.keys() - network.graph.endings.keys()):
        names = ", ".join(network.graph.endings)
        raise InvalidParams(f"models.{model}.output.{min(unknown)}: there is no such output. Outputs: {names}.")
    inputs, labels = next(read_batches(folder, "test", 2))
    metrics = find_metrics(params, model, outputs, labels)
    known = {} if labels is None else tensors_of(labels)
    put_out = outputs_for(model, "test", network, inputs)
    read = [output for output in put_out if output in known and metrics[output][1].reads == "labels"]
    _check_classes(model, folder, "test", {output: put_out[output] for output in read})
    for output in known.keys() & put_out.keys():
        title = f"{model}.{output}" if output else model
        check_labels(metrics[output][1], known[output], put_out[output].shape, title)
    if params.retrain.labels:
        for split in ("train", "validation"):
            read_examples(folder, split, count=1, several=bool(outputs))
            _check_classes(model, folder, split, put_out)
    if trained:
        _check_measurable(params, model, network, folder, loss)
    floors = {name: points for name, points in params.register.floors.items() if task_of(name) == model}
    floors_by_name(floors, names_of(params, model, outputs), "register.floors")


def _check_informative(
    params: Params, workspace: Workspace, model: str, network: Network, some: Sequence[Batch]
) -> None:
    """Check that a budget finds out what a network may lose: on some calibration examples; if these fail, on all.

    Raises:
        InvalidCalibration: It does not.
    """
    if params.zip_config().budget is None:
        return
    try:
        check_informative(model, _measured(params, model, network, [some[0][:AT_ONCE]]))
    except InvalidCalibration:
        check_informative(model, _measured(params, model, network, calibration(params, workspace, model, network)))


def _measured(params: Params, model: str, network: Network, batches: Sequence[Batch]) -> Traced:
    loss = loss_of_outputs(params, model, network, batches)
    sensitivity = sensitivities(network, batches, params.collect.seed, loss)
    return Traced(network, sensitivity=sensitivity, known_loss=loss)


def _check_measurable(params: Params, model: str, network: Network, folder: Path, loss: Loss) -> None:
    """Check that metrics are numbers: on some test examples; if these fail, which may lack a class, on all.

    Raises:
        InvalidConfig: A metric fails, or it is no finite number.
    """
    examples = partial(read_batches, folder, "test", _TRIED)
    try:
        _measure(params, model, network, islice(examples(), 1), loss)
    except InvalidConfig:
        _measure(params, model, network, examples(), loss)


def _measure(
    params: Params, model: str, network: Network, examples: Iterable[tuple[Batch, Batch | None]], loss: Loss
) -> None:
    outputs, labels = [], []
    for inputs, own in examples:
        outputs.append(outputs_of(partial(run, network.graph, network.state), [inputs]))
        labels += [] if own is None else [own]
    known = concatenated(labels) if labels else None
    put_out = concatenated(outputs)
    metrics = find_metrics(params, model, network.graph.outputs, known)
    for title, (_, metric, case) in cases_of(metrics, Case(put_out, known, put_out, loss), model).items():
        error_of(metric, case, title)


def _check_classes(model: str, folder: Path, split: str, put_out: Mapping[str, Tensor]) -> None:
    """Raises `InvalidCalibration` if a split has class numbers that the network has not."""
    ranges = class_ranges(folder, split) if put_out else {}
    for output, own in put_out.items():
        if own.ndim > 1 and output in ranges:
            title = f"models.{model}.data: labels of {split} examples{f' for {output}' if output else ''}"
            check_classes(*ranges[output], own.shape[1], title)
