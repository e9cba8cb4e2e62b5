"""Fit one layer of all tasks: to the originals' outputs, and to each other where neurons are shared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped
from torch import Tensor

from mtz_core.merging.difference import weigh_by_sensitivity
from mtz_core.merging.rounding import Rounder, choose_scales
from mtz_core.network.graph import Network, Node, blank_run
from mtz_core.network.layers import from_rows
from mtz_core.network.narrowing import Reduced
from mtz_core.network.operations import operation_of
from mtz_core.settings import ZipConfig
from mtz_core.statistics.calibration import layer_rows, sample_positions
from mtz_core.statistics.linalg import CHUNK, DenseHessian, Elimination, Hessian, chunks, weighted_sum
from mtz_core.statistics.moments import Moments
from mtz_core.zipped.codes import nearest
from mtz_core.zipped.ownership import Arrangement, Owners, Segment

HELD_OUT = 5
"""One row in this many is held out where the error of a fit is measured."""


@dataclass(frozen=True, eq=False)
class Clip:
    """What the activation behind a layer cannot tell apart: outputs beyond a threshold.

    Attributes:
        threshold: The threshold of every neuron, in units of the layer's outputs.
        below: Whether it is the outputs below the threshold that are clipped, per neuron; otherwise those above.
    """

    threshold: Float[Tensor, " out"]
    below: Bool[Tensor, " out"]

    def nearest_target(self, y: Float[Tensor, "n out"], y_hat: Float[Tensor, "n out"]) -> Float[Tensor, "n out"]:
        """Relax targets: of all values that the activation treats like `y`, the ones nearest to `y_hat`.

        Args:
            y: The targets.
            y_hat: The present outputs.

        Returns:
            The relaxed targets.
        """
        clipped = torch.where(self.below, y <= self.threshold, y >= self.threshold)
        nearest = torch.where(self.below, y_hat.minimum(self.threshold), y_hat.maximum(self.threshold))
        return torch.where(clipped, nearest, y)


def following_clip(network: Network, layer: Node) -> Clip | None:
    """Find what the only reader of a layer's output clips, directly or behind a batch normalisation.

    Args:
        network: The network.
        layer: The layer.

    Returns:
        The clip; None if nothing is clipped, or if several nodes read the output.
    """
    width = network.state[layer.weight].new_ones(layer.layer.matrix(network.state[layer.weight]).shape[0])
    reader = _only_reader(network, layer.name)
    if reader is None:
        return None
    operation = operation_of(reader.kind)
    if operation is not None and operation.clips:
        return Clip(width * operation.floor, width > 0)
    if reader.kind != "batch_norm" or reader.sources != (layer.name,) or not _on_second_axis(network, layer):
        return None
    behind = _only_reader(network, reader.name)
    operation = operation_of(behind.kind) if behind is not None else None
    if operation is None or not operation.clips:
        return None
    defaults = {"running_mean": 0 * width, "running_var": width, "weight": width, "bias": 0 * width}
    mean, variance, scale, shift = (
        network.state[reader.arguments[name]["state"]] if reader.arguments.get(name) else default
        for name, default in defaults.items()
    )
    deviation = (variance + float(reader.arguments["eps"])).sqrt()
    threshold = torch.where(scale == 0, torch.inf, mean + (operation.floor - shift) * deviation / scale)
    return Clip(threshold, scale >= 0)


def _on_second_axis(network: Network, layer: Node) -> bool:
    """Whether a layer's neurons lie where a batch normalisation expects channels."""
    if layer.layer.channel_axis(3) == 1:
        return True
    return next(value for node, value in blank_run(network) if node.name == layer.name).ndim == 2


def _only_reader(network: Network, name: str) -> Node | None:
    readers = [node for node in network.graph.nodes if name in node.sources]
    return readers[0] if len(readers) == 1 and name != network.graph.output else None


