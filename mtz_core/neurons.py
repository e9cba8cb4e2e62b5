"""Find the neuron groups of a network: which rows and columns of its layers belong to one and the same neuron.

The network is run on labels instead of numbers (see `mtz_core.labels`). Tied labels are one neuron; neurons that occur
equally often in the same rows and columns of the same layers form a group, within which they can be permuted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from mtz_core.errors import UnsupportedModule
from mtz_core.graph import FIXED, GETITEM, INPUT, KERNEL, Axis, LayerGraph, NeuronGroup, Node, operator, resolve
from mtz_core.labels import THE_INPUT, THE_KERNEL, Ties, compress
from mtz_core.layers import LAYERS, Convolution
from mtz_core.operations import CREATION, NotUnderstood, Value, operation_of

REMEDY = (
    "Register what it does to neurons (mtz_core.register_operation), or list the module under `keep_separate` to "
    "leave it task-specific."
)


@dataclass(frozen=True, eq=False)
class Analysis:
    """A graph, and what its self-check needs beside it.

    `rows` and `columns` are those of all nodes with a matrix, whether they are shared or not; `constants` has the
    neuron of every element of other parameters and statistics. `classes[group]` numbers the neurons: only those of
    equal number may be permuted with each other.
    """

    graph: LayerGraph
    rows: Mapping[str, Axis]
    columns: Mapping[str, Axis]
    constants: Mapping[str, Axis]
    classes: Mapping[str, Int64[np.ndarray, " neurons"]]


@dataclass
class _Labelling:
    """Labels of everything, as far as the network has been run."""

    ties: Ties = field(default_factory=Ties)
    values: dict[str, Any] = field(default_factory=dict)
    rows: dict[str, Int64[Tensor, " out"]] = field(default_factory=dict)
    columns: dict[str, Int64[Tensor, " columns"]] = field(default_factory=dict)
    constants: dict[str, Value] = field(default_factory=dict)


def analyse(
    nodes: Sequence[Node],
    output: str,
    state: Mapping[str, Tensor],
    trainable: frozenset[str],
    input_shape: tuple[int, ...],
    input_dtype: torch.dtype,
) -> Analysis:
    """The graph of these nodes with its neuron groups. Raises `UnsupportedModule` for operators without a rule."""
    found = _Labelling()
    entry = torch.empty(1, *input_shape, dtype=input_dtype, device="meta")
    found.values[INPUT] = Value(entry, torch.full([1] * entry.ndim, THE_INPUT))
    for node in nodes:
        try:
            found.values[node.name] = _label(found, node, state, trainable)
        except (NotUnderstood, RuntimeError, ValueError, IndexError) as error:
            if not node.separate:
                where, reason = node.module or "the network itself", str(error).strip().splitlines()[0]
                raise UnsupportedModule(
                    f"{where!r}: operator {node.kind} cannot be zipped: {reason}. {REMEDY}"
                ) from error
            found.values[node.name] = _opaque(found, node, state)
    return _collect(found, nodes, output)


def _label(found: _Labelling, node: Node, state: Mapping[str, Tensor], trainable: frozenset[str]) -> Any:
    """The value of a node as far as labels go."""
    if node.kind == GETITEM:
        return found.values[node.sources[0]][node.arguments["index"]]
    arguments = _given(found, node, state, trainable)
    values = [value for value in _flat(arguments) if isinstance(value, Value)]
    if all(value.actual is not None for value in values) and _makes_constants(node.kind, values):
        out = _run_actual(node, arguments)
        constants = [Value(part.to("meta"), _nothing(part), True, part) for part in _listed(out)]
        return constants if isinstance(out, (list, tuple)) else constants[0]
    operation = operation_of(node.kind)
    is_matrix = operation is None and node.kind in LAYERS
    if operation is None and not is_matrix:
        raise NotUnderstood("zipping does not know this operator")
    out = _run_meta(node, arguments)
    if is_matrix:
        name = LAYERS[node.kind].weight
        if "state" not in node.arguments[name]:
            raise NotUnderstood("its weights are computed, not stored")
        return Value(out, _label_layer(found, node, arguments, out, arguments[name]))
    assert operation is not None
    labels: Any = operation.rule(found.ties, node, arguments, out)
    constant = all(value.constant for value in values)
    if isinstance(out, (list, tuple)):
        return [Value(o, part, constant) for o, part in zip(out, labels, strict=True)]
    return Value(out, labels, constant)


def _makes_constants(kind: str, values: Sequence[Value]) -> bool:
    """Whether an operator is a function of tensors, or one that is known to do nothing but make some."""
    return kind.partition(".")[0] in CREATION or (bool(values) and not operator(kind)._schema.is_mutable)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _flat(argument: Any) -> list[Any]:
    if isinstance(argument, Mapping):
        return [leaf for part in argument.values() for leaf in _flat(part)]
    if isinstance(argument, (list, tuple)):
        return [leaf for part in argument for leaf in _flat(part)]
    return [argument]


def _given(found: _Labelling, node: Node, state: Mapping[str, Tensor], trainable: frozenset[str]) -> dict[str, Any]:
    """The arguments of a node for one example, tensors as `Value`."""
    weight = node.arguments.get(LAYERS[node.kind].weight) if node.kind in LAYERS else None
    for name in node.state:
        if name in found.constants:
            continue
        tensor = state[name]
        meta = tensor.to("meta")
        if (name in trainable and weight != {"state": name}) or _is_statistic(node, name):
            labels = found.ties.fresh(tensor.numel()).reshape(tensor.shape)
            found.constants[name] = Value(meta, labels, constant=True)
        elif name in trainable:
            continue
        else:
            found.constants[name] = Value(meta, _nothing(meta), constant=True, actual=tensor)
    given = dict(found.constants)
    if weight is not None and "state" in weight and weight["state"] not in given:
        meta = state[weight["state"]].to("meta")
        given[weight["state"]] = Value(meta, _nothing(meta), constant=True)
    return {name: resolve(value, found.values, given, 1) for name, value in node.arguments.items()}  # type: ignore[arg-type]


def _is_statistic(node: Node, name: str) -> bool:
    """Whether a buffer holds one number per channel that belongs to the channel: a normalisation's statistics."""
    return any(node.arguments.get(key) == {"state": name} for key in ("running_mean", "running_var"))


