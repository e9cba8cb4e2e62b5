"""Which neurons of the networks become one: functional difference, assignment, descent over neuron groups.

The cost of sharing neuron i of A with neuron j of B is their functional difference (He, Zhou, Thiele 2018,
section 3.2, generalised to own inputs that compensate),

    d(i, j) = ½ (s_i − s_j)ᵀ P (s_i − s_j),   P = (M_A⁻¹/α_A + M_B⁻¹/α_B)⁻¹,

with `s` a neuron's weights on shared inputs and `M` what is left of the layer-wise Hessian on them, summed over all
layers that write the neuron group. All ``N_A × N_B`` values come from one factorisation and one matrix product per
layer. More than two networks are matched one at a time against what the others have in common, which is the same
formula with the shared weights of the others for A and the sum of their Hessians for M_A.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mtz_core.errors import IncompatibleNetworks, InvalidConfig
from mtz_core.graph import LayerGraph, Network, NeuronGroup, Node, first_difference
from mtz_core.linalg import DenseHessian, Hessian, chunks, weighted_sum
from mtz_core.moments import Moments
from mtz_core.sensitivity import Sensitivities
from mtz_core.settings import ZipConfig
from mtz_core.structure import NOT_A_MEMBER, arrange, positions_of, same_kernels


@dataclass(frozen=True, eq=False)
class Pairing:
    """Which neurons of one group are one neuron of the zipped network.

    `members[u, t]` is the neuron of task t that is (a part of) the zipped network's neuron u, or `NOT_A_MEMBER`. Rows
    are in canonical order: neurons of more tasks first, then by the tasks and their neurons.
    """

    tasks: tuple[str, ...]
    members: Int64[np.ndarray, "neurons tasks"]

    @classmethod
    def from_tuples(
        cls, tasks: tuple[str, ...], widths: Sequence[int], tuples: Int64[np.ndarray, "k tasks"]
    ) -> Pairing:
        """The pairing in which the given tuples are shared and every other neuron stays its task's own."""
        rows = [tuples[(tuples >= 0).any(axis=1)]]
        for t, width in enumerate(widths):
            rest = np.setdiff1d(np.arange(width), tuples[:, t])
            own = np.full((len(rest), len(tasks)), NOT_A_MEMBER, dtype=np.int64)
            own[:, t] = rest
            rows.append(own)
        members = np.concatenate(rows).astype(np.int64)
        absent = (members < 0).astype(np.int64)
        keys = np.concatenate([absent.sum(axis=1)[:, None], absent, members], axis=1)
        return cls(tasks, members[np.lexsort(keys.T[::-1])])

    @property
    def shared(self) -> int:
        """Neurons that belong to more than one task."""
        return int(((self.members >= 0).sum(axis=1) > 1).sum())


@dataclass(frozen=True)
class GroupMatch:
    """The pairing of one neuron group and its predicted cost, the total functional difference of its shared neurons.

    `curve[k - 1]` is what the cheapest k would cost if as many as possible were matched: a picture of what sharing less
    or more means. `total` is the predicted cost of all groups once this pairing was taken, in `sweep` of the descent
    (0: before it); NaN where there is no descent, or groups are missing yet.
    """

    group: str
    pairing: Pairing
    cost: float
    curve: tuple[float, ...]
    sweep: int = 0
    total: float = math.nan


