"""Whether two networks have one topology and, if not, the first difference in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mtz_core.network.graph import INPUT, LayerGraph, NeuronGroup, Node
from mtz_core.network.layers import LAYERS


def first_difference(first: LayerGraph, second: LayerGraph) -> tuple[str, str] | None:
    """Find the first node or neuron group at which the topologies of two networks differ.

    Compared are the kinds of all nodes, what each of them reads, the names of layers, how kernels move, and the groups.
    Widths, shapes and numbers of classes may differ.

    Args:
        first: One graph.
        second: The other graph.

    Returns:
        What the first and what the second network has there, in words; None if the topologies are the same.
    """
    for a, b in zip(_steps(first), _steps(second), strict=False):
        if a != b:
            return a, b
    if len(first.nodes) != len(second.nodes):
        longer = first if len(first.nodes) > len(second.nodes) else second
        extra, ended = _steps(longer)[min(len(first.nodes), len(second.nodes))], "nothing more"
        return (extra, ended) if longer is first else (ended, extra)
    for a, b in zip(_described(first.groups), _described(second.groups), strict=False):
        if a != b:
            return a, b
    if len(first.groups) != len(second.groups):
        return f"{len(first.groups)} neuron groups", f"{len(second.groups)} neuron groups"
    return None


def _steps(graph: LayerGraph) -> list[str]:
    number = {INPUT: "input"} | {node.name: f"step {i}" for i, node in enumerate(graph.nodes)}
    return [describe(node) + _reading(node, number) for node in graph.nodes]


def _reading(node: Node, number: Mapping[str, str]) -> str:
    return f" reading {' and '.join(number[source] for source in node.sources)}" if node.sources else ""


def _described(groups: Sequence[NeuronGroup]) -> list[str]:
    return [
        f"neuron group {group.name!r} written by {', '.join(group.writers) or 'nothing'} "
        f"and read by {', '.join(group.readers) or 'nothing'}"
        for group in groups
    ]


SPLITS = frozenset({"chunk", "split.Tensor", "split_with_sizes"})
"""Ways of writing one and the same cut into pieces."""

_SETTINGS = frozenset({"kernel_size", "stride", "padding", "dilation"})


def describe(node: Node) -> str:
    """A node in words: its kind, a layer's name, and how its window moves."""
    name = f" {node.name!r}" if node.kind in LAYERS else ""
    bias = " without bias" if node.is_layer and node.bias is None else ""
    given = {key: value for key, value in sorted(node.arguments.items()) if key in _SETTINGS}
    if given.get("stride") == given.get("kernel_size"):
        given.pop("stride", None)  # a pooling's default, which some ways of writing it spell out
    settings = ", ".join(f"{key}={value}" for key, value in given.items())
    kind = "split" if node.kind in SPLITS else node.kind
    return f"{kind}{name}{bias}" + (f" ({settings})" if settings else "")
