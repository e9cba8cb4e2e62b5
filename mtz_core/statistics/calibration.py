"""What the layers of a network are fed: calibration batches, sampled rows, and their moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mtz_core.errors import InvalidCalibration
from mtz_core.network.graph import INPUT, Network, Node, free_unused, run_node
from mtz_core.network.layers import with_ones
from mtz_core.settings import ZipConfig
from mtz_core.statistics.moments import Moments

BATCH = 100
"""Examples that go through a network at once."""


def as_batches(data: Tensor | Iterable[Any], task: str) -> list[Tensor]:
    """Return calibration data as a list of batches.

    Args:
        data: Examples in one tensor, or batches: tensors, or pairs of ``(inputs, labels)`` as a ``DataLoader`` of a
            labelled data set gives them; labels are left aside.
        task: Whose data they are, for errors.

    Raises:
        InvalidCalibration: There are no examples, or their values are of another kind or not finite.
    """
    if isinstance(data, Tensor) and data.ndim:
        batches = list(torch.split(data, BATCH))
    elif isinstance(data, Iterable) and not isinstance(data, Tensor):
        batches = [_inputs(batch) for batch in data]
    else:
        raise InvalidCalibration(f"the calibration data of {task!r} are neither a tensor of examples nor batches.")
    for batch in batches:
        if not isinstance(batch, Tensor) or not batch.ndim:
            raise InvalidCalibration(
                f"the calibration data of {task!r} have a batch of type {type(batch).__name__}. Give tensors of "
                "examples, or pairs of (inputs, labels)."
            )
    batches = [batch for batch in batches if len(batch)]
    if not batches:
        raise InvalidCalibration(f"the calibration data of {task!r} are empty. Give at least one example.")
    for batch in batches:
        known = batch.is_floating_point() or batch.dtype in (torch.int32, torch.int64)
        if not known or batch.dtype != batches[0].dtype:
            raise InvalidCalibration(
                f"the calibration data of {task!r} have dtype {batch.dtype}. Give floating-point values (or whole "
                "numbers, for tokens) of one dtype, as the network is meant to read them."
            )
        if batch.shape[1:] != batches[0].shape[1:]:
            raise InvalidCalibration(
                f"the calibration data of {task!r} mix examples of shape {list(batches[0].shape[1:])} and "
                f"{list(batch.shape[1:])}. Give one shape."
            )
        if not bool(torch.isfinite(batch).all()):
            raise InvalidCalibration(f"the calibration data of {task!r} have NaN or infinite values.")
    return batches


def _inputs(batch: Any) -> Any:
    """Return the inputs of a batch, which may come with its labels."""
    return batch[0] if isinstance(batch, (tuple, list)) and len(batch) == 2 else batch


def sample_positions(
    node: Node, weight: tuple[int, ...], x: Shaped[Tensor, "batch ..."], config: ZipConfig
) -> Int64[Tensor, " p"]:
    """At most `config.patches` of a layer's positions, the same for every example, ascending; `weight` is its shape."""
    positions = node.layer.positions(x, weight, node.arguments)
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(positions, generator=generator)[: config.patches].sort().values


def layer_rows(
    node: Node, weight: tuple[int, ...], x: Shaped[Tensor, "batch ..."], positions: Int64[Tensor, " p"]
) -> Float[Tensor, "n groups*in"]:
    """A layer's input as the rows that meet its matrix, with the trailing 1 if it has a bias; groups side by side."""
    rows = node.layer.rows(x, weight, node.arguments, positions)
    return with_ones(rows, node.layer.conv_groups(node.arguments), node.bias is not None)


@torch.no_grad()
def stream_rows(
    network: Network, batches: Iterable[Tensor], config: ZipConfig
) -> Iterator[Mapping[str, Float[Tensor, "n groups*in"]]]:
    """The sampled input rows of every layer of an original network, batch by batch.

    Raises `InvalidCalibration` for activations that are not finite, naming the layer.
    """
    for batch in batches:
        rows: dict[str, Tensor] = {}
        values: dict[str, Any] = {INPUT: batch}
        for node in network.graph.nodes:
            if node.is_layer:
                weight = network.state[node.weight]
                x, shape = values[node.source], tuple(weight.shape)
                rows[node.name] = layer_rows(node, shape, x, sample_positions(node, shape, x, config)).to(weight.dtype)
            values[node.name] = run_node(node, values, network.state, len(batch))
            if node.is_layer and not bool(torch.isfinite(values[node.name]).all()):
                raise InvalidCalibration(
                    f"layer {node.name!r} puts out NaN or infinite values on the calibration data. "
                    "Check the network's weights and the scale of the data."
                )
            free_unused(network.graph, values, node)
        yield rows


def original_moments(network: Network, batches: Iterable[Tensor], config: ZipConfig) -> dict[str, Moments]:
    """Second moments of every layer's input in an original network."""
    moments = {
        node.name: Moments(network.columns(node), node.layer.conv_groups(node.arguments))
        for node in network.graph.layers
    }
    for rows in stream_rows(network, batches, config):
        for layer, layer_moments in moments.items():
            layer_moments.add(rows[layer])
    return moments
