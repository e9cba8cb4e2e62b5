"""ZipIt!: features that correlate become one, within a network as well as across networks.

Stoica, Bolya, Bjorner, Ramesh, Hearn, Hoffman, *ZipIt! Merging Models from Different Tasks without Training* (ICLR
2024). The features of all networks are put side by side and merged, pair by pair, by greatest correlation. What comes
out is a merge matrix ``M`` (every merged feature is the mean of its members) and an unmerge matrix ``U`` (every member
is read as the merged feature) for each network, and layers become ``W' = Σ_t M_t W_t U_t``, with the ``U_t`` of what
they read. Heads read through their own task's ``U_t``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mtz_core.errors import InvalidConfig
from mtz_core.network.graph import Axis, Network, Node
from mtz_core.network.groups import analyse
from mtz_core.network.narrowing import Dropper
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.ownership import positions_of
from tests.benchmarks.rivals.assemble import assemble, check_equal_widths, common_parts, matrices_of, traced
from tests.benchmarks.rivals.features import Place, common_images, correlations

BEYOND = 4.0
"""How much worse a pair is that is beyond the budget: worse than any other, as correlations lie between −1 and 1."""


@dataclass(frozen=True)
class ZipItConfig:
    """How to merge features.

    `alpha`: a merged feature correlates with others as the lesser of its two parts does, times this (section 4.3; 0:
    features are merged twice only where nothing else is left). `beta`: the share of a network's merges that may be
    within it; with 0 no merged feature of two networks has two members of one, with 1 nothing is barred. Both defaults
    are the published ones. `width`: merged features of each group, relative to one network's. `layers`: how many neuron
    groups are merged, from the input on, all if None (partial zipping: the rest stays each task's own). `place`: where
    features are taken.
    """

    alpha: float = 0.3
    beta: float = 0.125
    width: float = 1.0
    layers: int | None = None
    place: Place = "read"

    def __post_init__(self) -> None:
        for name in ("alpha", "beta", "width"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidConfig(f"{name}: {getattr(self, name)} is impossible. Allowed: 0 to 1.")


@dataclass(frozen=True, eq=False)
class Zip:
    """Which merged feature every feature of every network has become; merged features count from 0."""

    tasks: tuple[str, ...]
    clusters: Mapping[str, Int64[np.ndarray, " features"]]

    @property
    def sizes(self) -> Int64[np.ndarray, " merged"]:
        """The number of members of every merged feature."""
        return np.bincount(np.concatenate([self.clusters[task] for task in self.tasks]))

    def merge(self, task: str) -> Float[Tensor, "merged features"]:
        """``M_t``."""
        return self.unmerge(task).T / torch.from_numpy(self.sizes)[:, None]

    def unmerge(self, task: str) -> Float[Tensor, "features merged"]:
        """``U_t``."""
        return torch.eye(len(self.sizes), dtype=torch.float64)[torch.from_numpy(self.clusters[task])]


def zipit(
    networks: Mapping[str, nn.Module], calibration: Mapping[str, Tensor], config: ZipItConfig | None = None
) -> ZippedNetwork:
    """Networks of equal widths zipped by ZipIt!; every task runs the whole merged network.

    All networks are run on the images of all tasks. Normalisations stay each task's: a merged feature has the mean
    parameters and statistics of the task's members (of all members, if it has none); as published, these should be
    computed anew afterwards (`rivals.statistics.reestimate`). Raises `IncompatibleNetworks`, `InvalidConfig`.
    """
    config = config or ZipItConfig()
    originals = traced(networks, calibration)
    check_equal_widths(originals)
    zips = find_zips(originals, calibration, config)
    merged = _merged_networks(originals, zips)
    members = {name: np.repeat(np.arange(len(z.sizes))[:, None], len(merged), axis=1) for name, z in zips.items()}
    matrices = matrices_of(merged)
    for layer, part in common_parts(merged, members).items():
        total = torch.stack([part.of(task, matrices[task][layer]) for task in merged]).sum(dim=0)
        for task in merged:
            matrices[task][layer] = part.put(task, matrices[task][layer], total)
    return assemble(merged, members, matrices, "zipit", originals)


def find_zips(
    networks: Mapping[str, Network], calibration: Mapping[str, Tensor], config: ZipItConfig
) -> dict[str, Zip]:
    """What becomes of the features of every group that is merged, from the input on. Raises `InvalidConfig`."""
    graph = next(iter(networks.values())).graph
    names = [group.name for group in graph.hidden_groups][: config.layers]
    for node in graph.layers:
        later = {g.name for g in graph.hidden_groups if g.name not in names} & {*graph.columns[node.name].groups}
        if later and {*graph.rows[node.name].groups} & {*names}:
            raise InvalidConfig(f"layers: layer {node.name!r} would be merged, but not what it reads. Merge more.")
    found = correlations(networks, common_images(calibration, networks), config.place)
    zips = {}
    for name in names:
        width = graph.widths[name]
        label = zip_features(
            found[name], [width] * len(networks), max(1, round(config.width * width)), config.alpha, config.beta
        )
        zips[name] = Zip(tuple(networks), dict(zip(networks, np.split(label, len(networks)), strict=True)))
    return zips


def zip_features(
    correlation: Float[np.ndarray, "features features"], widths: Sequence[int], count: int, alpha: float, beta: float
) -> Int64[np.ndarray, " features"]:
    """The merged feature, of `count`, that each feature of several networks belongs to.

    Greedy, pair by pair (the paper's algorithm 1 with sections 4.2 and 4.3). A merge is within a network if both sides
    have members of it; each network's budget of such merges is `beta` times the merges per network. Beyond it, they are
    made only where no other pair is left.
    """
    features = len(correlation)
    merges = features - count
    holds = np.repeat(np.eye(len(widths), dtype=bool), widths, axis=0)
    budget = np.full(len(widths), int(beta * merges / len(widths)))
    similarity, score = correlation.copy(), correlation.copy()
    np.fill_diagonal(score, -np.inf)
    label = np.arange(features)

    def rate(feature: int) -> None:
        """How much a feature wants to be merged with each other."""
        barred = (holds & holds[feature] & (budget == 0)).any(axis=1)
        row = similarity[feature] - BEYOND * barred
        row[~holds.any(axis=1)] = row[feature] = -np.inf
        score[feature] = score[:, feature] = row

    for network in np.flatnonzero(budget == 0):
        for feature in np.flatnonzero(holds[:, network]).tolist():
            rate(feature)
    for _ in range(merges):
        kept, taken = map(int, np.unravel_index(score.argmax(), score.shape))
        within = holds[kept] & holds[taken] & (budget > 0)
        budget -= within
        similarity[kept] = similarity[:, kept] = alpha * np.minimum(similarity[kept], similarity[taken])
        holds[kept] |= holds[taken]
        holds[taken] = False
        label[label == taken] = kept
        score[taken] = score[:, taken] = -np.inf
        spent = (holds & within & (budget == 0)).any(axis=1)
        for feature in (kept, *np.flatnonzero(spent).tolist()):
            rate(feature)
    return np.unique(label, return_inverse=True)[1]


def _merged_networks(networks: Mapping[str, Network], zips: Mapping[str, Zip]) -> dict[str, Network]:
    """Every network with ``M_t W_t U_t`` for its layers' matrices, and with what it needs beside them.

    Raises `CannotDrop` where a layer cannot get narrower.
    """
    keep = {name: np.arange(len(found.sizes)) for name, found in zips.items()}
    narrow = {task: Dropper(network).narrow(keep).network for task, network in networks.items()}
    constants = _mean_constants(networks, zips)
    merged = {}
    for task, network in networks.items():
        values = constants[task]
        for node in network.graph.layers:
            axes = network.graph.rows[node.name], network.graph.columns[node.name]
            values |= _merged_layer(node, network, *(_Image.of(axis, zips, task) for axis in axes))
        state = {name: values.get(name, like).reshape(like.shape) for name, like in narrow[task].state.items()}
        merged[task] = replace(narrow[task], state=state)
    return merged


def _merged_layer(node: Node, network: Network, rows: _Image, columns: _Image) -> dict[str, Tensor]:
    """A layer's weight and bias as ``M W U`` and ``M b``."""
    matrix = node.layer.matrix(network.state[node.weight])
    read = matrix.new_zeros(len(matrix), columns.size).index_add(1, columns.target, matrix)
    tensors = {node.weight: node.layer.from_matrix(rows.means(read), tuple(network.state[node.weight].shape))}
    if node.bias is not None:
        tensors[node.bias] = rows.means(network.state[node.bias])
    return tensors


@dataclass(frozen=True, eq=False)
class _Image:
    """Where the positions of an axis lie when its groups' features are merged, and each one's part in the mean."""

    target: Int64[Tensor, " positions"]
    part: Float[Tensor, " positions"]
    size: int

    @classmethod
    def of(cls, axis: Axis, zips: Mapping[str, Zip], task: str) -> _Image:
        """A merged feature takes the place of the feature of its number."""
        kept, part = np.ones(len(axis.group), dtype=bool), np.ones(len(axis.group))
        tables = {name: positions_of(axis, name) for name in axis.groups if name in zips}
        for name, table in tables.items():
            kept[table[len(zips[name].sizes) :]] = False
        place = np.cumsum(kept) - 1
        target = place.copy()
        for name, table in tables.items():
            cluster = zips[name].clusters[task]
            target[table] = place[table[cluster]]
            part[table] = (1 / zips[name].sizes[cluster])[:, None]
        return cls(torch.from_numpy(target), torch.from_numpy(part), int(kept.sum()))

    def means(self, values: Float[Tensor, "positions ..."]) -> Float[Tensor, "size ..."]:
        """``M v``: this task's part of every merged feature's mean."""
        parts = self.part.to(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
        return values.new_zeros(self.size, *values.shape[1:]).index_add(0, self.target, values * parts)

    def sums(self, values: Float[Tensor, " positions"]) -> Float[Tensor, " size"]:
        """The sum of the task's members of every merged feature."""
        return values.new_zeros(self.size).index_add(0, self.target, values)

    def counts(self) -> Int64[Tensor, " size"]:
        """How many members of every merged feature the task has."""
        return self.target.bincount(minlength=self.size)


def _mean_constants(networks: Mapping[str, Network], zips: Mapping[str, Zip]) -> dict[str, dict[str, Tensor]]:
    """Parameters and statistics of normalisations: the mean of the task's own members, or of all if it has none."""
    axes = {}
    for task, network in networks.items():
        graph = network.graph
        axes[task] = analyse(graph.nodes, graph.output, network.state, network.trainable, network.inputs).constants
    layers = {name for network in networks.values() for node in network.graph.layers for name in node.state}
    found: dict[str, dict[str, Tensor]] = {task: {} for task in networks}
    for name, axis in next(iter(axes.values())).items():
        if name in layers or not {*axis.groups} & {*zips}:
            continue
        images = {task: _Image.of(axes[task][name], zips, task) for task in networks}
        parts = [images[task].means(network.state[name].flatten()) for task, network in networks.items()]
        for task, network in networks.items():
            own, count = images[task].sums(network.state[name].flatten()), images[task].counts()
            found[task][name] = torch.where(count > 0, own / count.clamp(min=1), torch.stack(parts).sum(dim=0))
    return found
