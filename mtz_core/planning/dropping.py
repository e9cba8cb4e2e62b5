"""Which neurons can be dropped, and at what damage: optimal brain surgeon on the layers that read them.

When the neuron whose outputs are a layer's inputs ``S`` is dropped, the layer's other weights adjust in closed form.
The damage that is left (Hassibi and Stork 1993; here for a block of inputs and all rows of the layer at once) is

    ½ Σ_o f_o w_oSᵀ ([H⁻¹]_SS)⁻¹ w_oS,

with ``H`` the layer's Hessian and ``f_o`` the sensitivity of the loss to row o (`mtz_core.statistics.sensitivity`).
What is dropped is a *unit*: a neuron of one task, or neurons that several tasks share, which are dropped in all of
them. The units that cost least for the bytes that they free are dropped first, a few at a time. In between, ``H⁻¹`` and
the weights are updated, so that the damages of a sequence add up to the damage of dropping all of it. The damage of a
group that several layers read is the sum over these layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from mtz_core.network.graph import Network, Node
from mtz_core.network.groups import analysis_of
from mtz_core.network.narrowing import LEAST
from mtz_core.statistics.linalg import Hessian, invert
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities
from mtz_core.zipped.ownership import positions_of

AT_ONCE = 1 / 64
"""The fraction of the remaining units that is dropped at once."""

WIDEST = 8192
"""The most inputs of a layer whose inverse Hessian is kept up to date; in wider layers, damage is computed once."""


class Reader:
    """A layer that reads a group, as far as neurons have been dropped; or several that read it in the same columns.

    Attributes:
        slots: The columns of each of the group's neurons, ``[neurons, slots]``.
        classes: For each of the group's neurons, the number of its part: where a group is cut, parts are treated
            differently, and an operator may not work without any neuron of one.
        columns: The columns of the layers' matrices, each row times the root of its sensitivity; those of layers with
            fewer rows end in zeros. Dropped columns are left out from time to time.
        exact: Whether the inverse Hessians are kept up to date (see `WIDEST`).
        inverse: The inverse Hessians of the inputs that meet `columns`, if `exact`.
        dropped: Which of `columns` are dropped.
        blocks: Each neuron's block of the inverse Hessians, if not `exact`.
    """

    slots: Int64[Tensor, "neurons slots"]
    classes: Int64[np.ndarray, " neurons"]
    columns: Float[Tensor, "layers columns out"]
    inverse: Float[Tensor, "layers columns columns"]
    dropped: Bool[Tensor, " columns"]
    blocks: Float[Tensor, "layers neurons slots slots"]

    def __init__(
        self, network: Network, node: Node, group: str, hessian: Hessian, sensitivity: Float[Tensor, " out"]
    ) -> None:
        """Factorise the layer's Hessian.

        Args:
            network: The task's network.
            node: The layer.
            group: The group that it reads.
            hessian: The layer's damped Hessian.
            sensitivity: The sensitivity of the loss to each of the layer's rows.

        Raises:
            SingularHessian: If the Hessian cannot be factorised.
        """
        self.slots = torch.from_numpy(positions_of(network.graph.columns[node.name], group))
        self.classes = analysis_of(network).classes[group]
        self.columns = (network.matrix(node).T.to(torch.float64) * sensitivity.sqrt()).contiguous()[None]
        self.dropped = torch.zeros(hessian.size, dtype=torch.bool)
        self.exact = hessian.size <= WIDEST
        if self.exact:
            self.inverse = invert(hessian.dense())[None]
        else:
            self.blocks = torch.stack([_inverse_block(hessian, own) for own in self.slots])[None]

    def copy(self) -> Reader:
        """Copy the reader, to drop other neurons from it."""
        return self.side_by_side([self])[0]

    @staticmethod
    def side_by_side(readers: Sequence[Reader]) -> list[Reader]:
        """Copy readers. Those with the same columns become one, which handles all of their layers at once."""
        alike: dict[object, list[Reader]] = {}
        for reader in readers:
            same = (reader.slots.numpy().tobytes(), reader.dropped.numpy().tobytes())
            alike.setdefault(same if reader.exact else reader, []).append(reader)
        copies = []
        for own in alike.values():
            copy = object.__new__(Reader)
            copy.__dict__ = dict(own[0].__dict__)
            if copy.exact:
                most = max(reader.columns.shape[2] for reader in own)
                copy.columns = torch.cat([F.pad(r.columns, (0, most - r.columns.shape[2])) for r in own])
                copy.inverse = torch.cat([reader.inverse for reader in own])
                copy.dropped = own[0].dropped.clone()
            copies.append(copy)
        return copies

    def damages(self, neurons: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The damage of dropping each of these neurons alone, in nats."""
        own = self.slots[neurons]
        if own.shape[1] == 1 and self.exact:  # of all columns: picking some would copy them
            norms = torch.linalg.vector_norm(self.columns, dim=2)
            each = 0.5 * norms.square_() / self.inverse.diagonal(dim1=1, dim2=2)
            return each[:, own[:, 0]].clamp(min=0).sum(dim=0)
        blocks = self.inverse[:, own[:, :, None], own[:, None, :]] if self.exact else self.blocks[:, neurons]
        weights = self.columns[:, own]
        return 0.5 * (weights * torch.linalg.solve(blocks, weights)).sum(dim=(2, 3)).clamp(min=0).sum(dim=0)

    def drop(self, neurons: Int64[Tensor, " n"]) -> float:
        """Drop neurons and adjust the other weights to compensate.

        Args:
            neurons: The neurons' indices in the group.

        Returns:
            The damage of dropping all of them, in nats.
        """
        if not self.exact:
            return float(self.damages(neurons).sum())
        own = self.slots[neurons].flatten()
        weights, strip = self.columns[:, own], self.inverse[:, own]
        block = strip[:, :, own]
        answer = _solve(block, strip)
        damage = 0.5 * float((_solve(block, weights) * weights).sum(dim=(1, 2)).clamp(min=0).sum())
        self.columns.baddbmm_(answer.mT, weights, alpha=-1)
        self.inverse.baddbmm_(self.inverse[:, :, own], answer, alpha=-1)
        self.dropped[own] = True
        if 2 * int(self.dropped.sum()) > len(self.dropped):
            self._leave_out_dropped()
        return damage

    def _leave_out_dropped(self) -> None:
        stay = torch.nonzero(~self.dropped)[:, 0]
        self.slots = ((~self.dropped).cumsum(0) - 1)[self.slots]
        self.columns = self.columns.index_select(1, stay)
        self.inverse = self.inverse.index_select(1, stay).index_select(2, stay)
        self.dropped = self.dropped[stay]


