"""Add a network to a zipped one: the newcomer takes over shared neurons as they are, the other tasks do not change.

Existing neurons play the part of the other network: a neuron of the newcomer that joins one takes its weights on every
input that the newcomer shares with one of its owners, at the cost ``½ (s_u − s_j)ᵀ M (s_u − s_j)`` to the newcomer
alone; its weights on its own inputs are adjusted to compensate, and everything that is not shared is refitted, as in
`mtz_core.merging.walk`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mtz_core.batches import signature_of
from mtz_core.errors import IncompatibleNetworks, InvalidCalibration, InvalidConfig
from mtz_core.merging.compatibility import KEPT_SEPARATE, kept_separate
from mtz_core.merging.fitting import LayerFit, following_clip
from mtz_core.merging.judging import hold_out, judge, warn_of_ruin
from mtz_core.merging.pairing import Pairing, assign, assign_greedily
from mtz_core.merging.walk import ActivationStream, check_task_name, task_module, trace_task, warn_of_unused
from mtz_core.network.graph import Network, Node
from mtz_core.network.narrowing import Reduced
from mtz_core.network.topology import describe, find_difference
from mtz_core.network.tracing import lies_in
from mtz_core.settings import ZipConfig
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.linalg import DenseHessian, Elimination, Hessian
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import loss_of
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.ownership import NOT_A_MEMBER, Segment, positions_of
from mtz_core.zipped.report import LayerReport
from mtz_core.zipped.structure import (
    TaskStructure,
    ZippedStructure,
    can_share,
    hidden_groups,
    own_name,
    to_blocks,
)

_CALLER = 4
"""The stack level of whoever called `ZippedNetwork.with_task`; that and `no_grad` are in between."""


@torch.no_grad()
def add_network(
    zipped: ZippedNetwork,
    task: str,
    network: nn.Module,
    calibration: Tensor | Iterable[Any],
    config: ZipConfig | None = None,
) -> ZippedNetwork:
    """Zip one more network into a zipped one; see `ZippedNetwork.with_task`.

    Args:
        zipped: The zipped network; it is not modified.
        task: Name of the new task.
        network: Its pre-trained network, of the same topology; it is not modified.
        calibration: Its calibration data, as in `zip_networks`. One example in `HELD_OUT` is held out to judge it.
        config: How to zip it. `share` is relative to the newcomer's neurons, or to the zipped network's where those are
            fewer.

    Returns:
        A zipped network with the new task, whose other tasks compute exactly what they did.

    Raises:
        InvalidConfig: The task is in here already, or a setting is impossible.
        InvalidCalibration: The calibration data, or what is declared of outputs, do not fit the network.
        MtzError: In its other kinds, as `zip_networks`.

    Warns:
        ZipWarning: The newcomer has lost most of what it knew, or no output of it depends on some of its parameters.
    """
    config = config or ZipConfig(method=zipped.report.method)  # type: ignore[arg-type]
    _check_request(zipped, task, config)
    network = task_module(task, network)
    batches, held_out = hold_out(as_batches(calibration, task, signature_of(network)))
    traced = trace_task(task, network, batches[0], config)
    warn_of_unused(task, traced, stacklevel=_CALLER)
    traced = _alike(zipped, task, traced)
    try:
        loss = loss_of(traced, batches, config.output_of(task))
        moments = original_moments(traced, batches, config)
    except InvalidCalibration as refusal:
        raise InvalidCalibration(f"the network of {task!r}: {refusal}") from refusal
    structure = _match(zipped, task, traced, moments, config)
    whole = Reduced.whole(traced)
    stream = ActivationStream(whole, batches)
    tensors: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    before = list(zipped.report.layers)
    for node in traced.graph.nodes:
        if not node.is_layer:
            stream.advance(node)
            continue
        rows, columns = structure.rows[node.name], structure.columns[node.name]
        part = LayerFit(
            node,
            whole,
            stream.original[node.source],
            stream.zipped[node.source],
            shared=any(len(run.owners) > 1 for run in rows.of(task)),
            config=config,
        )
        cost = _fit(zipped, structure, task, part, config)
        changed = part.tensors()
        blocks: dict[str, Tensor] = {}
        for other, own in structure.nodes[node.name].items():
            matrix = part.stored_matrix() if other == task else zipped.matrix(other, own)
            scales, bias = None if other == task else zipped.scales(other, own), own.bias is not None
            blocks |= to_blocks(node.name, other, matrix, rows, columns, bias, blocks, scales, structure.bits)
        tensors |= blocks
        stream.advance(node, changed)
        error = stream.output_error(node)
        known = [report for report in before if report.layer == node.name]
        report = known[0] if len(known) == 1 else _no_report(node)
        before = [other for other in before if other is not report]
        reports.append(_extended(report, task, part, cost, error, structure))
        part.release()
    for layer in structure.nodes.keys() - traced.graph.layers_by_name.keys():
        for other, node in structure.nodes[layer].items():
            rows, columns = structure.rows[layer], structure.columns[layer]
            matrix, bias, scales = zipped.matrix(other, node), node.bias is not None, zipped.scales(other, node)
            tensors |= to_blocks(layer, other, matrix, rows, columns, bias, tensors, scales, structure.bits)
    reports += before
    stored = zipped.tensors()
    for name in structure.own_shapes():
        tensors[name] = stored[name].clone() if name in stored else traced.state[name.removesuffix(own_name("", task))]
    finished = structure.reported(tensors, reports)
    grown = ZippedNetwork(finished, {name: tensor.clone() for name, tensor in tensors.items()}).eval()
    if held_out:
        original = Traced(traced, batches=batches, known_loss=loss)
        judged = judge(grown, {task: original}, {task: held_out})
        grown.judged(judged)
        warn_of_ruin(judged, "Share less of it: ZipConfig(share=0.0) keeps it as it is", stacklevel=_CALLER)
    return grown


def _check_request(zipped: ZippedNetwork, task: str, config: ZipConfig) -> None:
    for name, value in (("budget", config.budget), ("balance", config.balance)):
        if value is not None:
            raise InvalidConfig(
                f"{name}: a network is added by `share` alone, and the others stay as they are. Leave it out."
            )
    check_task_name(task)
    if task in zipped.tasks:
        raise InvalidConfig(
            f"task {task!r} is in this zipped network already. Take it out first, or name it differently."
        )


def _extended(
    report: LayerReport,
    task: str,
    part: LayerFit,
    cost: float,
    error: float,
    structure: ZippedStructure,
) -> LayerReport:
    """The report of a layer with one more task, which costs and errs that much there."""
    rows, state = structure.rows[report.layer], part.network.state
    few = f"{task} has {part.few_rows}" if part.few_rows else ""
    original = sum(state[name].numel() for name in part.node.state)
    return replace(
        report,
        neurons={**report.neurons, task: len(rows.order(task))},
        shared=rows.shared(),
        cost=report.cost + cost,
        few_rows="; ".join(filter(None, (report.few_rows, few))),
        error={**report.error, task: error},
        parameters=structure.parameters_of(report.layer),
        original_parameters={**report.original_parameters, task: original},
    )


def _no_report(node: Node) -> LayerReport:
    """The report of a layer that none of the others has."""
    return LayerReport(node.name, node.kind, {}, 0, 0.0, {}, 0, {}, KEPT_SEPARATE)


def _alike(zipped: ZippedNetwork, task: str, traced: Network) -> Network:
    """Let the newcomer keep separate what the others do, if it differs from them.

    Args:
        zipped: The zipped network.
        task: The newcomer's task.
        traced: The newcomer.

    Returns:
        The newcomer.

    Raises:
        IncompatibleNetworks: If it differs from the others in what they share, or in dtype.
    """
    first, graph = next((other, network.graph) for other, network in zipped.structure.networks.items())
    found = find_difference(graph, traced.graph)
    if found is not None:
        separate = {n.module for own in zipped.structure.networks.values() for n in own.graph.nodes if n.separate}
        common = iter([(node.module, describe(node)) for node in graph.nodes if not node.separate])
        step, more = next(common, None), []
        for node in traced.graph.nodes:
            if not node.separate and step == (node.module, describe(node)):
                step = next(common, None)
            elif lies_in(node.module, separate):
                more.append(node.name)
        traced = kept_separate(traced, more)
        found = find_difference(graph, traced.graph)
    if found is not None:
        raise IncompatibleNetworks(
            f"the networks differ in structure: {first} has {found.words[0]} where {task} has {found.words[1]}, in "
            f"{found.where}. A network that is added has what the others share; zip all of them anew."
        )
    node = traced.graph.layers[0]
    if zipped.precision != traced.state[node.weight].dtype:
        raise IncompatibleNetworks("the networks mix float32 and float64 weights. Convert them to one dtype.")
    return traced


def _match(
    zipped: ZippedNetwork, task: str, traced: Network, moments: Mapping[str, Moments], config: ZipConfig
) -> ZippedStructure:
    """The structure with the newcomer in it: which existing neuron each of its neurons joins, group by group."""
    old = zipped.structure
    tasks = (*old.tasks, task)
    networks = {**old.networks, task: TaskStructure.of(traced)}
    graphs = [network.graph for network in networks.values()]
    unknown = np.zeros((0, len(old.tasks)), dtype=np.int64)
    alone = {
        name: np.pad(old.members.get(name, unknown), ((0, 0), (0, 1)), constant_values=NOT_A_MEMBER)
        for name in hidden_groups(graphs)
    }
    mine = traced.graph.hidden_widths
    counts = config.counts({name: [len(rows), mine.get(name, 0)] for name, rows in alone.items()})
    members: dict[str, Int64[np.ndarray, "neurons tasks"]] = {}
    for name in alone:
        width = mine.get(name, 0)
        known = ZippedStructure(tasks, networks, members, old.report, old.separate)
        cost = np.zeros((len(alone[name]), width))
        writers = [node for node in traced.graph.layers if cost.size and name in traced.graph.rows[node.name].groups]
        ready = [node for node in writers if {*traced.graph.columns[node.name].groups} & {*alone} <= members.keys()]
        fits = False
        for node in ready or writers:
            found = _costs(zipped, known, task, traced, node, name, moments[node.name], config)
            if found is not None:
                cost, fits = cost + found, True
        pairs = (assign if config.method == "refit" else assign_greedily)(cost, counts[name] if fits else 0)
        rows = alone[name].copy()
        rows[pairs[:, 0], -1] = pairs[:, 1]
        everyone = [graph.hidden_widths.get(name, 0) for graph in graphs]
        members[name] = Pairing.from_tuples(tasks, everyone, rows).members
    structure = ZippedStructure(tasks, networks, members, old.report, old.separate)
    return replace(structure, bits=zipped.bits_in(structure))


def _costs(
    zipped: ZippedNetwork,
    structure: ZippedStructure,
    task: str,
    traced: Network,
    node: Node,
    group: str,
    moments: Moments,
    config: ZipConfig,
) -> Float[np.ndarray, "neurons width"] | None:
    """Compute what it costs the newcomer in one layer that its neurons join existing ones.

    Returns:
        The cost of every pair; None where none can join, and for convolutions in groups, whose neurons are matched by
        the other layers that write them.
    """
    networks = structure.networks
    if moments.conv_groups > 1 or not can_share(node.name, networks.values()):
        return None
    tables = {t: torch.from_numpy(positions_of(n.graph.rows[node.name], group)) for t, n in networks.items()}
    mine = tables[task]
    if len({table.shape[1] for table in tables.values()}) > 1:
        return None
    hessian = moments.hessian(config.fixed_damping)
    matrix = traced.matrix(node)[mine.flatten()].to(torch.float64)
    members = zipped.structure.members[group]
    costs = np.zeros((len(members), len(mine)))
    for pattern in np.unique(members >= 0, axis=0):
        owners = tuple(t for t, owns in zip(zipped.tasks, pattern, strict=True) if owns)
        units = np.flatnonzero(((members >= 0) == pattern).all(axis=1))
        rows = {t: tables[t][members[units, zipped.tasks.index(t)]].flatten() for t in owners}
        common = _Common(zipped, structure, task, owners, node, hessian.size)
        curvature = common.curvature(hessian, config)
        theirs, own = common.stored(rows), matrix[:, common.shared]
        centre = torch.cat([theirs, own]).mean(dim=0)  # only differences count: less cancellation near the centre
        weights = torch.cat([theirs - centre, own - centre])
        image = curvature.product(weights.T).T.reshape(len(units) + len(mine), -1)
        weights = weights.reshape(image.shape)
        norms, inner = (weights * image).sum(dim=1), weights[: len(units)] @ image[len(units) :].T
        distance = 0.5 * (norms[: len(units), None] + norms[None, len(units) :]) - inner
        costs[units] = distance.clamp_(min=0).numpy()
    return costs


class _Common:
    """The inputs that the newcomer has in common with any of the owners of some rows, and their stored weights."""

    def __init__(
        self,
        zipped: ZippedNetwork,
        structure: ZippedStructure,
        task: str,
        owners: tuple[str, ...],
        node: Node,
        inputs: int,
    ) -> None:
        self.zipped, self.owners, self.node = zipped, owners, node
        self.holders: list[tuple[str, Int64[np.ndarray, " n"]]] = []
        shared = [np.zeros(0, dtype=np.int64)]
        for run in structure.columns[node.name].of(task):
            holder = next((owner for owner in owners if owner in run.owners), None)
            if holder is not None:
                self.holders.append((holder, run.places[holder]))
                shared.append(run.places[task])
        if node.bias is not None:
            shared.append(np.array([inputs - 1]))
        self.shared = torch.from_numpy(np.concatenate(shared))
        self.own = torch.from_numpy(np.setdiff1d(np.arange(inputs), self.shared.numpy()))

    def curvature(self, hessian: Hessian, config: ZipConfig) -> Hessian:
        """What is left of the newcomer's Hessian on these inputs."""
        if config.method == "refit" and len(self.own):
            return hessian.eliminate(self.shared, self.own).curvature
        return hessian.select(self.shared)

    def stored(self, rows: Mapping[str, Int64[Tensor, " n"]]) -> Float[Tensor, "n s"]:
        """The weights that the zipped network has there, given the rows in every owner's own matrix."""
        parts = [torch.zeros(len(rows[self.owners[0]]), 0)]
        for holder, places in self.holders:
            parts.append(self.zipped.matrix(holder, self.node)[rows[holder]][:, torch.from_numpy(places)])
        if self.node.bias is not None:
            parts.append(self.zipped.matrix(self.owners[0], self.node)[rows[self.owners[0]], -1:])
        return torch.cat(parts, dim=1).to(torch.float64)