def functional_difference(
    weights: tuple[Float[Tensor, "a s"], Float[Tensor, "b s"]],
    curvatures: tuple[Hessian, Hessian],
    balance: tuple[float, float],
    slots: int = 1,
) -> Float[Tensor, "a/slots b/slots"]:
    """``d(i, j)`` for all pairs at once, each neuron having `slots` consecutive rows. Raises `SingularHessian`."""
    (rows_a, rows_b), (m_a, m_b), (alpha_a, alpha_b) = weights, curvatures, balance
    a, b, inputs = len(rows_a) // slots, len(rows_b) // slots, rows_a.shape[1]
    distance = torch.zeros(a, b, dtype=torch.float64)
    if inputs == 0:
        return distance
    total = weighted_sum([m_a, m_b], [alpha_a, alpha_b])
    # Only differences count: there is less cancellation near the centre.
    centre = (rows_a.sum(dim=0, dtype=torch.float64) + rows_b.sum(dim=0, dtype=torch.float64)) / (slots * (a + b))

    def centred(rows: Tensor, part: slice) -> Float[Tensor, "n s"]:
        return rows[part.start * slots : part.stop * slots].to(torch.float64) - centre

    def image(rows: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:  # P s, P = αβ M_A (αM_A + βM_B)⁻¹ M_B
        return alpha_a * alpha_b * m_a.product(total.solve(m_b.product(rows.T))).T

    for part in chunks(a, slots * inputs):
        rows = centred(rows_a, part)
        distance[part] += 0.5 * (rows * image(rows)).sum(dim=1).reshape(-1, slots).sum(dim=1)[:, None]
    for part in chunks(b, slots * inputs):
        rows = centred(rows_b, part)
        images = image(rows)
        distance[:, part] += 0.5 * (rows * images).sum(dim=1).reshape(-1, slots).sum(dim=1)
        images = images.reshape(-1, slots * inputs)
        for other in chunks(a, slots * inputs):
            distance[other, part] -= centred(rows_a, other).reshape(-1, slots * inputs) @ images.T
    return distance.clamp_(min=0)


def felt_balance(balance: Sequence[float], felt: Sequence[Float[Tensor, " out"]]) -> list[float]:
    """``α_t √(mean F_t)``, made to sum to 1: tasks weigh in a layer by how much their losses feel its outputs.

    Networks differ in the scale of their activations: without this the loudest would decide for all. The root is a
    hedge: with the Fisher information itself a confident network would give up everything (docs/method.md).
    """
    weights = [alpha * float(rows.mean()) ** 0.5 for alpha, rows in zip(balance, felt, strict=True)]
    return [weight / sum(weights) for weight in weights] if sum(weights) > 0 else list(balance)


def assign(cost: Float[np.ndarray, "a b"], count: int) -> Int64[np.ndarray, "count 2"]:
    """`count` disjoint pairs of least total cost.

    Exact: the rows and columns that stay alone are assigned to ``a − count`` and ``b − count`` free dummies, which may
    not meet each other, so that exactly `count` real pairs remain.
    """
    a, b = cost.shape
    padded = np.zeros((a + b - count, a + b - count))
    padded[:a, :b] = cost
    padded[a:, b:] = np.inf
    rows, columns = linear_sum_assignment(padded)
    real = (rows < a) & (columns < b)
    return np.stack([rows[real], columns[real]], axis=1)


def assign_greedily(cost: Float[np.ndarray, "a b"], count: int) -> Int64[np.ndarray, "count 2"]:
    """`count` disjoint pairs, always taking the cheapest that is left (as the paper does).

    Taken in rounds: two neurons that are each other's cheapest partner would be taken before anything that could
    come between them, so all such pairs are taken at once; the cheapest `count` of all are the greedy answer.
    """
    rows, columns = np.arange(cost.shape[0]), np.arange(cost.shape[1])
    found: list[np.ndarray] = []
    while len(rows) and len(columns):
        left = cost[np.ix_(rows, columns)]
        best_column, best_row = left.argmin(axis=1), left.argmin(axis=0)
        mutual = np.flatnonzero(best_row[best_column] == np.arange(len(rows)))
        found.append(np.stack([rows[mutual], columns[best_column[mutual]]], axis=1))
        rows, columns = np.delete(rows, mutual), np.delete(columns, best_column[mutual])
    pairs = np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)
    order = np.argsort(cost[pairs[:, 0], pairs[:, 1]], kind="stable")
    return pairs[order[:count]]


