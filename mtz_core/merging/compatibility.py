"""Whether networks can be zipped, and how many neurons of each hidden group they can share."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from mtz_core.errors import IncompatibleNetworks, InvalidConfig
from mtz_core.network.graph import LayerGraph, Network, NeuronGroup, Node
from mtz_core.network.topology import first_difference
from mtz_core.settings import ZipConfig
from mtz_core.zipped.structure import same_kernels

KEPT_SEPARATE = "it is listed under keep_separate"
"""Why a layer stays task-specific that is meant to."""


def check_compatible(networks: Mapping[str, Network]) -> LayerGraph:
    """Check that all networks have one topology and one dtype.

    Args:
        networks: The traced networks by task.

    Returns:
        The graph of the first network.

    Raises:
        IncompatibleNetworks: If there are fewer than two networks, if topologies differ (the message shows the first
            difference side by side), or if float32 and float64 weights are mixed.
    """
    if len(networks) < 2:
        raise IncompatibleNetworks(
            f"zipping unites two or more networks, not {len(networks)} ({', '.join(networks) or 'none'})."
        )
    (first, reference), *others = networks.items()
    for task, network in others:
        difference = first_difference(reference.graph, network.graph)
        if difference is not None:
            raise IncompatibleNetworks(
                f"the networks differ in structure: {first} has {difference[0]} where {task} has {difference[1]}. "
                "Zip networks of the same topology."
            )
    dtypes = {n.state[node.weight].dtype for n in networks.values() for node in n.graph.layers}
    if dtypes not in ({torch.float32}, {torch.float64}):
        raise IncompatibleNetworks("the networks mix float32 and float64 weights. Convert them to one dtype.")
    return reference.graph


def shared_counts(networks: Mapping[str, Network], config: ZipConfig) -> dict[str, int]:
    """Count the neurons that all networks are to share in every hidden group.

    Args:
        networks: The traced networks by task.
        config: How to zip.

    Returns:
        The counts by group. A group whose writers correspond nowhere gets 0.

    Raises:
        InvalidConfig: If `share` or `balance` do not fit the networks.
    """
    config.balance_of(tuple(networks))
    graph = next(iter(networks.values())).graph
    widths = {g.name: [network.graph.widths[g.name] for network in networks.values()] for g in graph.hidden_groups}
    counts = config.counts(widths)
    for group in graph.hidden_groups:
        if not any(why_separate(networks, layer) is None for layer in writers_of(graph, group)):
            if isinstance(config.share, Mapping) and counts[group.name]:
                raise InvalidConfig(
                    f"share.{group.name}: impossible, as no layer that writes these neurons can be shared: "
                    f"{why_separate(networks, writers_of(graph, group)[0])}."
                )
            counts[group.name] = 0
    return counts


def writers_of(graph: LayerGraph, group: NeuronGroup) -> list[Node]:
    """The layers that write a group."""
    return [node for node in graph.layers if node.name in group.writers]


def why_separate(networks: Mapping[str, Network], layer: Node) -> str | None:
    """Tell why the rows of a layer stay task-specific, whatever is shared around it.

    Args:
        networks: The traced networks by task.
        layer: The layer.

    Returns:
        The reason in words; None if the rows can be shared.
    """
    if any(node.separate for n in networks.values() for node in n.graph.layers if node.name == layer.name):
        return KEPT_SEPARATE
    if not same_kernels(layer.name, networks.values()):
        return "its kernels or convolution groups differ in size"
    rows, columns = ([getattr(n.graph, side)[layer.name] for n in networks.values()] for side in ("rows", "columns"))
    for axis, what in ((rows, "written"), (columns, "read")):
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
