"""What zipping did, layer by layer, and what it saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mtz_core.settings import Kind, Output, Outputs
from mtz_core.task_loss import JointLoss, Loss

ROWS = 24
"""The most layers that a printed report lists; of more, it shows the first and the last."""

_LAYER_WIDTH = 32
_NONE = "–"
_NAMED = 3  # for so many tasks a table has each one's value, for more their range


def noted_in_brief(notes: Mapping[str, str], does: str, do: str) -> str:
    """Return the first of the notes on layers, with the layer's path and how many more there are.

    Args:
        notes: What is noted, by the layer's path; at least one note.
        does: What is noted of one layer, as ``stays separate``.
        do: The same of several.

    Returns:
        The note in words.
    """
    first = next(iter(notes))
    more = f" and {len(notes) - 1} more" if len(notes) > 1 else ""
    return f"{first!r}{more} {do if more else does}: {notes[first]}"


@dataclass(frozen=True)
class LayerReport:
    """What zipping did to one layer.

    Attributes:
        layer: Path of the layer.
        kind: Its operator.
        neurons: Rows of its matrix, per task; tasks that lack the layer are left out.
        shared: How many of them are stored once for several tasks.
        cost: Predicted loss of the shared ones, ``Σ_t ½ α_t (s* − s_t)ᵀ M_t (s* − s_t)``.
        error: Relative squared error of its outputs on calibration data, ``E‖ŷ − y‖² / E‖y‖²`` against the original
            network, per task; empty where the original has not run along.
        parameters: Values that are stored.
        original_parameters: Values of the original layer, per task.
        note: Why nothing is shared, where that was not asked for.
        few_rows: By how much calibration data is too little to fit the layer well.
        bits: To how many bits its weights are rounded, as ``4`` or ``3-8``; empty where none are.
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
    bits: str = ""

    def of(self, tasks: Sequence[str], shared: int, parameters: int) -> LayerReport:
        """Return the report when only these tasks are left."""
        return replace(
            self,
            neurons={task: self.neurons[task] for task in tasks},
            shared=shared,
            error={task: self.error[task] for task in tasks},
            parameters=parameters,
            original_parameters={task: self.original_parameters[task] for task in tasks},
        )


_JUDGED = {"lost", "agreement"}
"""What a report on a task says of each of several outputs, beside what it is declared as."""


@dataclass(frozen=True)
class TaskReport:
    """How well a task came through zipping, judged on examples to which nothing was fitted.

    Attributes:
        output: The kind of its outputs, see `mtz_core.Output`; of several outputs the fields of each, by name, with
            ``lost`` and ``agreement`` of each that counts.
        tolerance: The error that makes no difference to it, if one is declared.
        guessed: Why this kind was taken, in words; empty where it was declared.
        lost: The share of its own information that it has lost: 0 for none, 1 for all; see `mtz_core.task_loss`.
        agreement: How far its outputs agree with the original network's, in percent.
        examples: How many examples it was judged on.
    """

    output: Kind | Mapping[str, Mapping[str, Any]]
    tolerance: float | None
    guessed: str
    lost: float
    agreement: float
    examples: int

    @classmethod
    def of(cls, loss: Loss, outputs: Any, targets: Any) -> TaskReport:
        """Make a report on a task that has this loss, from outputs and those of the original."""
        lost, agreement = float(loss(outputs, targets)), loss.agreement(outputs, targets)
        if not isinstance(loss, JointLoss):
            return cls(loss.kind, loss.output.tolerance, loss.guessed, lost, agreement, len(targets))
        several = {name: asdict(own.output) for name, own in loss.losses.items()}
        for name, (weight, own) in loss.parts.items():
            if weight:
                pair = outputs.tensors[name], targets.tensors[name]
                several[name] |= {"lost": float(own(*pair)), "agreement": own.agreement(*pair)}
        return cls(several, None, loss.guessed, lost, agreement, len(targets))

    @property
    def declared(self) -> Outputs:
        """What the outputs mean."""
        if isinstance(self.output, Mapping):
            return {name: Output(**{n: own[n] for n in own.keys() - _JUDGED}) for name, own in self.output.items()}
        return Output(self.output, self.tolerance)

    @property
    def worst(self) -> tuple[str, float]:
        """The output that has lost most, by its name (empty for one), and the share of its information that is lost."""
        several = self.output if isinstance(self.output, Mapping) else {}
        lost = {name: float(own["lost"]) for name, own in several.items() if "lost" in own} or {"": self.lost}
        return max(lost.items(), key=lambda item: item[1])

    def has_guessed(self, output: str = "") -> bool:
        """Whether the kind of an output was guessed; that of several is named."""
        return any(part.startswith(f"{output}: " if output else "") for part in self.guessed.split("; ") if part)

    @property
    def kinds(self) -> str:
        """The kind of the outputs, or of each, in words."""
        if isinstance(self.output, Mapping):
            return ", ".join(f"{name}: {own['kind']}" for name, own in self.output.items())
        return self.output

    def brief(self) -> str:
        """Return the figures in a few words."""
        return f"{self.agreement:.1f} % agreement, {100 * self.lost:.2g} % lost"

    def __str__(self) -> str:
        """Return a line for people."""
        guessed = f", guessed, as {self.guessed}" if self.guessed else ""
        several = self.output if isinstance(self.output, Mapping) else {}
        each = ", ".join(f"{name} {own['agreement']:.1f} %" for name, own in several.items() if "agreement" in own)
        brief = self.brief().replace("agreement", f"agreement ({each})", 1) if each else self.brief()
        return f"{brief}, on {self.examples} held-out examples; outputs are {self.kinds}{guessed}"


