"""Which neurons of the networks become one: functional difference, assignment, and the walk over neuron groups.

The cost of sharing neuron i of A with neuron j of B is their functional difference (He, Zhou, Thiele 2018,
section 3.2, generalised to own inputs that compensate),

    d(i, j) = ½ (s_i − s_j)ᵀ P (s_i − s_j),   P = (M_A⁻¹/α_A + M_B⁻¹/α_B)⁻¹,

with `s` a neuron's weights on shared inputs and `M` what is left of the layer-wise Hessian on them. All
``N_A × N_B`` values come from one factorisation and one matrix product.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from mtz_core.errors import IncompatibleNetworks
from mtz_core.graph import LayerGraph, Network, NeuronGroup, Node
from mtz_core.linalg import Hessian, weighted_sum
from mtz_core.moments import Moments
from mtz_core.settings import ZipConfig
from mtz_core.structure import Layout, Owners

NOT_A_MEMBER = -1


@dataclass(frozen=True, eq=False)
class Pairing:
    """Which neurons of one group are one neuron of the zipped network.

    `members[u, t]` is the neuron of task t that is (a part of) the zipped network's neuron u, or `NOT_A_MEMBER`. Rows
    are in canonical order: neurons of more tasks first, then by the first task's neuron.
    """

    tasks: tuple[str, ...]
    members: Int64[np.ndarray, "neurons tasks"]

    @classmethod
    def from_pairs(cls, tasks: tuple[str, ...], widths: Sequence[int], pairs: Int64[np.ndarray, "k tasks"]) -> Pairing:
        """The pairing in which the given tuples are shared and every other neuron stays its task's own."""
        own = []
        for t, width in enumerate(widths):
            rest = np.setdiff1d(np.arange(width), pairs[:, t])
            rows = np.full((len(rest), len(tasks)), NOT_A_MEMBER, dtype=np.int64)
            rows[:, t] = rest
            own.append(rows)
        return cls(tasks, np.concatenate([pairs[np.argsort(pairs[:, 0])], *own]).astype(np.int64))

    @property
    def layout(self) -> Layout:
        """Owners and number of neurons of every run of rows with the same owners."""
        runs: list[tuple[Owners, int]] = []
        for row in self.members >= 0:
            owners = tuple(task for task, owns in zip(self.tasks, row, strict=True) if owns)
            if runs and runs[-1][0] == owners:
                runs[-1] = (owners, runs[-1][1] + 1)
            else:
                runs.append((owners, 1))
        return tuple(runs)

    @property
    def shared(self) -> int:
        """Neurons that belong to more than one task."""
        return int(((self.members >= 0).sum(axis=1) > 1).sum())

    def neurons(self, task: str) -> Int64[np.ndarray, " width"]:
        """The task's neurons in the order in which the zipped network holds them."""
        column = self.members[:, self.tasks.index(task)]
        return column[column >= 0]

    def neurons_shared(self, task: str) -> int:
        """How many of the task's neurons are shared; they come first in `neurons`."""
        member = self.members >= 0
        return int((member[:, self.tasks.index(task)] & (member.sum(axis=1) > 1)).sum())


@dataclass(frozen=True)
class GroupMatch:
    """The pairing of one neuron group and its predicted cost, the total functional difference of the pairs.

    `curve[k - 1]` is what the cheapest k pairs would cost if as many as possible were paired: a picture of what
    sharing less or more means.
    """

    group: str
    pairing: Pairing
    cost: float
    curve: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class InputSplit:
    """How one task's columns of a layer split into shared and own inputs, in the zipped network's order."""

    columns: Int64[Tensor, " columns"]
    shared: Int64[Tensor, " s"]
    own: Int64[Tensor, " p"]