def check_compatible(networks: Mapping[str, Network]) -> LayerGraph:
    """The graph of the first of the networks, whose topology all have.

    Raises `IncompatibleNetworks` with the first difference, side by side.
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
    """Neurons to share among all networks in every hidden group.

    Groups whose writers correspond nowhere get 0. Raises `InvalidConfig` for settings that do not fit the networks.
    """
    config.balance_of(tuple(networks))
    graph = next(iter(networks.values())).graph
    widths = {g.name: [network.graph.widths[g.name] for network in networks.values()] for g in graph.hidden_groups}
    counts = config.counts(widths)
    for group in graph.hidden_groups:
        if not any(why_separate(networks, layer) is None for layer in _writers(graph, group)):
            if isinstance(config.share, Mapping) and counts[group.name]:
                raise InvalidConfig(
                    f"share.{group.name}: impossible, as no layer that writes these neurons can be shared: "
                    f"{why_separate(networks, _writers(graph, group)[0])}."
                )
            counts[group.name] = 0
    return counts


def _writers(graph: LayerGraph, group: NeuronGroup) -> list[Node]:
    return [node for node in graph.layers if node.name in group.writers]


def why_separate(networks: Mapping[str, Network], layer: Node) -> str | None:
    """Why the rows of a layer stay task-specific whatever is shared around it; None if they need not."""
    if any(node.separate for n in networks.values() for node in n.graph.layers if node.name == layer.name):
        return "it is listed under keep_separate"
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


@dataclass(frozen=True, eq=False)
class _Side:
    """One task's view of a layer: weights on the shared inputs of the group's neurons, their curvature, its balance.

    A neuron may have several rows (`slots`).
    """

    rows: Float[Tensor, "neurons slots s"]
    curvature: Hessian
    balance: float


_Layers = Sequence[Sequence[_Side]]
"""For every layer that writes a group, the view of every task."""


class Matcher:
    """Finds the best pairing of one neuron group while the others stay, and predicts what pairings cost."""

    def __init__(
        self,
        networks: Mapping[str, Network],
        moments: Mapping[str, Mapping[str, Moments]],
        config: ZipConfig,
        felt: Mapping[str, Sensitivities] | None = None,
    ) -> None:
        self.networks, self.moments, self.config, self.felt = networks, moments, config, felt
        self.graph = check_compatible(networks)
        self.tasks = tuple(networks)
        self.counts = shared_counts(networks, config)
        self.groups = {group.name: group for group in self.graph.hidden_groups}
        self.writers = {
            name: [node for node in _writers(self.graph, group) if why_separate(networks, node) is None]
            for name, group in self.groups.items()
        }
        self.refit = config.method == "refit"

    def reads(self, node: Node) -> set[str]:
        """The hidden groups that a layer reads."""
        return {name for name in self.graph.columns[node.name].groups if name in self.groups}

    def match(self, name: str, pairings: Mapping[str, Pairing]) -> GroupMatch:
        """The best pairing of a group, given those of other groups.

        Inputs from groups without a pairing count as own; layers that read such are left out where others are left.
        """
        writers = self.writers[name]
        ready = [node for node in writers if self.reads(node) <= pairings.keys()]
        layers = [self._sides(node, name, pairings) for node in ready or writers]
        widths = [network.graph.widths[name] for network in self.networks.values()]
        tuples, curve = _match_tuples(layers, widths, self.counts[name], self.config)
        pairing = Pairing.from_tuples(self.tasks, widths, tuples)
        return GroupMatch(name, pairing, _pairing_cost(layers, pairing), curve)

    def tuples(self, name: str, pairings: Mapping[str, Pairing], count: int) -> Int64[np.ndarray, "count tasks"]:
        """The best tuples of all tasks' neurons, `count` of them, given the pairings of other groups."""
        layers = [self._sides(node, name, pairings) for node in self.writers[name]]
        widths = [network.graph.widths[name] for network in self.networks.values()]
        return _match_all(layers, widths, count, self.config)[0]

    def cost(self, name: str, pairings: Mapping[str, Pairing]) -> float:
        """The predicted cost of a group's shared neurons, all pairings given."""
        return _pairing_cost([self._sides(node, name, pairings) for node in self.writers[name]], pairings[name])

    def touched(self, name: str) -> list[str]:
        """The groups whose cost depends on the pairing of a group: itself, and those written by its readers."""
        return [g for g in self.groups if g == name or any(name in self.reads(node) for node in self.writers[g])]

    def tuple_damages(
        self, name: str, pairings: Mapping[str, Pairing], tuples: Int64[np.ndarray, "k tasks"]
    ) -> Float[np.ndarray, " k"]:
        """What sharing tuples of a group's neurons would cost the tasks, in nats of their losses."""
        damage = np.zeros(len(tuples))
        for node in self.writers[name]:
            felt = None
            if self.felt is not None:
                rows = [torch.from_numpy(positions_of(n.graph.rows[node.name], name)) for n in self.networks.values()]
                felt = [self.felt[task][node.name][own] for task, own in zip(self.tasks, rows, strict=True)]
            damage += _tuple_costs([self._sides(node, name, pairings)], tuples, felt)
        return damage

    def _sides(self, node: Node, name: str, pairings: Mapping[str, Pairing]) -> list[_Side]:
        members = {group: pairing.members for group, pairing in pairings.items()}
        columns = arrange(self.tasks, {t: n.graph.columns[node.name] for t, n in self.networks.items()}, members)
        common = [run for run in columns.runs if run.owners == self.tasks]
        hessians = {
            task: _average(self.moments[task][node.name].hessian(self.config.fixed_damping)) for task in self.tasks
        }
        balance = self.config.balance_of(self.tasks)
        if self.refit and self.felt is not None:
            balance = felt_balance(balance, [self.felt[task][node.name] for task in self.tasks])
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
    """For layers side by side, the mean of their Hessians: one matrix for all pairs of neurons."""
    if isinstance(hessian, DenseHessian) and hessian.matrix.ndim == 3:
        return DenseHessian(hessian.matrix.mean(dim=0))
    return hessian


def _tuple_rows(side: _Side, neurons: Int64[np.ndarray, " k"]) -> Float[Tensor, "k*slots s"]:
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
    felt: Sequence[Float[Tensor, "neurons slots"]] | None = None,
) -> Float[np.ndarray, " k"]:
    """The predicted cost of tuples of neurons, one of each task: ``Σ_t ½ α_t (s* − s_t)ᵀ M_t (s* − s_t)``.

    With `felt`, in its currency: the shared weights are the same, but every row's loss counts as much as it is felt.
    """
    costs = torch.zeros(len(tuples), dtype=torch.float64)
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
                weight = side.balance if felt is None else felt[t][torch.from_numpy(tuples[part, t])]
                costs[part] += (weight * losses).sum(dim=1)
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


