"""The zipped network as a module of torch: blocks of weights, each stored once, and a forward pass per task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from inspect import Parameter, Signature
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from mtz_core.batches import Batch, bound, concatenated, flattened, formed, shapes_in_words, tensors_of
from mtz_core.errors import InvalidCalibration, InvalidConfig, InvalidZippedFile
from mtz_core.network.graph import (
    INPUT,
    LayerGraph,
    Network,
    Node,
    blank_values,
    free_unused,
    given_name,
    input_values,
    run,
    run_node,
)
from mtz_core.network.to_module import build_module
from mtz_core.settings import ZipConfig
from mtz_core.task_loss import Loss, make_loss
from mtz_core.zipped import format
from mtz_core.zipped.codes import unpack, values_of
from mtz_core.zipped.ownership import Arrangement, Segment
from mtz_core.zipped.prefix import Order, Prefix, common_prefix
from mtz_core.zipped.report import TaskReport, ZipReport
from mtz_core.zipped.structure import (
    ZippedStructure,
    bias_name,
    block_name,
    hidden_groups,
    own_name,
    scale_name,
    to_blocks,
)


class ZippedNetwork(nn.Module):
    """Several networks in one; ``zipped(x, task="fashion")`` runs one of them.

    It is an ordinary ``nn.Module``: it trains, moves between devices, and holds each shared value once. Printed, it
    shows its report.
    """

    def __init__(self, structure: ZippedStructure, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.structure = structure
        learning = {own_name(n, task) for task, network in structure.networks.items() for n in network.trainable}
        learning |= (structure.block_shapes().keys() | structure.scale_shapes().keys()) - structure.bits.keys()
        for name, tensor in tensors.items():
            if name in learning:
                self.register_parameter(attribute(name), nn.Parameter(tensor))
            else:
                self.register_buffer(attribute(name), tensor)
        self.register_load_state_dict_pre_hook(_read_former_names)  # type: ignore[no-untyped-call]
        self._prefix: Prefix | None = None
        self._orders: dict[tuple[str, str], tuple[Tensor | None, Tensor | None]] = {}

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return self.structure.tasks

    @property
    def report(self) -> ZipReport:
        """What zipping did, layer by layer, and the sizes."""
        return self.structure.report

    @property
    def precision(self) -> torch.dtype:
        """The type of the weights, which may have been turned to another since they were zipped."""
        return next(self.parameters()).dtype

    def judged(self, tasks: Mapping[str, TaskReport]) -> ZippedNetwork:
        """Report how well tasks came through, and return this network."""
        report = replace(self.report, tasks={**self.report.tasks, **tasks})
        self.structure = replace(self.structure, report=report)
        return self

    def loss_of(self, task: str, targets: Batch) -> Loss:
        """Make a task's loss for its original network's outputs, of the kind that was declared or found in zipping."""
        judged = self.report.tasks.get(task)
        endings = self.structure.networks[task].graph.endings
        return make_loss(targets, None if judged is None else judged.declared, endings)

    def tensors(self) -> dict[str, Tensor]:
        """Return every stored tensor by its name, detached."""
        return {name: self._get(name).detach() for name in self.structure.stored_shapes()}

    def forward(
        self, x: Batch | Mapping[str, Tensor] | Sequence[Shaped[Tensor, "..."]], task: str | Sequence[str]
    ) -> Any:
        """Run one task, or every example's own task.

        Args:
            x: Examples, ``[batch, *input shape]``; of several inputs, a dict by name, or a tuple in their order.
            task: The task, or one for each example.

        Returns:
            The outputs, ``[batch, *output shape]``; several in dicts, lists or tuples as in the original network.

        Raises:
            InvalidConfig: A task is not in here, or the outputs of a mixed batch differ in shape.
            InvalidCalibration: Inputs are missing or unknown, or of unequal lengths.
        """
        if not isinstance(task, str) and isinstance(task, Iterable):
            return self._mixed(x, list(task))
        self._check_task(task)
        graph = self.structure.networks[task].graph
        return _formed(graph, run(graph, self.state_of(task), self.batch_for(x, task), self.training))

    def signature(self, task: str) -> Signature:
        """Return which inputs a task's network takes."""
        names = [given_name(name) or "x" for name in self.structure.networks[task].inputs]
        return Signature([Parameter(name, Parameter.POSITIONAL_OR_KEYWORD) for name in names])

    def batch_for(self, x: Any, task: str) -> Batch:
        """Return the inputs of a task, by name if they have names.

        Raises:
            InvalidCalibration: Inputs are missing or unknown, or of unequal lengths.
        """
        if INPUT in self.structure.networks[task].inputs:
            if not isinstance(x, Tensor):
                raise InvalidCalibration(f"the network of {task!r} takes one tensor, but is given {type(x).__name__}.")
            return x
        given = (x,) if isinstance(x, Tensor) else x
        return bound(given, self.signature(task), f"the inputs of {task!r}")

    def _mixed(self, given: Any, tasks: list[str]) -> Any:
        for task in tasks:
            self._check_task(task)
        x = self.batch_for(given, tasks[0]) if tasks else given
        if len(tasks) != len(x):
            raise InvalidConfig(f"task lists {len(tasks)} tasks for {len(x)} examples. List one for each.")
        outputs: list[tuple[Tensor, Batch]] = []
        device = next(iter(tensors_of(x).values())).device
        for task in dict.fromkeys(tasks):
            index = torch.tensor([i for i, t in enumerate(tasks) if t == task], device=device)
            outputs.append((index, flattened(self(x[index], task=task))))
        forms = {str(self.structure.networks[task].graph.form) for task in tasks}
        if len(forms) != 1 or len({shapes_in_words(output) for _, output in outputs}) != 1:
            raise InvalidConfig(
                f"a batch cannot mix {', '.join(dict.fromkeys(tasks))}: their outputs differ in shape. "
                "Call the network once per task."
            )
        order = torch.cat([index for index, _ in outputs]).argsort()
        return _formed(self.structure.networks[tasks[0]].graph, concatenated([own for _, own in outputs])[order])

    def run_all(self, x: Batch | Mapping[str, Tensor] | Sequence[Shaped[Tensor, "..."]]) -> dict[str, Any]:
        """Run all tasks on the same examples; what all of them share from the input on is computed once.

        Args:
            x: Examples, as for one task.

        Returns:
            The outputs of each task.

        Raises:
            InvalidConfig: The tasks read inputs of different names or shapes.
            InvalidCalibration: Inputs are missing or unknown, or of unequal lengths.
        """
        networks = self.structure.networks
        first = self.tasks[0]
        if any(network.inputs != networks[first].inputs for network in networks.values()):
            raise InvalidConfig("the tasks read different inputs. Call the network once per task.")
        batch = self.batch_for(x, first)
        if self._prefix is None:
            self._prefix = common_prefix(self.structure, self.precision)
        prefix = self._prefix
        shared = input_values(batch)
        state = self.state_of(first)
        for node in networks[first].graph.nodes:
            if node.name in prefix.nodes:
                shared[node.name] = run_node(node, shared, state, len(batch), self.training)
                for source in set(node.sources) - prefix.frontier:
                    if networks[first].graph.last_use.get(source) == node.name:
                        shared.pop(source)
        return {task: self._rest(task, shared, prefix.nodes, prefix.orders[task], len(batch)) for task in self.tasks}

    def _rest(
        self, task: str, shared: Mapping[str, Any], done: frozenset[str], orders: Mapping[str, Order], batch: int
    ) -> Any:
        """One task from the end of the common prefix on."""
        graph, state = self.structure.networks[task].graph, self.state_of(task)
        values: dict[str, Any] = {name: orders[name].apply(value) for name, value in shared.items()}
        for node in graph.nodes:
            if node.name not in done:
                values[node.name] = run_node(node, values, state, batch, self.training)
                free_unused(graph, values, node)
        return _formed(graph, values[graph.output])

    def network(self, task: str) -> nn.Module:
        """Return one task alone, as a plain torch module with dense weights that needs nothing of this package.

        Its tensors have the names and shapes of the original network's, its neurons the original order.

        Raises:
            InvalidConfig: The task is not in here.
        """
        self._check_task(task)
        part = self.structure.networks[task]
        precise = {n: replace(i, dtype=self.precision) for n, i in part.inputs.items() if i.dtype.is_floating_point}
        state = {name: tensor.detach().clone() for name, tensor in self.state_of(task).items()}
        alone = Network(part.graph, state, part.trainable, {**part.inputs, **precise}, part.non_persistent)
        return build_module(alone).train(self.training)

    def without(self, task: str) -> ZippedNetwork:
        """Return a zipped network without one task; the others compute exactly what they did.

        Raises:
            InvalidConfig: The task is not in here, or it is the only one.
        """
        self._check_task(task)
        rest = tuple(other for other in self.tasks if other != task)
        if not rest:
            raise InvalidConfig(f"{task!r} is the only task of this zipped network.")
        kept = [self.tasks.index(other) for other in rest]
        networks = {other: self.structure.networks[other] for other in rest}
        hidden = hidden_groups(network.graph for network in networks.values())
        members = {name: self.structure.members[name][:, kept] for name in hidden}
        members = {name: rows[(rows >= 0).any(axis=1)] for name, rows in members.items()}
        structure = ZippedStructure(rest, networks, members, self.report, self.structure.all_separate())
        bits = self.bits_in(structure)
        structure = replace(structure, bits=bits)
        tensors: dict[str, Tensor] = {}
        for layer, nodes in structure.nodes.items():
            rows, columns = structure.rows[layer], structure.columns[layer]
            for other, node in nodes.items():
                matrix, bias, scales = self.matrix(other, node), node.bias is not None, self.scales(other, node)
                tensors |= to_blocks(layer, other, matrix, rows, columns, bias, tensors, scales, bits)
        reports = []
        for report in self.report.layers:
            left = [other for other in rest if other in report.neurons]
            if left:
                shared = structure.rows[report.layer].shared()
                reports.append(report.of(left, shared, structure.parameters_of(report.layer)))
        tensors |= {name: self._get(name).detach().clone() for name in structure.own_shapes()}
        return ZippedNetwork(structure.reported(tensors, reports), tensors).eval()

    def bits_in(self, structure: ZippedStructure) -> dict[str, int]:
        """Tell to how many bits each block of another structure of these tasks is rounded, with the values it has here.

        A row's scale is the same for all of its blocks, and the levels of few bits are among those of more. So a block
        that is made of several keeps the most bits of any. It is not rounded if one of them is not.

        Args:
            structure: The structure; it may have a task that is not in here.

        Returns:
            The bits by the names of its blocks.
        """
        found: dict[str, int] = {}
        for layer in structure.nodes.keys() & self.structure.nodes.keys() if self.structure.bits else ():
            for rows, columns in product(structure.rows[layer].segments, structure.columns[layer].segments):
                owners = (
                    task for task in rows.owners if task in columns.owners and task in self.structure.nodes[layer]
                )
                task = next(owners, None)
                if task is None:
                    continue
                bits = [
                    self.structure.bits.get(block_name(layer, row.owners, column.owners))
                    for row in self._meeting(self.structure.rows[layer], task, rows)
                    for column in self._meeting(self.structure.columns[layer], task, columns)
                ]
                known = [own for own in bits if own is not None]
                if known and len(known) == len(bits):
                    found[block_name(layer, rows.owners, columns.owners)] = max(known)
        return found

    @staticmethod
    def _meeting(arrangement: Arrangement, task: str, segment: Segment) -> list[Segment]:
        """The segments here that hold positions of a task's segment elsewhere."""
        places = segment.places[task]
        return [own for own in arrangement.of(task) if np.isin(own.places[task], places).any()]

    def with_task(
        self, task: str, network: nn.Module, data: Tensor | Iterable[Any], config: ZipConfig | None = None
    ) -> ZippedNetwork:
        """Return a zipped network with one more task; the others compute exactly what they did.

        Args:
            task: Name of the new task.
            network: Its pre-trained network, of the same topology.
            data: Its calibration data, as in `zip_networks`. One example in five is held out to judge it.
            config: How to zip it. `share` is relative to its own neurons, or to those here where they are fewer.

        Raises:
            MtzError: In its kinds, as `zip_networks`.

        Warns:
            ZipWarning: The new task has lost most of what it knew.
        """
        # Merging builds upon this module, and whoever only runs a zipped network need not load it.
        found: ZippedNetwork = import_module("mtz_core.merging.adding").add_network(self, task, network, data, config)
        return found

    def __repr__(self) -> str:
        """Return the tasks, and the report as a table."""
        return f"ZippedNetwork of {', '.join(self.tasks)}\n{self.report}"

    def matrix(self, task: str, node: Node) -> Float[Tensor, "out columns"]:
        """Return one task's dense matrix of a layer, the bias (if any) as its last column."""
        weight = self._dense_weight(task, node).detach()
        if node.bias is None:
            return weight
        return torch.cat([weight, self._dense_bias(task, node).detach()[:, None]], dim=1)

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` and `weights.safetensors` into a folder; see `mtz_core.zipped.format`."""
        format.save(self.structure, self.tensors(), Path(folder))

    def state_of(self, task: str) -> Mapping[str, Tensor]:
        """Return all tensors of one task by their original names; those of layers are assembled on access."""
        return _TaskState(self, task)

    def _dense_weight(self, task: str, node: Node) -> Float[Tensor, "out in"]:
        """One task's dense matrix of a layer, put together from the blocks."""
        rows, columns = self.structure.rows[node.name], self.structure.columns[node.name]
        strips = [
            _join([self.block(node.name, row, column) for column in columns.of(task)], 1) for row in rows.of(task)
        ]
        weight = _join(strips, 0)
        row_order, column_order = self._order(task, node, weight.device)
        if column_order is not None:
            weight = weight.index_select(1, column_order)
        return weight if row_order is None else weight.index_select(0, row_order)

    def block(self, layer: str, rows: Segment, columns: Segment) -> Float[Tensor, "rows columns"]:
        """Return the values of one block."""
        name = block_name(layer, rows.owners, columns.owners)
        bits, stored = self.structure.bits.get(name), self._get(name)
        if bits is None:
            return stored
        codes = unpack(stored, bits, rows.size * columns.size).reshape(rows.size, columns.size)
        return values_of(codes, self._get(scale_name(layer, rows.owners)), bits)

    def scales(self, task: str, node: Node) -> Float[Tensor, " out"] | None:
        """Return the scales of one task's rows of a layer, 0 where nothing is rounded; None if nothing is at all."""
        segments = self.structure.rows[node.name].of(task)
        rounded = {run.owners for run in segments if self.structure.is_rounded(node.name, run.owners)}
        if not rounded:
            return None
        parts = [
            self._get(scale_name(node.name, run.owners)).detach()
            if run.owners in rounded
            else torch.zeros(run.size, dtype=self.precision)
            for run in segments
        ]
        order = torch.from_numpy(np.argsort(self.structure.rows[node.name].order(task)))
        return _join(parts, 0)[order.to(parts[0].device)]

    def _dense_bias(self, task: str, node: Node) -> Float[Tensor, " out"]:
        """One task's bias of a layer that has one, put together from the blocks."""
        segments = self.structure.rows[node.name].of(task)
        bias = _join([self._get(bias_name(node.name, run.owners)) for run in segments], 0)
        order, _ = self._order(task, node, bias.device)
        return bias if order is None else bias.index_select(0, order)

    def _order(self, task: str, node: Node, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """Where a task's rows and columns lie in its joined blocks; None where they are in order."""
        if (task, node.name) not in self._orders:
            self._orders[task, node.name] = (
                _index(self.structure.rows[node.name], task),
                _index(self.structure.columns[node.name], task),
            )
        rows, columns = self._orders[task, node.name]
        return rows if rows is None else rows.to(device), columns if columns is None else columns.to(device)

    def _get(self, name: str) -> Tensor:
        found: Tensor = getattr(self, attribute(name))
        return found

    def _check_task(self, task: str) -> None:
        if not isinstance(task, str) or task not in self.tasks:
            raise InvalidConfig(f"task {task!r} is not in this zipped network. Tasks: {', '.join(self.tasks)}.")


class _TaskState(Mapping[str, Tensor]):
    """One task's tensors by their original names."""

    def __init__(self, zipped: ZippedNetwork, task: str) -> None:
        self._zipped, self._task = zipped, task
        self._network = zipped.structure.networks[task]
        self._layers = {name: node for node in self._network.graph.layers for name in node.state}

    def __getitem__(self, name: str) -> Tensor:
        node = self._layers.get(name)
        if node is None:
            return self._zipped._get(own_name(name, self._task))
        if name == node.bias:
            return self._zipped._dense_bias(self._task, node)
        weight = self._zipped._dense_weight(self._task, node)
        return node.layer.from_matrix(weight, self._network.shapes[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._network.shapes)

    def __len__(self) -> int:
        return len(self._network.shapes)


def load(folder: str | Path) -> ZippedNetwork:
    """Read a zipped network, in evaluation mode.

    Every task is run on shapes alone first, so that settings that do not fit are found here.

    Args:
        folder: What `ZippedNetwork.save` wrote.

    Returns:
        The network. Nothing is unpickled, and no code from the files is executed.

    Raises:
        InvalidZippedFile: A file is missing, damaged, of an unknown version, or does not fit the other.
    """
    structure, tensors = format.load(Path(folder))
    shapes = ZippedNetwork(structure, {name: tensor.to("meta") for name, tensor in tensors.items()}).eval()
    try:
        for task, network in structure.networks.items():
            values = blank_values(network.inputs, 2)
            shapes(values.get(INPUT, {given_name(name): value for name, value in values.items()}), task)
    except Exception as error:  # torch raises many kinds for settings that make no sense
        raise InvalidZippedFile(
            f"{Path(folder) / format.MANIFEST} is malformed: the network cannot run: {str(error).splitlines()[0]}"
        ) from error
    return ZippedNetwork(structure, tensors).eval()


def _read_former_names(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Give parameters the names that they have since version 0.2."""
    former = f"{prefix}_parameters_by_name."
    for name in [name for name in state if name.startswith(former)]:
        state[prefix + name.removeprefix(former)] = state.pop(name)


def _formed(graph: LayerGraph, outputs: Batch) -> Any:
    """Outputs in what held them in the original network."""
    return formed(graph.form, list(tensors_of(outputs).values()))


def attribute(name: str) -> str:
    """The name of a stored tensor in ``state_dict``."""
    return name.replace(".", "|")  # torch keeps the dot for paths of submodules


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _index(arrangement: Arrangement, task: str) -> Tensor | None:
    order = arrangement.order(task)
    inverse = np.argsort(order)
    return None if bool((inverse == np.arange(len(inverse))).all()) else torch.from_numpy(inverse)