def _nothing(meta: Tensor) -> Tensor:
    return torch.full([1] * meta.ndim, FIXED)


def _run_meta(node: Node, arguments: Mapping[str, Any]) -> Any:
    return operator(node.kind)(**{name: _map(value, lambda v: v.meta) for name, value in arguments.items()})


def _run_actual(node: Node, arguments: Mapping[str, Any]) -> Any:
    return operator(node.kind)(**{name: _map(value, lambda v: v.actual) for name, value in arguments.items()})


def _map(argument: Any, change: Any) -> Any:
    if isinstance(argument, Value):
        return change(argument)
    if isinstance(argument, (list, tuple)):
        return [_map(part, change) for part in argument]
    return argument


def _opaque(found: _Labelling, node: Node, state: Mapping[str, Tensor]) -> Any:
    """A node that nobody understands: what it reads stays in its place, what it writes belongs to no neuron."""
    given = {name: Value(state[name].to("meta"), _nothing(state[name]), True) for name in node.state}
    arguments = {name: resolve(value, found.values, given, 1) for name, value in node.arguments.items()}  # type: ignore[arg-type]
    for value in _flat(arguments):
        if isinstance(value, Value):
            found.ties.pin(value.labels, torch.arange(value.labels.numel()).reshape(value.labels.shape))
    schema = operator(node.kind)._schema
    if schema.is_mutable or not any(isinstance(value, Value) for value in _flat(arguments)):
        raise UnsupportedModule(
            f"{node.module!r}: operator {node.kind} is no function of tensors. Leave the network out."
        )
    out = _run_meta(node, arguments)
    parts = [Value(meta, _nothing(meta)) for meta in _listed(out)]
    return parts if isinstance(out, (list, tuple)) else parts[0]


