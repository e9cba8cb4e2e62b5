"""Whether networks can be zipped, and how many neurons of each hidden group they can share.

What networks have in common is what none of them keeps separate: there they run the same operators in the same order,
in layers of the same names. What is kept separate may be anything. Where networks differ although nothing is kept
separate, what they have in common ends at the first difference.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from difflib import SequenceMatcher

import torch

from mtz_core.errors import IncompatibleNetworks, InvalidConfig
from mtz_core.network.graph import OUTPUTS, LayerGraph, Network, Node
from mtz_core.network.groups import analysis_of
from mtz_core.network.topology import Difference, describe, find_difference
from mtz_core.network.tracing import lies_in
from mtz_core.settings import ZipConfig
from mtz_core.zipped.structure import hidden_groups, same_groups, same_kernels

KEPT_SEPARATE = "it is listed under keep_separate"
"""Why a layer stays task-specific that is meant to."""


def check_compatible(networks: Mapping[str, Network]) -> LayerGraph:
    """Check that all networks are alike in what they do not keep separate, and have one dtype.

    Args:
        networks: The traced networks by task.

    Returns:
        The graph of the first network.

    Raises:
        IncompatibleNetworks: If there are fewer than two networks, if they differ (the message shows the first
            difference side by side, and what to keep separate), or if float32 and float64 weights are mixed.
    """
    if len(networks) < 2:
        raise IncompatibleNetworks(
            f"zipping unites two or more networks, not {len(networks)} ({', '.join(networks) or 'none'})."
        )
    if found := _first_difference(networks):
        raise IncompatibleNetworks(f"the networks differ in structure: {_in_words(found)}. {_remedy(networks)}")
    dtypes = {n.state[node.weight].dtype for n in networks.values() for node in n.graph.layers}
    if dtypes not in ({torch.float32}, {torch.float64}):
        raise IncompatibleNetworks("the networks mix float32 and float64 weights. Convert them to one dtype.")
    return next(iter(networks.values())).graph


def common_part(networks: Mapping[str, Network]) -> dict[str, Network]:
    """Find what networks have in common where nothing is kept separate: everything before their first difference.

    Args:
        networks: The traced networks by task.

    Returns:
        The networks; where they differ, with everything behind the first difference kept separate. They are unchanged
        if they do not differ.

    Raises:
        IncompatibleNetworks: If they differ although parts are kept separate, if nothing before the first difference
            can be shared, or for what `check_compatible` refuses.
    """
    found = _first_difference(networks) if len(networks) > 1 else None
    if found is not None and any(_listed(network) for network in networks.values()):
        networks = _all_separate(networks)
    elif found is not None:
        trunk = _trunk(networks)
        if _can_share(trunk):
            why = f"the networks differ from there on ({_in_words(found)}). {_remedy(networks)}".rstrip(".")
            networks = {task: replace(network, unlike=why) for task, network in trunk.items()}
    check_compatible(networks)
    return dict(networks)


def shared_counts(networks: Mapping[str, Network], config: ZipConfig) -> dict[str, int]:
    """Count the neurons that all networks are to share in every hidden group that any of them has.

    Args:
        networks: The traced networks by task.
        config: How to zip.

    Returns:
        The counts by group. A group whose writers correspond nowhere gets 0.

    Raises:
        InvalidConfig: If `share` or `balance` do not fit the networks.
    """
    config.balance_of(tuple(networks))
    graphs = [network.graph for network in networks.values()]
    widths = {name: [graph.hidden_widths.get(name, 0) for graph in graphs] for name in hidden_groups(graphs)}
    counts = config.counts(widths)
    for name in widths:
        writers = writers_of(networks, name)
        if not any(why_separate(networks, layer) is None for layer in writers):
            if isinstance(config.share, Mapping) and counts[name]:
                raise InvalidConfig(
                    f"share.{name}: impossible, as no layer that writes these neurons can be shared: "
                    f"{why_separate(networks, writers[0])}."
                )
            counts[name] = 0
    return counts


def writers_of(networks: Mapping[str, Network], group: str) -> list[Node]:
    """The layers that write a group in any network."""
    found: dict[str, Node] = {}
    for network in networks.values():
        names = {name for own in network.graph.groups if own.name == group for name in own.writers}
        found.update({node.name: node for node in network.graph.layers if node.name in names - found.keys()})
    return list(found.values())


def separate_layers(networks: Mapping[str, Network]) -> dict[str, str]:
    """Tell which layers stay task-specific although nobody has listed them, and why, by the layer's name."""
    layers = {node.name: node for network in networks.values() for node in network.graph.layers}
    reasons = {name: why_separate(networks, node) for name, node in layers.items()}
    return {name: reason for name, reason in reasons.items() if reason and reason != KEPT_SEPARATE}


