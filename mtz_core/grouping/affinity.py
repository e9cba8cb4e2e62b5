"""How much two networks have in common: what sharing all their neurons would cost and save, without merging anything.

For neurons i of A and j of B with weights ``a`` and ``b`` on their common inputs, the functional difference of
`mtz_core.merging.matching` is ``½ (a − b)ᵀ P (a − b)``, with ``P = αβ H_A T⁻¹ H_B`` and ``T = α H_A + β H_B = L Lᵀ``.
As ``P`` is also ``α H_A − α² H_A T⁻¹ H_A``, all its values come from the images ``L⁻¹ H w``: one factorisation, one
triangular solve and one product per layer, in single precision, on those inputs that are not always 0.

``½ (aᵀPa + bᵀPb)``, each without its mean, is what two neurons of this strength would cost if they had nothing in
common. The *similarity* of two networks is the part of this that matched neurons save, with all layers weighed by the
sensitivities of the losses to them. The damage to a task is half of its stake, times the part that is not in common:
with equal Hessians, the mean of two neurons is that far from either. Sums of functional differences themselves predict
damage less well, because later layers make good for much of what earlier ones lose.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from mtz_core.merging.difference import weigh_by_sensitivity
from mtz_core.merging.matching import Matcher
from mtz_core.merging.pairing import Pairing, assign
from mtz_core.network.graph import Network, Node
from mtz_core.network.topology import first_difference
from mtz_core.planning.sizes import Sizes
from mtz_core.settings import DEFAULT_DAMPING, ZipConfig
from mtz_core.statistics.linalg import DenseHessian, Hessian, RowsHessian, SingularHessian
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.ownership import arrange, positions_of

_LEAST_BALANCE = 1e-3
"""The least weight that either task has in a layer."""

_TASKS = ("first", "second")


@dataclass(frozen=True)
class Affinity:
    """What two networks have in common, or why they cannot be compared.

    Attributes:
        similarity: The part of their functional energy that both have: 1 for networks that compute the same, whatever
            the order of their neurons.
        damage: The nats that each task is expected to lose if all neurons are shared. Measured to be right within a
            factor of about two (docs/benchmarks/affinities.md).
        saved: The bytes that sharing all neurons saves.
        why: Why the networks cannot be compared; empty if they can.
    """

    similarity: float
    damage: tuple[float, float]
    saved: int
    why: str = ""

    @property
    def comparable(self) -> bool:
        """Whether the networks could be zipped at all."""
        return not self.why

    @property
    def reversed(self) -> Affinity:
        """The same affinity with the networks in reverse order."""
        return replace(self, damage=self.damage[::-1])


@dataclass(frozen=True, eq=False)
class Affinities:
    """The affinities of all pairs of some models.

    Attributes:
        bytes: The size of every model, in bytes.
        tags: The tags of every model that has any.
        pairs: The affinity of ``(a, b)`` for every pair of models with ``a < b``.
    """

    bytes: Mapping[str, int]
    tags: Mapping[str, frozenset[str]]
    pairs: Mapping[tuple[str, str], Affinity]

    @property
    def models(self) -> tuple[str, ...]:
        """All models, in alphabetical order."""
        return tuple(sorted(self.bytes))

    def of(self, model: str, other: str) -> Affinity:
        """The affinity of two models. The damage to the first one comes first."""
        return self.pairs[model, other] if model < other else self.pairs[other, model].reversed


@dataclass(frozen=True, eq=False)
class Profile:
    """Everything that comparisons need of a network, for every layer that writes hidden neurons, in single precision.

    Attributes:
        network: The traced network.
        sensitivity: The sensitivity of the loss to each layer's rows, in nats per squared unit of the layer's output.
        matrices: The matrix of every layer, bias as the last column.
        hessians: The damped Hessian of every layer.
        images: ``W H`` of every layer whose Hessian is dense.
        carrying: For every layer, which inputs are ever other than 0.
        stake: What it would cost the task's loss if a neuron group had constant outputs, ``½ Σ F Var(y)`` in nats,
            averaged over the groups.
        structure: A digest of everything but values.
    """

    network: Network
    sensitivity: Sensitivities
    matrices: Mapping[str, Float[Tensor, "_out _columns"]]
    hessians: Mapping[str, Hessian]
    images: Mapping[str, Float[Tensor, "_out _columns"]]
    carrying: Mapping[str, Bool[np.ndarray, " _columns"]]
    stake: float
    structure: str

    @classmethod
    def of(
        cls,
        network: Network,
        moments: Mapping[str, Moments],
        sensitivity: Sensitivities,
        damping: float = DEFAULT_DAMPING,
    ) -> Profile:
        """Make the profile of a traced network from its statistics.

        Args:
            network: The traced network.
            moments: The second moments of each layer's input.
            sensitivity: The sensitivity of the loss to each layer's rows.
            damping: ``λ`` relative to the mean diagonal of a layer's Hessian.

        Returns:
            The profile.

        Raises:
            InvalidCalibration: If a layer has no calibration rows.
        """
        hidden = network.graph.hidden_groups
        written = {name for group in hidden for name in group.writers}
        matrices, hessians, images, carrying, stake = {}, {}, {}, {}, 0.0
        for node in network.graph.layers:
            if node.name not in written:
                continue
            matrix = network.matrix(node).to(torch.float32)
            hessian = _single(moments[node.name].hessian(damping))
            variance = hessian.energies(matrix.T)
            if node.bias is not None:
                mean = matrix @ hessian.product(_constant(hessian.size)[:, None])[:, 0]
                variance = (variance - mean.square()).clamp_(min=0)
            stake += 0.5 * float((sensitivity[node.name] * variance).sum()) / len(hidden)
            matrices[node.name], hessians[node.name] = matrix, hessian
            if isinstance(hessian, DenseHessian):
                images[node.name] = matrix @ hessian.matrix
            carrying[node.name] = _carrying(hessian, moments[node.name].damping(damping))
        return cls(network, sensitivity, matrices, hessians, images, carrying, stake, _structure(network))

    @property
    def bytes(self) -> int:
        """The memory that the profile takes, in bytes, its network included."""
        hessians = [h.rows if isinstance(h, RowsHessian) else h.matrix for h in self.hessians.values()]
        tensors = [*self.matrices.values(), *self.images.values(), *hessians]
        return self.network.bytes + sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _carrying(hessian: Hessian, damping: float) -> Bool[np.ndarray, " columns"]:
    if isinstance(hessian, RowsHessian):
        return (hessian.rows != 0).any(dim=0).numpy()
    return (hessian.matrix.diagonal() > (1 + 1e-5) * damping).numpy()


def _single(hessian: Hessian) -> Hessian:
    """A Hessian in single precision; for layers that lie side by side, the mean of their Hessians."""
    if isinstance(hessian, RowsHessian):
        return RowsHessian(hessian.rows.to(torch.float32), hessian.damping)
    matrix = hessian.matrix if hessian.matrix.ndim == 2 else hessian.matrix.mean(dim=0)
    return DenseHessian(matrix.to(torch.float32))


def _constant(size: int) -> Float[Tensor, " size"]:
    """The weights of a neuron that is always 1: the bias meets the last input."""
    weights = torch.zeros(size)
    weights[-1] = 1.0
    return weights


def _structure(network: Network) -> str:
    graph = network.graph
    digest = hashlib.sha256(repr((network.inputs, graph.output, graph.groups)).encode())
    digest.update(repr((graph.nodes, graph.widths)).encode())
    digest.update(repr([(name, tensor.shape, tensor.dtype) for name, tensor in network.state.items()]).encode())
    for axis in (*graph.rows.values(), *graph.columns.values()):
        digest.update(repr(axis.groups).encode() + axis.group.tobytes() + axis.neuron.tobytes())
    return digest.hexdigest()


@dataclass(frozen=True, eq=False)
class _Outline:
    """What networks of two structures can share.

    Attributes:
        writers: For every hidden group, the layers that write it and can be shared.
        counts: For every hidden group, the number of neurons that can be shared.
        reads: For every such layer, the hidden groups that it reads.
        saved: The bytes that sharing all of this saves.
        why: Why nothing can be shared; empty otherwise.
    """

    writers: Mapping[str, Sequence[Node]]
    counts: Mapping[str, int]
    reads: Mapping[str, frozenset[str]]
    saved: int
    why: str = ""


class Comparer:
    """Compares networks two at a time. What follows from structures alone is computed once per pair of structures."""

    def __init__(self) -> None:
        self._outlines: dict[tuple[str, str], _Outline] = {}

    def compare(self, first: Profile, second: Profile) -> Affinity:
        """Compare two networks.

        Args:
            first: The profile of one network.
            second: The profile of the other.

        Returns:
            What they have in common.

        Raises:
            SingularHessian: If a Hessian cannot be factorised.
        """
        key = first.structure, second.structure
        if key not in self._outlines:
            self._outlines[key] = _outline(first.network, second.network)
        outline = self._outlines[key]
        if outline.why:
            return Affinity(0.0, (0.0, 0.0), 0, outline.why)
        difference, energy = _differences(outline, (first, second))
        distance = min(max(difference / energy, 0.0), 1.0) if energy > 0 else 0.0
        return Affinity(1.0 - distance, (0.5 * distance * first.stake, 0.5 * distance * second.stake), outline.saved)


def _outline(first: Network, second: Network) -> _Outline:
    why = _why_not(first, second)
    if why:
        return _Outline({}, {}, {}, 0, why)
    networks = dict(zip(_TASKS, (first, second), strict=True))
    matcher = Matcher({task: Traced(network) for task, network in networks.items()}, ZipConfig())
    if not any(matcher.counts.values()):
        return _Outline({}, {}, {}, 0, "no layer can be shared")
    sizes = Sizes(networks)
    separate, shared = (sizes.counts(sizes.widths, own) for own in (dict.fromkeys(matcher.counts, 0), matcher.counts))
    saved = sizes.stored(separate) - sizes.stored(shared)
    reads = {node.name: frozenset(matcher.reads(node)) for nodes in matcher.writers.values() for node in nodes}
    return _Outline(matcher.writers, matcher.counts, reads, saved)


def _why_not(first: Network, second: Network) -> str:
    """Why two networks cannot be zipped, in words; empty if they can."""
    shapes = [[own.shape for own in network.inputs.values()] for network in (first, second)]
    if shapes[0] != shapes[1]:
        said = [", ".join(" × ".join(map(str, shape)) for shape in own) for own in shapes]
        return f"their inputs differ: {said[0]} and {said[1]}"
    difference = first_difference(first.graph, second.graph)
    if difference is not None:
        return f"their topologies differ: {difference[0]} where the other has {difference[1]}"
    dtypes = [
        [*(i.dtype for i in n.inputs.values()), *(n.state[node.weight].dtype for node in n.graph.layers)]
        for n in (first, second)
    ]
    unlike = next((pair for pair in zip(*dtypes, strict=True) if pair[0] != pair[1]), None)
    return f"their inputs or weights differ in type: {unlike[0]} and {unlike[1]}" if unlike else ""


def _differences(outline: _Outline, profiles: tuple[Profile, Profile]) -> tuple[float, float]:
    """Compute what sharing all matched neurons costs, and what it would cost if they had nothing in common.

    Groups are matched in topological order, using those of their layers whose inputs are matched already, as
    `Matcher.match` does. The costs in the other layers are added when all groups are matched.

    Args:
        outline: What the networks can share.
        profiles: The networks' profiles.

    Returns:
        Both costs, in nats.
    """
    pairings: dict[str, Pairing] = {}
    late: list[tuple[str, Node]] = []
    difference = energy = 0.0
    for name, writers in outline.writers.items():
        if not writers:
            continue
        ready = [node for node in writers if outline.reads[node.name] <= pairings.keys()]
        layers = [_layer(profiles, node, name, pairings) for node in ready or writers]
        cost = torch.stack([layer[0] for layer in layers]).sum(dim=0)
        tuples = assign(cost.to(torch.float64).numpy(), outline.counts[name])
        if ready:
            difference += float(cost[*tuples.T].sum())
            energy += sum(float(layer[1][*tuples.T].sum()) for layer in layers)
        late += [(name, node) for node in writers if node not in ready]
        pairings[name] = Pairing.from_tuples(_TASKS, cost.shape, tuples)
    for name, node in late:
        members = pairings[name].members
        tuples = members[(members >= 0).all(axis=1)]
        cost, strength = _layer(profiles, node, name, pairings)
        difference += float(cost[*tuples.T].sum())
        energy += float(strength[*tuples.T].sum())
    return difference, energy


@dataclass(frozen=True, eq=False)
class _Side:
    """One network's view of a layer on common inputs. With a bias, the last row is a neuron that is always 1.

    Attributes:
        rows: The weights.
        curvature: What is left of the Hessian on these inputs.
        images: The product of both.
    """

    rows: Float[Tensor, "n s"]
    curvature: Float[Tensor, "s s"]
    images: Float[Tensor, "n s"]


def _layer(
    profiles: tuple[Profile, Profile], node: Node, name: str, pairings: Mapping[str, Pairing]
) -> tuple[Float[Tensor, "a b"], Float[Tensor, "a b"]]:
    """The functional difference of all neurons in a layer, and their energy, in nats of both losses together."""
    places = [positions_of(profile.network.graph.rows[node.name], name) for profile in profiles]
    sensitivity = [profile.sensitivity[node.name] for profile in profiles]
    alpha = min(max(weigh_by_sensitivity((0.5, 0.5), sensitivity)[0], _LEAST_BALANCE), 1 - _LEAST_BALANCE)
    own, centred, cross = _products(_sides(profiles, node, pairings, places), alpha, node.bias is not None)
    # With Hessians alike each task's part of αβ δᵀHδ is β² δᵀHδ and α² δᵀHδ: this turns it into nats.
    ratio = (1 - alpha) / alpha, alpha / (1 - alpha)
    difference = energy = torch.zeros(len(places[0]), len(places[1]))
    for slot in range(places[0].shape[1]):
        parts = [slice(slot * len(place), (slot + 1) * len(place)) for place in places]
        weigh = [
            (rows[torch.from_numpy(place[:, slot])] * part).to(torch.float32)
            for rows, place, part in zip(sensitivity, places, ratio, strict=True)
        ]
        scale = 0.5 * _sums(weigh[0], weigh[1])
        distance = _sums(own[0][parts[0]], own[1][parts[1]]) - 2 * cross[parts[0], parts[1]]
        difference = difference + scale * distance.clamp_(min=0)
        energy = energy + scale * _sums(centred[0][parts[0]], centred[1][parts[1]])
    return difference, energy


def _sums(first: Float[Tensor, " a"], second: Float[Tensor, " b"]) -> Float[Tensor, "a b"]:
    return first[:, None] + second[None, :]


def _products(
    sides: tuple[_Side, _Side], alpha: float, centre: bool
) -> tuple[Sequence[Float[Tensor, " _n"]], Sequence[Float[Tensor, " _n"]], Float[Tensor, "a b"]]:
    """Compute ``wᵀPw`` of every row of both sides, the same of rows without their means, and ``aᵀPb`` of all pairs.

    Args:
        sides: Both networks' views of a layer.
        alpha: The weight of the first network; the second has the rest.
        centre: Whether means are removed; then the last row of either side is the neuron that is always 1.

    Returns:
        The three products. Those of rows hold one tensor for each network.

    Raises:
        SingularHessian: If the weighted sum of the curvatures cannot be factorised.
    """
    balance = alpha, 1 - alpha
    total = balance[0] * sides[0].curvature + balance[1] * sides[1].curvature
    halves = _turned(total, torch.cat([side.images for side in sides])).split([len(side.rows) for side in sides])
    own = [
        part * (side.rows * side.images).sum(dim=1) - part**2 * half.square().sum(dim=1)
        for side, half, part in zip(sides, halves, balance, strict=True)
    ]
    cross = balance[0] * balance[1] * (halves[0] @ halves[1].T)
    if not centre:
        return own, own, cross
    mean = cross[:-1, -1], cross[-1, :-1]
    level = cross[-1, -1].clamp(min=torch.finfo(torch.float32).tiny)
    own = [energy[:-1] for energy in own]
    centred = [(energy - along.square() / level).clamp_(min=0) for energy, along in zip(own, mean, strict=True)]
    return own, centred, cross[:-1, :-1]


def _turned(total: Float[Tensor, "s s"], images: Float[Tensor, "n s"]) -> Float[Tensor, "n s"]:
    """Compute ``L⁻¹ H w`` of every row, with ``T = L Lᵀ``; in double precision where single is too coarse.

    Args:
        total: ``T``.
        images: ``H w`` of every row.

    Returns:
        The turned images.

    Raises:
        SingularHessian: If ``T`` is not positive definite.
    """
    factor, info = torch.linalg.cholesky_ex(total)
    if not int(info):
        return torch.linalg.solve_triangular(factor.mT, images, upper=True, left=False)
    factor, info = torch.linalg.cholesky_ex(total.to(torch.float64))
    if int(info):
        raise SingularHessian(f"two Hessians of size {len(total)} have no positive definite sum. Raise `damping`.")
    return torch.linalg.solve_triangular(factor.mT, images.to(torch.float64), upper=True, left=False).to(torch.float32)


def _sides(
    profiles: tuple[Profile, Profile],
    node: Node,
    pairings: Mapping[str, Pairing],
    places: Sequence[Int64[np.ndarray, "_neurons slots"]],
) -> tuple[_Side, _Side]:
    """Form both views of a layer on the inputs that correspond, in matched order.

    Inputs without a partner compensate. Inputs that are always 0 in both networks are left out: their weights have no
    effect on the data.

    Args:
        profiles: The networks' profiles.
        node: The layer.
        pairings: The pairings of the groups that are matched already.
        places: The rows of each neuron of the group, for each network.

    Returns:
        The view of each network.
    """
    hessians = [profile.hessians[node.name] for profile in profiles]
    shared = _common_inputs(profiles, node, pairings)
    own = [np.setdiff1d(np.arange(h.size), index) for h, index in zip(hessians, shared, strict=True)]
    rows = [torch.from_numpy(place.T.flatten()) for place in places]  # slot by slot
    few = [len(hessian.rows) for hessian in hessians if isinstance(hessian, RowsHessian)]
    if len(few) == len(hessians) and sum(few) < len(shared[0]):
        return _in_span(profiles, node, shared, own, rows)
    carrying = np.zeros(len(shared[0]), dtype=bool)
    for profile, index in zip(profiles, shared, strict=True):
        carrying |= profile.carrying[node.name][index]
    sides = []
    for profile, hessian, index, rest, row in zip(profiles, hessians, shared, own, rows, strict=True):
        inputs = torch.from_numpy(index[carrying])
        weights = _picked(profile.matrices[node.name], row, inputs)
        if len(rest):
            curvature = DenseHessian(hessian.dense()).eliminate(inputs, torch.from_numpy(rest)).curvature.dense()
        else:
            curvature = _picked(hessian.dense(), inputs, inputs)
        known = not len(rest) and node.name in profile.images
        images = _picked(profile.images[node.name], row, inputs) if known else weights @ curvature
        if node.bias is not None:
            weights = torch.cat([weights, _constant(len(inputs))[None]])
            images = torch.cat([images, curvature[-1:]])
        sides.append(_Side(weights, curvature, images))
    return sides[0], sides[1]


def _common_inputs(
    profiles: tuple[Profile, Profile], node: Node, pairings: Mapping[str, Pairing]
) -> list[Int64[np.ndarray, " s"]]:
    """The positions of a layer's inputs that correspond in both networks, that of the bias last."""
    members = {group: pairing.members for group, pairing in pairings.items()}
    axes = {task: p.network.graph.columns[node.name] for task, p in zip(_TASKS, profiles, strict=True)}
    common = [run for run in arrange(_TASKS, axes, members).segments if run.owners == _TASKS]
    shared = []
    for task, profile in zip(_TASKS, profiles, strict=True):
        places = np.concatenate([np.zeros(0, dtype=np.int64), *(run.places[task] for run in common)])
        shared.append(np.append(places, profile.hessians[node.name].size - 1) if node.bias is not None else places)
    return shared


