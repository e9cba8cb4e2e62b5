"""Pre-trained networks, traced or not, and the images for their retraining."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from mtz_core.batches import Batch, needs_several, signature_of
from mtz_core.errors import MtzError, UnsupportedModule
from mtz_core.network.graph import Network, given_name, input_values
from mtz_core.network.tracing import trace
from tasks.artifacts.paths import Workspace
from tasks.data.examples import InvalidData, read_batches, read_examples, read_images
from tasks.data.layout import SPLITS
from tasks.models.factories import build_network
from tasks.models.weights import read_weights, state_for
from tasks.params import Params
from tasks.progress import show_progress

_SCANNED = 1000
"""Texts whose tokens are looked at at a time."""


def load_network(params: Params, workspace: Workspace, model: str) -> nn.Module:
    """Load a model's pre-trained network.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the weights.
        model: The model's name.

    Returns:
        The network, in evaluation mode.

    Raises:
        InvalidFactory: The network cannot be built.
        InvalidArtifact: The weights cannot be read.
        InvalidWeights: The weights do not fit the network.
    """
    settings = params.models[model]
    network = build_network(params, model)
    weights = read_weights(workspace.root / settings.weights)
    state, notes = state_for(network, weights, f"{settings.weights} does not fit {settings.network}")
    network.load_state_dict(state)
    for note in notes:
        show_progress(f"{settings.weights}: {note}")
    return network.eval()


def load_traced(params: Params, workspace: Workspace, model: str) -> Network:
    """Load a model's network and trace it on one of its own images.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the weights and the data.
        model: The model's name.

    Returns:
        The network as the core sees it.

    Raises:
        MtzError: The network cannot be loaded, as for `load_network`, or cannot be traced.
    """
    return trace_on_own_image(params, workspace, model, load_network(params, workspace, model))


def trace_on_own_image(params: Params, workspace: Workspace, model: str, network: nn.Module) -> Network:
    """Trace a network, trained or not, on one image of a model.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the data.
        model: The model's name.
        network: A network of this model's kind.

    Returns:
        The network as the core sees it.

    Raises:
        UnsupportedModule: The network needs several inputs, and the data have one.
        MtzError: The image cannot be read, or the network cannot be traced.
    """
    example = read_images(workspace.root / params.models[model].data, "train", count=1)
    taken = signature_of(network)
    if isinstance(example, Tensor) and needs_several(taken):
        raise UnsupportedModule(
            f"models.{model}.network: {type(network).__name__} needs several inputs ({', '.join(taken.parameters)}), "
            "but the data have one. Name their columns after the inputs."
        )
    try:
        return trace(network, example, params.models[model].keep_separate, params.models[model].zip)
    except MtzError as error:
        raise type(error)(f"models.{model}: {error}") from error


def check_tokens(params: Params, workspace: Workspace, model: str, network: Network) -> None:
    """Check that a network of texts knows all tokens of its data; other networks are left alone.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the data.
        model: The model's name.
        network: The model's network, traced.

    Raises:
        InvalidData: A split holds a token that has no row in the network's embedding.
    """
    known: dict[str, int] = {}
    for node in network.graph.nodes:
        for name in network.inputs if node.kind == "embedding" else ():
            if {"value": name} in node.arguments.values():
                known[name] = min(len(network.state[node.weight]), known.get(name, sys.maxsize))
    if not known:
        return
    folder = workspace.root / params.models[model].data
    for split in SPLITS:
        for inputs, _ in read_batches(folder, split, _SCANNED, labelled=False):
            values = input_values(inputs)
            for name, words in known.items():
                least, most = int(values[name].min()), int(values[name].max())
                if least < 0 or most >= words:
                    raise InvalidData(
                        f"models.{model}.data: {split} holds token {least if least < 0 else most}"
                        f"{f' of {given_name(name)}' if given_name(name) else ''}, but the network knows 0 to "
                        f"{words - 1}. Use the vocabulary that it was trained with."
                    )


def read_split(
    params: Params, workspace: Workspace, split: str, count: int | None
) -> tuple[dict[str, Batch], dict[str, Any]]:
    """Read images of every model, and their labels if retraining uses them; otherwise labels stay unread.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the data.
        split: `train`, `validation` or `test`.
        count: The most examples of each model; None for all.

    Returns:
        The images and the labels by model, those of several outputs by their names; there are no labels if retraining
        does not use them.

    Raises:
        InvalidData: A model's split cannot be used.
    """
    images: dict[str, Batch] = {}
    labels: dict[str, Any] = {}
    for model, block in params.models.items():
        folder, seed = workspace.root / block.data, params.retrain.seed
        if params.retrain.labels:
            images[model], labels[model] = read_examples(folder, split, count, seed, several=True)
        else:
            images[model] = read_images(folder, split, count, seed)
    return images, labels
