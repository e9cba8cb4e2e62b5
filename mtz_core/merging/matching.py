"""Which neurons of the networks become one: functional difference, assignment, coordinate descent over neuron groups.

The cost of sharing neuron i of A with neuron j of B is their functional difference (He, Zhou, Thiele 2018, section 3.2,
generalised to own inputs that compensate),

    d(i, j) = ½ (s_i − s_j)ᵀ P (s_i − s_j),   P = (M_A⁻¹/α_A + M_B⁻¹/α_B)⁻¹,

with ``s`` a neuron's weights on shared inputs and ``M`` what is left of the layer-wise Hessian on them, summed over all
layers that write the neuron group. All ``N_A × N_B`` values come from one factorisation and one matrix product per
layer. More than two networks are matched one at a time against what the others have in common. The formula stays the
same, with the shared weights of the others for A and the sum of their Hessians for ``M_A``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtz_core.merging.compatibility import check_compatible, shared_counts, why_separate, writers_of
from mtz_core.merging.difference import functional_difference, weigh_by_sensitivity
from mtz_core.merging.pairing import GroupMatch, Pairing, assign, assign_greedily
from mtz_core.network.graph import Network, Node
from mtz_core.settings import ZipConfig
from mtz_core.statistics.linalg import DenseHessian, Hessian, chunks, weighted_sum
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.ownership import NOT_A_MEMBER, arrange, positions_of


@dataclass(frozen=True, eq=False)
class _Side:
    """One task's view of a layer.

    Attributes:
        rows: The weights of the group's neurons on the shared inputs; a neuron may have several rows (slots).
        curvature: What is left of the layer's Hessian on the shared inputs.
        balance: The task's weight in the layer.
    """

    rows: Float[Tensor, "neurons slots s"]
    curvature: Hessian
    balance: float


_Layers = Sequence[Sequence[_Side]]
"""For every layer that writes a group, the view of every task."""


class Matcher:
    """Finds the best pairing of one neuron group given the others', and predicts what pairings cost.

    Attributes:
        traced: The networks by task, with what was measured of them.
        networks: The same networks alone.
        config: How to zip.
        tasks: The tasks.
        counts: How many neurons all networks are to share in every group.
        widths: For every hidden group of any network, the number of neurons that each network has in it.
        writers: For every group, the layers that write it and can be shared.
        refit: Whether own inputs compensate (``method="refit"``).
    """

    def __init__(
        self,
        traced: Mapping[str, Traced],
        config: ZipConfig,
        among: Mapping[str, Network] | None = None,
    ) -> None:
        """Find out what can be shared.

        Args:
            traced: The networks by task, with what was measured of them.
            config: How to zip.
            among: All networks that are zipped together, if these are some of them: what cannot be shared by all of
                them is not shared by some.

        Raises:
            IncompatibleNetworks: If the networks differ in what they do not keep separate, or in dtype.
            InvalidConfig: If settings do not fit the networks.
        """
        self.traced, self.config = traced, config
        self.networks = networks = {task: own.network for task, own in traced.items()}
        check_compatible(networks)
        self.tasks = tuple(networks)
        self.counts = shared_counts(networks, config)
        self.widths = {
            name: [network.graph.hidden_widths.get(name, 0) for network in networks.values()] for name in self.counts
        }
        self.writers = {
            name: [node for node in writers_of(networks, name) if why_separate(among or networks, node) is None]
            for name in self.widths
        }
        self.refit = config.method == "refit"

    def _sensitivity(self, node: Node) -> list[Float[Tensor, " rows"]] | None:
        """The sensitivities of all tasks to a layer's rows; None if tasks weigh alike."""
        known = [own.sensitivity for own in self.traced.values()]
        return None if None in known else [own[node.name] for own in known if own is not None]

    def reads(self, node: Node) -> set[str]:
        """The hidden groups that a layer reads in all networks."""
        graphs = [network.graph for network in self.networks.values()]
        return set.intersection(*({*graph.columns[node.name].groups} & graph.hidden_widths.keys() for graph in graphs))

    def match(self, name: str, pairings: Mapping[str, Pairing]) -> GroupMatch:
        """Find the best pairing of a group, given those of other groups.

        Inputs from groups without a pairing count as own. Layers that read such groups are left out, as long as other
        layers are left.

        Args:
            name: The group.
            pairings: The pairings of other groups.

        Returns:
            The pairing and its predicted cost.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        writers = self.writers[name]
        ready = [node for node in writers if self.reads(node) <= pairings.keys()]
        layers = [self._sides(node, name, pairings) for node in ready or writers]
        widths = self.widths[name]
        tuples, curve = _match_tuples(layers, widths, self.counts[name], self.config)
        pairing = Pairing.from_tuples(self.tasks, widths, tuples)
        return GroupMatch(name, pairing, _pairing_cost(layers, pairing), curve)

    def tuples(self, name: str, pairings: Mapping[str, Pairing], count: int) -> Int64[np.ndarray, "count tasks"]:
        """Find the best tuples that have a neuron of every task.

        Args:
            name: The group.
            pairings: The pairings of all other groups.
            count: The number of tuples.

        Returns:
            The neuron of every task in each tuple.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        layers = [self._sides(node, name, pairings) for node in self.writers[name]]
        return _match_all(layers, self.widths[name], count, self.config)[0]

    def cost(self, name: str, pairings: Mapping[str, Pairing]) -> float:
        """Predict the cost of a group's shared neurons.

        Args:
            name: The group.
            pairings: The pairings of all groups.

        Returns:
            The total functional difference.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        return _pairing_cost([self._sides(node, name, pairings) for node in self.writers[name]], pairings[name])

    def touched(self, name: str) -> list[str]:
        """The groups whose cost depends on a group's pairing: the group itself and those that its readers write."""
        return [g for g in self.widths if g == name or any(name in self.reads(node) for node in self.writers[g])]

    def tuple_damages(
        self, name: str, pairings: Mapping[str, Pairing], tuples: Int64[np.ndarray, "k tasks"]
    ) -> Float[np.ndarray, "k tasks"]:
        """Predict what sharing tuples of a group's neurons would cost the tasks.

        Args:
            name: The group.
            pairings: The pairings of all groups.
            tuples: The neuron of every task in each tuple, or `NOT_A_MEMBER`.

        Returns:
            The damage that every tuple does to every task, in its loss.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        damage = np.zeros(tuples.shape)
        owned = tuples >= 0
        for node in self.writers[name]:
            sides, sensitivity = self._sides(node, name, pairings), None
            if (known := self._sensitivity(node)) is not None:
                rows = [torch.from_numpy(positions_of(n.graph.rows[node.name], name)) for n in self.networks.values()]
                sensitivity = [whole[own] for whole, own in zip(known, rows, strict=True)]
            for pattern in np.unique(owned, axis=0):
                which, tasks = (owned == pattern).all(axis=1), np.flatnonzero(pattern)
                felt = None if sensitivity is None else [sensitivity[t] for t in tasks]
                damage[np.ix_(which, tasks)] += _tuple_costs(
                    _restrict([sides], tasks), tuples[np.ix_(which, tasks)], felt
                )
        return damage

    def _sides(self, node: Node, name: str, pairings: Mapping[str, Pairing]) -> list[_Side]:
        members = {group: pairing.members for group, pairing in pairings.items()}
        columns = arrange(self.tasks, {t: n.graph.columns[node.name] for t, n in self.networks.items()}, members)
        common = [run for run in columns.segments if run.owners == self.tasks]
        hessians = {
            task: _average(own.moments[node.name].hessian(self.config.fixed_damping))
            for task, own in self.traced.items()
        }
        balance = self.config.balance_of(self.tasks)
        known = self._sensitivity(node)
        if self.refit and known is not None:
            balance = weigh_by_sensitivity(balance, known)
        sides = []
        for (task, network), alpha in zip(self.networks.items(), balance, strict=True):
            hessian = hessians[task]
            shared = np.concatenate([np.zeros(0, dtype=np.int64), *(run.places[task] for run in common)])
            if node.bias is not None:
                shared = np.append(shared, hessian.size - 1)
            own = np.setdiff1d(np.arange(hessian.size), shared)
            index = torch.from_numpy(shared)
            positions = torch.from_numpy(positions_of(network.graph.rows[node.name], name))
            rows = network.matrix(node)[positions.flatten()][:, index]
            curvature = hessian.select(index)
            if self.refit and len(own):
                curvature = hessian.eliminate(index, torch.from_numpy(own)).curvature
            sides.append(_Side(rows.reshape(*positions.shape, len(index)), curvature, alpha))
        return sides


def _average(hessian: Hessian) -> Hessian:
    """The mean of the Hessians of layers that lie side by side: one matrix for all pairs of neurons."""
    if isinstance(hessian, DenseHessian) and hessian.matrix.ndim == 3:
        return DenseHessian(hessian.matrix.mean(dim=0))
    return hessian


def _tuple_rows(side: _Side, neurons: Int64[np.ndarray, " k"]) -> Float[Tensor, "k_slots s"]:
    return side.rows[torch.from_numpy(neurons)].flatten(0, 1).to(torch.float64)


def _total(sides: Sequence[_Side]) -> Hessian:
    """``Σ α M``."""
    return weighted_sum([side.curvature for side in sides], [side.balance for side in sides])


def _centre(sides: Sequence[_Side], rows: Sequence[Float[Tensor, "n s"]], total: Hessian) -> Float[Tensor, "n s"]:
    """Shared weights ``(Σ α M)⁻¹ Σ α M s``."""
    mean = torch.stack(list(rows)).mean(dim=0)  # solving for the distance from the mean keeps equal neurons equal
    pull = [s.balance * s.curvature.product((r - mean).T) for s, r in zip(sides, rows, strict=True)]
    return mean + total.solve(torch.stack(pull).sum(dim=0)).T


def _tuple_costs(
    layers: _Layers,
    tuples: Int64[np.ndarray, "k tasks"],
    sensitivity: Sequence[Float[Tensor, "_neurons slots"]] | None = None,
) -> Float[np.ndarray, "k tasks"]:
    """Predict the cost of tuples of neurons, one of each task: ``½ α_t (s* − s_t)ᵀ M_t (s* − s_t)`` to task t.

    Args:
        layers: For every layer that writes the group, the view of every task.
        tuples: The neuron of every task in each tuple.
        sensitivity: The sensitivity of every task's loss to the neurons' rows. With it, costs are in these losses: the
            shared weights are the same, but every row counts by its sensitivity.

    Returns:
        The cost of every tuple to every task.
    """
    costs = torch.zeros(tuples.shape, dtype=torch.float64)
    for sides in layers:
        _, slots, inputs = sides[0].rows.shape
        if not inputs:
            continue
        total = _total(sides)
        for part in chunks(len(tuples), slots * inputs):
            rows = [_tuple_rows(side, tuples[part, t]) for t, side in enumerate(sides)]
            centre = _centre(sides, rows, total)
            for t, (side, own) in enumerate(zip(sides, rows, strict=True)):
                losses = 0.5 * side.curvature.energies((centre - own).T).reshape(-1, slots)
                weight = side.balance if sensitivity is None else sensitivity[t][torch.from_numpy(tuples[part, t])]
                costs[part, t] += (weight * losses).sum(dim=1)
    return costs.numpy()


def _pairing_cost(layers: _Layers, pairing: Pairing) -> float:
    """The predicted cost of all shared neurons of a pairing."""
    owned = pairing.members >= 0
    total = 0.0
    for pattern in np.unique(owned[owned.sum(axis=1) > 1], axis=0):
        tuples = pairing.members[(owned == pattern).all(axis=1)][:, pattern]
        total += float(_tuple_costs(_restrict(layers, np.flatnonzero(pattern)), tuples).sum())
    return total


def _restrict(layers: _Layers, tasks: Iterable[int], neurons: Sequence[np.ndarray] | None = None) -> _Layers:
    """The views of some tasks, and of some of their neurons."""
    return [
        [
            sides[t] if neurons is None else replace(sides[t], rows=sides[t].rows[torch.from_numpy(neurons[i])])
            for i, t in enumerate(tasks)
        ]
        for sides in layers
    ]


_Tuples = tuple[Int64[np.ndarray, "k tasks"], tuple[float, ...]]


def _match_tuples(layers: _Layers, widths: Sequence[int], count: int, config: ZipConfig) -> _Tuples:
    """Find the tuples of neurons to share: `count` of all tasks, then what wider networks share beyond them.

    Args:
        layers: For every layer that writes the group, the view of every task.
        widths: The number of neurons of every task.
        count: The number of tuples that have a neuron of every task.
        config: How to zip.

    Returns:
        The tuples, and the cost curve of those of all tasks.
    """
    found, curve = _match_all(layers, widths, count, config)
    wider = [t for t, width in enumerate(widths) if width > min(widths)]
    if len(widths) > 2 and len(wider) > 1 and config.shared_fraction is not None and layers:
        rest = [np.setdiff1d(np.arange(widths[t]), found[:, t]) for t in wider]
        more = min(round(config.shared_fraction * min(widths[t] for t in wider)) - count, *map(len, rest))
        extra, _ = _match_tuples(_restrict(layers, wider, rest), [len(r) for r in rest], max(more, 0), config)
        wide = np.full((len(extra), len(widths)), NOT_A_MEMBER, dtype=np.int64)
        for i, t in enumerate(wider):
            own = extra[:, i] >= 0
            wide[own, t] = rest[i][extra[own, i]]
        found = np.concatenate([found, wide])
    return found, curve


def _match_all(layers: _Layers, widths: Sequence[int], count: int, config: ZipConfig) -> _Tuples:
    """Find `count` tuples with one neuron of every task.

    Args:
        layers: For every layer that writes the group, the view of every task.
        widths: The number of neurons of every task.
        count: The number of tuples.
        config: How to zip.

    Returns:
        The tuples, and what the cheapest 1, 2, … of as many as possible would cost.
    """
    if not layers:
        return np.zeros((0, len(widths)), dtype=np.int64), ()
    most = min(widths)
    solve = assign if config.method == "refit" else assign_greedily
    if len(widths) == 2:
        cost = _pair_costs(layers, [0], [1], None)
        complete = solve(cost, most)
        tuples = complete if count == most else solve(cost, count)
        return tuples, tuple(np.cumsum(np.sort(cost[complete[:, 0], complete[:, 1]])).tolist())
    tuples = solve(_pair_costs(layers, [0], [1], None), most)
    for t in range(2, len(widths)):
        tuples = np.column_stack([tuples, np.zeros(most, dtype=np.int64)])
        tuples[:, t] = _partners(_pair_costs(layers, list(range(t)), [t], tuples), solve)
    if config.method == "refit":
        tuples = _settle(layers, tuples, config)
    costs = _tuple_costs(layers, tuples).sum(axis=1)
    cheapest = tuples[np.sort(np.argsort(costs, kind="stable")[:count])]
    if config.method == "refit" and 0 < count < most:
        cheapest = _settle(layers, cheapest, config)
    return cheapest, tuple(np.cumsum(np.sort(costs)).tolist())


def _pair_costs(
    layers: _Layers, tasks: list[int], other: list[int], tuples: Int64[np.ndarray, "k tasks"] | None
) -> Float[np.ndarray, "a b"]:
    """The cost of every neuron of one task with every tuple of others, or with every neuron of one other task."""
    total: Tensor | None = None
    for sides in layers:
        (one,) = _restrict([sides], other)[0]
        others = _restrict([sides], tasks)[0]
        if tuples is None:
            rows, curvature, balance = others[0].rows.flatten(0, 1), others[0].curvature, others[0].balance
        else:
            picked = [_tuple_rows(side, tuples[:, t]) for t, side in zip(tasks, others, strict=True)]
            curvature, balance = _total(others), 1.0
            rows = _centre(others, picked, curvature) if one.rows.shape[-1] else picked[0]
        cost = functional_difference(
            (rows, one.rows.flatten(0, 1)), (curvature, one.curvature), (balance, one.balance), one.rows.shape[1]
        )
        total = cost if total is None else total + cost
    assert total is not None
    return total.numpy()


def _partners(
    cost: Float[np.ndarray, "k n"], solve: Callable[[np.ndarray, int], np.ndarray]
) -> Int64[np.ndarray, " k"]:
    """The neuron that each tuple is paired with."""
    pairs = solve(cost, len(cost))
    return np.asarray(pairs[np.argsort(pairs[:, 0]), 1])


def _settle(layers: _Layers, tuples: Int64[np.ndarray, "k tasks"], config: ZipConfig) -> Int64[np.ndarray, "k tasks"]:
    """Match every task anew against what the others share, until the cost stops falling."""
    best = float(_tuple_costs(layers, tuples).sum())
    for _ in range(config.matching_rounds):
        before = best
        for t in range(tuples.shape[1]):
            others = [other for other in range(tuples.shape[1]) if other != t]
            trial = tuples.copy()
            trial[:, t] = _partners(_pair_costs(layers, others, [t], tuples), assign)
            cost = float(_tuple_costs(layers, trial).sum())
            if cost < best:
                tuples, best = trial, cost
        if best >= before:
            break
    return tuples


def descent(matches: Iterable[GroupMatch]) -> tuple[float, ...]:
    """The predicted cost of all groups: before coordinate descent, then after every pairing that it took."""
    return tuple(match.total for match in matches if not math.isnan(match.total))


def match(traced: Mapping[str, Traced], config: ZipConfig) -> Iterator[GroupMatch]:
    """Pair the neurons of every hidden group, using the originals' weights and Hessians.

    Groups are paired in topological order. Where a group's pairing depends on later ones (a residual sum is written by
    layers that read it), the groups are matched again in turn, at most `ZipConfig.matching_rounds` times. A new pairing
    is taken only if the predicted cost of all groups falls.

    Args:
        traced: The networks by task, with their moments.
        config: How to zip.

    Returns:
        Pairings of groups. The last one of a group counts.

    Raises:
        IncompatibleNetworks: If the networks differ in what they do not keep separate, or in dtype.
        InvalidConfig: If settings do not fit the networks.
        SingularHessian: If a Hessian cannot be factorised.
    """
    return pair_all(Matcher(dict(sorted(traced.items())), config))


def pair_all(matcher: Matcher) -> Iterator[GroupMatch]:
    """Pair the neurons of every hidden group, as `match` does.

    Args:
        matcher: Finds the pairing of one group.

    Yields:
        Pairings of groups. The last one of a group counts.

    Raises:
        SingularHessian: If a Hessian cannot be factorised.
    """
    pairings: dict[str, Pairing] = {}
    coupled = False
    for name in matcher.widths:
        coupled = coupled or not all(matcher.reads(node) <= pairings.keys() for node in matcher.writers[name])
        found = matcher.match(name, pairings)
        pairings[name] = found.pairing
        yield found
    if not coupled or not matcher.refit:
        return
    costs = {name: matcher.cost(name, pairings) for name in matcher.widths}
    yield replace(found, cost=costs[name], total=sum(costs.values()))
    for sweep in range(1, matcher.config.matching_rounds + 1):
        fell = False
        for name in matcher.widths:
            found = matcher.match(name, pairings)
            trial = pairings | {name: found.pairing}
            changed = {group: matcher.cost(group, trial) for group in matcher.touched(name)}
            saved = sum(costs[group] - cost for group, cost in changed.items())
            if saved > 1e-9 * sum(costs.values()):
                pairings, costs, fell = trial, costs | changed, True
                yield replace(found, cost=changed[name], sweep=sweep, total=sum(costs.values()))
        if not fell:
            break