def split_inputs(pairing: Pairing, task: str, per_neuron: int, bias: bool) -> InputSplit:
    """Columns of a layer that reads a paired group: `columns` reorders the original ones, `shared` and `own` index the
    reordered ones. The constant 1 behind a bias is an input that all tasks share.
    """
    order = torch.from_numpy(pairing.neurons(task))
    columns = (order[:, None] * per_neuron + torch.arange(per_neuron)).flatten()
    boundary, end = pairing.neurons_shared(task) * per_neuron, len(columns)
    shared, own = torch.arange(boundary), torch.arange(boundary, end)
    if bias:
        constant = torch.tensor([end])
        columns, shared = torch.cat([columns, constant]), torch.cat([shared, constant])
    return InputSplit(columns, shared, own)


def shared_curvature(hessian: Hessian, split: InputSplit, compensate: bool) -> Hessian:
    """``M``: the Hessian left on the shared inputs, own inputs compensating (Schur complement) or fixed."""
    if compensate and len(split.own):
        return hessian.schur(split.shared, split.own)
    return hessian.select(split.shared)


def functional_difference(
    weights: tuple[Float[Tensor, "a s"], Float[Tensor, "b s"]],
    curvatures: tuple[Hessian, Hessian],
    balance: tuple[float, float],
) -> Float[Tensor, "a b"]:
    """``d(i, j)`` for all pairs at once. Raises `SingularHessian`."""
    (rows_a, rows_b), (m_a, m_b), (alpha_a, alpha_b) = weights, curvatures, balance
    centre = torch.cat([rows_a, rows_b]).mean(dim=0)  # only differences count: less cancellation near the centre
    rows = torch.cat([rows_a - centre, rows_b - centre])
    total = weighted_sum([m_a, m_b], [alpha_a, alpha_b])
    image = alpha_a * alpha_b * m_a.product(total.solve(m_b.product(rows.T))).T  # P sᵀ, P = αβ M_A (αM_A+βM_B)⁻¹ M_B
    norms = (rows * image).sum(dim=1)
    a = len(rows_a)
    inner = rows[:a] @ image[a:].T
    return (0.5 * (norms[:a, None] + norms[None, a:]) - inner).clamp_(min=0)


def relative_balance(
    balance: Sequence[float], matrices: Sequence[Float[Tensor, "_ _"]], hessians: Sequence[Hessian]
) -> list[float]:
    """``α_t / √(E‖y_t‖²)``: squared errors relative to the amplitude of each task's own outputs ``y = W x``.

    Networks differ in the scale of their activations: without this the loudest would decide for all. Dividing by the
    energy itself would be scale-free, but then tasks whose inputs are bright pay for it (docs/method.md).
    """
    energies = [float((w.T * h.product(w.T)).sum()) for w, h in zip(matrices, hessians, strict=True)]
    return [alpha / energy**0.5 if energy > 0 else alpha for alpha, energy in zip(balance, energies, strict=True)]


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
    """The graph that all networks have in common. Raises `IncompatibleNetworks` with the first difference."""
    if len(networks) != 2:
        raise IncompatibleNetworks(
            f"zipping unites two networks, not {len(networks)} ({', '.join(networks) or 'none'})."
        )
    (first, a), (second, b) = networks.items()
    for x, y in zip(a.graph.nodes, b.graph.nodes, strict=False):
        if x != y:
            raise IncompatibleNetworks(
                f"the networks differ in structure: {first} has {_describe(x)} where {second} has {_describe(y)}."
                " Zip networks of the same topology."
            )
    if len(a.graph.nodes) != len(b.graph.nodes):
        shorter, longer = sorted((first, second), key=lambda task: len(networks[task].graph.nodes))
        extra = networks[longer].graph.nodes[len(networks[shorter].graph.nodes)]
        raise IncompatibleNetworks(
            f"the networks differ in structure: {longer} has {_describe(extra)} where {shorter} has ended. "
            "Zip networks of the same topology."
        )
    if a.input_shape != b.input_shape:
        raise IncompatibleNetworks(
            f"the networks read different inputs: {first} {list(a.input_shape)}, {second} {list(b.input_shape)}. "
            "Bring the inputs to one shape first."
        )
    if {w.dtype for n in networks.values() for w in n.weights.values()} not in ({torch.float32}, {torch.float64}):
        raise IncompatibleNetworks("the networks mix float32 and float64 weights. Convert them to one dtype.")
    return a.graph


