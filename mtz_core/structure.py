"""What a zipped network is made of, beside its values: structure, layouts, names and shapes of blocks, and the report.

Neurons of every group are held in the order of its layout (see `Pairing.layout`): those of all tasks first, then
each task's own. A layer is a grid of blocks, one for each run of its neurons (rows) and each run of the neurons it
reads (columns), as far as their owners have a task in common. A task's dense weights are its blocks put together;
what several tasks use is one tensor.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mtz_core.graph import LayerGraph, Node

TASK_NAME = re.compile(r"[A-Za-z0-9_-]+")
"""What may name a task: names of blocks are made of it."""

Owners = tuple[str, ...]
"""The tasks that a neuron, a column or a block of weights belongs to, in the order of the zipped network's tasks."""

Layout = tuple[tuple[Owners, int], ...]
"""Runs of neurons with the same owners, in order, with their lengths."""


@dataclass(frozen=True)
class LayerReport:
    """What zipping did to one layer.

    `neurons` per task, `shared` of them; `cost` is the predicted loss of the shared neurons
    ``Σ_t ½ α_t (s* − s_t)ᵀ M_t (s* − s_t)``; `error` per task is the measured relative squared error of the layer's
    output on calibration data, ``E‖ŷ − y‖² / E‖y‖²`` against the original network.
    """

    layer: str
    kind: str
    neurons: Mapping[str, int]
    shared: int
    cost: float
    error: Mapping[str, float]
    parameters: int
    original_parameters: int


@dataclass(frozen=True)
class ZipReport:
    """Per layer what was shared, and the sizes of all weights: parameters, and bytes of the stored tensors."""

    method: str
    layers: tuple[LayerReport, ...]
    stored_parameters: int
    original_parameters: int
    stored_bytes: int
    original_bytes: int

    @property
    def stored_fraction(self) -> float:
        """Stored parameters relative to the originals'."""
        return self.stored_parameters / self.original_parameters


def block_name(layer: str, rows: Owners, columns: Owners) -> str:
    """The name of a block of weights, for files and ``state_dict``. Task names hold neither '+' nor '/'."""
    return f"{layer}/weight/{'+'.join(rows)}/{'+'.join(columns)}"


def bias_name(layer: str, rows: Owners) -> str:
    """The name of a block of biases."""
    return f"{layer}/bias/{'+'.join(rows)}"


@dataclass(frozen=True)
class ZippedStructure:
    """Everything about a zipped network but the values of its blocks.

    `layouts` has an entry per neuron group, `columns_per_neuron` one per layer.
    """

    tasks: tuple[str, ...]
    graph: LayerGraph
    input_shape: tuple[int, ...]
    layouts: Mapping[str, Layout]
    columns_per_neuron: Mapping[str, int]
    report: ZipReport

    def rows(self, node: Node) -> Layout:
        """The layout of a layer's neurons."""
        return self.layouts[self.graph.written_by(node.name).name]

    def columns(self, node: Node) -> Layout:
        """The layout of the neurons that a layer reads."""
        return self.layouts[self.graph.read_by(node.name).name]

    def block_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every block that a zipped network of this structure stores."""
        shapes: dict[str, tuple[int, ...]] = {}
        for node in self.graph.layers:
            for rows, count in self.rows(node):
                for columns, width in self.columns(node):
                    if set(rows) & set(columns):
                        name = block_name(node.name, rows, columns)
                        shapes[name] = (count, width * self.columns_per_neuron[node.name])
                if node.bias:
                    shapes[bias_name(node.name, rows)] = (count,)
        return shapes