class LayerFit:
    """One task's side of a layer: its matrix in float64, and the rows that the zipped network feeds it.

    Attributes:
        node: The layer in the reduced network.
        network: The task's network, dropped neurons removed.
        zipped: The layer's inputs in the zipped network, batch by batch.
        paper: Whether the method is the paper's.
        sensitivity: The sensitivity of the task's loss to the rows that are left; None if it is not given.
        held_out: Whether the layer is fitted to most rows only, so that `held_out_error` can measure on the others.
        shape: The shape of the layer's weight.
        conv_groups: How many layers lie side by side.
        intact: Whether the zipped network's inputs are the original's.
        changed: Whether the matrix may differ from the original's.
        scales: The step of every row's grid, 0 of rows that are not rounded.
        targets: The original's outputs, batch by batch.
        hessian: The damped Hessian of the rows; None where the layer stays as it is, because nothing is shared in it or
            before it, or because it mixes positions some of which are gone. The attributes below exist only if there is
            one.
        matrix: The layer's matrix in float64, bias as the last column.
        positions: The positions at which rows are taken, batch by batch.
        count: The number of rows.
        damping: The absolute damping ``λ``.
    """

    def __init__(
        self,
        node: Node,
        reduced: Reduced,
        original: Sequence[Shaped[Tensor, "_ ..."]],
        zipped: Sequence[Shaped[Tensor, "_ ..."]],
        shared: bool,
        config: ZipConfig,
        sensitivity: Float[Tensor, " all_rows"] | None = None,
        damping: float | None = None,
        held_out: bool = False,
        targets: Sequence[Float[Tensor, "_n all_rows"]] | None = None,
        rounded: bool = False,
    ) -> None:
        """Collect the layer's rows and targets, and form its Hessian.

        Args:
            node: The layer in the reduced network.
            reduced: The task's network, some of whose neurons may have been dropped, and its original.
            original: The layer's inputs in the original network, batch by batch. They may be left out if `targets` are
                given and the inputs in the zipped network differ.
            zipped: The layer's inputs in the zipped network, batch by batch.
            shared: Whether any of the layer's rows are shared.
            config: How to zip.
            sensitivity: The sensitivity of the task's loss to the original layer's rows.
            damping: ``λ`` relative to the mean diagonal of the Hessian; `ZipConfig.fixed_damping` if it is not given.
            held_out: Whether one row in `HELD_OUT` is held out.
            targets: What the original layer puts out at the sampled positions, if that is known; for ``refit``.
            rounded: Whether any of the layer's rows are to be rounded.

        Raises:
            InvalidCalibration: If there are no rows.
        """
        network = reduced.network
        self.node, self.network, self.zipped = node, network, zipped
        self.paper, self.held_out = config.method == "paper", held_out
        left = reduced.kept_rows(node)
        self.sensitivity = sensitivity if sensitivity is None or left is None else sensitivity[left]
        self.shape = tuple(network.state[node.weight].shape)
        self.conv_groups = node.layer.conv_groups(node.arguments)
        self.intact = bool(original) and all(a is b for a, b in zip(original, zipped, strict=True))
        self.changed = False
        self.hessian: Hessian | None = None
        self.targets: list[Float[Tensor, "n out"]] = []
        self._kept: list[Float[Tensor, "n columns"]] = []
        self.matrix = network.matrix(node).to(torch.float64, copy=True)
        self.scales = self.matrix.new_zeros(len(self.matrix))
        self._own = not shared
        if not shared and (self.paper or (self.intact and not rounded) or reduced.kept_positions(node)):
            return
        self.positions = [sample_positions(node, self.shape, x_hat, config) for x_hat in zipped]
        moments = Moments(self.matrix.shape[1], self.conv_groups)
        if targets is None:
            before = reduced.original.graph.node(node.name)
            target, left = reduced.original.matrix(before), reduced.kept_rows(node)
            if left is not None and self.conv_groups == 1:
                target, left = target[left], None
            for x, x_hat, positions in zip(original, zipped, self.positions, strict=True):
                rows = self._rows(x, before, positions)
                fed = rows if self.paper or x is x_hat else self._rows(x_hat, node, positions)
                moments.add(self._fitted(fed))
                if not self.paper:
                    self._keep(fed)
                    outputs = from_rows(rows, target, before.layer.conv_groups(before.arguments))
                    self.targets.append(outputs if left is None else outputs[:, left])
        else:
            for x_hat, positions in zip(zipped, self.positions, strict=True):
                fed = self._rows(x_hat, node, positions)
                moments.add(self._fitted(fed))
                self._keep(fed)
            self.targets = [outputs if left is None else outputs[:, left] for outputs in targets]
        self.count = moments.count
        relative = config.fixed_damping if damping is None else damping
        self.damping = moments.damping(relative)
        self.hessian = moments.hessian(relative)

    def _rows(self, x: Tensor, node: Node, positions: Int64[Tensor, " p"]) -> Float[Tensor, "n columns"]:
        rows = layer_rows(node, self.shape, x, positions)
        return rows.to(self.network.state[self.node.weight].dtype)

    def _keep(self, rows: Float[Tensor, "n columns"]) -> None:
        """Keep the rows of a batch, if those of all batches are few."""
        total = sum(len(x_hat) * len(positions) for x_hat, positions in zip(self.zipped, self.positions, strict=True))
        if total * rows.shape[1] <= CHUNK:
            self._kept.append(rows)

    def _fed(self) -> Iterator[Float[Tensor, "_n columns"]]:
        """The rows that the zipped network feeds the layer, batch by batch."""
        if self._kept:
            return iter(self._kept)
        return (self._rows(x, self.node, own) for x, own in zip(self.zipped, self.positions, strict=True))

    def _stacked(
        self, matrix: Float[Tensor, "out in"]
    ) -> Float[Tensor, "{self.conv_groups} out//{self.conv_groups} in"]:
        return matrix.unflatten(0, (self.conv_groups, -1))

    def _fitted(self, rows: Float[Tensor, "n columns"]) -> Float[Tensor, "m columns"]:
        """The rows of a batch that the layer is fitted to."""
        return rows[: len(rows) - len(rows) // HELD_OUT] if self.held_out else rows

    def held_out_error(self) -> float:
        """``½ Σ F E‖y − W x̂‖²`` on the held-out rows, in nats."""
        if self.hessian is None:
            return 0.0
        total, count = 0.0, 0
        for target, fed in zip(self.targets, self._fed(), strict=True):
            rows = fed[len(self._fitted(target)) :]
            errors = target[len(target) - len(rows) :] - from_rows(rows, self.matrix.to(rows.dtype), self.conv_groups)
            sensitivity = 1.0 if self.sensitivity is None else self.sensitivity.to(errors.dtype)
            total, count = total + 0.5 * float((sensitivity * errors.square()).sum()), count + len(rows)
        return total / max(count, 1)

    def refit(self, clip: Clip | None) -> None:
        """Fit the matrix to the original's outputs ``y`` on what the zipped network feeds, drawn to the prior ``W₀``.

        Solves ``min E‖y − W x̂‖² + λ‖W − W₀‖²`` by one Newton step from the present matrix, which is exact:
        ``W + (E[(y − W x̂) x̂ᵀ] − λ (W − W₀))(Ĥ + λ I)⁻¹``.

        Args:
            clip: What the next activation clips. If given, ``y`` is first relaxed to the targets nearest to the present
                outputs.

        Raises:
            SingularHessian: If the Hessian cannot be factorised.
        """
        if self.hessian is None or (self.intact and (clip is None or self._own)):
            return  # an intact layer is its own best fit
        prior = self.network.matrix(self.node)
        present = self.matrix.to(prior.dtype)
        gradient = torch.zeros_like(self.matrix)
        for target, fed in zip(self.targets, self._fed(), strict=True):
            fed, target = self._fitted(fed), self._fitted(target)
            output = from_rows(fed, present, self.conv_groups)
            if clip is not None:
                target = clip.nearest_target(target, output)
            gradient += self._correlate(target - output, fed)
        gradient.div_(self.count)
        gradient.sub_((self.matrix - prior).mul_(self.damping))
        del present, prior
        if self.conv_groups == 1:
            for part in chunks(*gradient.shape):
                self.matrix[part] += self.hessian.solve(gradient[part].T).T
        else:
            self.matrix += self.hessian.solve(self._stacked(gradient).mT).mT.flatten(0, 1)
        self.changed = True

    def _correlate(self, outputs: Float[Tensor, "n out"], rows: Tensor) -> Float[Tensor, "out in"]:
        if self.conv_groups == 1:
            return outputs.T @ rows
        split = rows.unflatten(1, (self.conv_groups, -1)).transpose(0, 1)
        return torch.bmm(outputs.unflatten(1, (self.conv_groups, -1)).permute(1, 2, 0), split).flatten(0, 1)

    @property
    def few_rows(self) -> str:
        """The numbers of rows and of inputs in words, if the layer is fitted to fewer rows than it has inputs."""
        if self.hessian is None or self.count >= self.hessian.size:
            return ""
        return f"{self.count:,} rows for {self.hessian.size:,} inputs"

    def stored_matrix(self) -> Float[Tensor, "out in"]:
        """The matrix that the zipped network stores, in the original's dtype."""
        original = self.network.matrix(self.node)
        return self.matrix.to(original.dtype) if self.changed else original

    def set_rounded(
        self, rows: Int64[Tensor, " n"], weights: Float[Tensor, "n in"], scales: Float[Tensor, " n"]
    ) -> None:
        """Take rounded rows."""
        self.matrix[rows], self.scales[rows], self.changed = weights, scales, True

    def tensors(self) -> dict[str, Tensor] | None:
        """Weight and bias as the zipped network has them, by name; None if they are the original's."""
        if not self.changed:
            return None
        matrix = self.stored_matrix()
        if self.node.bias is None:
            return {self.node.weight: self.node.layer.from_matrix(matrix, self.shape)}
        weight = self.node.layer.from_matrix(matrix[:, :-1], self.shape)
        return {self.node.weight: weight, self.node.bias: matrix[:, -1]}

    def release(self) -> None:
        """Free everything but the weights."""
        self.hessian, self.targets, self.zipped, self._kept = None, [], [], []
        if hasattr(self, "matrix"):
            del self.matrix


def fit(
    parts: Mapping[str, LayerFit],
    rows: Arrangement,
    columns: Arrangement,
    clips: Mapping[str, Clip | None],
    config: ZipConfig,
    bits: Mapping[Owners, int] = MappingProxyType({}),
) -> float:
    """Find the matrices of all tasks, with common weights for shared neurons.

    Args:
        parts: The tasks' sides of the layer. Their matrices are updated.
        rows: Who owns the layer's rows.
        columns: Who owns the layer's columns.
        clips: What follows the layer in every task, for the rounds of ``refit``.
        config: How to zip.
        bits: The number of bits to which the rows of these tasks are rounded; those of others are not.

    Returns:
        The predicted cost of sharing.

    Raises:
        SingularHessian: If a Hessian cannot be factorised.
    """
    if config.method == "refit":
        for part in parts.values():
            part.refit(None)
    segments = [segment for segment in rows.segments if len(segment.owners) > 1]
    balance = dict(zip(parts, config.balance_of(tuple(parts)), strict=True)) if segments else {}
    if config.method == "refit" and segments:
        sensitivity = [part.sensitivity for part in parts.values() if part.sensitivity is not None]
        if len(sensitivity) == len(parts):
            balance = dict(zip(parts, weigh_by_sensitivity(list(balance.values()), sensitivity), strict=True))
    sharing = [_sharing(parts, segment, columns, balance) for segment in segments]
    cost = sum(one.apply() for one in sharing)
    for _ in range(config.refit_rounds if config.method == "refit" and any(clips.values()) else 0):
        for task, part in parts.items():
            part.refit(clips[task])
        cost = sum(one.apply() for one in sharing)
    for one in sharing:
        if one.segment.owners in bits:
            one.round(bits[one.segment.owners])
    for segment in rows.segments:
        if len(segment.owners) == 1 and segment.owners in bits:
            (task,) = segment.owners
            _round_own(parts[task], torch.from_numpy(segment.places[task]), bits[segment.owners])
    return cost


def _round_own(part: LayerFit, rows: Int64[Tensor, " n"], bits: int) -> None:
    """Round rows that one task alone has, on all of their inputs; the biases answer."""
    free = int(part.node.bias is not None)
    weights = part.matrix[rows]
    if part.hessian is None:  # no rows tell what an error costs
        own = weights[:, : weights.shape[1] - free]
        scales = choose_scales(own, own.new_ones(own.shape[1]), bits)
        weights[:, : own.shape[1]] = nearest(own, scales[:, None], bits)
    elif part.conv_groups == 1:
        rounder = Rounder(part.hessian, free)
        scales = choose_scales(
            weights[:, : weights.shape[1] - free], rounder.importance[: weights.shape[1] - free], bits
        )
        weights = rounder.round(weights, scales, bits)
    else:
        weights, scales = _round_grouped(weights, _grouped_hessian(part, rows), free, bits)
    part.set_rounded(rows, weights, scales)


def _grouped_hessian(part: LayerFit, rows: Int64[Tensor, " n"]) -> Float[Tensor, "n inputs inputs"]:
    """The Hessian of each of these rows of a grouped convolution: that of its conv_group."""
    assert isinstance(part.hessian, DenseHessian)
    return part.hessian.matrix[rows // (len(part.matrix) // part.conv_groups)]


def _round_grouped(
    weights: Float[Tensor, "rows inputs"], hessians: Float[Tensor, "rows inputs inputs"], free: int, bits: int
) -> tuple[Float[Tensor, "rows inputs"], Float[Tensor, " rows"]]:
    """Round rows that have a Hessian each, and return them with their scales."""
    rounder = Rounder(DenseHessian(hessians), free)
    stacked, left = weights[:, None], weights.shape[1] - free
    scales = choose_scales(stacked[..., :left], rounder.importance[:, :left], bits)
    return rounder.round(stacked, scales, bits)[:, 0], scales[:, 0]


def _sharing(
    parts: Mapping[str, LayerFit], segment: Segment, columns: Arrangement, balance: Mapping[str, float]
) -> _Sharing | _GroupedSharing:
    own = {task: parts[task] for task in segment.owners}
    return (_GroupedSharing if next(iter(own.values())).conv_groups > 1 else _Sharing)(own, segment, columns, balance)


class _Sharing:
    """Rows that several tasks share, and the factorisations that their common weights need.

    The weights are ``s* = (Σ α_t M_t)⁻¹ Σ α_t M_t s_t`` on the inputs that two or more of the tasks share. The weights
    of inputs that only one of them has answer with ``−H_pp⁻¹ H_ps δ``, unless the method is the paper's.
    """

    def __init__(
        self, parts: Mapping[str, LayerFit], segment: Segment, columns: Arrangement, balance: Mapping[str, float]
    ) -> None:
        self.parts, self.segment = parts, segment
        self.balance = [balance[task] for task in segment.owners]
        common = [c for c in columns.segments if len(set(c.owners) & set(segment.owners)) > 1]
        ends = np.cumsum([0, *(c.size for c in common)])
        self.size = int(ends[-1])
        self.shared: dict[str, Int64[Tensor, " s"]] = {}
        self.own: dict[str, Int64[Tensor, " p"]] = {}
        self.places: dict[str, Int64[Tensor, " s"]] = {}
        bias = next(iter(parts.values())).node.bias is not None
        for task, part in parts.items():
            inputs = part.matrix.shape[1]
            mine = [(c.places[task], np.arange(ends[i], ends[i + 1])) for i, c in enumerate(common) if task in c.owners]
            shared = np.concatenate([np.zeros(0, dtype=np.int64), *(place for place, _ in mine)])
            places = np.concatenate([np.zeros(0, dtype=np.int64), *(place for _, place in mine)])
            if bias:
                shared, places = np.append(shared, inputs - 1), np.append(places, self.size)
            self.shared[task], self.places[task] = torch.from_numpy(shared), torch.from_numpy(places)
            self.own[task] = torch.from_numpy(np.setdiff1d(np.arange(inputs), shared))
        self.size += bias
        self.left = {task: self._eliminate(task) for task in parts}
        self.curvatures = {task: self._widen(task) for task in parts}
        self.total = weighted_sum(list(self.curvatures.values()), self.balance) if self.size else None

    def _eliminate(self, task: str) -> Elimination:
        part, shared, own = self.parts[task], self.shared[task], self.own[task]
        assert part.hessian is not None
        if part.paper or not len(own):
            whole = len(shared) == part.hessian.size and bool((shared == torch.arange(len(shared))).all())
            curvature = part.hessian if whole else part.hessian.select(shared)
            return Elimination(curvature, lambda change: change.new_zeros(0, change.shape[1]))
        return part.hessian.eliminate(shared, own)

    def _widen(self, task: str) -> Hessian:
        """A task's curvature on all inputs that any two of the tasks share."""
        curvature, places = self.left[task].curvature, self.places[task]
        if len(places) == self.size:
            return curvature
        wide = torch.zeros(self.size, self.size, dtype=torch.float64)
        wide[places[:, None], places] = curvature.dense()
        return DenseHessian(wide)

    def apply(self) -> float:
        """Give the rows their common weights and return the cost."""
        return sum(self._apply(part) for part in chunks(self.segment.size, self.size)) if self.size else 0.0

    def round(self, bits: int) -> None:
        """Round first what the tasks share, under the sum of what they feel, then what each has of its own."""
        free = int(next(iter(self.parts.values())).node.bias is not None)
        common = self.size - free
        rounder = Rounder(self.total, free) if common and self.total is not None else None
        own = {
            task: Rounder(part.hessian.select(self.own[task]))
            for task, part in self.parts.items()
            if part.hessian is not None and len(self.own[task])
        }
        for some in chunks(self.segment.size, max(part.matrix.shape[1] for part in self.parts.values())):
            self._round(some, bits, common, rounder, own)

    def _round(self, some: slice, bits: int, common: int, rounder: Rounder | None, own: Mapping[str, Rounder]) -> None:
        rows = {task: torch.from_numpy(self.segment.places[task][some]) for task in self.parts}
        mean = torch.zeros(some.stop - some.start, self.size, dtype=torch.float64)
        for task, part in self.parts.items():
            mean[:, self.places[task]] = part.matrix[rows[task]][:, self.shared[task]]
        balance = dict(zip(self.parts, self.balance, strict=True))
        seen = [mean[:, :common]] if rounder is not None else []
        felt = [rounder.importance[:common]] if rounder is not None else []
        for task, one in own.items():
            seen.append(self.parts[task].matrix[rows[task]][:, self.own[task]])
            felt.append(balance[task] * one.importance)
        scales = choose_scales(torch.cat(seen, dim=1), torch.cat(felt), bits)
        rounded = mean if rounder is None else rounder.round(mean, scales, bits)
        for task, part in self.parts.items():
            weights = part.matrix[rows[task]]
            change = (rounded[:, self.places[task]] - weights[:, self.shared[task]]).T
            weights[:, self.shared[task]] = rounded[:, self.places[task]]
            if task in own:
                answered = weights[:, self.own[task]] + self.left[task].answer(change).T
                weights[:, self.own[task]] = own[task].round(answered, scales, bits)
            part.set_rounded(rows[task], weights, scales)

    def _apply(self, some: slice) -> float:
        assert self.total is not None
        rows = {task: torch.from_numpy(self.segment.places[task][some]) for task in self.parts}
        weights = {task: part.matrix[rows[task]][:, self.shared[task]] for task, part in self.parts.items()}
        mean = torch.zeros(some.stop - some.start, self.size, dtype=torch.float64)
        owners = torch.zeros(self.size, dtype=torch.float64)
        for task, own in weights.items():
            mean.index_add_(1, self.places[task], own)
            owners[self.places[task]] += 1
        mean /= owners  # solving for the distance from the mean keeps equal neurons exactly equal
        pull = torch.zeros_like(mean)
        for (task, own), alpha in zip(weights.items(), self.balance, strict=True):
            distance = torch.zeros_like(mean)
            distance[:, self.places[task]] = own - mean[:, self.places[task]]
            pull += alpha * self.curvatures[task].product(distance.T).T
        merged = mean + self.total.solve(pull.T).T
        cost = 0.0
        for (task, own), alpha in zip(weights.items(), self.balance, strict=True):
            part = self.parts[task]
            change = (merged[:, self.places[task]] - own).T
            cost += 0.5 * alpha * float(self.left[task].curvature.energies(change).sum())
            part.matrix[rows[task][:, None], self.shared[task]] = merged[:, self.places[task]]
            if not part.paper and len(self.own[task]):
                part.matrix[rows[task][:, None], self.own[task]] += self.left[task].answer(change).T
            part.changed = True
        return cost


class _GroupedSharing:
    """The same for a grouped convolution: every row has the Hessian of its conv_group, and no input is own."""

    def __init__(
        self, parts: Mapping[str, LayerFit], segment: Segment, columns: Arrangement, balance: Mapping[str, float]
    ) -> None:
        self.parts, self.segment = parts, segment
        self.balance = [balance[task] for task in segment.owners]

    def apply(self) -> float:
        """Give the rows their common weights and return the cost."""
        return sum(self._apply(some) for some in self._chunks())

    def _chunks(self) -> Iterator[slice]:
        return chunks(self.segment.size, next(iter(self.parts.values())).matrix.shape[1] ** 2)

    def round(self, bits: int) -> None:
        """Round the rows under the sum of what the tasks feel."""
        for some in self._chunks():
            rows = {task: torch.from_numpy(self.segment.places[task][some]) for task in self.parts}
            felt = zip(self.balance, self.parts.items(), strict=True)
            hessians = torch.stack([alpha * _grouped_hessian(part, rows[task]) for alpha, (task, part) in felt]).sum(
                dim=0
            )
            first, part = next(iter(self.parts.items()))
            weights, scales = _round_grouped(part.matrix[rows[first]], hessians, int(part.node.bias is not None), bits)
            for task, part in self.parts.items():
                part.set_rounded(rows[task], weights, scales)

    def _apply(self, some: slice) -> float:
        rows = {task: torch.from_numpy(self.segment.places[task][some]) for task in self.parts}
        hessians = [_grouped_hessian(part, rows[task]) for task, part in self.parts.items()]
        own = [part.matrix[rows[task]] for task, part in self.parts.items()]
        mean = torch.stack(own).mean(dim=0)
        total = sum(a * h for a, h in zip(self.balance, hessians, strict=True))
        pull = sum(a * (h @ (w - mean)[..., None]) for a, h, w in zip(self.balance, hessians, own, strict=True))
        assert isinstance(total, Tensor) and isinstance(pull, Tensor)
        merged = mean + DenseHessian(total).solve(pull)[..., 0]
        cost = 0.0
        for (task, part), alpha, hessian, weights in zip(self.parts.items(), self.balance, hessians, own, strict=True):
            change = (merged - weights)[..., None]
            cost += 0.5 * alpha * float(DenseHessian(hessian).energies(change).sum())
            part.matrix[rows[task]] = merged
            part.changed = True
        return cost
