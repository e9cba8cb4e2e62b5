"""The walk over the layers of several networks that merges them into one.

Nodes are run in topological order, in the originals and in the zipped network, on every task's calibration data. Every
layer is refitted to the originals' outputs on the inputs that the zipped network really feeds it, whatever sums and
normalisations these came through. Then paired neurons are merged, own weights compensate, and the blocks are stored.
(``method="paper"`` skips refit and compensation.)

A layer's targets matter only as far as the next activation can tell them apart: before a ReLU, any negative value is as
good as any other, also with a batch normalisation in between. So a layer is fitted in several rounds. The first takes
the originals' outputs as targets. Each later one replaces every target that the activation would clip by the nearest
value that it clips alike, and solves again. Both halves of a round lower the same squared error (each task's relative
to the amplitude of its own fit), and the Hessians, the expensive part, stay the same.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtz_core.batches import Batch
from mtz_core.errors import InvalidConfig, MtzError, UnsupportedModule, ZipWarning
from mtz_core.merging.compatibility import check_compatible, why_separate
from mtz_core.merging.fitting import LayerFit, fit, following_clip
from mtz_core.merging.pairing import Pairing
from mtz_core.network.graph import Network, Node, free_unused, input_values, run_node
from mtz_core.network.narrowing import Dropper, Keep, Reduced
from mtz_core.network.tracing import as_module, trace
from mtz_core.settings import ZipConfig
from mtz_core.statistics.calibration import LayerOutputs
from mtz_core.statistics.sensitivity import Sensitivities, sensitivities
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.report import LayerReport, ZipReport
from mtz_core.zipped.structure import (
    TASK_NAME,
    TaskStructure,
    ZippedStructure,
    block_name,
    own_name,
    scale_name,
    to_blocks,
)

DAMPINGS = (5e-4, 5e-3, 2e-2, 1e-1)
"""What ``damping="auto"`` chooses from, layer by layer."""


def check_task_name(task: object) -> None:
    """Check that a value can name a task.

    Args:
        task: The value.

    Raises:
        InvalidConfig: If it is no text of letters, digits, '_' and '-'.
    """
    if not isinstance(task, str) or not TASK_NAME.fullmatch(task):
        raise InvalidConfig(f"{task!r} cannot name a task. Allowed: letters, digits, '_' and '-'.")


def task_module(task: str, given: object) -> nn.Module:
    """Return a task's network as `mtz_core.network.tracing.as_module` does, naming the task in errors."""
    try:
        return as_module(given)
    except UnsupportedModule as error:
        raise UnsupportedModule(f"the network of {task!r}: {error}") from error


def trace_task(task: str, module: nn.Module, example: Batch, config: ZipConfig) -> Network:
    """Trace a task's network, naming the task in errors.

    Args:
        task: The task.
        module: Its network.
        example: A batch of its inputs.
        config: `ZipConfig.keep_separate` names submodules that stay task-specific; those that the network lacks are
            other networks'. `ZipConfig.zip` names those that take part.

    Returns:
        The traced network.

    Raises:
        MtzError: Of the kinds that `mtz_core.network.tracing.trace` raises.
    """
    module = task_module(task, module)
    own = dict(module.named_modules())
    try:
        return trace(module, example, [path for path in config.keep_separate if path in own or ":" in path], config.zip)
    except MtzError as error:
        raise type(error)(f"the network of {task!r}: {error}") from error


def warn_of_unused(task: str, network: Network, stacklevel: int) -> None:
    """Warn of parameters that are left out.

    Args:
        task: The task.
        network: Its network.
        stacklevel: How many calls above this one the user's code is.
    """
    if network.unused:
        warnings.warn(f"the network of {task!r}: {network.left_out}.", ZipWarning, stacklevel=stacklevel + 1)


def finish(steps: Iterator[LayerReport | ZippedNetwork]) -> ZippedNetwork:
    """Run `merge` to its end and return the zipped network."""
    *_, zipped = steps
    assert isinstance(zipped, ZippedNetwork)
    return zipped


