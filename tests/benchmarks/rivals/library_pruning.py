"""Each network pruned alone by a library: torch-pruning 1.6, which removes whole neurons across coupled layers.

Fang, Ma, Song, Mi, Wang, *DepGraph: Towards Any Structural Pruning* (CVPR 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
import torch_pruning  # type: ignore[import-untyped]
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from mtz_core.network.graph import Network
from mtz_core.network.narrowing import LEAST
from mtz_core.network.tracing import evaluation_mode
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.rivals.assemble import assemble, matrices_of, traced
from tests.benchmarks.rivals.sizes import largest_below, stored_bytes

PER_BATCH = 50
"""Examples whose gradients are held at once."""


def pruned(
    networks: Mapping[str, nn.Module],
    calibration: Mapping[str, Tensor],
    fraction: float,
    examples: int = 1000,
    normalizer: str | None = None,
    seed: int = 0,
) -> ZippedNetwork:
    """Each network pruned to at most `fraction` of its bytes; nothing is shared, and nothing is trained.

    The library's `GroupHessianImportance` (optimal brain damage: the sum of ``w² E[(∂ℓ/∂w)²]`` over all weights that
    read or write a neuron), ranked over all layers (`global_pruning`), in one shot. The expectation is over the first
    `examples` calibration images, with labels drawn from the network's own predictions: the Fisher information, which
    needs no labels. Raises `InvalidConfig` if no pruned network is that small.
    """
    originals = traced(networks, calibration)
    smaller = {
        task: _pruned(networks[task], network, calibration[task][:examples], fraction, normalizer, seed)
        for task, network in originals.items()
    }
    found = traced(smaller, calibration)
    return assemble(found, {}, matrices_of(found), "library pruning", originals)


def _pruned(
    module: nn.Module, network: Network, images: Tensor, fraction: float, normalizer: str | None, seed: int
) -> nn.Module:
    with evaluation_mode(module):
        curvature = fisher_diagonal(module, images, seed)
    hidden = {group.name for group in network.graph.hidden_groups}
    neurons = sum(network.graph.widths[name] for name in hidden)
    removable = (neurons - LEAST * len(hidden) - 1) / neurons  # the library rounds up
    outputs = {node.module for node in network.graph.layers if not {*network.graph.rows[node.name].groups} & hidden}

    def build(kept: float) -> nn.Module:
        smaller = copy.deepcopy(module).eval()
        # Handed over as gradients: what the library accumulates by itself (1.6.1) is the last example's curvature only.
        for name, parameter in smaller.named_parameters():
            parameter.grad = curvature[name].clone()
        pruner = torch_pruning.BasePruner(
            smaller,
            images[:1],
            importance=LayersKept(normalizer),
            global_pruning=True,
            pruning_ratio=(1 - kept) * removable,
            ignored_layers=[smaller.get_submodule(path) for path in outputs],
        )
        pruner.step()
        smaller.zero_grad()
        return smaller

    return largest_below(build, int(fraction * stored_bytes(module)))


class LayersKept(torch_pruning.importance.GroupHessianImportance):  # type: ignore[misc]
    """The library's importance, but for the greatest of every group, which are beyond all.

    Where the library would have to remove a whole layer, it removes nothing of it, and networks get larger again.
    """

    def __init__(self, normalizer: str | None) -> None:
        super().__init__(group_reduction="sum", normalizer=normalizer)

    def __call__(self, group: torch_pruning.Group) -> Tensor | None:
        importance: Tensor | None = super().__call__(group)
        if importance is not None:
            importance[importance.topk(min(LEAST, len(importance))).indices] = torch.inf
        return importance


def fisher_diagonal(module: nn.Module, images: Tensor, seed: int) -> dict[str, Tensor]:
    """``E[(∂ℓ/∂w)²]`` of every parameter, labels drawn from the network's own predictions; in evaluation mode."""
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(seed)

    def loss(values: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(module, dict(values), (image[None],)), label[None])

    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with torch.enable_grad():
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))
        for part in torch.split(images, PER_BATCH):
            with torch.no_grad():
                labels = torch.multinomial(module(part).softmax(dim=1), 1, generator=generator)[:, 0]
            for name, gradient in gradients(parameters, part, labels).items():
                total[name] += gradient.square().sum(dim=0)
    return {name: value / len(images) for name, value in total.items()}