def _in_span(
    profiles: tuple[Profile, Profile],
    node: Node,
    shared: Sequence[Int64[np.ndarray, " s"]],
    own: Sequence[Int64[np.ndarray, " _p"]],
    rows: Sequence[Int64[Tensor, " _n"]],
) -> tuple[_Side, _Side]:
    """Both views where rows are fewer than inputs, in an orthonormal basis of what the rows of both networks span."""
    data, dampings = [], []
    for profile, index, rest in zip(profiles, shared, own, strict=True):
        hessian, inputs = profile.hessians[node.name], torch.from_numpy(index)
        left = hessian.eliminate(inputs, torch.from_numpy(rest)).curvature if len(rest) else hessian.select(inputs)
        assert isinstance(left, RowsHessian)
        data.append(left.rows)
        dampings.append(left.damping)
    basis = _basis(torch.cat(data))
    sides = []
    for profile, index, row, seen, damping in zip(profiles, shared, rows, data, dampings, strict=True):
        weights = _picked(profile.matrices[node.name], row, torch.from_numpy(index))
        if node.bias is not None:
            weights = torch.cat([weights, _constant(len(index))[None]])
        weights, seen = weights @ basis.T, seen @ basis.T
        curvature = seen.T @ seen
        curvature.diagonal().add_(damping)
        sides.append(_Side(weights, curvature, weights @ curvature))
    return sides[0], sides[1]


def _basis(rows: Float[Tensor, "r n"]) -> Float[Tensor, "k n"]:
    """Orthonormal rows that span the given ones, as far as single precision can tell."""
    values, vectors = torch.linalg.eigh((rows @ rows.T).to(torch.float64))
    kept = values > values[-1] * len(rows) * torch.finfo(torch.float32).eps
    return (vectors[:, kept] / values[kept].sqrt()).T.to(torch.float32) @ rows


def _picked(
    matrix: Float[Tensor, "n s"], rows: Int64[Tensor, " a"], columns: Int64[Tensor, " b"]
) -> Float[Tensor, "a b"]:
    """Some rows and columns, in the given order. Several times as fast as indexing."""
    return matrix.index_select(0, rows).index_select(1, columns)
