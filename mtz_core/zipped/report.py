"""What zipping did, layer by layer, and what it saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor


@dataclass(frozen=True)
class LayerReport:
    """What zipping did to one layer.

    `neurons` are the rows of its matrix per task, `shared` of them stored once for several tasks; `cost` is the
    predicted loss of the shared ones, ``Σ_t ½ α_t (s* − s_t)ᵀ M_t (s* − s_t)``; `error` per task is the measured
    relative squared error of the layer's output on calibration data, ``E‖ŷ − y‖² / E‖y‖²`` against the original
    network. `note` says why nothing is shared where that is not by choice, `few_rows` by how much calibration data are
    too few to fit the layer well.
    """

    layer: str
    kind: str
    neurons: Mapping[str, int]
    shared: int
    cost: float
    error: Mapping[str, float]
    parameters: int
    original_parameters: Mapping[str, int]
    note: str = ""
    few_rows: str = ""

    def of(self, tasks: Sequence[str], shared: int, blocks: Mapping[str, Tensor]) -> LayerReport:
        """The report when only these tasks are left."""
        return replace(
            self,
            neurons={task: self.neurons[task] for task in tasks},
            shared=shared,
            error={task: self.error[task] for task in tasks},
            parameters=sum(block.numel() for block in blocks.values()),
            original_parameters={task: self.original_parameters[task] for task in tasks},
        )


@dataclass(frozen=True)
class ZipReport:
    """Per layer what was shared, and sizes: parameters, and bytes of all that is stored (statistics, too).

    `descent` is the predicted cost of sharing before and after every step of the coordinate descent over neuron groups;
    empty where no pairing depends on a later one.
    """

    method: str
    layers: tuple[LayerReport, ...]
    stored_parameters: int
    original_parameters: int
    stored_bytes: int
    original_bytes: int
    descent: tuple[float, ...] = ()

    @property
    def stored_fraction(self) -> float:
        """Stored parameters relative to the originals'."""
        return self.stored_parameters / self.original_parameters