def _solve(matrices: Float[Tensor, "layers n n"], right: Float[Tensor, "layers n m"]) -> Float[Tensor, "layers n m"]:
    """Solve for every column. Mostly n is 1, and dividing by a number takes a fraction of the time."""
    return right * matrices.reciprocal() if matrices.shape[-1] == 1 else torch.linalg.solve(matrices, right)


def _inverse_block(hessian: Hessian, own: Int64[Tensor, " slots"]) -> Float[Tensor, "slots slots"]:
    unit = torch.zeros(hessian.size, len(own), dtype=torch.float64)
    unit[own, torch.arange(len(own))] = 1
    return hessian.solve(unit)[own]


def readers(
    network: Network, group: str, moments: Mapping[str, Moments], sensitivity: Sensitivities, damping: float
) -> list[Reader]:
    """The layers of a network that read a group.

    Grouped convolutions are left out: they keep the group's neurons separate and do not tell what they are worth.

    Args:
        network: The network.
        group: The group.
        moments: The second moments of every layer's input.
        sensitivity: The sensitivity of the loss to each layer's rows.
        damping: ``λ`` relative to the mean diagonal of a layer's Hessian.

    Returns:
        A reader for every layer.

    Raises:
        SingularHessian: If a layer's Hessian cannot be factorised.
    """
    return [
        Reader(network, node, group, moments[node.name].hessian(damping), sensitivity[node.name])
        for node in network.graph.layers
        if group in network.graph.columns[node.name].groups and moments[node.name].conv_groups == 1
    ]


