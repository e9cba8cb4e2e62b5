"""RegMean: the weights that reproduce every network's own layer outputs best, in closed form."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Float64
from torch import Tensor, nn

from mtz_core.settings import ZipConfig
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.moments import Moments
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.rivals.assemble import assemble, common_parts, matrices_of, neuron_by_neuron, traced
from tests.benchmarks.rivals.averaging import matched_neurons

DAMPING = 1e-6
"""Relative to the mean of the diagonal: it only decides for inputs that are always 0, whose weights are averaged."""


def regmean(
    networks: Mapping[str, nn.Module],
    calibration: Mapping[str, Tensor],
    matched: bool = False,
    scaling: float = 0.9,
    patches: int = 64,
) -> ZippedNetwork:
    """Every hidden neuron shared, layer by layer ``W* = (Σ_t Gᵗ)⁻¹ Σ_t Gᵗ Wᵗ`` with ``Gᵗ = XᵗᵀXᵗ`` of its inputs.

    Jin, Ren, Preotiuc-Pietro, Cheng, *Dataless Knowledge Fusion by Merging Weights of Language Models* (ICLR 2023),
    equation 2 and algorithm 1. `scaling` multiplies the entries of ``Gᵗ`` off its diagonal (the paper's α; 0.9 is its
    choice for most models, 1 is no scaling). The inputs are those of the original network on its own images. A
    convolution's rows are its unfolded patches, `patches` sampled positions of each image; the bias is the weight of an
    input that is always 1. Convolutions in groups are averaged. `matched`: neurons are matched by their activations
    first, which the paper, whose networks have one ancestor, does not need. Raises `IncompatibleNetworks`.
    """
    found = traced(networks, calibration)
    members = matched_neurons(found, calibration) if matched else neuron_by_neuron(found)
    config = ZipConfig(patches=patches)
    moments = {t: original_moments(n, as_batches(calibration[t], t), config) for t, n in found.items()}
    matrices = matrices_of(found)
    for layer, part in common_parts(found, members).items():
        weights = [part.of(task, matrices[task][layer]) for task in found]
        if any(moments[task][layer].conv_groups > 1 for task in found):
            merged = torch.stack(weights).mean(dim=0)
        else:
            places = [torch.from_numpy(part.columns[task]) for task in found]
            grams = [_gram(moments[task][layer])[at][:, at] for task, at in zip(found, places, strict=True)]
            merged = regression_mean(weights, [scaled(gram, scaling) for gram in grams])
        for task in found:
            matrices[task][layer] = part.put(task, matrices[task][layer], merged)
    return assemble(found, members, matrices, "regmean, matched" if matched else "regmean")


def regression_mean(
    weights: Sequence[Float[Tensor, "out in"]], grams: Sequence[Float64[Tensor, "in in"]]
) -> Float[Tensor, "out in"]:
    """``(Σ_t Gᵗ)⁻¹ Σ_t Gᵗ Wᵗ``, where each ``Wᵗ`` has inputs as rows; solved for the difference from the plain mean."""
    mean = torch.stack([weight.to(torch.float64) for weight in weights]).mean(dim=0)
    total = torch.stack(list(grams)).sum(dim=0)
    pull = sum(gram @ (weight - mean).T for gram, weight in zip(grams, weights, strict=True))
    level = float(total.diagonal().mean())
    total.diagonal().add_(DAMPING * level if level > 0 else 1.0)
    return (mean + torch.linalg.solve(total, pull).T).to(weights[0].dtype)


def scaled(gram: Float64[Tensor, "in in"], scaling: float) -> Float64[Tensor, "in in"]:
    """A Gram matrix, its entries off the diagonal times `scaling`."""
    return scaling * gram + (1 - scaling) * torch.diag(gram.diagonal())


def _gram(moments: Moments) -> Float64[Tensor, "in in"]:
    """The mean outer product of the rows: networks count alike, however many rows they have."""
    if moments.gram is not None:
        return moments.gram / moments.count
    rows = moments.rows.to(torch.float64)
    return rows.T @ rows / moments.count
