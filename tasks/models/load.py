"""Pre-trained networks, traced or not, and the images that each is calibrated and retrained with."""

from __future__ import annotations

import torch
from torch import nn

from mtz_core.errors import InvalidWeights, MtzError
from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from tasks.artifacts.paths import Workspace
from tasks.artifacts.tensors import read_tensors
from tasks.data.examples import read_examples, read_images
from tasks.models.factories import build_network
from tasks.params import Params


def load_network(params: Params, workspace: Workspace, model: str) -> nn.Module:
    """A model's pre-trained network in evaluation mode. Raises `MtzError` in its kinds."""
    settings = params.models[model]
    network = build_network(params, model)
    state, given = network.state_dict(), read_tensors(workspace.root / settings.weights)
    for name in sorted(state.keys() | given.keys()):
        expected = tuple(state[name].shape) if name in state else None
        found = tuple(given[name].shape) if name in given else None
        if expected != found:
            raise InvalidWeights(
                f"{settings.weights} does not fit {settings.network}: {name!r} should have shape {expected}, "
                f"but has {found} (None: not there). Name the factory and arguments that the weights were trained with."
            )
    network.load_state_dict(given)
    return network.eval()


def load_traced(params: Params, workspace: Workspace, model: str) -> Network:
    """A model's network as the core sees it, traced on one of its own images. Raises `MtzError` in its kinds."""
    return trace_on_own_image(params, workspace, model, load_network(params, workspace, model))


def trace_on_own_image(params: Params, workspace: Workspace, model: str, network: nn.Module) -> Network:
    """Any network of a model's kind, trained or not, as the core sees it. Raises `MtzError` in its kinds."""
    example = read_images(workspace.root / params.models[model].data, "train", count=1)
    try:
        return trace(network, example, params.models[model].keep_separate)
    except MtzError as error:
        raise type(error)(f"models.{model}: {error}") from error


def calibration(params: Params, workspace: Workspace, model: str) -> torch.Tensor:
    """A model's calibration images, without labels."""
    settings = params.collect
    return read_images(workspace.root / params.models[model].data, "train", settings.images, settings.seed)


def read_split(
    params: Params, workspace: Workspace, split: str, count: int | None
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Images of every model, and their labels if these take part; otherwise they stay unread."""
    images: dict[str, torch.Tensor] = {}
    labels: dict[str, torch.Tensor] = {}
    for model, block in params.models.items():
        folder, seed = workspace.root / block.data, params.retrain.seed
        if params.retrain.labels:
            images[model], labels[model] = read_examples(folder, split, count, seed)
        else:
            images[model] = read_images(folder, split, count, seed)
    return images, labels
