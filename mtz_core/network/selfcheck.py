"""The self-check of a traced network: permuting its neurons must not change what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mtz_core.batches import Batch, mapped, tensors_of
from mtz_core.errors import UnsupportedModule
from mtz_core.network.graph import INPUT, Axis, Network, free_unused, input_values, run_node
from mtz_core.network.groups import Analysis
from mtz_core.network.operations import Value

TOLERANCE = 1e-4
"""How far outputs may differ, relative to the largest: the effect of reordering sums in float32."""

NAMED = 8
"""How many operators an error names."""

Permutations = Mapping[str, Int64[np.ndarray, " _neurons"]]


@torch.no_grad()
def check(network: Network, analysis: Analysis, examples: Batch, expected: Batch) -> None:
    """Compare the graph with the module, then the graph with itself, its neurons permuted.

    Args:
        network: The traced network.
        analysis: Its analysis.
        examples: A batch of inputs.
        expected: The module's outputs for these inputs.

    Raises:
        UnsupportedModule: If the outputs differ. The message names the neuron group at fault.
    """
    same = _run(network, analysis, examples, {})
    if not _same(same, mapped(Tensor.cpu, expected)):
        raise UnsupportedModule(
            "the traced network does not compute what the module does. Its forward pass has effects that torch.export "
            "does not see; leave this network out of the group."
        )
    generator = np.random.default_rng(0)
    permutations = {
        group.name: _permutation(analysis.classes[group.name], generator)
        for group in network.graph.groups
        if group.hidden and group.name != INPUT
    }
    if _same(_run(network, analysis, examples, permutations), same):
        return
    for name, permutation in permutations.items():
        if not _same(_run(network, analysis, examples, {name: permutation}), same):
            break
    raise UnsupportedModule(
        f"the neurons of group {name!r} are not interchangeable: permuting them in all layers that write and read "
        f"them changes the output. Something between those layers treats them differently; list it, or its module, "
        f"under `keep_separate`. Between them are {_between(network, analysis, name)}."
    )


def _between(network: Network, analysis: Analysis, group: str) -> str:
    """The operators that pass on the neurons of a group, and their modules, in words."""
    labels = torch.tensor(analysis.members[group])
    found = []
    for node in network.graph.nodes:
        value = analysis.labels.values[node.name]
        passed = value.labels if isinstance(value, Value) else torch.cat([part.labels.flatten() for part in value])
        if not node.is_layer and bool(torch.isin(analysis.labels.ties.resolve(passed), labels).any()):
            found.append(repr(node.name) + (f" (in {node.module!r})" if node.module else ""))
    return ", ".join(found[:NAMED]) + (f" and {len(found) - NAMED} more" if len(found) > NAMED else "")


def _same(found: Batch, expected: Batch) -> bool:
    return close(tensors_of(found), tensors_of(expected))


def close(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    """Return whether all outputs are the same but for rounding.

    Args:
        a: The outputs by name.
        b: What they should be.

    Returns:
        Whether names, shapes and values agree.
    """
    return a.keys() == b.keys() and all(a[name].shape == b[name].shape and _near(a[name], b[name]) for name in a)


def _near(a: Tensor, b: Tensor) -> bool:
    finite = torch.isfinite(b)
    if not bool((torch.isfinite(a) == finite).all()):
        return False
    a, b = a[finite], b[finite]
    return a.numel() == 0 or bool((a - b).abs().max() <= TOLERANCE * max(float(b.abs().max()), 1e-30))


def _permutation(classes: Int64[np.ndarray, " n"], generator: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """A random order of neurons in which each takes the place of one of its own class."""
    order = np.arange(len(classes))
    for one in np.unique(classes):
        own = np.flatnonzero(classes == one)
        order[own] = generator.permutation(own)
    return order


def _run(network: Network, analysis: Analysis, examples: Batch, permutations: Permutations) -> Batch:
    """The network's output with permuted neurons. Weights are copied one layer at a time."""
    graph = network.graph
    constants = {
        name: tensor.flatten()[torch.from_numpy(_order(analysis.constants[name], permutations))].reshape(tensor.shape)
        for name, tensor in network.state.items()
        if name in analysis.constants
    }
    values: dict[str, Any] = {name: value.cpu().clone() for name, value in input_values(examples).items()}
    for node in graph.nodes:
        state = {name: constants.get(name, network.state[name]) for name in node.state}
        if node.name in analysis.rows:
            rows = torch.from_numpy(_order(analysis.rows[node.name], permutations))
            columns = torch.from_numpy(_order(analysis.columns[node.name], permutations))
            weight = network.state[node.weight]
            matrix = node.layer.matrix(weight)[rows[:, None], columns]
            state[node.weight] = node.layer.from_matrix(matrix, tuple(weight.shape))
        values[node.name] = run_node(node, values, state, len(examples))
        free_unused(graph, values, node)
    output: Batch = values[graph.output]
    return output


def _order(axis: Axis, permutations: Permutations) -> Int64[np.ndarray, " n"]:
    """For every position, where its content comes from."""
    order = np.arange(len(axis.group))
    for number, name in enumerate(axis.groups):
        if name in permutations:
            places = list(_places(axis, number, len(permutations[name])))
            for neuron, other in enumerate(permutations[name].tolist()):
                order[places[neuron]] = places[other]
    return order


def _places(axis: Axis, group: int, neurons: int) -> Iterator[Int64[np.ndarray, " slots"]]:
    """The positions of every neuron of a group, in ascending order."""
    own = np.flatnonzero(axis.group == group)
    sorted_ = own[np.argsort(axis.neuron[own], kind="stable")]
    yield from np.split(sorted_, np.searchsorted(axis.neuron[sorted_], np.arange(1, neurons)))
