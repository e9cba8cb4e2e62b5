"""Building networks by importable factories."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import nn

from mtz_core.errors import MtzError
from tasks.params import Params

_FORMER = {"tasks.networks": "tasks.models.example_networks", "tasks.programs": "tasks.models.programs"}
"""Former names of the factories' modules, from before version 0.2, which params.yaml and fleet.yaml may still use."""


class InvalidFactory(MtzError):
    """The factory of a network cannot be imported, or does not return a network."""


def find_factory(params: Params, model: str) -> Callable[..., object]:
    """Import the factory of a model's network; the import may register operators for zipping.

    Args:
        params: The parameters of the group.
        model: The model's name.

    Returns:
        The factory.

    Raises:
        InvalidFactory: The factory cannot be imported.
    """
    return import_named(params.models[model].network, f"models.{model}.network")


def import_named(name: str, where: str) -> Callable[..., Any]:
    """Import a function that settings name.

    Args:
        name: The function, as `package.module:function`.
        where: The setting, for errors.

    Returns:
        The function.

    Raises:
        InvalidFactory: The function cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        function: Callable[..., Any] = getattr(importlib.import_module(_FORMER.get(module, module)), attribute)
    except (ImportError, AttributeError) as error:
        remedy = "Its file belongs in the project's folder, or its package in the environment; or correct the name."
        raise InvalidFactory(f"{where}: {name} cannot be imported: {error}. {remedy}") from error
    return function


def build_network(params: Params, model: str) -> nn.Module:
    """Build the untrained network of a model.

    Args:
        params: The parameters of the group.
        model: The model's name.

    Returns:
        The network that the model's factory returns.

    Raises:
        InvalidFactory: The factory cannot be imported, fails, or does not return a `torch.nn.Module`.
    """
    settings = params.models[model]
    where = f"models.{model}.network"
    factory = find_factory(params, model)
    try:
        network = factory(**settings.arguments)
    except Exception as error:  # a user's factory may raise anything
        raise InvalidFactory(
            f"{where}: {settings.network} failed with arguments {settings.arguments}: {error!r}."
        ) from error
    if not isinstance(network, nn.Module):
        raise InvalidFactory(f"{where}: {settings.network} returned {type(network).__name__}, not a torch.nn.Module.")
    return network
