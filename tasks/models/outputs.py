"""What the networks of models put out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtz_core.batches import Batch, shapes_in_words, tensors_of
from mtz_core.errors import MtzError
from mtz_core.network.graph import Network, run
from mtz_core.statistics.sensitivity import loss_of
from mtz_core.task_loss import Loss
from tasks.artifacts.paths import Workspace
from tasks.data.examples import InvalidData, read_batches
from tasks.data.layout import SPLITS
from tasks.params import Params

_TRIED = 2
"""Examples of a split that a network is tried on."""


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


@torch.no_grad()
def outputs_for(model: str, split: str, network: Network, inputs: Batch) -> Mapping[str, Tensor]:
    """Run a network on some examples of a split.

    Args:
        model: The model's name, for errors.
        split: The split's name, for errors.
        network: The model's network, traced.
        inputs: The examples.

    Returns:
        Each output by its name; by ``""`` if there is one.

    Raises:
        InvalidData: The network does not accept such examples.
    """
    try:
        return tensors_of(run(network.graph, network.state, inputs))
    except Exception as error:  # torch raises many kinds for shapes and types that do not fit
        dtypes = ", ".join(str(own.dtype) for own in tensors_of(inputs).values())
        raise InvalidData(
            f"models.{model}.data: {split} examples have shape {shapes_in_words(inputs)} and are {dtypes}, and the "
            "network, which fits training examples, does not accept them. Bring all splits to one: "
            + str(error).partition("\n")[0]
        ) from error


def check_splits(
    params: Params, workspace: Workspace, model: str, network: Network, splits: Sequence[str] = SPLITS[1:]
) -> None:
    """Check that a network, traced on training examples, accepts those of the other splits, too.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the data.
        model: The model's name.
        network: The model's network, traced.
        splits: The splits; all but that for training by default.

    Raises:
        InvalidData: A split is missing or cannot be read, or the network does not accept its examples.
    """
    folder = workspace.root / params.models[model].data
    for split in splits:
        inputs, _ = next(read_batches(folder, split, _TRIED, labelled=False))
        outputs_for(model, split, network, inputs)
