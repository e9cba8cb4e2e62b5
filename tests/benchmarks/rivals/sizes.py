"""Networks of other sizes: bytes of a module, narrower modules, and the largest that fits."""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from mtz_core.errors import InvalidConfig
from mtz_core.network.narrowing import LEAST, Dropper
from mtz_core.network.to_module import build_module
from mtz_core.network.tracing import trace

HALVINGS = 12


def stored_bytes(network: nn.Module) -> int:
    """Bytes of a network's parameters and statistics."""
    tensors = network.state_dict().values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor.is_floating_point())


def scaling(network: nn.Module, example: Tensor, seed: int = 0) -> Callable[[float], nn.Module]:
    """Makes networks like this one with a fraction of every hidden group's neurons, their weights drawn anew.

    They raise `CannotDrop` where an operator is bound to the number of neurons.
    """
    whole = trace(network, example)
    dropper = Dropper(whole)
    widths = {group.name: whole.graph.widths[group.name] for group in whole.graph.hidden_groups}

    def build(fraction: float) -> nn.Module:
        keep = {name: np.arange(min(width, max(LEAST, round(fraction * width)))) for name, width in widths.items()}
        scaled = copy.deepcopy(build_module(dropper.narrow(keep).network))  # it holds the network's own tensors
        torch.manual_seed(seed)
        for part in scaled.modules():
            if isinstance(part, nn.Linear | nn.modules.conv._ConvNd | nn.modules.batchnorm._BatchNorm):
                part.reset_parameters()
        return scaled.train()

    return build


def largest_below(build: Callable[[float], nn.Module], most: int) -> nn.Module:
    """The largest of the networks that `build` makes of fractions from 0 to 1 that has at most so many bytes.

    `build` must not give larger networks for smaller fractions. Raises `InvalidConfig` if the smallest is too large.
    """
    network = build(1.0)
    if stored_bytes(network) <= most:
        return network
    low, high, found = 0.0, 1.0, build(0.0)
    if stored_bytes(found) > most:
        raise InvalidConfig(f"no network has at most {most} bytes: the smallest has {stored_bytes(found)}.")
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        network = build(middle)
        if stored_bytes(network) <= most:
            low, found = middle, network
        else:
            high = middle
    return found