def shared_counts(networks: Mapping[str, Network], config: ZipConfig) -> dict[str, int]:
    """Neurons to share in every hidden group. Raises `InvalidConfig` for settings that do not fit the networks."""
    first = next(iter(networks.values()))
    config.balance_of(tuple(networks))
    return config.counts(
        {group.name: [network.width(group) for network in networks.values()] for group in first.graph.hidden_groups}
    )


def _describe(node: Node) -> str:
    settings = ", ".join(f"{key}={value}" for key, value in node.settings.items())
    bias = " without bias" if node.is_layer and not node.bias else ""
    return f"{node.kind} {node.name!r}{bias}" + (f" ({settings})" if settings else "")


def identity_pairing(tasks: tuple[str, ...], width: int) -> Pairing:
    """Every channel shared with its namesake: the networks' common input."""
    return Pairing(tasks, np.repeat(np.arange(width)[:, None], len(tasks), axis=1))


def separate_pairing(tasks: tuple[str, ...], widths: Sequence[int]) -> Pairing:
    """Nothing shared: the networks' outputs."""
    return Pairing.from_pairs(tasks, widths, np.zeros((0, len(tasks)), dtype=np.int64))


def match(
    networks: Mapping[str, Network],
    moments: Mapping[str, Mapping[str, Moments]],
    config: ZipConfig,
) -> Iterator[GroupMatch]:
    """Pair the neurons of every hidden group, in topological order, on the originals' weights and Hessians.

    `moments[task][layer]` are the second moments of the original network's layer inputs. The split of a layer's
    inputs into shared and own ones follows from the groups paired before. Raises `IncompatibleNetworks`,
    `InvalidConfig`, `SingularHessian`.
    """
    graph = check_compatible(networks)
    tasks = tuple(networks)
    counts = shared_counts(networks, config)
    refit = config.method == "refit"
    input_channels = networks[tasks[0]].input_shape[0]
    pairings = {graph.groups[0].name: identity_pairing(tasks, input_channels)}
    for group in graph.hidden_groups:
        widths = [network.width(group) for network in networks.values()]
        total = torch.zeros(widths[0], widths[1], dtype=torch.float64)
        for layer in (node for node in graph.layers if node.name in group.writers):
            balance = config.balance_of(tasks)
            matrices, splits, hessians = [], [], []
            for task, network in networks.items():
                pairing = pairings[graph.read_by(layer.name).name]
                split = split_inputs(pairing, task, network.columns_per_neuron(layer), layer.bias)
                splits.append(split)
                matrices.append(network.weights[layer.name][:, split.columns].to(torch.float64))
                hessians.append(moments[task][layer.name].hessian(config.damping).select(split.columns))
            if refit:
                balance = relative_balance(balance, matrices, hessians)
            shared = [matrix[:, split.shared] for matrix, split in zip(matrices, splits, strict=True)]
            curvatures = [shared_curvature(h, split, refit) for h, split in zip(hessians, splits, strict=True)]
            total += functional_difference(
                (shared[0], shared[1]), (curvatures[0], curvatures[1]), (balance[0], balance[1])
            )
        found = _match_group(group, total.numpy(), counts[group.name], tasks, config)
        pairings[group.name] = found.pairing
        yield found


def _match_group(
    group: NeuronGroup, cost: Float[np.ndarray, "a b"], count: int, tasks: tuple[str, ...], config: ZipConfig
) -> GroupMatch:
    solve = assign if config.method == "refit" else assign_greedily
    most = min(cost.shape)
    complete = solve(cost, most)
    pairs = complete if count == most else solve(cost, count)
    return GroupMatch(
        group=group.name,
        pairing=Pairing.from_pairs(tasks, list(cost.shape), pairs),
        cost=float(cost[pairs[:, 0], pairs[:, 1]].sum()),
        curve=tuple(np.cumsum(np.sort(cost[complete[:, 0], complete[:, 1]])).tolist()),
    )
