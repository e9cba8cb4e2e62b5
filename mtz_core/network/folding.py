"""Replace what does not depend on a network's input by its values: constants, and weights that are computed."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from mtz_core.network.graph import GETITEM, OUTPUTS, Node, leaves, operator, run_node
from mtz_core.network.layers import LAYERS
from mtz_core.network.operations import operation_of


def fold_constants(
    nodes: Sequence[Node], output: str, state: Mapping[str, Tensor], parameters: frozenset[str]
) -> tuple[list[Node], dict[str, Tensor]]:
    """Replace nodes that depend on neither input, parameters nor batch size by their values.

    Args:
        nodes: The nodes, in an order in which they can run.
        output: The value that is the network's output.
        state: The stored tensors by name.
        parameters: The names of those that are parameters.

    Returns:
        The nodes that are left, and the stored tensors with the values that these read.
    """
    values: dict[str, Any] = {}
    kept: list[Node] = []
    for node in nodes:
        known = all(source in values for source in node.sources) and not parameters & set(node.state)
        if known and not _has_batch(node) and node.name != output:
            values[node.name] = run_node(node, values, state, batch=0)
        else:
            kept.append(node)
    folded = dict.fromkeys(source for node in kept for source in node.sources if source in values)
    names = {source: f"constant:{source}" for source in folded}
    constants = {name: values[source].clone() for source, name in names.items()}
    return [_with_states(node, names) for node in kept], {**state, **constants}


def _has_batch(node: Node) -> bool:
    return any(
        isinstance(leaf, Mapping) and "batch" in leaf
        for argument in node.arguments.values()
        for leaf in leaves(argument)
    )


def _with_states(node: Node, names: Mapping[str, str]) -> Node:
    """A node that reads stored tensors in place of values."""
    return replace(node, arguments={key: _replaced(part, names, "state") for key, part in node.arguments.items()})


def _replaced(argument: Any, names: Mapping[str, str], kind: str) -> Any:
    if isinstance(argument, list):
        return [_replaced(part, names, kind) for part in argument]
    if isinstance(argument, Mapping) and argument.get("value") in names:
        return {kind: names[argument["value"]]}
    return argument


@dataclass(frozen=True)
class Program:
    """A network as it is read, before its layers are known.

    Attributes:
        nodes: The nodes, in an order in which they can run.
        output: The value that is the network's output.
        state: The stored tensors by name.
        parameters: The names of those that are parameters.
    """

    nodes: Sequence[Node]
    output: str
    state: Mapping[str, Tensor]
    parameters: frozenset[str]


@dataclass(frozen=True)
class _Computed:
    """A value that is computed from parameters, and constants, alone.

    Attributes:
        value: The name of the value; of equal computations, that of the first.
        nodes: The names of the nodes that compute it.
        parameters: The names of the parameters that it is computed from.
    """

    value: str
    nodes: frozenset[str]
    parameters: frozenset[str]


def fold_weights(program: Program) -> Program:
    """Store weights that are computed from parameters alone, such as normalised or pruned ones, as what they are.

    So are biases, such as those of queries, keys and values that are kept in three parts. What they are computed from
    is no longer needed. Where something else reads it, or where there would be more values to store than before,
    everything stays as it is. So do layers that are kept separate.

    Args:
        program: The network.

    Returns:
        The network with the computed weights, named `weight` and `bias` below the path of what they are computed from.
    """
    computed = _computed(program)
    reading = {node.name: own for node in program.nodes if (own := _computed_weights(node, computed))}
    for layers in _families(computed, reading):
        if _can_fold(program, computed, {layer: reading[layer] for layer in layers}):
            program = _fold(program, computed, {layer: reading[layer] for layer in layers})
    left = {node.name for node in program.nodes}
    return _renumbered(program, [name for name in computed if name not in left])


def _computed(program: Program) -> dict[str, _Computed]:
    """Find the values that are computed from parameters alone."""
    found: dict[str, _Computed] = {}
    first: dict[str, str] = {}
    for node in program.nodes:
        own = program.parameters & {*node.state}
        if (not own and not node.sources) or any(source not in found for source in node.sources):
            continue
        if _has_batch(node) or not _is_function(node):
            continue
        parts = [found[source] for source in node.sources]
        names = {source: found[source].value for source in node.sources}
        text = repr((node.kind, sorted((key, _replaced(part, names, "value")) for key, part in node.arguments.items())))
        found[node.name] = _Computed(
            first.setdefault(text, node.name),
            frozenset({node.name}).union(*(part.nodes for part in parts)),
            own.union(*(part.parameters for part in parts)),
        )
    return found


def _is_function(node: Node) -> bool:
    if node.kind in (GETITEM, OUTPUTS):
        return True
    found = operator(node.kind)
    return torch.Tag.nondeterministic_seeded not in found.tags and not found._schema.is_mutable


_Reading = Mapping[str, Mapping[str, str]]
"""For layers, the computed values that are their weight and bias."""


def _computed_weights(node: Node, computed: Mapping[str, _Computed]) -> dict[str, str]:
    """The values that are a layer's weight and bias, as far as these are computed; none for other nodes."""
    if node.kind not in LAYERS or operation_of(node.kind) is not None or node.separate:
        return {}
    layer = LAYERS[node.kind]
    given = {"weight": node.arguments.get(layer.weight), "bias": node.arguments.get(layer.bias or "")}
    own = {name: part["value"] for name, part in given.items() if isinstance(part, Mapping) and "value" in part}
    own = {name: source for name, source in own.items() if source in computed}
    return own if own and node.source not in computed else {}


