"""Calibration batches, the rows that they feed to each layer, and the rows' second moments."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from inspect import Signature
from math import isfinite, prod
from typing import Any, TypeGuard

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from mtz_core.batches import ANY_NAMES, Batch, NamedTensors, bound, divided, is_positional, needs_several, tensors_of
from mtz_core.errors import InvalidCalibration
from mtz_core.network.graph import Network, Node, blank_run, free_unused, input_values, run_node
from mtz_core.network.layers import from_rows, with_ones
from mtz_core.settings import ZipConfig
from mtz_core.statistics.moments import Moments

LayerOutputs = Mapping[str, Sequence[Float[Tensor, "_n _out"]]]
"""For every layer, what it puts out at the sampled positions, batch by batch."""

FEWEST = 8
"""The fewest positions that every example gives to a convolution in groups."""

BATCH = 100
"""The number of examples that go through a network at once, if their values are small."""

IN_CACHE = 2**24
"""The most bytes that a layer's outputs should have for a batch. Larger ones leave the caches, and memory for them is
fetched from the system, and given back, for every operator."""


def as_batches(data: Tensor | Iterable[Any], task: str, taken: Signature = ANY_NAMES) -> list[Any]:
    """Turn calibration data into a list of batches.

    Args:
        data: One tensor of examples, or batches: tensors, or pairs of ``(inputs, labels)`` as a ``DataLoader`` of a
            labelled data set gives them; labels are left aside. Floating-point values, or whole numbers for tokens. A
            dict, as a whole or as a batch, has several inputs by name. If the network cannot do with one input, so has
            a tuple or list of as many tensors, in the network's order.
        task: The task's name, for errors.
        taken: The inputs that the task's network takes.

    Returns:
        The batches that are not empty: tensors, or `NamedTensors` of several inputs. What is given as a whole is split
            into batches of `BATCH` examples.

    Raises:
        InvalidCalibration: If there are no examples, if a batch is no tensor, if inputs are missing or unknown or of
            unequal lengths, if dtypes or shapes of examples differ, or if values are not finite.
    """
    if isinstance(data, NamedTensors) or has_several(data, taken) or (isinstance(data, Tensor) and data.ndim):
        batches: list[Any] = list(divided(as_batch(data, task, taken), BATCH))
    elif isinstance(data, Iterable) and not isinstance(data, Tensor):
        if _is_labelled(data):
            raise InvalidCalibration(
                f"the calibration data of {task!r} are a pair of tensors of {data[0].ndim} and {data[1].ndim} axes, "
                "and a tuple holds batches of inputs. Give the inputs alone: labels are not read."
            )
        batches = [as_batch(_inputs(batch, taken), task, taken) for batch in data]
    else:
        raise InvalidCalibration(
            f"the calibration data of {task!r} are neither a tensor of examples nor batches. Give a tensor [n, …], or "
            "batches of such, as a DataLoader of a data set yields them."
        )
    for batch in batches:
        if not isinstance(batch, NamedTensors) and (not isinstance(batch, Tensor) or not batch.ndim):
            entries = f" with {len(batch)} entries" if isinstance(batch, (tuple, list)) else ""
            raise InvalidCalibration(
                f"the calibration data of {task!r} have a batch of type {type(batch).__name__}{entries}. Give tensors "
                "of examples, dicts of tensors by the names of inputs, or pairs of (inputs, labels)."
            )
    batches = [batch for batch in batches if len(batch)]
    if not batches:
        raise InvalidCalibration(f"the calibration data of {task!r} are empty. Give at least one example.")
    first = tensors_of(batches[0])
    for batch in batches:
        if tensors_of(batch).keys() != first.keys():
            names = [", ".join(own) or "one tensor" for own in (first, tensors_of(batch))]
            raise InvalidCalibration(
                f"the calibration data of {task!r} mix batches of {names[0]} and of {names[1]}. Give the same inputs "
                "in all."
            )
        for name, tensor in tensors_of(batch).items():
            _check_examples(tensor, first[name], f"{task!r}" + (f" ({name})" if name else ""), masks=bool(name))
    return batches


def as_batch(given: Any, task: str, taken: Signature = ANY_NAMES) -> Any:
    """Take several inputs for a batch; anything else is returned as it is.

    Args:
        given: A tensor, a dict of several, a tuple or list of several if the network cannot do with one, or whatever.
        task: The task's name, for errors.
        taken: The inputs that the task's network takes.

    Returns:
        The batch.

    Raises:
        InvalidCalibration: If inputs are missing or unknown, no tensors, or of unequal lengths.
    """
    if has_several(given, taken) or (isinstance(given, Tensor) and needs_several(taken)):
        inputs = (given,) if isinstance(given, Tensor) else given
        return bound(inputs, taken, f"the calibration data of {task!r}")
    return given


def has_several(given: object, taken: Signature) -> bool:
    """Whether a value is one batch of inputs by name, or of several inputs in the network's order."""
    return isinstance(given, Mapping) or is_positional(given, taken)


