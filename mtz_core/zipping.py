"""Zipping: the walk over layers that makes one network of several.

For every layer in topological order: refit the layer to the originals' outputs on the inputs that the zipped network
really feeds it, merge the paired neurons, let own weights compensate, store the blocks, and move the calibration
data one step on, in the originals and in the zipped network. (`method="paper"` skips refit and compensation.)

A layer's targets are exact only as far as the next activation can tell: behind a ReLU, any negative value is as good as
any other. So a layer is fitted in sweeps. The first takes the originals' outputs; each later one replaces every target
that the activation would clip by the nearest value that it clips alike, and solves again. Both halves of a sweep lower
the same squared error (each task's taken relative to the amplitude of its own fit), and the Hessians, the expensive
part, stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mtz_core.activations import as_batches, layer_rows, original_moments, sample_positions
from mtz_core.errors import InvalidConfig, MtzError
from mtz_core.graph import INPUT, Network, Node, run_node, trace
from mtz_core.layers import OPERATIONS, Operation, from_matrix
from mtz_core.linalg import Hessian, weighted_sum
from mtz_core.matching import (
    Pairing,
    check_compatible,
    identity_pairing,
    match,
    relative_balance,
    separate_pairing,
    shared_counts,
    shared_curvature,
    split_inputs,
)
from mtz_core.moments import Moments
from mtz_core.settings import ZipConfig
from mtz_core.structure import TASK_NAME, LayerReport, Layout, ZippedStructure, ZipReport, bias_name, block_name
from mtz_core.zipped import ZippedNetwork


def zip_networks(
    networks: Mapping[str, nn.Module],
    calibration: Mapping[str, Tensor | Iterable[Tensor]],
    config: ZipConfig | None = None,
) -> ZippedNetwork:
    """Zip pre-trained networks into one (He, Zhou, Thiele 2018; see `ZipConfig.method`). They are not modified.

    `calibration[task]` are examples of the task's inputs, ``[batch, *input shape]``, no labels needed: one
    tensor or batches. Raises `MtzError` in its kinds: unsupported or incompatible networks, weights or data that are
    not finite or do not fit, impossible settings; all before any work where they can be known.
    """
    config = config or ZipConfig()
    for task in networks:
        if not isinstance(task, str) or not TASK_NAME.fullmatch(task):
            raise InvalidConfig(f"{task!r} cannot name a task. Allowed: letters, digits, '_' and '-'.")
    if set(networks) != set(calibration):
        raise InvalidConfig(f"calibration is given for {sorted(calibration)}, but the networks are {sorted(networks)}.")
    batches = {task: as_batches(data, task) for task, data in calibration.items()}
    traced = {task: _trace(task, module, batches[task][0]) for task, module in networks.items()}
    check_compatible(traced)
    shared_counts(traced, config)
    moments = {task: original_moments(network, batches[task], config) for task, network in traced.items()}
    pairings = {found.group: found.pairing for found in match(traced, moments, config)}
    del moments
    return finish(merge(traced, pairings, batches, config))


def _trace(task: str, module: nn.Module, example: Tensor) -> Network:
    try:
        return trace(module, example)
    except MtzError as error:
        raise type(error)(f"the network of {task!r}: {error}") from error


def finish(steps: Iterator[LayerReport | ZippedNetwork]) -> ZippedNetwork:
    """Run `merge` to its end, without looking at its reports."""
    *_, zipped = steps
    assert isinstance(zipped, ZippedNetwork)
    return zipped


@dataclass
class _Stream:
    """One task's calibration data on their way through the original and through the zipped network.

    Holds the value of the current node only, batch by batch. `intact` says that the zipped network has computed
    the same as the original so far: nothing upstream is shared.
    """

    original: list[Tensor]
    zipped: list[Tensor]
    intact: bool = True

    def advance(self, node: Node, original: _Weights, zipped: _Weights) -> None:
        for i, (x, x_hat) in enumerate(zip(self.original, self.zipped, strict=True)):
            self.original[i] = run_node(node, x, *original)
            self.zipped[i] = self.original[i] if self.intact else run_node(node, x_hat, *zipped)


_Weights = tuple[Tensor | None, Tensor | None]


@torch.no_grad()
def merge(
    networks: Mapping[str, Network],
    pairings: Mapping[str, Pairing],
    batches: Mapping[str, list[Tensor]],
    config: ZipConfig,
) -> Iterator[LayerReport | ZippedNetwork]:
    """Merge paired networks, yielding a report as each layer is done and the zipped network at the end.

    `pairings` has an entry for every hidden group. Memory beyond weights: the calibration data at the width of the
    current layer, twice, and the moments of that layer.
    """
    graph = check_compatible(networks)
    tasks = tuple(networks)
    groups = {group.name: group for group in graph.groups}
    all_pairings = {
        INPUT: identity_pairing(tasks, networks[tasks[0]].input_shape[0]),
        graph.groups[-1].name: separate_pairing(tasks, [n.width(graph.groups[-1]) for n in networks.values()]),
    } | {name: pairings[name] for name in groups if name in pairings}
    layouts = {name: pairing.layout for name, pairing in all_pairings.items()}
    columns_per_neuron = {node.name: networks[tasks[0]].columns_per_neuron(node) for node in graph.layers}
    streams = {task: _Stream(list(batches[task]), list(batches[task])) for task in tasks}
    balance = config.balance_of(tasks)
    blocks: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    for node in graph.nodes:
        if not node.is_layer:
            for stream in streams.values():
                stream.advance(node, (None, None), (None, None))
            continue
        rows_group, columns_group = graph.written_by(node.name).name, graph.read_by(node.name).name
        rows, columns = all_pairings[rows_group], all_pairings[columns_group]
        parts = [_Part(node, networks[t], rows, columns, t, streams[t], config) for t in tasks]
        following = OPERATIONS.get(next((n.kind for n in graph.nodes if n.source == node.name), ""), Operation())
        cost = _fit(parts, balance, rows.shared, following, config)
        cut: dict[str, Tensor] = {}
        for task, part in zip(tasks, parts, strict=True):
            original = networks[task].weights[node.name]
            matrix = part.matrix.to(original.dtype)
            per_neuron = columns_per_neuron[node.name]
            cut |= _cut(node, task, matrix, layouts[rows_group], layouts[columns_group], per_neuron)
            streams[task].intact &= rows.shared == 0
            streams[task].advance(node, from_matrix(original, node.bias), from_matrix(matrix, node.bias))
        blocks |= cut
        report = LayerReport(
            layer=node.name,
            kind=node.kind,
            neurons={task: len(rows.neurons(task)) for task in tasks},
            shared=rows.shared,
            cost=cost,
            error={task: _output_error(streams[task], rows.neurons(task)) for task in tasks},
            parameters=sum(t.numel() for t in cut.values()),
            original_parameters=sum(network.weights[node.name].numel() for network in networks.values()),
        )
        reports.append(report)
        yield report
    structure = ZippedStructure(
        tasks=tasks,
        graph=graph,
        input_shape=networks[tasks[0]].input_shape,
        layouts=layouts,
        columns_per_neuron=columns_per_neuron,
        report=ZipReport(
            method=config.method,
            layers=tuple(reports),
            stored_parameters=sum(t.numel() for t in blocks.values()),
            original_parameters=sum(network.parameters for network in networks.values()),
            stored_bytes=sum(t.numel() * t.element_size() for t in blocks.values()),
            original_bytes=sum(network.bytes for network in networks.values()),
        ),
    )
    yield ZippedNetwork(structure, {name: blocks[name] for name in structure.block_shapes()}).eval()


class _Part:
    """One task's side of a layer: its matrix in the zipped network's order (float64), and the rows it will be fed.

    `hessian` belongs to those rows; None where the layer stays as it is: nothing is shared in it or before it.
    """

    def __init__(
        self,
        node: Node,
        network: Network,
        rows: Pairing,
        columns: Pairing,
        task: str,
        stream: _Stream,
        config: ZipConfig,
    ) -> None:
        self.node, self.stream = node, stream
        self.paper = config.method == "paper"
        self.split = split_inputs(columns, task, network.columns_per_neuron(node), node.bias)
        neurons = torch.from_numpy(rows.neurons(task))
        self.original = network.weights[node.name][neurons]
        self.prior = self.original.to(torch.float64)[:, self.split.columns]
        self.matrix = self.prior.clone()
        self.hessian: Hessian | None = None
        if rows.shared or not (self.paper or stream.intact):
            self.positions = sample_positions(node, stream.original[0], config)
            moments = Moments(self.prior.shape[1])
            self.targets: list[Float[Tensor, "n out"]] = []
            for x, x_hat in zip(stream.original, stream.zipped, strict=True):
                rows_of_original = layer_rows(node, x, self.positions)
                fed = rows_of_original[:, self.split.columns] if self.paper else self._fed(x_hat)
                moments.add(fed)
                if not self.paper:
                    self.targets.append(rows_of_original @ self.original.T)
            self.count = moments.count
            self.damping = moments.damping(config.damping)
            self.hessian = moments.hessian(config.damping)

    def _fed(self, x_hat: Tensor) -> Float[Tensor, "n in"]:
        return layer_rows(self.node, x_hat, self.positions)

    def refit(self, following: Operation | None) -> None:
        """The matrix that best gives the original's outputs ``y`` on what the zipped network feeds, drawn to the prior.

        ``min E‖y − W x̂‖² + λ‖W − W₀‖²`` by one Newton step from the present matrix, which is exact:
        ``W + (E[(y − W x̂) x̂ᵀ] − λ (W − W₀))(Ĥ + λ I)⁻¹``. Given the operation that follows, ``y`` is first relaxed to
        the targets nearest to the present outputs.
        """
        if self.hessian is None or (following is None and self.stream.intact):
            return  # an intact layer is its own best fit
        correlation = torch.zeros_like(self.prior)
        present = self.matrix.to(self.original.dtype)
        for target, x_hat in zip(self.targets, self.stream.zipped, strict=True):
            fed = self._fed(x_hat)
            output = fed @ present.T
            if following is not None:
                target = following.nearest_target(target, output)
            correlation += ((target - output).T @ fed).to(torch.float64)
        gradient = correlation / self.count - self.damping * (self.matrix - self.prior)
        self.matrix = self.matrix + self.hessian.solve(gradient.T).T


def _fit(
    parts: Sequence[_Part], balance: Sequence[float], shared: int, following: Operation, config: ZipConfig
) -> float:
    """Find the matrices of all tasks, their first `shared` neurons in common; returns the cost of sharing."""
    if config.method == "paper":
        return _share(parts, balance, shared, compensate=False)
    for part in parts:
        part.refit(None)
    cost = _share(parts, balance, shared, compensate=True)
    for _ in range(config.sweeps if following.clips else 0):
        for part in parts:
            part.refit(following)
        cost = _share(parts, balance, shared, compensate=True)
    return cost


def _share(parts: Sequence[_Part], balance: Sequence[float], count: int, compensate: bool) -> float:
    """Give the first `count` neurons of all parts one set of weights on their shared inputs; returns the cost.

    ``s* = (Σ α_t M_t)⁻¹ Σ α_t M_t s_t``; own inputs' weights answer with ``−H_pp⁻¹ H_ps δ`` if they may.
    """
    if count == 0:
        return 0.0
    hessians = [part.hessian for part in parts if part.hessian is not None]
    if compensate:
        balance = relative_balance(balance, [part.matrix for part in parts], hessians)
    shared = [part.matrix[:count, part.split.shared] for part in parts]
    curvatures = [shared_curvature(h, part.split, compensate) for h, part in zip(hessians, parts, strict=True)]
    mean = torch.stack(shared).mean(dim=0)  # solving for the distance from the mean keeps equal neurons exactly equal
    pull = torch.stack([a * m.product((s - mean).T) for a, m, s in zip(balance, curvatures, shared, strict=True)])
    merged = mean + weighted_sum(curvatures, balance).solve(pull.sum(dim=0)).T
    cost = 0.0
    for part, hessian, curvature, own, alpha in zip(parts, hessians, curvatures, shared, balance, strict=True):
        change = (merged - own).T
        cost += 0.5 * alpha * float((change * curvature.product(change)).sum())
        part.matrix[:count, part.split.shared] = merged
        if compensate and len(part.split.own):
            part.matrix[:count, part.split.own] += hessian.compensation(part.split.shared, part.split.own, change).T
    return cost


def _cut(
    node: Node, task: str, matrix: Float[Tensor, "out in"], rows: Layout, columns: Layout, per_neuron: int
) -> dict[str, Tensor]:
    """One task's dense matrix as the blocks that a zipped network stores."""
    weight, bias = from_matrix(matrix, node.bias)
    blocks: dict[str, Tensor] = {}
    top = 0
    for row_owners, height in rows:
        if task not in row_owners:
            continue
        left = 0
        for column_owners, neurons in columns:
            if task in column_owners:
                width = neurons * per_neuron
                block = weight[top : top + height, left : left + width]
                blocks[block_name(node.name, row_owners, column_owners)] = block.contiguous()
                left += width
        if bias is not None:
            blocks[bias_name(node.name, row_owners)] = bias[top : top + height].clone()
        top += height
    return blocks


def _output_error(stream: _Stream, neurons: Int64[np.ndarray, " out"]) -> float:
    """``E‖ŷ − y‖² / E‖y‖²`` of the current value, original neurons reordered as the zipped network's."""
    if stream.intact:
        return 0.0
    order = torch.from_numpy(neurons)
    difference = sum(
        float((z - y[:, order]).square().sum()) for y, z in zip(stream.original, stream.zipped, strict=True)
    )
    norm = sum(float(y.square().sum()) for y in stream.original)
    return difference / norm if norm else difference
