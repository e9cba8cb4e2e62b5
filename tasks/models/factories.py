"""How networks are built: importable factories."""

from __future__ import annotations

import importlib
from collections.abc import Callable

from torch import nn

from mtz_core.errors import MtzError
from tasks.params import Params

_FORMER = {"tasks.networks": "tasks.models.example_networks", "tasks.programs": "tasks.models.programs"}
"""Modules of factories as they were called before version 0.2: params.yaml and fleet.yaml may still say so."""


class InvalidFactory(MtzError):
    """A network's factory cannot be imported, or does not return a network."""


def find_factory(params: Params, model: str) -> Callable[..., object]:
    """The factory of a model's network; importing it may teach zipping operators. Raises `InvalidFactory`."""
    name = params.models[model].network
    module_name, _, attribute = name.partition(":")
    try:
        factory: Callable[..., object] = getattr(
            importlib.import_module(_FORMER.get(module_name, module_name)), attribute
        )
    except (ImportError, AttributeError) as error:
        raise InvalidFactory(f"models.{model}.network: {name} cannot be imported: {error}.") from error
    return factory


def build_network(params: Params, model: str) -> nn.Module:
    """The untrained network of a model. Raises `InvalidFactory`."""
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
