"""Find the neuron groups of a network: which rows and columns of its layers belong to one and the same neuron.

The network is run on labels instead of numbers (see `mtz_core.network.ties`). Tied labels are one neuron. Neurons that
occur equally often in the same rows and columns of the same layers form a group, within which they can be permuted.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mtz_core.network.graph import (
    FIXED,
    INPUT,
    KERNEL,
    OUTPUTS,
    Axis,
    Inputs,
    LayerGraph,
    Network,
    NeuronGroup,
    Node,
    given_name,
)
from mtz_core.network.labelling import Labelling, label_network
from mtz_core.network.operations import Value
from mtz_core.network.ties import THE_KERNEL


@dataclass(frozen=True, eq=False)
class Analysis:
    """A graph, and what its self-check needs beside it.

    Attributes:
        graph: The graph.
        rows: For every node with a matrix, whether it is shared or not, whose its rows are.
        columns: For every node with a matrix, whose its columns are.
        constants: For every other parameter and statistic, the neuron of each of its elements.
        classes: For every group, a number for each neuron. Only neurons of equal number may be permuted with each
            other.
        labels: The labels of all values.
        members: For every group, the labels of its neurons.
        bound: Why all neurons of a layer stay in their places that meet an input, in words, by the layer's name.
    """

    graph: LayerGraph
    rows: Mapping[str, Axis]
    columns: Mapping[str, Axis]
    constants: Mapping[str, Axis]
    classes: Mapping[str, Int64[np.ndarray, " _neurons"]]
    labels: Labelling
    members: Mapping[str, Sequence[int]]
    bound: Mapping[str, str]


def analyse(
    nodes: Sequence[Node],
    output: str,
    state: Mapping[str, Tensor],
    trainable: frozenset[str],
    inputs: Inputs,
) -> Analysis:
    """Find the neuron groups of a network.

    Args:
        nodes: The nodes, in an order in which they can run.
        output: The value that is the network's output.
        state: The stored tensors by name.
        trainable: The names of the tensors that are parameters.
        inputs: What the network is given.

    Returns:
        The graph and its analysis.

    Raises:
        UnsupportedModule: If there is no rule for an operator, or if its rule does not cover how it is used.
    """
    return _collect(label_network(nodes, state, trainable, inputs), nodes, output)


_KNOWN: WeakKeyDictionary[Network, Analysis] = WeakKeyDictionary()


def analysis_of(network: Network) -> Analysis:
    """Analyse a traced network, once for as long as it is there."""
    if network not in _KNOWN:
        entry = (network.state, network.trainable, network.inputs)
        _KNOWN[network] = analyse(network.graph.nodes, network.graph.output, *entry)
    return _KNOWN[network]


def remember(network: Network, analysis: Analysis) -> None:
    """Let `analysis_of` know the analysis that a network was made from."""
    _KNOWN[network] = analysis


def _collect(found: Labelling, nodes: Sequence[Node], output: str) -> Analysis:
    """Turn classes of tied labels into neurons, and neurons that are alike into groups."""
    ties = found.ties
    # A node that is kept separate and has no rule is no layer.
    nodes = [replace(node, is_layer=node.is_layer and node.name in found.rows) for node in nodes]
    layers = [node for node in nodes if node.is_layer]
    tables = {
        (node.name, side): ties.resolve(labels[node.name]).numpy()
        for node in nodes
        for side, labels in (("rows", found.rows), ("columns", found.columns))
        if node.name in labels
    }
    entries = {*ties.resolve(torch.tensor(ties.inputs)).tolist()}
    outputs = found.values[output]
    outputs = outputs if isinstance(outputs, list) else [outputs]
    ends = {label for value in outputs for label in ties.resolve(value.labels).flatten().tolist()}
    occurrences: dict[int, list[tuple[int, str, int]]] = {}
    for number, node in enumerate(nodes):
        for side in ("rows", "columns"):
            if (node.name, side) in tables:
                labels, counts = np.unique(tables[node.name, side], return_counts=True)
                for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
                    occurrences.setdefault(label, []).append((number, side, count))
    written = {label for label, places in occurrences.items() if any(side == "rows" for _, side, _ in places)}
    alike: dict[tuple[Any, ...], list[int]] = {}
    for label in written - {*entries, FIXED, int(ties.resolve(torch.tensor([THE_KERNEL])))}:
        alike.setdefault((label in ends, *occurrences[label]), []).append(label)
    names = {node.name for node in layers}
    groups, members = _name_groups(alike, nodes, tables, names)
    grouped = {n.name for n in layers if n.layer.conv_groups(n.arguments) > 1}
    groups = [
        replace(g, readers=tuple(n.name for n in layers if n.name in {*g.readers, *grouped & {*g.writers}}))
        for g in groups
    ]
    members[KERNEL] = [int(ties.resolve(torch.tensor([THE_KERNEL])))]
    given = sorted(label for label in entries if label in occurrences and label not in written)
    if given:
        reading = {n for label in given for n, side, _ in occurrences[label] if side == "columns" and nodes[n].is_layer}
        groups.insert(0, NeuronGroup(INPUT, (), tuple(nodes[n].name for n in sorted(reading)), hidden=False))
        members[INPUT] = given[:1]
    place = {label: (name, i) for name, labels in members.items() for i, label in enumerate(labels)}
    place |= dict.fromkeys(given, (INPUT, 0))
    axes = {key: _axis(labels, place) for key, labels in tables.items()}
    graph = LayerGraph(
        nodes=tuple(nodes),
        output=output,
        groups=tuple(groups),
        widths={name: len(labels) for name, labels in members.items()},
        rows={node.name: axes[node.name, "rows"] for node in layers},
        columns={node.name: axes[node.name, "columns"] for node in layers},
    )
    constants = {
        name: _axis(ties.resolve(value.labels).flatten().numpy(), place)
        for name, value in found.constants.items()
        if value.actual is None
    }
    rows, columns = ({name: axis for (name, s), axis in axes.items() if s == side} for side in ("rows", "columns"))
    classes = _classes(found, nodes, members, constants)
    bound = _bound(found, nodes, {node.name: tables[node.name, "rows"] for node in layers}, entries - ends)
    return Analysis(graph, rows, columns, constants, classes, found, members, bound)


def _bound(
    found: Labelling, nodes: Sequence[Node], rows: Mapping[str, np.ndarray], entries: Collection[int]
) -> dict[str, str]:
    """Tell which layers have no neurons of their own, as theirs meet an input one by one, and where that is."""
    names = [name for name, labels in rows.items() if np.isin(labels, [*entries]).all()]
    if not names:
        return {}
    meeting = list(_meetings(found, nodes))
    places = {node.name: place for place, node in enumerate(nodes)}
    bound = {}
    for name in names:
        own = [(node, inputs) for node, inputs, labels in meeting if labels & {*rows[name].tolist()}]
        behind = [pair for pair in own if places[pair[0].name] > places[name]]
        if not own:
            continue
        node, inputs = (behind or own)[0]
        which = " and ".join(f"{given_name(value)!r}" for value in sorted(inputs)) if inputs != {INPUT} else ""
        bound[name] = (
            f"its neurons meet the input{f' {which}' if which else ''} one by one, in {node.name!r}, and stay in their "
            "places. A mask does not bind them if it is an input of its own, of booleans (torch.bool)"
        )
    return bound


def _meetings(found: Labelling, nodes: Sequence[Node]) -> Iterator[tuple[Node, set[str], set[int]]]:
    """The nodes in which what a layer has computed meets an input, which inputs these are, and all labels there."""
    raw: dict[str, set[str]] = {name: {name} for name in found.values if name.startswith(INPUT)}
    computed: set[str] = set()
    for node in nodes:
        inputs = {name for source in node.sources for name in raw.get(source, ())}
        if node.is_layer or computed & {*node.sources}:
            computed.add(node.name)
        elif inputs:
            raw[node.name] = inputs
        if inputs and node.name in computed and not node.is_layer and node.kind != OUTPUTS:
            given = [found.values[source] for source in node.sources]
            parts = [part for value in given for part in (value if isinstance(value, list) else [value])]
            yield node, inputs, {n for part in parts for n in found.ties.resolve(part.labels).flatten().tolist()}


def _name_groups(
    alike: Mapping[tuple[Any, ...], list[int]],
    nodes: Sequence[Node],
    tables: Mapping[tuple[str, str], np.ndarray],
    names: set[str],
) -> tuple[list[NeuronGroup], dict[str, list[int]]]:
    """The groups in topological order, named after the first layer that writes them, and their labels."""
    ordered = []
    for (ends, *places), labels in alike.items():
        first = next(number for number, side, _ in places if side == "rows")
        order = {label: i for i, label in reversed(list(enumerate(tables[nodes[first].name, "rows"].tolist())))}
        labels = sorted(labels, key=order.__getitem__)
        ordered.append((first, order[labels[0]], ends, places, labels))
    groups: list[NeuronGroup] = []
    members: dict[str, list[int]] = {}
    for first, _, ends, places, labels in sorted(ordered, key=lambda entry: entry[:2]):
        writers = tuple(nodes[n].name for n, side, _ in places if side == "rows" and nodes[n].name in names)
        readers = tuple(nodes[n].name for n, side, _ in places if side == "columns" and nodes[n].name in names)
        # What other networks have, too, is not kept separate: it names the group.
        written = [nodes[n] for n, side, _ in places if side == "rows"]
        name = next((node.name for node in written if not node.separate), nodes[first].name)
        name = next(n for n in (name, *(f"{name}[{i}]" for i in range(2, len(ordered) + 2))) if n not in members)
        groups.append(NeuronGroup(name, writers, readers, hidden=not ends and bool(writers)))
        members[name] = labels
    return groups, members


def _axis(labels: np.ndarray, place: Mapping[int, tuple[str, int]]) -> Axis:
    groups = list(dict.fromkeys(place[label][0] for label in labels.tolist() if label in place))
    number = {name: i for i, name in enumerate(groups)}
    where = [
        (number[place[label][0]], place[label][1]) if label in place else (FIXED, FIXED) for label in labels.tolist()
    ]
    table = np.array(where, dtype=np.int64).reshape(-1, 2)
    return Axis(tuple(groups), table[:, 0], table[:, 1])


def _classes(
    found: Labelling, nodes: Sequence[Node], members: Mapping[str, Sequence[int]], constants: Mapping[str, Axis]
) -> dict[str, Int64[np.ndarray, " _neurons"]]:
    """Number the neurons of every group by the constants and cuts that they are in, and by what pins them."""
    marks: dict[int, list[tuple[int, int]]] = {}
    for labels, colours in found.ties.colours:
        for label, colour in zip(found.ties.resolve(labels).tolist(), colours.tolist(), strict=True):
            marks.setdefault(label, []).append((colour, 0))
    for number, table in enumerate((*(found.constants[name] for name in constants), *_cuts(found, nodes))):
        occurring, counts = np.unique(found.ties.resolve(table.labels).numpy(), return_counts=True)
        for label, count in zip(occurring.tolist(), counts.tolist(), strict=True):
            marks.setdefault(label, []).append((-1 - number, count))
    classes = {}
    for name, neurons in members.items():
        kinds: dict[tuple[Any, ...], int] = {}
        keys = [tuple(sorted(marks.get(label, []))) for label in neurons]
        classes[name] = np.array([kinds.setdefault(key, len(kinds)) for key in keys], dtype=np.int64)
    return classes


def _cuts(found: Labelling, nodes: Sequence[Node]) -> Iterator[Value]:
    """Values with some neurons of what they are cut from, but not all. What follows may treat these otherwise."""
    for node in nodes:
        whole = found.values[node.sources[0]] if node.sources and not node.is_layer else None
        if isinstance(whole, Value) and whole.labels.numel() > 1:
            parts = found.values[node.name]
            for part in parts if isinstance(parts, list) else [parts]:
                if len(found.ties.resolve(part.labels).unique()) < len(found.ties.resolve(whole.labels).unique()):
                    yield part
