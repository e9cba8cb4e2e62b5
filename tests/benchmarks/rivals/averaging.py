"""Averaging of weights: neuron i with neuron i, or of neurons that were matched first."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from jaxtyping import Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mtz_core.network.graph import Network
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.rivals.assemble import (
    assemble,
    check_equal_widths,
    common_parts,
    matrices_of,
    neuron_by_neuron,
    traced,
)
from tests.benchmarks.rivals.features import common_images, correlations


def averaged(
    networks: Mapping[str, nn.Module], calibration: Mapping[str, Tensor], matched: bool = False
) -> ZippedNetwork:
    """Every hidden neuron shared, its weights the mean over the networks; heads and normalisations stay each task's.

    `matched`: neurons are matched by their activations first (see `matched_neurons`). Raises `IncompatibleNetworks`.
    """
    found = traced(networks, calibration)
    members = matched_neurons(found, calibration) if matched else neuron_by_neuron(found)
    matrices = matrices_of(found)
    for layer, part in common_parts(found, members).items():
        mean = torch.stack([part.of(task, matrices[task][layer]) for task in found]).mean(dim=0)
        for task in found:
            matrices[task][layer] = part.put(task, matrices[task][layer], mean)
    return assemble(found, members, matrices, "averaging, matched" if matched else "averaging")


def matched_neurons(
    networks: Mapping[str, Network], calibration: Mapping[str, Tensor]
) -> dict[str, Int64[np.ndarray, "neurons tasks"]]:
    """Members that give every neuron of the first network its partner in each other: the greatest total correlation.

    Activation matching of Ainsworth, Hayase, Srinivasa, *Git Re-Basin: Merging Models modulo Permutation Symmetries*
    (ICLR 2023), section 3.1, with correlations in place of inner products (Li et al., *Convergent Learning*, 2016), one
    linear assignment for every neuron group. All networks are run on the images of all tasks. More than two networks
    are each matched with the first. Raises `IncompatibleNetworks` for different widths.
    """
    check_equal_widths(networks)
    members = {}
    for group, correlation in correlations(networks, common_images(calibration, networks)).items():
        width = len(correlation) // len(networks)
        partners = [
            linear_sum_assignment(correlation[:width, start : start + width], maximize=True)[1]
            for start in range(width, len(correlation), width)
        ]
        members[group] = np.stack([np.arange(width), *partners], axis=1)
    return members