class ActivationStream:
    """One task's calibration data on their way through the original and through the zipped network, batch by batch.

    A value of the zipped network is the very same object as the original's as long as nothing upstream has changed.
    Where it is known already what the original's layers put out, the original does not run along.

    Attributes:
        reduced: The task's network, some of whose neurons may have been dropped, and its original.
        original: The live values of the original network, one entry per batch; empty if it does not run along.
        zipped: The live values of the zipped network, one entry per batch.
        targets: What the original's layers put out at the sampled positions, if that is known.
    """

    def __init__(self, reduced: Reduced, batches: Sequence[Batch], targets: LayerOutputs | None = None) -> None:
        self.reduced, self.targets = reduced, targets
        given = [input_values(batch) for batch in batches]
        self.zipped: dict[str, list[Any]] = {name: [own[name] for own in given] for name in given[0]}
        self.original = {name: list(own) for name, own in self.zipped.items()} if targets is None else {}
        self._intact = {*self.zipped}
        self._sizes = [len(batch) for batch in batches]

    def intact(self, name: str) -> bool:
        """Whether the zipped network has computed this value as the original does."""
        return name in self._intact

    def given(self, name: str) -> list[Any]:
        """A value of the original network; empty if it is not known, since the original does not run along."""
        return self.zipped[name] if self.intact(name) else self.original.get(name, [])

    def targets_of(self, layer: Node) -> Sequence[Float[Tensor, "_n _out"]] | None:
        """What the original's layer puts out at the sampled positions, if that is known."""
        return None if self.targets is None else self.targets[layer.name]

    def advance(self, node: Node, changed: Mapping[str, Tensor] | None = None) -> None:
        """Run a node in both networks.

        Args:
            node: The node.
            changed: The tensors that the zipped network has in place of the reduced network's, by name.
        """
        whole, narrow = self.reduced.original, self.reduced.network
        same = not changed and all(self.intact(source) for source in node.sources) and not self.reduced.touches(node)
        before = whole.graph.node(node.name)
        if self.original:
            self.original[node.name] = self._run(before, self.original, whole.state)
        if not same:
            self.zipped[node.name] = self._run(node, self.zipped, {**narrow.state, **(changed or {})})
        elif self.original:
            self.zipped[node.name] = list(self.original[node.name])
        else:
            self.zipped[node.name] = self._run(before, self.zipped, whole.state)
        if same:
            self._intact.add(node.name)
        for values in (self.original, self.zipped):
            free_unused(whole.graph, values, node)

    def _run(self, node: Node, values: Mapping[str, list[Any]], state: Mapping[str, Tensor]) -> list[Any]:
        given = [values[source] for source in node.sources]
        return [
            run_node(node, dict(zip(node.sources, parts, strict=True)), state, self._sizes[i])
            for i, parts in enumerate(zip(*given, strict=True) if given else [()] * len(self._sizes))
        ]

    def output_error(self, node: Node) -> float:
        """``E‖ŷ − y‖² / E‖y‖²`` of a layer's outputs, dropped ones aside; the original has to run along."""
        if self.intact(node.name):
            return 0.0
        left, rows = self.reduced.kept_positions(node), self.reduced.kept_rows(node)
        if rows is not None:
            left[node.layer.channel_axis(self.original[node.name][0].ndim)] = rows
        difference, norm = 0.0, 0.0
        for y, z in zip(self.original[node.name], self.zipped[node.name], strict=True):
            for axis, kept in left.items():
                y = y.index_select(axis, kept)
            difference += float((z - y).square_().sum())
            norm += float(y.square().sum())
        return difference / norm if norm else difference


@torch.no_grad()
def merge(
    traced: Mapping[str, Traced],
    pairings: Mapping[str, Pairing],
    config: ZipConfig,
    costs: Sequence[float] = (),
    keep: Mapping[str, Keep] | None = None,
    damping: Mapping[str, float] | None = None,
    bits: Mapping[str, int] | None = None,
) -> Iterator[LayerReport | ZippedNetwork]:
    """Merge paired networks layer by layer.

    Beside weights, this needs memory for the calibration data at the width of the live values, twice (once where
    `Traced.targets` are given), and for the moments of the current layer.

    Args:
        traced: The networks by task, with their calibration data. Sensitivities are computed where they are left out.
        pairings: The pairing of every hidden group.
        config: How to zip.
        costs: The predicted costs of coordinate descent, for the report.
        keep: For every task, the neurons that are left of groups that lose some; `pairings` then number those.
        damping: For some tasks, the relative ``λ`` of their fits, in place of the configured one.
        bits: The number of bits to which weights are rounded, by the names of their scales (`scale_name`).

    Yields:
        A report when a layer is done, for every layer, and at last the zipped network.

    Raises:
        IncompatibleNetworks: If the networks differ in what they do not keep separate, or in dtype.
        InvalidConfig: If settings do not fit the networks.
        SingularHessian: If a Hessian cannot be factorised.
    """
    traced = dict(sorted(traced.items()))
    networks = {task: own.network for task, own in traced.items()}
    check_compatible(networks)
    sensitivity = {
        task: own.sensitivity or sensitivities(own.network, own.batches, config.seed, own.loss)
        for task, own in traced.items()
    }
    reduced = {task: Dropper(network).narrow((keep or {}).get(task, {})) for task, network in networks.items()}
    structure = ZippedStructure(
        tasks=tuple(networks),
        networks={task: TaskStructure.of(narrow.network, narrow.original) for task, narrow in reduced.items()},
        members={name: pairing.members for name, pairing in pairings.items()},
        report=ZipReport(config.method, (), 0, 0, 0, 0, tuple(costs)),
    )
    structure = replace(structure, bits=_bits_of_blocks(structure, bits or {}))
    known = {task: own.targets if config.method == "refit" else None for task, own in traced.items()}
    streams = {task: ActivationStream(own, traced[task].batches, known[task]) for task, own in reduced.items()}
    tensors: dict[str, Tensor] = {}
    reports: list[LayerReport] = []
    for nodes in _layers(streams):
        report, blocks = _merge_layer(structure, reduced, nodes, streams, config, sensitivity, damping or {})
        tensors |= blocks
        reports.append(report)
        yield report
    for task, network in structure.networks.items():
        for name in network.own:
            tensors[own_name(name, task)] = reduced[task].network.state[name].clone()
    finished = structure.reported(tensors, reports)
    yield ZippedNetwork(finished, {name: tensors[name] for name in finished.stored_shapes()}).eval()


