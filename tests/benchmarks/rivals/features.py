"""Which neurons of several networks are alike: correlations of what they put out on the same images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtz_core.errors import InvalidCalibration
from mtz_core.network.graph import INPUT, Axis, Network, Node, free_unused, run_node
from mtz_core.statistics.calibration import as_batches
from mtz_core.zipped.ownership import positions_of

Place = Literal["read", "written"]
"""Where a neuron's values are taken: as layers read them (behind its activation), or as layers write them."""


def common_images(calibration: Mapping[str, Tensor], tasks: Iterable[str]) -> list[Tensor]:
    """The images of all tasks in batches: every network is run on all of them.

    Raises `InvalidCalibration` unless all tasks have images of one shape.
    """
    batches = [batch for task in tasks for batch in as_batches(calibration[task], task)]
    if len({batch.shape[1:] for batch in batches}) > 1:
        raise InvalidCalibration("the tasks' images differ in shape, so activations cannot be compared image by image.")
    return batches


@torch.no_grad()
def correlations(
    networks: Mapping[str, Network], images: Iterable[Tensor], place: Place = "read"
) -> dict[str, Float[np.ndarray, "neurons neurons"]]:
    """Pearson's correlation of the neurons of all networks, for every hidden group; the networks' neurons in turn.

    Samples are images and positions; where several layers read (or write) a group, all of their samples. A neuron that
    is constant correlates with nothing (0).
    """
    sums: dict[str, Tensor] = {}
    products: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    for batch in images:
        streams = [neuron_values(network, batch, place) for network in networks.values()]
        for found in zip(*streams, strict=True):
            group = found[0][0]
            values = torch.cat([value for _, value in found], dim=1).to(torch.float64)
            sums[group] = sums.get(group, 0) + values.sum(dim=0)
            products[group] = products.get(group, 0) + values.T @ values
            counts[group] = counts.get(group, 0) + len(values)
    found_correlations = {}
    for group, count in counts.items():
        mean = sums[group] / count
        covariance = products[group] / count - mean[:, None] * mean
        scale = covariance.diagonal().clamp(min=0).sqrt()
        live = scale > 1e-6 * products[group].diagonal().div(count).sqrt()
        inverse = torch.where(live, 1 / scale.where(live, torch.ones(())), 0)
        found_correlations[group] = (covariance * inverse[:, None] * inverse).numpy()
    return found_correlations


def neuron_values(
    network: Network, batch: Tensor, place: Place
) -> Iterator[tuple[str, Float[Tensor, "samples neurons"]]]:
    """Values of every hidden group's neurons on a batch, once for every value that layers read (or write)."""
    hidden = {group.name for group in network.graph.hidden_groups}
    values: dict[str, Any] = {INPUT: batch}
    seen: set[tuple[str, str]] = set()
    for node in network.graph.nodes:
        values[node.name] = run_node(node, values, network.state, len(batch))
        if node.is_layer:
            axis = (network.graph.columns if place == "read" else network.graph.rows)[node.name]
            name = node.source if place == "read" else node.name
            for group in axis.groups:
                if group in hidden and (name, group) not in seen:
                    seen.add((name, group))
                    yield group, _of_neurons(values[name], node, axis, group)
        free_unused(network.graph, values, node)


def _of_neurons(value: Tensor, node: Node, axis: Axis, group: str) -> Float[Tensor, "samples neurons"]:
    """A group's neurons in a value that a layer reads or writes; a neuron's several channels are several samples."""
    channels = value.movedim(node.layer.channel_axis(value.ndim), -1).flatten(0, -2)
    index = torch.from_numpy(_channels(axis, group, channels.shape[1]))
    return channels[:, index.flatten()].unflatten(1, tuple(index.shape)).transpose(1, 2).flatten(0, 1)


def _channels(axis: Axis, group: str, channels: int) -> Int64[np.ndarray, "neurons slots"]:
    """The channels of every neuron; a convolution has as many columns for each as its kernel has taps."""
    taps = len(axis.group) // channels
    return positions_of(axis, group)[:, ::taps] // taps
