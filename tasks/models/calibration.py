"""The data that networks are measured on, and fitted to."""

from __future__ import annotations

from typing import Any

from mtz_core.network.graph import Network
from mtz_core.statistics.calibration import as_batches, cut
from tasks.artifacts.paths import Workspace
from tasks.data.examples import read_images
from tasks.params import Params


def calibration(params: Params, workspace: Workspace, model: str, network: Network) -> list[Any]:
    """Read a model's calibration images, without labels.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the data.
        model: The model's name.
        network: The model's network, traced.

    Returns:
        A seeded sample of the training split, in batches `[n, …]`, or `NamedTensors` of several inputs.

    Raises:
        InvalidData: The training split cannot be used.
        InvalidCalibration: Its values cannot be used.
    """
    settings = params.collect
    images = read_images(workspace.root / params.models[model].data, "train", settings.images, settings.seed)
    return cut(network, as_batches(images, model))