def _bits_of_blocks(structure: ZippedStructure, bits: Mapping[str, int]) -> dict[str, int]:
    """The bits of every block, given those of rows by the names of their scales."""
    return {
        block_name(layer, rows.owners, columns.owners): bits[scale_name(layer, rows.owners)]
        for layer in (structure.nodes if bits else ())
        for rows in structure.rows[layer].segments
        for columns in structure.columns[layer].segments
        if scale_name(layer, rows.owners) in bits and set(rows.owners) & set(columns.owners)
    }


def _layers(streams: Mapping[str, ActivationStream]) -> Iterator[dict[str, Node]]:
    """Walk over the nodes of all tasks, and run those that are no layers.

    Args:
        streams: The tasks' calibration data.

    Yields:
        A layer of one task; or of all tasks at once, if all of them have it and come to it in the same order. It must
        be run before the walk goes on.
    """
    graphs = {task: stream.reduced.network.graph for task, stream in streams.items()}
    everywhere = set.intersection(*(set(graph.layers_by_name) for graph in graphs.values()))
    if len({tuple(node.name for node in graph.layers if node.name in everywhere) for graph in graphs.values()}) > 1:
        separate = {node.name for graph in graphs.values() for node in graph.layers if node.separate}
        everywhere -= separate
    left = {task: iter(graph.nodes) for task, graph in graphs.items()}
    while True:
        met: dict[str, Node] = {}
        for task, nodes in left.items():
            for node in nodes:
                if not node.is_layer:
                    streams[task].advance(node)
                elif node.name in everywhere:
                    met[task] = node
                    break
                else:
                    yield {task: node}
        if not met:
            return
        yield met


def _merge_layer(
    structure: ZippedStructure,
    reduced: Mapping[str, Reduced],
    nodes: Mapping[str, Node],
    streams: Mapping[str, ActivationStream],
    config: ZipConfig,
    sensitivity: Mapping[str, Sensitivities],
    damping: Mapping[str, float],
) -> tuple[LayerReport, dict[str, Tensor]]:
    """Fit one layer of the tasks that have these nodes, store its blocks, and run it."""
    (node, *_) = nodes.values()
    rows, columns = structure.rows[node.name], structure.columns[node.name]
    own = {task: reduced[task] for task in nodes}
    originals = {task: narrow.original for task, narrow in reduced.items()}
    bits = {
        run.owners: structure.bits[block_name(node.name, run.owners, column.owners)]
        for run in rows.segments
        for column in columns.segments
        if block_name(node.name, run.owners, column.owners) in structure.bits
    }

    def parts_with(alike: float, held_out: bool) -> dict[str, LayerFit]:
        return {
            task: LayerFit(
                nodes[task],
                narrow,
                streams[task].given(nodes[task].source),
                streams[task].zipped[nodes[task].source],
                shared=any(len(run.owners) > 1 for run in rows.of(task)),
                config=config,
                sensitivity=sensitivity[task][node.name],
                damping=damping.get(task, alike),
                held_out=held_out,
                targets=streams[task].targets_of(node),
                rounded=any(task in owners for owners in bits),
            )
            for task, narrow in own.items()
        }

    def held_out_error(alike: float) -> float:
        trial = parts_with(alike, held_out=True)
        fit(trial, rows, columns, {}, config)
        return sum(part.held_out_error() for part in trial.values())

    choose = config.damping == "auto" and config.method == "refit"
    parts = parts_with(min(DAMPINGS, key=held_out_error) if choose else config.fixed_damping, held_out=False)
    clips = {task: following_clip(narrow.network, nodes[task]) for task, narrow in own.items()}
    cost = fit(parts, rows, columns, clips, config, bits)
    few = {task: part.few_rows for task, part in parts.items() if part.few_rows}
    blocks: dict[str, Tensor] = {}
    for task, part in parts.items():
        changed = part.tensors()
        bias = nodes[task].bias is not None
        matrix, scales = part.stored_matrix(), part.scales
        blocks |= to_blocks(node.name, task, matrix, rows, columns, bias, blocks, scales, structure.bits)
        part.release()
        streams[task].advance(nodes[task], changed)
    report = LayerReport(
        layer=node.name,
        kind=node.kind,
        neurons={task: len(rows.order(task)) for task in nodes},
        shared=rows.shared(),
        cost=cost,
        error={task: streams[task].output_error(node) for task, node in nodes.items() if streams[task].original},
        parameters=structure.parameters_of(node.name),
        original_parameters={t: sum(originals[t].state[n].numel() for n in node.state) for t, node in nodes.items()},
        note=why_separate(originals, node) or "",
        few_rows="; ".join(f"{task} has {what}" for task, what in few.items()),
        bits="-".join(map(str, dict.fromkeys((min(bits.values()), max(bits.values()))))) if bits else "",
    )
    return report, blocks
