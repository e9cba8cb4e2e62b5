"""Checks of outputs before any work: their kinds, metrics, labels and floors."""

from __future__ import annotations

from collections.abc import Mapping

from mtz_core.batches import tensors_of
from mtz_core.network.graph import Network, run
from mtz_core.settings import floors_by_name
from mtz_core.statistics.calibration import as_batches
from tasks.artifacts.paths import Workspace
from tasks.data.examples import InvalidData, largest_labels, read_batches
from tasks.models.metrics import find_metrics, names_of
from tasks.models.outputs import loss_of_outputs
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
        InvalidCalibration: The settings declare an output that the network has not, or a kind that does not fit.
        InvalidParams: The settings name a metric or a floor of an output that is not there.
        InvalidData: A metric needs labels, and there are none, or labels are for other outputs or classes.
    """
    outputs, folder = network.graph.outputs, workspace.root / params.models[model].data
    declared = params.models[model].declared_output
    if trained:
        images, _ = next(read_batches(folder, "train", _TRIED, labelled=False))
        loss_of_outputs(params, model, network, as_batches(images, model))
    elif isinstance(declared, Mapping) and (unknown := declared.keys() - network.graph.endings.keys()):
        names = ", ".join(network.graph.endings)
        raise InvalidParams(f"models.{model}.output.{min(unknown)}: there is no such output. Outputs: {names}.")
    images, labels = next(read_batches(folder, "test", 1))
    metrics, largest = find_metrics(params, model, outputs, labels), largest_labels(folder, "test")
    for output, own in tensors_of(run(network.graph, network.state, images)).items():
        if output in largest and metrics[output][1].reads == "labels" and largest[output] >= own.shape[1]:
            raise InvalidData(
                f"models.{model}.data: labels of test examples go up to {largest[output]}, but the network has "
                f"{own.shape[1]} classes{f' in {output}' if output else ''}. Allowed: 0 to {own.shape[1] - 1}."
            )
    floors = {name: points for name, points in params.register.floors.items() if task_of(name) == model}
    floors_by_name(floors, names_of(params, model, outputs), "register.floors")
