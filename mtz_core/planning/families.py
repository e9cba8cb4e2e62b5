"""Who can share with whom: all tasks with each other, or only those of one *family* among themselves.

Of three and more networks, some are often nearer to each other than to the rest. Their families are found by clustering
(average linkage), with what sharing everything would cost two networks, for each byte that it saves, as their distance.
Where the distances between clusters jump, the clusters are taken for families.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from jaxtyping import Float64, Int64
from scipy.cluster.hierarchy import cut_tree, linkage

from mtz_core.merging.matching import Matcher, pair_all
from mtz_core.planning.sizes import Sizes
from mtz_core.settings import ZipConfig
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.ownership import NOT_A_MEMBER
from mtz_core.zipped.structure import hidden_groups

PARTITIONS = 2
"""Into how many different sets of families tasks are divided at most."""

Tuples = tuple[Int64[np.ndarray, "k tasks"], Float64[np.ndarray, "k tasks"]]
"""The neuron of every task in each tuple, or `NOT_A_MEMBER`; and what sharing the tuple costs every task, in its
loss."""


class Family:
    """Some tasks whose neurons are matched with each other, and with nobody else's.

    Attributes:
        places: The places of its tasks among all tasks.
        matcher: Finds tuples and their damages.
        pairings: The pairings of all groups when everything is shared. What wider networks can share beyond the
            narrower ones they share.
        tuples: For every group, all tuples that can be shared.
    """

    def __init__(self, traced: Mapping[str, Traced], tasks: Sequence[str], config: ZipConfig) -> None:
        """Match the networks of a family.

        Args:
            traced: All networks by task, with moments and sensitivities.
            tasks: The tasks of the family.
            config: How to zip.

        Raises:
            MtzError: If the networks cannot be zipped together, or if a Hessian cannot be factorised.
        """
        balance = None if config.balance is None else {task: config.balance[task] for task in tasks}
        everything = replace(config, share=1.0, budget=None, balance=balance)
        among = {task: own.network for task, own in traced.items()}
        self.matcher = Matcher({task: traced[task] for task in tasks}, everything, among)
        self.pairings = {found.group: found.pairing for found in pair_all(self.matcher)}
        self.places = [tuple(traced).index(task) for task in tasks]
        self._tasks = len(traced)
        self.tuples = {
            group: self.damaged(group, pairing.members[(pairing.members >= 0).sum(axis=1) > 1])
            for group, pairing in self.pairings.items()
        }

    @property
    def is_pair(self) -> bool:
        """Whether these are two tasks."""
        return len(self.places) == 2

    def best(self, group: str, count: int) -> Tuples:
        """So many tuples of a group that have a neuron of every task and cost least together."""
        return self.damaged(group, self.matcher.tuples(group, self.pairings, count))

    def damaged(self, group: str, own: Int64[np.ndarray, "k family"]) -> Tuples:
        """Tuples of a group by the tasks of the family, with their damage, among all tasks."""
        tuples = np.full((len(own), self._tasks), NOT_A_MEMBER, dtype=np.int64)
        damage = np.zeros(tuples.shape)
        tuples[:, self.places] = own
        damage[:, self.places] = self.matcher.tuple_damages(group, self.pairings, own)
        return tuples, damage


class Sharing:
    """A way to share: the tasks of each family with each other.

    Attributes:
        families: The families of two and more tasks.
        tuples: For every group, all tuples that can be shared, those first that cost least for each neuron that they
            save.
    """

    def __init__(
        self, families: Sequence[Family], groups: Sequence[str], balance: Float64[np.ndarray, " tasks"]
    ) -> None:
        """Rank the tuples of all families.

        Args:
            families: The families of two and more tasks.
            groups: All groups that any task has.
            balance: How much the damage to each task counts where tuples are ranked.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        self.families, self._balance = families, balance
        self.tuples: dict[str, Tuples] = {}
        nothing = np.zeros((0, len(balance)), dtype=np.int64), np.zeros((0, len(balance)))
        for group in groups:
            found = [family.tuples[group] for family in families if group in family.tuples] or [nothing]
            tuples, damage = (np.concatenate(parts) for parts in zip(*found, strict=True))
            saved = (tuples >= 0).sum(axis=1) - 1
            cheapest = np.argsort((damage @ balance) / saved, kind="stable")
            self.tuples[group] = tuples[cheapest], damage[cheapest]

    def cheapest(self, group: str, count: int, exact: bool) -> Tuples:
        """So many tuples of a group that cost little.

        Args:
            group: The group.
            count: The number of tuples.
            exact: Whether to find those that cost least together, where that can be done: of two tasks.

        Returns:
            The tuples.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        tuples, damage = self.tuples[group]
        found = tuples[:count], damage[:count]
        if exact and len(self.families) == 1 and self.families[0].is_pair and 0 < count < len(tuples):
            best = self.families[0].best(group, count)  # by a cost that is not quite the damage
            if (best[1] @ self._balance).sum() < (found[1] @ self._balance).sum():
                found = best
        return found


def ways_to_share(
    traced: Mapping[str, Traced], config: ZipConfig, balance: Float64[np.ndarray, " tasks"]
) -> list[Sharing]:
    """List the ways to share that are worth a plan.

    Args:
        traced: The networks by task, with moments and sensitivities.
        config: How to zip.
        balance: How much the damage to each task counts.

    Returns:
        The ways, that in which all tasks share with each other last.

    Raises:
        MtzError: If the networks cannot be zipped together, or if a Hessian cannot be factorised.
    """
    tasks, groups = tuple(traced), hidden_groups(own.network.graph for own in traced.values())
    everyone = Sharing([Family(traced, tasks, config)], groups, balance)
    if len(tasks) < 3:
        return [everyone]
    pairs: dict[tuple[str, ...], Family] = {}
    for pair in combinations(tasks, 2):
        pairs[pair] = Family(traced, pair, config)
    distances = [_distance(family, balance) for family in pairs.values()]
    ways = []
    for clusters in _partitions(len(tasks), distances):
        members = [tuple(tasks[t] for t in cluster) for cluster in clusters if len(cluster) > 1]
        ways.append(Sharing([pairs.get(own) or Family(traced, own, config) for own in members], groups, balance))
    return [*ways, everyone]


def _distance(pair: Family, balance: Float64[np.ndarray, " tasks"]) -> float:
    """What sharing everything costs two networks for each byte that it saves; infinite if it saves nothing."""
    sizes = Sizes(pair.matcher.networks)
    shared = {group: pairing.shared for group, pairing in pair.pairings.items()}
    saved = sizes.stored(sizes.counts(sizes.widths, dict.fromkeys(shared, 0)))
    saved -= sizes.stored(sizes.counts(sizes.widths, shared))
    damage = sum(float((cost @ balance).sum()) for _, cost in pair.tuples.values())
    return damage / saved if saved > 0 else np.inf


def _partitions(count: int, distances: Sequence[float]) -> list[list[list[int]]]:
    """Divide tasks into clusters where the distance at which clusters merge jumps most.

    Args:
        count: The number of tasks.
        distances: The distance of every two tasks, in the order of `itertools.combinations`.

    Returns:
        At most `PARTITIONS` partitions, those into more clusters first.
    """
    known = np.array(distances)
    finite = known[np.isfinite(known)]
    if not len(finite):
        return []
    # What cannot share lies farther away than all that can.
    merges = linkage(np.where(np.isfinite(known), known, 2 * finite.max() + 1.0), "average")
    heights = np.maximum(merges[:, 2], np.finfo(np.float64).tiny)
    jumps = heights[1:] / heights[:-1]
    found = []
    for merged in sorted(np.argsort(-jumps, kind="stable")[:PARTITIONS].tolist()):
        labels = cut_tree(merges, n_clusters=count - 1 - merged)[:, 0]
        found.append([np.flatnonzero(labels == label).tolist() for label in dict.fromkeys(labels.tolist())])
    return found
