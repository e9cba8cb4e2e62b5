"""Each network pruned alone by a library: torch-pruning 1.6, which removes whole neurons across coupled layers.

Fang, Ma, Song, Mi, Wang, *DepGraph: Towards Any Structural Pruning* (CVPR 2023).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

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

Importance = Literal["curvature", "magnitude"]
Outputs = Literal["logits", "regression"]


def pruned(
    networks: Mapping[str, nn.Module],
    calibration: Mapping[str, Tensor],
    fraction: float,
    examples: int = 1000,
    normalizer: str | None = None,
    seed: int = 0,
    importance: Importance = "curvature",
    outputs: Mapping[str, Outputs] | None = None,
) -> ZippedNetwork:
    """Each network pruned to at most `fraction` of its bytes; nothing is shared, and nothing is trained.

    ``curvature``: the library's `GroupHessianImportance` (optimal brain damage: the sum of ``w² E[(∂ℓ/∂w)²]`` over all
    weights that read or write a neuron), ranked over all layers (`global_pruning`), in one shot. The expectation is
    over the first `examples` calibration images, with labels drawn from the network's own predictions: the Fisher
    information, which needs no labels. Of `outputs` that are no logits it is Gauss and Newton's.

    ``magnitude``: its `GroupMagnitudeImportance`, the sum of absolute weights, the same share of every layer.

    Raises `InvalidConfig` if no pruned network is that small.
    """
    originals = traced(networks, calibration)
    smaller = {}
    for task, network in originals.items():
        module, images = networks[task], calibration[task]
        curvature = None
        if importance == "curvature":
            with evaluation_mode(module):
                kind = (outputs or {}).get(task, "logits")
                curvature = fisher_diagonal(module, images[:examples], seed, kind)
        smaller[task] = _pruned(module, network, images, fraction, normalizer, curvature)
    found = traced(smaller, calibration)
    return assemble(found, {}, matrices_of(found), "library pruning", originals)


def _pruned(
    module: nn.Module,
    network: Network,
    images: Tensor,
    fraction: float,
    normalizer: str | None,
    curvature: Mapping[str, Tensor] | None,
) -> nn.Module:
    hidden = {group.name for group in network.graph.hidden_groups}
    neurons = sum(network.graph.widths[name] for name in hidden)
    removable = (neurons - LEAST * len(hidden) - 1) / neurons  # the library rounds up
    outputs = {node.module for node in network.graph.layers if not {*network.graph.rows[node.name].groups} & hidden}
    fixed = {path for path, part in module.named_modules() if isinstance(part, nn.Embedding)}

    def build(kept: float) -> nn.Module:
        smaller = copy.deepcopy(module).eval()
        # Handed over as gradients: what the library accumulates by itself (1.6.1) is the last example's curvature only.
        for name, found in (curvature or {}).items():
            smaller.get_parameter(name).grad = found.clone()
        pruner = torch_pruning.BasePruner(
            smaller,
            images[:1],
            importance=Curvature(normalizer) if curvature is not None else Magnitude(),
            global_pruning=curvature is not None,
            pruning_ratio=(1 - kept) * removable,
            ignored_layers=[smaller.get_submodule(path) for path in outputs | fixed],
        )
        pruner.step()
        smaller.zero_grad()
        return smaller

    return largest_below(build, int(fraction * stored_bytes(module)))


class LayersKept:
    """A library's importance, but for the greatest of every group, which are beyond all.

    Where the library would have to remove a whole layer, it removes nothing of it, and networks get larger again.
    """

    def __call__(self, group: torch_pruning.Group) -> Tensor | None:
        importance: Tensor | None = super().__call__(group)  # type: ignore[misc]
        if importance is not None:
            importance[importance.topk(min(LEAST, len(importance))).indices] = torch.inf
        return importance


class Curvature(LayersKept, torch_pruning.importance.GroupHessianImportance):  # type: ignore[misc]
    """What removing a neuron costs, to second order."""

    def __init__(self, normalizer: str | None) -> None:
        super().__init__(group_reduction="sum", normalizer=normalizer)


class Magnitude(LayersKept, torch_pruning.importance.GroupMagnitudeImportance):  # type: ignore[misc]
    """The sum of the absolute weights of a neuron."""

    def __init__(self) -> None:
        super().__init__(p=1, group_reduction="sum", normalizer=None)


def fisher_diagonal(module: nn.Module, images: Tensor, seed: int, outputs: Outputs = "logits") -> dict[str, Tensor]:
    """``E[(∂ℓ/∂w)²]`` of every parameter, in evaluation mode.

    Of logits ℓ is the cross-entropy with labels drawn from the network's own predictions, of numbers their sum with
    random signs.
    """
    parameters = {name: parameter.detach() for name, parameter in module.named_parameters()}
    generator = torch.Generator().manual_seed(seed)

    def loss(values: Mapping[str, Tensor], image: Tensor, drawn: Tensor) -> Tensor:
        found: Any = functional_call(module, dict(values), (image[None],))
        return F.cross_entropy(found, drawn[None]) if outputs == "logits" else (found[0] * drawn).sum()

    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    with torch.enable_grad():
        gradients = vmap(grad(loss), in_dims=(None, 0, 0))
        for part in torch.split(images, PER_BATCH):
            with torch.no_grad():
                found = module(part)
                if outputs == "logits":
                    drawn = torch.multinomial(found.softmax(dim=1), 1, generator=generator)[:, 0]
                else:
                    drawn = 2 * torch.bernoulli(torch.full_like(found, 0.5), generator=generator) - 1
            for name, gradient in gradients(parameters, part, drawn).items():
                total[name] += gradient.square().sum(dim=0)
    return {name: value / len(images) for name, value in total.items()}
