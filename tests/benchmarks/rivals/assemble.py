"""From what a rival decided to a zipped network, so that sizes, evaluation and light retraining are the same for all.

All that rivals need to know of the inside of a zipped network is here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from mtz_core.errors import IncompatibleNetworks, InvalidCalibration
from mtz_core.merging.compatibility import check_compatible
from mtz_core.merging.pairing import Pairing
from mtz_core.merging.walk import trace_task
from mtz_core.network.graph import LayerGraph, Network, Node
from mtz_core.settings import ZipConfig
from mtz_core.statistics.calibration import as_batches
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.ownership import Arrangement, Members
from mtz_core.zipped.report import LayerReport, ZipReport
from mtz_core.zipped.structure import TaskStructure, ZippedStructure, own_name, to_blocks

Matrices = Mapping[str, Mapping[str, Tensor]]
"""For every task and layer the dense matrix ``[out, columns]``, the bias (if any) as its last column."""


def traced(networks: Mapping[str, nn.Module], calibration: Mapping[str, Tensor]) -> dict[str, Network]:
    """The networks' graphs, tasks in the order of a zipped network.

    Raises `IncompatibleNetworks` unless they have one topology, `InvalidCalibration` for tasks without examples.
    """
    for task in networks:
        if task not in calibration:
            raise InvalidCalibration(f"there are no calibration data for {task!r}.")
    found = {
        task: trace_task(task, networks[task], as_batches(calibration[task], task)[0], ZipConfig())
        for task in sorted(networks)
    }
    check_compatible(found)
    return found


def check_equal_widths(networks: Mapping[str, Network]) -> None:
    """Raises `IncompatibleNetworks` unless every hidden group has as many neurons in all networks."""
    first, *others = networks.values()
    for group in first.graph.hidden_groups:
        if any(other.graph.widths[group.name] != first.graph.widths[group.name] for other in others):
            widths = ", ".join(str(network.graph.widths[group.name]) for network in networks.values())
            raise IncompatibleNetworks(
                f"{group.name!r} has {widths} neurons. Merge networks of the same widths this way."
            )


def neuron_by_neuron(networks: Mapping[str, Network]) -> dict[str, Int64[np.ndarray, "neurons tasks"]]:
    """Members that make neuron i of every network one, in every hidden group. Raises `IncompatibleNetworks`."""
    check_equal_widths(networks)
    graph = next(iter(networks.values())).graph
    return {
        group.name: np.repeat(np.arange(graph.widths[group.name])[:, None], len(networks), axis=1)
        for group in graph.hidden_groups
    }


def matrices_of(networks: Mapping[str, Network]) -> dict[str, dict[str, Tensor]]:
    """The networks' own matrices."""
    return {task: {n.name: network.matrix(n) for n in network.graph.layers} for task, network in networks.items()}


@dataclass(frozen=True, eq=False)
class Common:
    """The part of a layer's matrix that all tasks share, in one order for all; the bias column belongs to it."""

    rows: Mapping[str, Int64[np.ndarray, " shared"]]
    columns: Mapping[str, Int64[np.ndarray, " inputs"]]

    def of(self, task: str, matrix: Float[Tensor, "out columns"]) -> Float[Tensor, "shared inputs"]:
        """The common part of a task's own matrix."""
        return matrix[torch.from_numpy(self.rows[task])][:, torch.from_numpy(self.columns[task])]

    def put(
        self, task: str, matrix: Float[Tensor, "out columns"], values: Float[Tensor, "shared inputs"]
    ) -> Float[Tensor, "out columns"]:
        """A task's own matrix with other values in the common part."""
        changed = matrix.clone()
        changed[torch.from_numpy(self.rows[task])[:, None], torch.from_numpy(self.columns[task])] = values
        return changed


def common_parts(networks: Mapping[str, Network], members: Members) -> dict[str, Common]:
    """What all tasks share of every layer that has such rows, if `members` are one."""
    structure = _structure(networks, members, {}, "")
    parts = {}
    for node in structure.layers:
        rows, columns = (_common(side[node.name], structure.tasks) for side in (structure.rows, structure.columns))
        if node.bias is not None:
            columns = {t: np.append(places, networks[t].columns(node) - 1) for t, places in columns.items()}
        if len(rows[structure.tasks[0]]):
            parts[node.name] = Common(rows, columns)
    return parts