@dataclass(frozen=True)
class ZipReport:
    """What was shared in each layer, and sizes. Printed, it is a table that fits a screen.

    Attributes:
        method: ``refit`` or ``paper``.
        layers: One report for each layer, in topological order.
        stored_parameters: Values that are stored and learn.
        original_parameters: Those of all originals together.
        stored_bytes: Bytes of everything that is stored, statistics of normalisations included.
        original_bytes: Those of all originals together.
        descent: Predicted cost of sharing before and after every step of the coordinate descent over neuron groups;
            empty where no pairing depends on a later one.
        tasks: How well each task came through; empty where that was not judged.
    """

    method: str
    layers: tuple[LayerReport, ...]
    stored_parameters: int
    original_parameters: int
    stored_bytes: int
    original_bytes: int
    descent: tuple[float, ...] = ()
    tasks: Mapping[str, TaskReport] = field(default_factory=dict)

    @property
    def stored_fraction(self) -> float:
        """Stored bytes relative to the originals'."""
        return self.stored_bytes / self.original_bytes if self.original_bytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """Return the report as plain values that JSON can hold."""
        return {**asdict(self), "layers": [asdict(layer) for layer in self.layers], "descent": list(self.descent)}

    def __str__(self) -> str:
        """Return the report as a table."""
        tasks = list(dict.fromkeys(task for layer in self.layers for task in layer.neurons))
        head, *rows = _HEAD, *(_row(layer, tasks) for layer in self.layers)
        if any(layer.bits for layer in self.layers):
            rows = [(*row, layer.bits or _NONE) for row, layer in zip(rows, self.layers, strict=True)]
            head = (*head, "bits")
        if len(rows) > ROWS:
            hidden = len(rows) - ROWS + 1
            rows[ROWS // 2 : ROWS // 2 + hidden] = [(f"… {hidden} more layers …", *[""] * (len(head) - 1))]
        widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
        lines = [_line(row, widths) for row in (head, tuple("─" * width for width in widths), *rows)]
        return "\n".join((*lines, *self._footer(tasks)))

    def _footer(self, tasks: Sequence[str]) -> Iterator[str]:
        sizes = f"{self.stored_bytes:,} of {self.original_bytes:,} bytes ({100 * self.stored_fraction:.1f} %)"
        yield f"stored: {sizes}, method {self.method}"
        if len(tasks) > _NAMED:
            yield f"ranges: from the least to the largest of {len(tasks)} tasks"
        elif tasks:
            yield f"tasks, in this order: {', '.join(tasks)}"
        yield from self._agreements()
        for title, found in (
            ("separate", [layer.layer for layer in self.layers if layer.note]),
            ("few rows", [layer.layer for layer in self.layers if layer.few_rows]),
        ):
            if found:
                more = f" and {len(found) - 1} more" if len(found) > 1 else ""
                yield f"{title}: {_shortened(found[0])}{more}"

    def _agreements(self) -> Iterator[str]:
        """How well the tasks came through; of many, the one that lost most."""
        if len(self.tasks) > _NAMED:
            task = max(self.tasks, key=lambda task: self.tasks[task].lost)
            yield f"most lost by {_shortened(task)}: {self.tasks[task].brief()}"
            return
        for task, judged in self.tasks.items():
            yield f"{_shortened(task)}: {judged.brief()}"


_Row = tuple[str, ...]
_HEAD: _Row = ("layer", "kind", "neurons", "shared", "stored", "output error")


def _row(layer: LayerReport, tasks: Sequence[str]) -> _Row:
    original = sum(layer.original_parameters.values())
    return (
        _shortened(layer.layer),
        layer.kind,
        _span([str(layer.neurons.get(task, _NONE)) for task in tasks]),
        str(layer.shared),
        f"{100 * layer.parameters / original:.1f} %" if original else "–",
        _span([f"{layer.error[task]:.2g}" if task in layer.error else _NONE for task in tasks]),
    )


def _span(values: Sequence[str]) -> str:
    """Return one value for each task, or for many tasks the least and the largest."""
    if len(set(values)) == 1:
        return values[0]
    if len(values) <= _NAMED:
        return " ".join(values)
    ordered = sorted((value for value in values if value != _NONE), key=float)
    return f"{ordered[0]} … {ordered[-1]}"


def _shortened(path: str) -> str:
    half = _LAYER_WIDTH // 2
    return path if len(path) <= _LAYER_WIDTH else f"{path[: half - 1]}…{path[-half:]}"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    names, numbers = row[:2], row[2:]
    parts = [text.ljust(width) for text, width in zip(names, widths[:2], strict=True)]
    parts += [text.rjust(width) for text, width in zip(numbers, widths[2:], strict=True)]
    return "  ".join(parts).rstrip()
