"""The zipped network as a module of torch: blocks of weights, each stored once, and a forward pass per task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mtz_core import format
from mtz_core.errors import InvalidConfig, InvalidZippedFile
from mtz_core.graph import INPUT, Node, build_module, run_node
from mtz_core.layers import DROPOUT, to_matrix
from mtz_core.structure import ZippedStructure, ZipReport, bias_name, block_name


class ZippedNetwork(nn.Module):
    """Several networks in one; ``zipped(x, task="fashion")`` runs one of them.

    An ordinary ``nn.Module``: trains, moves between devices, and holds each shared value once.
    """

    def __init__(self, structure: ZippedStructure, blocks: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.structure = structure
        self._blocks = nn.ParameterDict({_attribute(name): nn.Parameter(t) for name, t in blocks.items()})

    @property
    def tasks(self) -> tuple[str, ...]:
        """The names of the tasks."""
        return self.structure.tasks

    @property
    def report(self) -> ZipReport:
        """What zipping did, layer by layer, and the sizes."""
        return self.structure.report

    def blocks(self) -> dict[str, Tensor]:
        """Every stored tensor by its name, as it is now."""
        return {name: self._blocks[_attribute(name)].detach() for name in self.structure.block_shapes()}

    def forward(self, x: Float[Tensor, "batch ..."], task: str) -> Float[Tensor, "batch classes"]:
        """The output of one task. Raises `InvalidConfig` for a task that is not in here."""
        self._check_task(task)
        values = {INPUT: x}
        for node in self.structure.graph.nodes:
            weight, bias = self._layer_weights(node, task) if node.is_layer else (None, None)
            training = self.training and node.kind in DROPOUT
            values[node.name] = run_node(node, values[node.source], weight, bias, training)
        return values[self.structure.graph.nodes[-1].name]

    def network(self, task: str) -> nn.Module:
        """One task alone, as a plain module of torch with dense weights, its parameters named as in the original
        (see `mtz_core.graph.build_module`).

        Its hidden neurons are in the zipped network's order. Raises `InvalidConfig` for an unknown task.
        """
        self._check_task(task)
        graph = self.structure.graph
        module = build_module(graph, {node.name: to_matrix(*self._layer_weights(node, task)) for node in graph.layers})
        return module.train(self.training)

    def save(self, folder: str | Path) -> None:
        """Write `manifest.json` and `weights.safetensors`; see `mtz_core.format`."""
        format.save(self.structure, self.blocks(), Path(folder))

    def _layer_weights(self, node: Node, task: str) -> tuple[Float[Tensor, "out in"], Float[Tensor, " out"] | None]:
        """One task's dense weights of a layer, put together from the blocks."""
        columns = [owners for owners, _ in self.structure.columns(node) if task in owners]
        rows = [owners for owners, _ in self.structure.rows(node) if task in owners]
        weight = _join([_join([self._get(block_name(node.name, r, c)) for c in columns], 1) for r in rows], 0)
        return weight, _join([self._get(bias_name(node.name, r)) for r in rows], 0) if node.bias else None

    def _get(self, name: str) -> Tensor:
        block: Tensor = self._blocks[_attribute(name)]
        return block

    def _check_task(self, task: str) -> None:
        if task not in self.tasks:
            raise InvalidConfig(f"task {task!r} is not in this zipped network. Tasks: {', '.join(self.tasks)}.")


def load(folder: str | Path) -> ZippedNetwork:
    """Read a zipped network, in evaluation mode. Raises `InvalidZippedFile`, see `mtz_core.format`.

    Before it is returned, every task is run on shapes alone, so that settings that do not fit are found here.
    """
    structure, blocks = format.load(Path(folder))
    shapes = ZippedNetwork(structure, {name: block.to("meta") for name, block in blocks.items()}).eval()
    dtype = next(iter(blocks.values())).dtype
    try:
        for task in structure.tasks:
            shapes(torch.empty(2, *structure.input_shape, dtype=dtype, device="meta"), task)
    except Exception as error:  # torch raises many kinds for settings that make no sense
        raise InvalidZippedFile(
            f"{Path(folder) / format.MANIFEST} is malformed: the network cannot run: {str(error).splitlines()[0]}"
        ) from error
    return ZippedNetwork(structure, blocks).eval()


def _attribute(name: str) -> str:
    return name.replace(".", ":")  # torch keeps the dot for paths of submodules


def _join(parts: list[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)
