"""The sensitivity of a network's loss to each neuron: the unit in which all damage is counted.

A small change ``δy`` of a layer's outputs costs ``½ E[(g·δy)²]`` of the distillation loss (`mtz_core.retraining`)
against the network itself. Here ``g`` is the gradient of ``log p(c | x)``, and the class ``c`` is drawn from the
network's own predictions ``p`` at a temperature, so no labels are needed. This is the Fisher information. Of its matrix
only the diagonal is kept, one number per row of a layer (Amari 1998; Martens 2020, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mtz_core.errors import InvalidCalibration
from mtz_core.network.graph import INPUT, Network, free_unused, run_node

Sensitivities = Mapping[str, Float[Tensor, " _out"]]
"""For every layer, the sensitivity of the loss to each of its rows, in nats per squared unit of the layer's output."""

TEMPERATURE = 2.0
"""The temperature of predictions. Without it, a confident network would look as if it could lose everything."""


AT_ONCE = 16
"""The number of examples that are differentiated at once. All their intermediate values are held."""


def sensitivities(
    network: Network, batches: Iterable[Shaped[Tensor, "_ ..."]], seed: int = 0
) -> dict[str, Float[Tensor, " _out"]]:
    """Estimate ``E[Σ_positions g²]`` for every row of every layer.

    One class is drawn for each example.

    Args:
        network: The network.
        batches: Its calibration data.
        seed: Seeds the generator that draws classes.

    Returns:
        For every layer, one number per row, in nats per squared unit of the layer's output. A network with a single
            output has no classes; its sensitivities are in squared units of that output instead of nats.

    Raises:
        InvalidCalibration: If there are no examples.
    """
    generator = torch.Generator().manual_seed(seed)
    totals = {
        node.name: torch.zeros(network.graph.rows[node.name].group.shape[0], dtype=torch.float64)
        for node in network.graph.layers
    }
    count = 0
    for batch in (part for given in batches for part in torch.split(given, AT_ONCE)):
        outputs: dict[str, Tensor] = {}
        logits = _run_watched(network, batch, outputs)
        with torch.no_grad():
            score = _score(logits, generator)
        gradients = torch.autograd.grad(logits, list(outputs.values()), score, allow_unused=True)
        for (name, value), gradient in zip(outputs.items(), gradients, strict=True):
            if gradient is not None:
                axis = network.graph.node(name).layer.channel_axis(value.ndim)
                totals[name] += gradient.to(torch.float64).square().movedim(axis, -1).flatten(0, -2).sum(dim=0)
        count += len(batch)
    if not count:
        raise InvalidCalibration("there are no calibration examples. Give at least one.")
    return {name: total / count for name, total in totals.items()}


def _score(
    logits: Float[Tensor, "batch classes ..."], generator: torch.Generator
) -> Float[Tensor, "batch classes ..."]:
    """The gradient of ``log p(c | x)`` by the outputs, times the temperature. For a single output, ones."""
    if logits.ndim < 2 or logits.shape[1] == 1:
        return torch.ones_like(logits)
    soft = torch.softmax(logits.movedim(1, -1) / TEMPERATURE, dim=-1)
    drawn = torch.multinomial(soft.flatten(0, -2), 1, generator=generator).reshape(*soft.shape[:-1], 1)
    score = -soft
    return score.scatter_add(-1, drawn, torch.ones_like(score[..., :1])).movedim(-1, 1)


def _run_watched(network: Network, x: Tensor, outputs: dict[str, Tensor]) -> Tensor:
    """Run the network and collect what its layers put out.

    Args:
        network: The network.
        x: A batch of inputs.
        outputs: Receives the output of every layer, with gradients enabled.

    Returns:
        The network's output.
    """
    values: dict[str, Any] = {INPUT: x}
    with torch.enable_grad():
        for node in network.graph.nodes:
            value = run_node(node, values, network.state, len(x))
            if node.is_layer:
                value = value if value.requires_grad else value.detach().requires_grad_()
                outputs[node.name] = value
            values[node.name] = value
            free_unused(network.graph, values, node)
    result: Tensor = values[network.graph.output]
    return result