def why_separate(networks: Mapping[str, Network], layer: Node) -> str | None:
    """Tell why the rows of a layer stay task-specific, whatever is shared around it.

    Args:
        networks: The traced networks by task.
        layer: The layer.

    Returns:
        The reason in words; None if the rows can be shared.
    """
    graphs = {task: n.graph for task, n in networks.items() if layer.name in n.graph.layers_by_name}
    if any(graph.layers_by_name[layer.name].separate for graph in graphs.values()):
        return next((network.unlike for network in networks.values() if network.unlike), KEPT_SEPARATE)
    if len(graphs) < len(networks):
        return f"only {', '.join(graphs)} has it"
    for analysis in map(analysis_of, networks.values()):
        if reason := analysis.labels.reasons.get(layer.name) or analysis.bound.get(layer.name):
            return reason
    if not same_kernels(layer.name, networks.values()):
        return "its kernels or convolution groups differ in size"
    rows, columns = ([getattr(n.graph, side)[layer.name] for n in networks.values()] for side in ("rows", "columns"))
    ends = [task for task, graph in graphs.items() if not graph.hidden_widths.keys() & {*graph.rows[layer.name].groups}]
    if ends and len(ends) < len(graphs):
        return f"its neurons are outputs of {', '.join(ends)}"
    for axis, what in ((rows, "written"), (columns, "read")):
        if not same_groups(axis):
            return f"other neurons are {what} in different networks"
        for name in axis[0].groups:
            group = [a.groups.index(name) for a in axis]
            slots = {
                int((a.group == number).sum()) // network.graph.widths[name]
                for a, number, network in zip(axis, group, networks.values(), strict=True)
            }
            if len(slots) > 1 and (what == "written" or len(axis[0].groups) == 1):
                counts = " and ".join(map(str, sorted(slots)))
                return f"it has {counts} values per neuron {what} in different networks"
    return None


def _first_difference(networks: Mapping[str, Network]) -> tuple[str, str, Difference] | None:
    """Two tasks and the first difference of their networks."""
    (first, reference), *others = networks.items()
    for task, network in others:
        found = find_difference(reference.graph, network.graph)
        if found is not None:
            return first, task, found
    return None


def _in_words(found: tuple[str, str, Difference]) -> str:
    first, second, difference = found
    return f"{first} has {difference.words[0]} where {second} has {difference.words[1]}, in {difference.where}"


def _listed(network: Network) -> set[str]:
    """The modules of which a network keeps everything separate."""
    nodes = network.graph.nodes
    return _modules(node for node in nodes if node.separate) - _modules(node for node in nodes if not node.separate)


def _all_separate(networks: Mapping[str, Network]) -> dict[str, Network]:
    """The networks, each keeping separate what any of them does."""
    paths = set.union(*(_listed(network) for network in networks.values()))
    return {
        task: kept_separate(n, [node.name for node in n.graph.nodes if lies_in(node.module, paths)])
        for task, n in networks.items()
    }


def _trunk(networks: Mapping[str, Network]) -> dict[str, Network]:
    """The networks with everything behind their first difference kept separate."""
    places = {task: {node.name: i for i, node in enumerate(n.graph.nodes)} for task, n in networks.items()}
    ends = {task: len(own) for task, own in places.items()}
    found = _first_difference(networks)
    trunk = dict(networks)
    while found is not None:
        *tasks, difference = found
        before = dict(ends)
        for task, nodes in zip(tasks, difference.nodes, strict=True):
            ends[task] = min([ends[task], *(places[task][node.name] for node in nodes)])
        trunk = {
            task: kept_separate(n, [node.name for node in n.graph.nodes[ends[task] :]]) for task, n in networks.items()
        }
        found = _first_difference(trunk) if ends != before else None
    return trunk


def kept_separate(network: Network, nodes: Collection[str]) -> Network:
    """The network with these nodes kept separate, too; the very same if they are already."""
    if all(network.graph.node(name).separate for name in nodes):
        return network
    marked = tuple(replace(node, separate=node.separate or node.name in nodes) for node in network.graph.nodes)
    changed = replace(network, graph=replace(network.graph, nodes=marked))
    return replace(changed, graph=analysis_of(changed).graph)


def _can_share(networks: Mapping[str, Network]) -> bool:
    return any(shared_counts(networks, ZipConfig()).values())


def _remedy(networks: Mapping[str, Network]) -> str:
    """What to keep separate so that the networks can be zipped, in words."""
    paths = _unlike_parts(networks)
    if not paths:
        return "They have nothing in common that could be shared: zip networks of the same topology."
    own = {
        task: [path for path in paths if any(lies_in(node.module, [path]) for node in network.graph.nodes)]
        for task, network in networks.items()
    }
    which = "".join(f"; {task} has {found}" for task, found in own.items() if found != paths)
    named = any(node.separate for network in networks.values() for node in network.graph.nodes)
    return f"To zip what they have in common, {'add to' if named else 'set'} keep_separate: {paths}{which}."


def _unlike_parts(networks: Mapping[str, Network]) -> list[str]:
    """The modules in which networks differ, found by aligning their nodes; none if nothing else can be shared."""
    (reference, *others) = networks.values()
    paths: set[str] = set()
    for other in others:
        sides = [
            [node for node in n.graph.nodes if not node.separate and node.kind != OUTPUTS] for n in (reference, other)
        ]
        first, second = ([(node.module, describe(node)) for node in side] for side in sides)
        for tag, *spans in SequenceMatcher(None, first, second, autojunk=False).get_opcodes():
            if tag != "equal":
                paths |= _modules(sides[0][spans[0] : spans[1]]) | _modules(sides[1][spans[2] : spans[3]])
    while True:
        marked = {
            task: kept_separate(n, [node.name for node in n.graph.nodes if lies_in(node.module, paths)])
            for task, n in networks.items()
        }
        found = _first_difference(marked)
        if found is None:
            break
        more = _modules(node for nodes in found[-1].nodes for node in nodes)
        if more <= paths:
            return []
        paths |= more
    if not _can_share(marked):
        return []
    return sorted(path for path in paths if not lies_in(path, paths - {path}))


def _modules(nodes: Iterable[Node]) -> set[str]:
    return {node.module for node in nodes}
