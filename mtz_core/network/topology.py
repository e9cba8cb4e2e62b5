"""Whether two networks have one topology and, if not, the first difference in words.

What is kept separate may be anything: it is looked through to what it reads. What holds the outputs of a network, if it
returns several, makes no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mtz_core.network.graph import INPUT, OUTPUTS, LayerGraph, Node
from mtz_core.network.layers import LAYERS


@dataclass(frozen=True)
class Difference:
    """The first difference between the topologies of two networks.

    Attributes:
        words: What the first and what the second network has there.
        nodes: The nodes of each that are at fault; none where a network has nothing more.
    """

    words: tuple[str, str]
    nodes: tuple[tuple[Node, ...], tuple[Node, ...]]

    @property
    def where(self) -> str:
        """The modules of these nodes, in words."""
        modules = dict.fromkeys(node.module for nodes in self.nodes for node in nodes)
        return " and ".join(repr(module) if module else "the outermost module" for module in modules)


def first_difference(first: LayerGraph, second: LayerGraph) -> tuple[str, str] | None:
    """Find the first node or neuron group at which the topologies of two networks differ, in words.

    Args:
        first: One graph.
        second: The other graph.

    Returns:
        What the first and what the second network has there; None if the topologies are the same.
    """
    found = find_difference(first, second)
    return None if found is None else found.words


def find_difference(first: LayerGraph, second: LayerGraph) -> Difference | None:
    """Find the first node or neuron group at which the topologies of two networks differ.

    Compared are the kinds of all nodes, what each of them reads, the names of layers, how kernels move, and the groups.
    Widths, shapes and numbers of classes may differ. Where that is not the same, nodes that are kept separate are left
    out.

    Args:
        first: One graph.
        second: The other graph.

    Returns:
        The difference; None if the topologies are the same.
    """
    found = _compare(first, second, whole=True)
    separate = any(node.separate for graph in (first, second) for node in graph.nodes)
    return _compare(first, second, whole=False) if found is not None and separate else found


def _compare(first: LayerGraph, second: LayerGraph, whole: bool) -> Difference | None:
    """Find the first difference between the whole networks, or between what is not kept separate of them."""
    sides = (first, second)
    steps = tuple(list(_steps(graph, whole)) for graph in sides)
    groups = tuple(list(_groups(graph, whole)) for graph in sides)
    if found := _unlike(steps, ("nothing more", "nothing more")):
        return found
    many, few = (f"{len(own)} neuron groups" for own in groups)
    return _unlike(groups, (many, few), both=True)


_Described = Sequence[tuple[str, tuple[Node, ...]]]


def _unlike(sides: tuple[_Described, ...], ended: tuple[str, str], both: bool = False) -> Difference | None:
    """Compare two lists of what there is in words, each with its nodes.

    Args:
        sides: The lists.
        ended: What is said of a list that has ended.
        both: Whether that is said of both lists.

    Returns:
        The first difference.
    """
    first, second = sides
    for (a, mine), (b, theirs) in zip(first, second, strict=False):
        if a != b:
            return Difference((a, b), (mine, theirs))
    common = min(len(first), len(second))
    if len(first) == len(second):
        return None
    (a, mine), (b, theirs) = (
        side[common] if len(side) > common else (said, ()) for side, said in zip(sides, ended, strict=True)
    )
    return Difference(ended if both else (a, b), (mine, theirs))


def _steps(graph: LayerGraph, whole: bool) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """What every node does and reads, of the whole network or of what is not kept separate, which is looked through."""
    inputs = {source for node in graph.nodes for source in node.sources if source.startswith(INPUT)}
    origins: dict[str, tuple[str, ...]] = {name: (name.lstrip(":").replace(":", " "),) for name in inputs}
    count = 0
    for node in graph.nodes:
        if node.kind == OUTPUTS:
            continue
        if node.separate and not whole:
            origins[node.name] = tuple(sorted({origin for source in node.sources for origin in origins[source]}))
            continue
        read = " and ".join(" with ".join(origins[source]) or "what is kept separate" for source in node.sources)
        yield describe(node) + (f" reading {read}" if read else ""), (node,)
        origins[node.name] = (f"step {count}",)
        count += 1


def _groups(graph: LayerGraph, whole: bool) -> Iterator[tuple[str, tuple[Node, ...]]]:
    """The neuron groups.

    Args:
        graph: The graph.
        whole: Whether all groups are meant, and who reads them, or those that layers write which are not kept separate,
            in the order of the first of these. (It may depend on what is kept separate who reads them.)

    Yields:
        Each group in words, and the layers that the words name.
    """
    common = {node.name: number for number, node in enumerate(graph.layers) if whole or not node.separate}
    found = []
    for group in graph.groups:
        writers = [name for name in group.writers if name in common]
        words = f"neuron group {group.name!r} written by {', '.join(writers) or 'nothing'}"
        if whole:
            words += f" and read by {', '.join(group.readers) or 'nothing'}"
        if whole or writers:
            first = 0 if whole else common[writers[0]]
            named = (*writers, *(group.readers if whole else ()))
            found.append((first, words, tuple(graph.layers_by_name[name] for name in named)))
    for _, words, nodes in sorted(found, key=lambda entry: entry[0]):
        yield words, nodes


SPLITS = frozenset(
    {
        *("chunk", "split.Tensor", "split_with_sizes", "unsafe_chunk", "unsafe_split.Tensor"),
        *("unsafe_split_with_sizes", "tensor_split.sections", "tensor_split.indices"),
        *(f"{axis}split.{pieces}" for axis in "hvd" for pieces in ("int", "array")),
    }
)
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