def _families(computed: Mapping[str, _Computed], reading: _Reading) -> list[set[str]]:
    """Group the layers whose weights are computed from common parameters."""
    families: list[tuple[set[str], set[str]]] = []
    for layer, own in reading.items():
        layers, parameters = {layer}, {name for source in own.values() for name in computed[source].parameters}
        related = [family for family in families if family[1] & parameters]
        families = [family for family in families if not family[1] & parameters]
        families.append((layers.union(*(f[0] for f in related)), parameters.union(*(f[1] for f in related))))
    return [layers for layers, _ in families]


def _can_fold(program: Program, computed: Mapping[str, _Computed], reading: _Reading) -> bool:
    """Whether only these layers need the parameters of their weights, and the weights are no more values than those."""
    sources = {source for own in reading.values() for source in own.values()}
    inside = {name for source in sources for name in computed[source].nodes}
    parameters = {name for source in sources for name in computed[source].parameters}
    for node in program.nodes:
        if node.name in inside:
            continue
        weights = [*reading.get(node.name, {}).values()]
        if parameters & {*node.state} or any(s in inside for s in node.sources if weights.count(s) != 1):
            return False
    values = _values(program, inside)
    elsewhere = {name for node in program.nodes if node.name not in inside for name in node.state}
    read = {name for node in program.nodes if node.name in inside for name in node.state}
    origins = [program.state[name] for name in read - elsewhere]
    size = sum(values[value].numel() for value in {computed[source].value for source in sources})
    dtypes = {values[source].dtype for source in sources} | {tensor.dtype for tensor in origins}
    return len(dtypes) == 1 and program.output not in inside and size <= sum(tensor.numel() for tensor in origins)


def _values(program: Program, inside: set[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for node in program.nodes:
        if node.name in inside:
            values[node.name] = run_node(node, values, program.state, batch=0)
    return values


def _fold(program: Program, computed: Mapping[str, _Computed], reading: _Reading) -> Program:
    """Store the computed weights of these layers. Weights that are computed alike are stored once."""
    sources = {source for own in reading.values() for source in own.values()}
    inside = {name for source in sources for name in computed[source].nodes}
    parameters = frozenset(name for source in sources for name in computed[source].parameters)
    values = _values(program, inside)
    stored: dict[str, str] = {}
    renamed: dict[str, str] = {}
    kept = [node for node in program.nodes if node.name not in inside]
    read = {name for node in kept for name in node.state}
    taken = {node.name for node in kept}
    nodes: list[Node] = []
    for node in kept:
        own = reading.get(node.name, {})
        if own:
            path = node.name
            if "weight" in own:
                origins = {name for source in own.values() for name in computed[source].parameters}
                path = _free_path(origins, {*program.state, *stored.values()}, read | {*stored.values()}, taken)
            renamed[node.name] = path
            taken.add(path)
            for leaf, source in own.items():
                stored.setdefault(computed[source].value, f"{path}.{leaf}")
            node = replace(_with_states(node, {s: stored[computed[s].value] for s in own.values()}), name=path)
        arguments = {key: _replaced(part, renamed, "value") for key, part in node.arguments.items()}
        nodes.append(replace(node, arguments=arguments))
    state = {name: tensor for name, tensor in program.state.items() if name not in parameters}
    state |= {name: values[value].detach().clone() for value, name in stored.items()}
    output = renamed.get(program.output, program.output)
    return Program(nodes, output, state, program.parameters - parameters | {*stored.values()})


def _renumbered(program: Program, gone: Sequence[str]) -> Program:
    """Number the nodes as if those that are gone had never been, so that they are called as in a plain network."""
    numbers = sorted(int(name.partition(":")[2]) for name in gone)
    names = {}
    for node in program.nodes:
        kind, _, number = node.name.partition(":")
        if kind == node.kind and number:
            names[node.name] = f"{kind}:{int(number) - bisect(numbers, int(number))}"
    nodes = [
        replace(
            node,
            name=names.get(node.name, node.name),
            arguments={key: _replaced(part, names, "value") for key, part in node.arguments.items()},
        )
        for node in program.nodes
    ]
    return replace(program, nodes=nodes, output=names.get(program.output, program.output))


def _free_path(origins: set[str], tensors: set[str], read: set[str], names: set[str]) -> str:
    """Find a path for a layer with computed weights: that of the module whose parameters they are computed from.

    Args:
        origins: The names of these parameters.
        tensors: The names of all stored tensors.
        read: The names of those that will still be read.
        names: The names of all nodes.

    Returns:
        The path. If another tensor or module lies there, it is `folded` below it, with a number if need be.
    """
    homes = [f".{name}".partition(".parametrizations.")[0].removesuffix("_orig") for name in origins]
    modules = [home.removesuffix("weight").rstrip("._").split(".")[1:] for home in homes]
    common = takewhile(lambda parts: len({*parts}) == 1, zip(*modules, strict=False))
    base = ".".join(parts[0] for parts in common)
    for path in (base, *(f"{base}.folded{number}".lstrip(".") for number in ("", *range(2, len(names) + 3)))):
        below = any(name.startswith(f"{path}.") and "." in name.removeprefix(f"{path}.") for name in read)
        if path and path not in names and not below and f"{path}.weight" not in tensors:
            break
    return path
