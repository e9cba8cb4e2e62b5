"""The self-check of a traced network: permuting its neurons must not change what it computes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mtz_core.batches import Batch, mapped, tensors_of
from mtz_core.errors import UnsupportedModule
from mtz_core.network.graph import INPUT, NAMED, Axis, Network, Node, free_unused, input_values, run_node
from mtz_core.network.groups import Analysis
from mtz_core.network.operations import Value

TOLERANCE = 1e-4
"""How far outputs may differ, relative to the largest: the effect of reordering sums in float32."""

ROUNDING = 10
"""How far two float32 computations of one function may lie apart, in units of what rounding does to one of them."""

MEASURABLE = 1e-3
"""The largest effect of rounding, relative to outputs, by which a difference may be explained."""

Permutations = Mapping[str, Int64[np.ndarray, " _neurons"]]


@dataclass(frozen=True, eq=False)
class Reference:
    """What a module computes.

    Attributes:
        examples: A batch of inputs.
        expected: The module's outputs for these inputs.
        in_double: Computes them in double precision; returns None if the module cannot.
    """

    examples: Batch
    expected: Batch
    in_double: Callable[[], Batch | None] = lambda: None


@torch.no_grad()
def check(network: Network, analysis: Analysis, reference: Reference) -> None:
    """Compare the graph with the module, then the graph with itself, its neurons permuted.

    Some networks amplify rounding, so that the order of sums alone changes float32 outputs. Where these differ, double
    precision decides.

    Args:
        network: The traced network.
        analysis: Its analysis.
        reference: What the module computes.

    Raises:
        UnsupportedModule: If the outputs differ. The message names the neuron group at fault.
    """
    same, examples = compare(network, analysis, reference), reference.examples
    generator = np.random.default_rng(0)
    permutations = {
        group.name: _permutation(analysis.classes[group.name], generator)
        for group in network.graph.groups
        if group.hidden and group.name != INPUT
    }
    if _distance(_run(network, analysis, examples, permutations), same) <= TOLERANCE:
        return
    exact = _run_in_double(network, analysis, examples)
    double, expected = exact is not None, same if exact is None else exact
    if double and _distance(_run(network, analysis, examples, permutations, double), expected) <= TOLERANCE:
        return
    for name, permutation in permutations.items():
        if _distance(_run(network, analysis, examples, {name: permutation}, double), expected) > TOLERANCE:
            break
    raise UnsupportedModule(
        f"the neurons of group {name!r} are not interchangeable: permuting them in all layers that write and read "
        f"them changes the output. Something between those layers treats them differently; list it, or its module, "
        f"under `keep_separate`. Between them are {_between(network, analysis, name)}."
    )


@torch.no_grad()
def compare(network: Network, analysis: Analysis, reference: Reference) -> Batch:
    """Compare the graph with the module.

    Args:
        network: The traced network.
        analysis: Its analysis.
        reference: What the module computes.

    Returns:
        The graph's outputs.

    Raises:
        UnsupportedModule: If they differ from the module's.
    """
    try:
        same = _run(network, analysis, reference.examples, {})
    except (RuntimeError, IndexError, ValueError, TypeError) as error:  # another number of examples is one of its sizes
        raise UnsupportedModule(_other(reference.examples)) from error
    differs = _distance(same, mapped(Tensor.cpu, reference.expected))
    if differs > TOLERANCE:
        _check_in_double(network, analysis, reference, same, differs)
    return same


def _other(examples: Batch) -> str:
    """The error that a graph is not its module, in words."""
    count = "one example" if len(examples) == 1 else f"{len(examples)} examples"
    return (
        f"for {count} the traced network does not compute what the module does. Its forward pass depends on how many "
        "there are, or has effects that torch.export does not see. Write it differently, or leave this network out of "
        "the group."
    )


def _check_in_double(network: Network, analysis: Analysis, reference: Reference, same: Batch, differs: float) -> None:
    """Tell whether a graph's outputs differ from its module's by rounding alone.

    Args:
        network: The traced network.
        analysis: Its analysis.
        reference: What the module computes.
        same: The graph's outputs.
        differs: How far the module's lie from them.

    Raises:
        UnsupportedModule: If they differ by more, or if that cannot be told.
    """
    examples, wide = reference.examples, reference.in_double()
    exact = _run_in_double(network, analysis, examples)
    if exact is not None and wide is not None and _distance(exact, mapped(Tensor.cpu, wide)) <= TOLERANCE:
        return
    rounding = 0.0 if exact is None else _distance(same, exact)
    again = _run(network, analysis, examples, {})
    told = wide is not None and not any(_to_single(node) for node in network.graph.nodes)
    if told or differs > ROUNDING * rounding or _distance(again, same) > TOLERANCE:
        raise UnsupportedModule(_other(examples))
    if rounding > MEASURABLE:
        raise UnsupportedModule(
            f"rounding alone changes the outputs of this network by {100 * rounding:.2g} %, and the module does not "
            "run in double precision, so that what is traced cannot be compared with it. Leave this network out of the "
            "group."
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


def _distance(found: Batch, expected: Batch) -> float:
    return distance(tensors_of(found), tensors_of(expected))


def distance(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> float:
    """Return how far outputs differ, relative to the largest.

    Args:
        found: The outputs by name.
        expected: What they should be.

    Returns:
        The greatest difference; infinite if names or shapes differ.
    """
    if found.keys() != expected.keys():
        return math.inf
    return max(_apart(found[name], expected[name]) for name in found)


def _apart(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or not torch.equal(finite := torch.isfinite(b), torch.isfinite(a)):
        return math.inf
    a, b = a[finite], b[finite]
    return float((a - b).abs().max()) / max(float(b.abs().max()), 1e-30) if a.numel() else 0.0


def _permutation(classes: Int64[np.ndarray, " n"], generator: np.random.Generator) -> Int64[np.ndarray, " n"]:
    """A random order of neurons in which each takes the place of one of its own class."""
    order = np.arange(len(classes))
    for one in np.unique(classes):
        own = np.flatnonzero(classes == one)
        order[own] = generator.permutation(own)
    return order


def _run(
    network: Network, analysis: Analysis, examples: Batch, permutations: Permutations, double: bool = False
) -> Batch:
    """The network's output with permuted neurons, in its own or in double precision. Weights are copied one by one."""
    graph = network.graph
    constants = {
        name: tensor.flatten()[torch.from_numpy(_order(analysis.constants[name], permutations))].reshape(tensor.shape)
        for name, tensor in network.state.items()
        if name in analysis.constants
    }
    values: dict[str, Any] = {name: value.cpu().clone() for name, value in input_values(examples).items()}
    if double:
        values = {name: _widened(value) for name, value in values.items()}
    for node in graph.nodes:
        state = {name: constants.get(name, network.state[name]) for name in node.state}
        if node.name in analysis.rows:
            rows = torch.from_numpy(_order(analysis.rows[node.name], permutations))
            columns = torch.from_numpy(_order(analysis.columns[node.name], permutations))
            weight = network.state[node.weight]
            matrix = node.layer.matrix(weight)[rows[:, None], columns]
            state[node.weight] = node.layer.from_matrix(matrix, tuple(weight.shape))
        if double:
            node = _to_double(node)
            state = {name: _widened(tensor) for name, tensor in state.items()}
        values[node.name] = run_node(node, values, state, len(examples))
        if double:
            values[node.name] = _widened(values[node.name])
        free_unused(graph, values, node)
    output: Batch = values[graph.output]
    return output


_SINGLE, _DOUBLE = {"dtype": "float32"}, {"dtype": "float64"}


def _to_single(node: Node) -> bool:
    """Whether a node converts to single precision."""
    return _SINGLE in node.arguments.values()


def _to_double(node: Node) -> Node:
    """A node that converts to double precision where it did to single."""
    if not _to_single(node):
        return node
    return replace(node, arguments={name: _DOUBLE if own == _SINGLE else own for name, own in node.arguments.items()})


def _widened(value: Any) -> Any:
    """A float32 value, or such values in a sequence, in double precision; others as they are."""
    if isinstance(value, (list, tuple)):
        return [_widened(part) for part in value]
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def _run_in_double(network: Network, analysis: Analysis, examples: Batch) -> Batch | None:
    """The network's output in double precision; None if an operator does not work in it."""
    try:
        return _run(network, analysis, examples, {}, double=True)
    except RuntimeError:
        return None


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