def _is_labelled(data: object) -> TypeGuard[tuple[Tensor, Tensor]]:
    """Whether data can only be meant as inputs and their labels: two batches of inputs have equally many axes."""
    if not isinstance(data, tuple) or len(data) != 2 or not all(isinstance(own, Tensor) and own.ndim for own in data):
        return False
    return data[0].ndim != data[1].ndim and len(data[0]) == len(data[1])


def _check_examples(tensor: Tensor, first: Tensor, whose: str, masks: bool) -> None:
    """Check one input of a batch, given the same input of the first batch. One of several may be a mask."""
    whole = (torch.int32, torch.int64, *((torch.bool,) if masks else ()))
    if not (tensor.is_floating_point() or tensor.dtype in whole) or tensor.dtype != first.dtype:
        raise InvalidCalibration(
            f"the calibration data of {whose} have dtype {tensor.dtype}. Give floating-point values (or whole "
            "numbers, for tokens) of one dtype, as the network is meant to read them."
        )
    if tensor.shape[1:] != first.shape[1:]:
        raise InvalidCalibration(
            f"the calibration data of {whose} mix examples of shape {list(first.shape[1:])} and "
            f"{list(tensor.shape[1:])}. Give one shape; several inputs of a network as a dict by their names in its "
            "forward pass."
        )
    if not bool(torch.isfinite(tensor).all()):
        raise InvalidCalibration(f"the calibration data of {whose} have NaN or infinite values.")


def _inputs(batch: Any, taken: Signature) -> Any:
    """Return the inputs of a batch, which may come with its labels."""
    pair = isinstance(batch, (tuple, list)) and len(batch) == 2 and not is_positional(batch, taken)
    return batch[0] if pair else batch