def _fit(zipped: ZippedNetwork, structure: ZippedStructure, task: str, part: LayerFit, config: ZipConfig) -> float:
    """Refit the newcomer's layer, its shared rows taking the stored weights; returns what that costs it."""
    refit = config.method == "refit"
    clip = following_clip(part.network, part.node) if refit else None
    adoptions = [
        _Adoption(zipped, structure, task, part, run, config)
        for run in structure.rows[part.node.name].of(task)
        if len(run.owners) > 1
    ]
    cost = 0.0
    for sweep in range(1 + (config.refit_rounds if clip is not None else 0)):
        if refit:
            part.refit(clip if sweep else None)
        cost = sum(adoption.apply() for adoption in adoptions)
    return cost


class _Adoption:
    """Rows of the newcomer that are others' already."""

    def __init__(
        self,
        zipped: ZippedNetwork,
        structure: ZippedStructure,
        task: str,
        part: LayerFit,
        run: Segment,
        config: ZipConfig,
    ) -> None:
        assert part.hessian is not None
        owners = tuple(owner for owner in run.owners if owner != task)
        common = _Common(zipped, structure, task, owners, part.node, part.matrix.shape[1])
        self.part, self.common = part, common
        self.rows = torch.from_numpy(run.places[task])
        self.weights = common.stored({owner: torch.from_numpy(run.places[owner]) for owner in owners})
        self.left: Elimination | None = None
        if part.conv_groups == 1:
            self.curvature = common.curvature(part.hessian, config)
            if config.method == "refit" and len(common.own):
                self.left = part.hessian.eliminate(common.shared, common.own)

    def apply(self) -> float:
        """Give the rows the stored weights, own inputs' weights compensating; returns the cost."""
        part, shared = self.part, self.common.shared
        change = (self.weights - part.matrix[self.rows][:, shared]).T
        part.matrix[self.rows[:, None], shared] = self.weights
        if self.left is not None:
            part.matrix[self.rows[:, None], self.common.own] += self.left.answer(change).T
        part.changed = True
        if part.conv_groups > 1:
            assert isinstance(part.hessian, DenseHessian)
            hessians = part.hessian.matrix[self.rows // (len(part.matrix) // part.conv_groups)]
            return 0.5 * float(torch.einsum("in,nij,jn->", change, hessians, change))
        return 0.5 * float(self.curvature.energies(change).sum())