def eliminate(
    reading: Sequence[Sequence[Reader]],
    units: Int64[np.ndarray, "units tasks"],
    freed: Float64[np.ndarray, " units"],
    balance: Float64[np.ndarray, " tasks"] | None = None,
) -> tuple[Int64[np.ndarray, " n"], Float64[np.ndarray, "n tasks"]]:
    """Drop units one after the other until no task has more than `LEAST` of them left, or one of a part of several.

    Args:
        reading: For every task, the layers that read the group. They are not modified.
        units: The neuron of every task in each unit, or `NOT_A_MEMBER`.
        freed: The bytes that dropping each unit frees.
        balance: How much the damage to each task counts; alike if it is left out.

    Returns:
        The units in the order in which they are dropped, and the damage that each adds to every task.
    """
    balance = np.ones(units.shape[1]) if balance is None else balance
    reading = [Reader.side_by_side(task) for task in reading]
    owned = units >= 0
    counted, least = _kept(reading, units)
    alive, costs = np.ones(len(units), dtype=bool), np.zeros(units.shape)
    order: list[int] = []
    damage: list[np.ndarray] = []
    stale = set(range(units.shape[1]))
    while True:
        for t in stale:
            mine = np.flatnonzero(alive & owned[:, t])
            neurons = torch.from_numpy(units[mine, t])
            costs[mine, t] = sum(reader.damages(neurons).numpy() for reader in reading[t])
        spare = counted[alive].sum(axis=0) > least
        candidates = np.flatnonzero(alive & ~(counted & ~spare).any(axis=1))
        price = costs[candidates] @ balance / freed[candidates]
        cheapest = candidates[np.argsort(price, kind="stable")[: max(1, int(AT_ONCE * len(candidates)))]]
        left = counted[alive].sum(axis=0) - counted[cheapest].cumsum(axis=0)
        chosen = cheapest[(left >= least).all(axis=1)]
        if not len(chosen):
            return np.array(order, dtype=np.int64), np.array(damage).reshape(-1, units.shape[1])
        alive[chosen] = False
        stale = set(np.flatnonzero(owned[chosen].any(axis=0)).tolist())
        spent = np.zeros((len(chosen), units.shape[1]))
        for t in stale:
            mine = owned[chosen, t]
            together = sum(reader.drop(torch.from_numpy(units[chosen[mine], t])) for reader in reading[t])
            alone = costs[chosen[mine], t]
            spent[mine, t] = together * (alone / alone.sum() if alone.sum() > 0 else 1 / len(alone))
        order += chosen.tolist()
        damage += list(spent)


def _kept(
    reading: Sequence[Sequence[Reader]], units: Int64[np.ndarray, "units tasks"]
) -> tuple[Bool[np.ndarray, "units sets"], Int64[np.ndarray, " sets"]]:
    """The sets of units of which some have to be left, and how many: those of a task, those of each of its parts."""
    sets, least = [], []
    for own, column in zip(reading, units.T, strict=True):
        owned = column >= 0
        if owned.any():
            sets.append(owned)
            least.append(LEAST)
        classes = own[0].classes if own else np.zeros(0, dtype=np.int64)
        parts, sizes = np.unique(classes, return_counts=True)
        for part in parts[sizes > 1] if len(parts) > 1 else ():  # single neurons have been dropped on trial
            sets.append(owned & (classes[column] == part))
            least.append(1)
    return np.array(sets, dtype=bool).reshape(len(sets), len(units)).T, np.array(least, dtype=np.int64)
