"""Where networks come from: an importable factory and a file of weights."""

from __future__ import annotations

import importlib

import torch
from torch import nn

from mtz_core.errors import InvalidWeights, MtzError
from mtz_core.graph import Network, trace
from tasks.artifacts import Workspace, read_tensors
from tasks.data import read_images
from tasks.params import Params


class InvalidFactory(MtzError):
    """A network's factory cannot be imported, or does not return a network."""


def build_network(params: Params, model: str) -> nn.Module:
    """The untrained network of a model. Raises `InvalidFactory`."""
    settings = params.models[model]
    where = f"models.{model}.network"
    module_name, _, attribute = settings.network.partition(":")
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise InvalidFactory(f"{where}: {settings.network} cannot be imported: {error}.") from error
    try:
        network = factory(**settings.arguments)
    except Exception as error:  # a user's factory may raise anything
        raise InvalidFactory(
            f"{where}: {settings.network} failed with arguments {settings.arguments}: {error!r}."
        ) from error
    if not isinstance(network, nn.Module):
        raise InvalidFactory(f"{where}: {settings.network} returned {type(network).__name__}, not a torch.nn.Module.")
    return network


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
    """A model's network as the core sees it, traced on one of its own images."""
    settings = params.models[model]
    example = read_images(workspace.root / settings.data, "train", count=1)
    try:
        return trace(load_network(params, workspace, model), example)
    except MtzError as error:
        raise type(error)(f"models.{model}: {error}") from error


def calibration(params: Params, workspace: Workspace, model: str) -> torch.Tensor:
    """A model's calibration images, without labels."""
    settings = params.collect
    return read_images(workspace.root / params.models[model].data, "train", settings.images, settings.seed)