def cut(network: Network, batches: Iterable[Batch]) -> list[Batch]:
    """Cut batches into smaller ones where a layer's outputs would have more than `IN_CACHE` bytes.

    Args:
        network: The network that reads them.
        batches: The batches.

    Returns:
        Batches of at least one example.
    """
    largest = max((value.nbytes for node, value in blank_run(network) if node.is_layer), default=1)
    size = max(IN_CACHE // largest, 1)
    return [part for batch in batches for part in divided(batch, size)]


def sample_positions(
    node: Node, weight: tuple[int, ...], x: Shaped[Tensor, "batch ..."], config: ZipConfig
) -> Int64[Tensor, " p"]:
    """Sample the positions at which a layer's rows are taken.

    A neuron of a convolution in groups has few inputs, so few positions are enough: as many as it has inputs, and
    `FEWEST` at least.

    Args:
        node: The layer.
        weight: The shape of the layer's weight.
        x: The layer's input.
        config: `ZipConfig.patches` limits the number of positions; `ZipConfig.seed` seeds the sample.

    Returns:
        The sampled positions, ascending. They are the same for every example.
    """
    positions = node.layer.positions(x, weight, node.arguments)
    wanted = config.patches
    if node.layer.conv_groups(node.arguments) > 1:
        wanted = min(wanted, max(prod(weight[1:]), FEWEST))
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randperm(positions, generator=generator)[:wanted].sort().values


def layer_rows(
    node: Node, weight: tuple[int, ...], x: Shaped[Tensor, "batch ..."], positions: Int64[Tensor, " p"]
) -> Float[Tensor, "n columns"]:
    """Return a layer's input as the rows that meet its matrix.

    Args:
        node: The layer.
        weight: The shape of the layer's weight.
        x: The layer's input.
        positions: The positions at which rows are taken, as from `sample_positions`.

    Returns:
        One row per example and position. Rows of a layer with a bias end in a 1; the rows of several conv_groups lie
            side by side, each with a 1 of its own.
    """
    rows = node.layer.rows(x, weight, node.arguments, positions)
    return with_ones(rows, node.layer.conv_groups(node.arguments), node.bias is not None)


@torch.no_grad()
def stream_rows(
    network: Network, batches: Iterable[Batch], config: ZipConfig
) -> Iterator[Mapping[str, Float[Tensor, "n columns"]]]:
    """Stream the sampled input rows of every layer of an original network.

    Args:
        network: The original network.
        batches: Its calibration data.
        config: How rows are sampled, see `sample_positions`.

    Yields:
        For every batch, the rows of each layer by the layer's name.

    Raises:
        InvalidCalibration: If a layer's output is not finite. The message names the layer.
    """
    for batch in batches:
        rows: dict[str, Tensor] = {}
        values = input_values(batch)
        for node in network.graph.nodes:
            if node.is_layer:
                weight = network.state[node.weight]
                x, shape = values[node.source], tuple(weight.shape)
                rows[node.name] = layer_rows(node, shape, x, sample_positions(node, shape, x, config)).to(weight.dtype)
            values[node.name] = run_node(node, values, network.state, len(batch))
            if node.is_layer and not _all_finite(values[node.name]):
                raise InvalidCalibration(
                    f"layer {node.name!r} puts out NaN or infinite values on the calibration data. "
                    "Check the network's weights and the scale of the data."
                )
            free_unused(network.graph, values, node)
        yield rows


def _all_finite(values: Float[Tensor, "..."]) -> bool:
    """Whether all values are finite. They are if their sum is, which is cheap to tell; the sum may overflow."""
    return isfinite(float(values.sum())) or bool(torch.isfinite(values).all())


def original_moments(network: Network, batches: Iterable[Batch], config: ZipConfig) -> dict[str, Moments]:
    """Accumulate the second moments of every layer's input in an original network.

    Args:
        network: The original network.
        batches: Its calibration data.
        config: How rows are sampled, see `sample_positions`.

    Returns:
        The moments of each layer by the layer's name.

    Raises:
        InvalidCalibration: If a layer's output is not finite, or the square of what it reads.
    """
    moments = {
        node.name: Moments(network.columns(node), node.layer.conv_groups(node.arguments))
        for node in network.graph.layers
    }
    for rows in stream_rows(network, batches, config):
        for layer, layer_moments in moments.items():
            layer_moments.add(rows[layer])
    for layer, layer_moments in moments.items():
        if layer_moments.gram is not None and not _all_finite(layer_moments.gram):
            raise InvalidCalibration(
                f"layer {layer!r} reads values that are too large to be squared. Scale the data, or the weights of the "
                "layers before it."
            )
    return moments


@torch.no_grad()
def sampled_outputs(
    network: Network, batches: Iterable[Batch], config: ZipConfig
) -> dict[str, list[Float[Tensor, "_n _out"]]]:
    """Compute what every layer of an original network puts out at the sampled positions.

    Args:
        network: The original network.
        batches: Its calibration data.
        config: How rows are sampled, see `sample_positions`.

    Returns:
        The outputs of each layer by the layer's name, batch by batch.

    Raises:
        InvalidCalibration: If a layer's output is not finite.
    """
    outputs: dict[str, list[Tensor]] = {node.name: [] for node in network.graph.layers}
    for rows in stream_rows(network, batches, config):
        for node in network.graph.layers:
            conv_groups = node.layer.conv_groups(node.arguments)
            outputs[node.name].append(from_rows(rows[node.name], network.matrix(node), conv_groups))
    return outputs