_Tuples = tuple["Int64[np.ndarray, 'k tasks']", tuple[float, ...]]


def _match_tuples(layers: _Layers, widths: Sequence[int], count: int, config: ZipConfig) -> _Tuples:
    """Tuples of neurons to share, and the cost curve: `count` of all tasks, then what wider networks share more."""
    found, curve = _match_all(layers, widths, count, config)
    wider = [t for t, width in enumerate(widths) if width > min(widths)]
    if len(widths) > 2 and len(wider) > 1 and isinstance(config.share, (int, float)) and layers:
        rest = [np.setdiff1d(np.arange(widths[t]), found[:, t]) for t in wider]
        more = min(round(config.share * min(widths[t] for t in wider)) - count, *map(len, rest))
        extra, _ = _match_tuples(_restrict(layers, wider, rest), [len(r) for r in rest], max(more, 0), config)
        wide = np.full((len(extra), len(widths)), NOT_A_MEMBER, dtype=np.int64)
        for i, t in enumerate(wider):
            own = extra[:, i] >= 0
            wide[own, t] = rest[i][extra[own, i]]
        found = np.concatenate([found, wide])
    return found, curve


def _match_all(layers: _Layers, widths: Sequence[int], count: int, config: ZipConfig) -> _Tuples:
    """`count` tuples with one neuron of every task, and what the cheapest 1, 2, … of as many as possible would cost."""
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
    costs = _tuple_costs(layers, tuples)
    cheapest = tuples[np.sort(np.argsort(costs, kind="stable")[:count])]
    if config.method == "refit" and 0 < count < most:
        cheapest = _settle(layers, cheapest, config)
    return cheapest, tuple(np.cumsum(np.sort(costs)).tolist())


def _pair_costs(
    layers: _Layers, tasks: list[int], other: list[int], tuples: Int64[np.ndarray, "k tasks"] | None
) -> Float[np.ndarray, "a b"]:
    """The cost of every neuron of one task beside every tuple of others (or every neuron of one other)."""
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
    """The neuron that each tuple gets."""
    pairs = solve(cost, len(cost))
    return np.asarray(pairs[np.argsort(pairs[:, 0]), 1])


def _settle(layers: _Layers, tuples: Int64[np.ndarray, "k tasks"], config: ZipConfig) -> Int64[np.ndarray, "k tasks"]:
    """Match every task anew against what the others share, until nothing gets cheaper."""
    best = float(_tuple_costs(layers, tuples).sum())
    for _ in range(config.descents):
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
    """The predicted cost of all groups before coordinate descent, and after every pairing that it took."""
    return tuple(match.total for match in matches if not math.isnan(match.total))


def match(
    networks: Mapping[str, Network],
    moments: Mapping[str, Mapping[str, Moments]],
    config: ZipConfig,
    felt: Mapping[str, Sensitivities] | None = None,
) -> Iterator[GroupMatch]:
    """Pair the neurons of every hidden group on the originals' weights and Hessians; the last word on a group counts.

    `moments[task][layer]` are the second moments of the original network's layer inputs, `felt[task]` what the task's
    loss feels (tasks weigh alike if it is not given). Groups are paired in
    topological order. Where a group's pairing depends on later ones (a residual sum is written by layers that read it),
    the groups are matched again in turn, at most `config.descents` times, and a pairing is taken only if the predicted
    cost of all groups falls. Raises `IncompatibleNetworks`, `InvalidConfig`, `SingularHessian`.
    """
    matcher = Matcher(dict(sorted(networks.items())), moments, config, felt)
    pairings: dict[str, Pairing] = {}
    coupled = False
    for name in matcher.groups:
        coupled = coupled or not all(matcher.reads(node) <= pairings.keys() for node in matcher.writers[name])
        found = matcher.match(name, pairings)
        pairings[name] = found.pairing
        yield found
    if not coupled or config.method == "paper":
        return
    costs = {name: matcher.cost(name, pairings) for name in matcher.groups}
    yield replace(found, cost=costs[name], total=sum(costs.values()))
    for sweep in range(1, config.descents + 1):
        fell = False
        for name in matcher.groups:
            found = matcher.match(name, pairings)
            trial = pairings | {name: found.pairing}
            changed = {group: matcher.cost(group, trial) for group in matcher.touched(name)}
            saved = sum(costs[group] - cost for group, cost in changed.items())
            if saved > 1e-9 * sum(costs.values()):
                pairings, costs, fell = trial, costs | changed, True
                yield replace(found, cost=changed[name], sweep=sweep, total=sum(costs.values()))
        if not fell:
            break
