"""The functional difference of two neurons (He, Zhou, Thiele 2018, section 3.2), for all pairs at once.

Generalised to own inputs that compensate,

    d(i, j) = ½ (s_i − s_j)ᵀ P (s_i − s_j),   P = (M_A⁻¹/α_A + M_B⁻¹/α_B)⁻¹,

with `s` a neuron's weights on shared inputs and `M` what is left of the layer-wise Hessian on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mtz_core.statistics.linalg import Hessian, chunks, weighted_sum


def functional_difference(
    weights: tuple[Float[Tensor, "a s"], Float[Tensor, "b s"]],
    curvatures: tuple[Hessian, Hessian],
    balance: tuple[float, float],
    slots: int = 1,
) -> Float[Tensor, "a//{slots} b//{slots}"]:
    """Compute ``d(i, j)`` for all pairs of neurons at once.

    Args:
        weights: The rows of A's and of B's neurons on the shared inputs.
        curvatures: ``M_A`` and ``M_B``.
        balance: ``α_A`` and ``α_B``.
        slots: How many consecutive rows each neuron has.

    Returns:
        The functional differences, never negative.

    Raises:
        SingularHessian: If the weighted sum of the curvatures cannot be factorised.
    """
    (rows_a, rows_b), (m_a, m_b), (alpha_a, alpha_b) = weights, curvatures, balance
    a, b, inputs = len(rows_a) // slots, len(rows_b) // slots, rows_a.shape[1]
    distance = torch.zeros(a, b, dtype=torch.float64)
    if inputs == 0:
        return distance
    total = weighted_sum([m_a, m_b], [alpha_a, alpha_b])
    # Only differences count: there is less cancellation near the centre.
    centre = (rows_a.sum(dim=0, dtype=torch.float64) + rows_b.sum(dim=0, dtype=torch.float64)) / (slots * (a + b))

    def centred(rows: Tensor, part: slice) -> Float[Tensor, "n s"]:
        return rows[part.start * slots : part.stop * slots].to(torch.float64) - centre

    def image(rows: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:  # P s, P = αβ M_A (αM_A + βM_B)⁻¹ M_B
        return alpha_a * alpha_b * m_a.product(total.solve(m_b.product(rows.T))).T

    for part in chunks(a, slots * inputs):
        rows = centred(rows_a, part)
        distance[part] += 0.5 * (rows * image(rows)).sum(dim=1).reshape(-1, slots).sum(dim=1)[:, None]
    for part in chunks(b, slots * inputs):
        rows = centred(rows_b, part)
        images = image(rows)
        distance[:, part] += 0.5 * (rows * images).sum(dim=1).reshape(-1, slots).sum(dim=1)
        images = images.reshape(-1, slots * inputs)
        for other in chunks(a, slots * inputs):
            distance[other, part] -= centred(rows_a, other).reshape(-1, slots * inputs) @ images.T
    return distance.clamp_(min=0)


def weigh_by_sensitivity(balance: Sequence[float], sensitivity: Sequence[Float[Tensor, " _out"]]) -> list[float]:
    """Compute ``α_t √(mean F_t)``, scaled to sum to 1.

    In a layer, tasks weigh by the sensitivities ``F_t`` of their losses to its outputs. Networks differ in the scale of
    their activations; without this, the network with the largest ones would decide for all. The root is a hedge: with
    the Fisher information itself, a confident network would give up everything (docs/method.md).

    Args:
        balance: The weights ``α_t`` of the tasks.
        sensitivity: The sensitivities ``F_t`` of every task's loss to the layer's rows.

    Returns:
        The weights of the tasks in this layer. They equal `balance` if no loss is sensitive to the layer.
    """
    weights = [alpha * float(rows.mean()) ** 0.5 for alpha, rows in zip(balance, sensitivity, strict=True)]
    return [weight / sum(weights) for weight in weights] if sum(weights) > 0 else list(balance)
