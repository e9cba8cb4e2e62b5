"""What the networks of models put out."""

from __future__ import annotations

from collections.abc import Sequence

from mtz_core.batches import Batch
from mtz_core.errors import MtzError
from mtz_core.network.graph import Network
from mtz_core.statistics.sensitivity import loss_of
from mtz_core.task_loss import Loss
from tasks.params import Params


def loss_of_outputs(params: Params, model: str, network: Network, batches: Sequence[Batch]) -> Loss:
    """Make the loss of a model's task from what its network puts out.

    Args:
        params: The parameters of the group.
        model: The model's name.
        network: The model's network, traced.
        batches: Its calibration data, or some of them.

    Returns:
        The loss.

    Raises:
        InvalidCalibration: The settings declare an output that the network has not, or a kind that does not fit.
    """
    try:
        return loss_of(network, batches, params.models[model].declared_output)
    except MtzError as error:
        raise type(error)(f"models.{model}.output: {error}") from error