def _label_layer(found: _Labelling, node: Node, arguments: Mapping[str, Any], out: Tensor, weight: Value) -> Tensor:
    """A layer's columns belong to the neurons that it reads; its rows are new neurons.

    The rows of a depthwise or grouped convolution belong to the neurons that their group reads.
    """
    layer, ties = LAYERS[node.kind], found.ties
    if {"alpha", "beta"} & node.arguments.keys():
        raise NotUnderstood("it scales what it adds")
    if isinstance(layer, Convolution) and layer.transposed and layer.groups(node.arguments) > 1:
        raise NotUnderstood("it is a transposed convolution in groups")
    x: Value = arguments[layer.input]
    groups = layer.groups(node.arguments)
    columns, count = layer.matrix(weight.meta).shape[1], out.shape[layer.channel_axis(out.ndim)]
    if node.kind == "embedding":
        read = torch.tensor([THE_INPUT])
    else:
        axis = layer.channel_axis(x.labels.ndim)
        labels = compress(ties.resolve(x.labels))
        if labels.numel() > 1 and labels.shape[axis] == 1:  # it mixes positions, alike for every neuron
            found.rows[node.name] = torch.full((count,), FIXED)
            found.columns[node.name] = torch.full((columns,), FIXED)
            return labels
        read = ties.uniform(labels, (axis,)).flatten().expand(x.meta.shape[axis])
    if groups == 1:
        rows = ties.fresh(count)
        per_channel = columns // len(read) if len(read) > 1 else columns
        found.columns[node.name] = read.repeat_interleave(per_channel) if len(read) > 1 else read.expand(columns)
    else:
        rows = _grouped(ties, read, groups).repeat_interleave(count // groups)
        found.columns[node.name] = torch.full((columns,), THE_KERNEL)
    found.rows[node.name] = rows
    bias = arguments.get(layer.bias) if layer.bias else None
    if bias is not None and bias.constant:
        ties.tie(rows, bias.labels.flatten())
    return rows.reshape([count if a == layer.channel_axis(out.ndim) else 1 for a in range(out.ndim)])


def _grouped(ties: Ties, read: Int64[Tensor, " channels"], groups: int) -> Int64[Tensor, " groups"]:
    """The neuron of each group of a convolution: the channels that it reads, if those are neurons."""
    channels = read.reshape(groups, -1)
    first = channels[:, :1]
    ties.tie(channels, first)
    neurons = ties.resolve(first[:, 0])
    own = ties.fresh(groups)
    no_neuron = (neurons == ties.resolve(torch.tensor([THE_INPUT]))) | (neurons < 0)
    ties.pin(torch.where(no_neuron, own, FIXED), torch.arange(groups))
    return torch.where(no_neuron, own, neurons)


def _collect(found: _Labelling, nodes: Sequence[Node], output: str) -> Analysis:
    """Classes of tied labels as neurons, alike neurons as groups."""
    ties = found.ties
    layers = [node for node in nodes if node.is_layer]
    tables = {
        (node.name, side): ties.resolve(labels[node.name]).numpy()
        for node in nodes
        for side, labels in (("rows", found.rows), ("columns", found.columns))
        if node.name in labels
    }
    entry = int(ties.resolve(torch.tensor([THE_INPUT])))
    ends = set(ties.resolve(found.values[output].labels).flatten().tolist())
    occurrences: dict[int, list[tuple[int, str, int]]] = {}
    for number, node in enumerate(nodes):
        for side in ("rows", "columns"):
            if (node.name, side) in tables:
                labels, counts = np.unique(tables[node.name, side], return_counts=True)
                for label, count in zip(labels.tolist(), counts.tolist(), strict=True):
                    occurrences.setdefault(label, []).append((number, side, count))
    written = {label for label, places in occurrences.items() if any(side == "rows" for _, side, _ in places)}
    alike: dict[tuple[Any, ...], list[int]] = {}
    for label in written - {entry, FIXED, int(ties.resolve(torch.tensor([THE_KERNEL])))}:
        alike.setdefault((label in ends, *occurrences[label]), []).append(label)
    names = {node.name for node in layers}
    groups, members = _name_groups(alike, nodes, tables, names)
    grouped = {n.name for n in layers if n.layer.groups(n.arguments) > 1}
    groups = [
        replace(g, readers=tuple(n.name for n in layers if n.name in {*g.readers, *grouped & {*g.writers}}))
        for g in groups
    ]
    members[KERNEL] = [int(ties.resolve(torch.tensor([THE_KERNEL])))]
    if entry in occurrences and entry not in written:
        readers = tuple(nodes[n].name for n, side, _ in occurrences[entry] if side == "columns" and nodes[n].is_layer)
        groups.insert(0, NeuronGroup(INPUT, (), readers, hidden=False))
        members[INPUT] = [entry]
    place = {label: (name, i) for name, labels in members.items() for i, label in enumerate(labels)}
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
    return Analysis(graph, rows, columns, constants, _classes(found, members, constants))


def _name_groups(
    alike: Mapping[tuple[Any, ...], list[int]],
    nodes: Sequence[Node],
    tables: Mapping[tuple[str, str], np.ndarray],
    names: set[str],
) -> tuple[list[NeuronGroup], dict[str, list[int]]]:
    """Groups in topological order, named after the first layer that writes them."""
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
        name = nodes[first].name
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
    found: _Labelling, members: Mapping[str, Sequence[int]], constants: Mapping[str, Axis]
) -> dict[str, Int64[np.ndarray, " neurons"]]:
    """Neurons of a group that also agree in the constants that belong to them and in what pins them."""
    marks: dict[int, list[tuple[int, int]]] = {}
    for labels, colours in found.ties.colours:
        for label, colour in zip(found.ties.resolve(labels).tolist(), colours.tolist(), strict=True):
            marks.setdefault(label, []).append((colour, 0))
    for number, name in enumerate(constants):
        occurring, counts = np.unique(found.ties.resolve(found.constants[name].labels).numpy(), return_counts=True)
        for label, count in zip(occurring.tolist(), counts.tolist(), strict=True):
            marks.setdefault(label, []).append((-1 - number, count))
    classes = {}
    for name, neurons in members.items():
        kinds: dict[tuple[Any, ...], int] = {}
        keys = [tuple(sorted(marks.get(label, []))) for label in neurons]
        classes[name] = np.array([kinds.setdefault(key, len(kinds)) for key in keys], dtype=np.int64)
    return classes