def _common(arrangement: Arrangement, tasks: tuple[str, ...]) -> dict[str, Int64[np.ndarray, " n"]]:
    segments = [run for run in arrangement.segments if run.owners == tasks]
    return {t: np.concatenate([np.zeros(0, dtype=np.int64), *(run.places[t] for run in segments)]) for t in tasks}


@torch.no_grad()
def assemble(
    networks: Mapping[str, Network],
    members: Members,
    matrices: Matrices,
    method: str,
    originals: Mapping[str, Network] | None = None,
) -> ZippedNetwork:
    """The zipped network with these dense matrices, in evaluation mode; all other tensors are the networks' own.

    `members[group][u, t]` is the neuron of the t-th task (in alphabetical order) that is neuron u, or negative; neurons
    that occur nowhere stay their task's own. `originals` are what sizes are compared with, if not `networks`. Costs and
    errors in the report are NaN: nobody measured them. Raises `IncompatibleNetworks` where tasks differ in what they
    share.
    """
    networks = dict(sorted(networks.items()))
    check_compatible(networks)
    originals = networks if originals is None else originals
    structure = _structure(networks, members, originals, method)
    tensors: dict[str, Tensor] = {}
    reports = []
    for node in structure.layers:
        blocks = _blocks(structure, node, {task: matrices[task][node.name] for task in networks})
        reports.append(_report(structure, node, blocks, originals))
        tensors |= blocks
    for task, network in structure.networks.items():
        tensors |= {own_name(name, task): networks[task].state[name].clone() for name in network.own}
    finished = structure.reported(tensors, reports)
    names = (*finished.block_shapes(), *finished.own_shapes())
    return ZippedNetwork(finished, {name: tensors[name] for name in names}).eval()


def _structure(
    networks: Mapping[str, Network], members: Members, originals: Mapping[str, Network], method: str
) -> ZippedStructure:
    tasks = tuple(networks)
    parts = {task: TaskStructure.of(network, originals.get(task)) for task, network in networks.items()}
    graph = parts[tasks[0]].graph
    complete = {}
    for group in graph.hidden_groups:
        widths = [network.graph.widths[group.name] for network in networks.values()]
        tuples = members.get(group.name, np.zeros((0, len(tasks)), dtype=np.int64))
        complete[group.name] = Pairing.from_tuples(tasks, widths, tuples).members
    return ZippedStructure(
        tasks=tasks,
        networks=parts,
        members=complete,
        report=ZipReport(method, (), 0, 0, 0, 0),
    )


def _blocks(structure: ZippedStructure, node: Node, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A layer's blocks, which must be the same whichever of their tasks they are cut from."""
    rows, columns = structure.rows[node.name], structure.columns[node.name]
    blocks: dict[str, Tensor] = {}
    for task, matrix in matrices.items():
        for name, block in to_blocks(node.name, task, matrix, rows, columns, node.bias is not None, {}).items():
            if not torch.equal(blocks.setdefault(name, block), block):
                raise IncompatibleNetworks(f"the tasks disagree about {name!r}, which they share.")
    return blocks


def _report(
    structure: ZippedStructure, node: Node, blocks: Mapping[str, Tensor], originals: Mapping[str, Network]
) -> LayerReport:
    rows = structure.rows[node.name]
    return LayerReport(
        layer=node.name,
        kind=node.kind,
        neurons={task: len(rows.order(task)) for task in structure.tasks},
        shared=rows.shared(),
        cost=math.nan,
        error=dict.fromkeys(structure.tasks, math.nan),
        parameters=sum(block.numel() for block in blocks.values()),
        original_parameters={
            task: sum(network.state[name].numel() for name in node.state) for task, network in originals.items()
        },
    )


def graph_of(zipped: ZippedNetwork, task: str) -> LayerGraph:
    """The graph of one task, whose nodes' tensors are in ``zipped.state_of(task)``."""
    return zipped.structure.networks[task].graph
