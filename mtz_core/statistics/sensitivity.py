"""The sensitivity of a network's loss to each neuron: the unit in which all damage is counted.

A small change ``δy`` of a layer's outputs costs ``½ E[(g·δy)²]`` of the task's loss (`mtz_core.task_loss`) against the
network itself. Here ``g`` is a gradient whose second moment is the curvature of that loss: of ``log p(c | x)``, with
the class ``c`` drawn from the network's own predictions, or of the outputs with random signs. So no labels are needed.
This is the Fisher information, or Gauss and Newton's matrix. Of it only the diagonal is kept, one number per row of a
layer (Amari 1998; Martens 2020, section 5).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mtz_core.batches import Batch, concatenated, divided, tensors_of
from mtz_core.errors import InvalidCalibration
from mtz_core.network.graph import Network, free_unused, input_values, run, run_node
from mtz_core.settings import Outputs
from mtz_core.task_loss import Loss, make_loss

Sensitivities = Mapping[str, Float[Tensor, " _out"]]
"""For every layer, the sensitivity of the loss to each of its rows, per squared unit of the layer's output."""

AT_ONCE = 16
"""The number of examples that are differentiated at once. All their intermediate values are held."""

_BATCH = 100


def sensitivities(
    network: Network, batches: Iterable[Batch], seed: int = 0, loss: Loss | None = None
) -> dict[str, Float[Tensor, " _out"]]:
    """Estimate ``E[Σ_positions g²]`` for every row of every layer.

    One gradient is drawn for each example.

    Args:
        network: The network.
        batches: Its calibration data.
        seed: Seeds the generator that draws gradients.
        loss: The task's loss, if it is made already or its outputs are declared; see `loss_of`.

    Returns:
        For every layer, one number per row: shares of the task's information per squared unit of the layer's output.

    Raises:
        InvalidCalibration: If there are no examples.
    """
    batches = list(batches)
    loss = loss or loss_of(network, batches)
    generator = torch.Generator().manual_seed(seed)
    totals = {
        node.name: torch.zeros(network.graph.rows[node.name].group.shape[0], dtype=torch.float64)
        for node in network.graph.layers
    }
    count = 0
    for batch in (part for given in batches for part in divided(given, AT_ONCE)):
        outputs: dict[str, Tensor] = {}
        with torch.enable_grad():
            natural = loss.natural(_run_watched(network, batch, outputs))
        with torch.no_grad():
            score = loss.score(natural, generator)
        ends = [(own, tensors_of(score)[name]) for name, own in tensors_of(natural).items() if own.requires_grad]
        gradients = torch.autograd.grad(
            [own for own, _ in ends], list(outputs.values()), [drawn for _, drawn in ends], allow_unused=True
        )
        for (name, value), gradient in zip(outputs.items(), gradients, strict=True):
            if gradient is not None:
                axis = network.graph.node(name).layer.channel_axis(value.ndim)
                others = [other for other in range(gradient.ndim) if other != axis]
                totals[name] += gradient.to(torch.float64).square().sum(dim=others)
        count += len(batch)
    return {name: total / count for name, total in totals.items()}


@torch.no_grad()
def loss_of(network: Network, batches: Iterable[Batch], declared: Outputs | None = None) -> Loss:
    """Make a task's loss from its original network's outputs.

    Args:
        network: The network.
        batches: Its calibration data.
        declared: What its outputs mean; guessed if it is left out.

    Returns:
        The loss.

    Raises:
        InvalidCalibration: If there are no examples, or if outputs contradict what is declared.
    """
    parts = [part for given in batches for part in divided(given, _BATCH) if len(part)]
    targets = [run(network.graph, network.state, part) for part in parts]
    if not targets:
        raise InvalidCalibration("there are no calibration examples. Give at least one.")
    return make_loss(concatenated(targets), declared, network.graph.endings)


def _run_watched(network: Network, x: Batch, outputs: dict[str, Tensor]) -> Any:
    """Run the network and collect what its layers put out.

    Args:
        network: The network.
        x: A batch of inputs.
        outputs: Receives the output of every layer, with gradients enabled.

    Returns:
        The network's output.
    """
    values = input_values(x)
    with torch.enable_grad():
        for node in network.graph.nodes:
            value = run_node(node, values, network.state, len(x))
            if node.is_layer:
                value = value if value.requires_grad else value.detach().requires_grad_()
                outputs[node.name] = value
            values[node.name] = value
            free_unused(network.graph, values, node)
    return values[network.graph.output]
