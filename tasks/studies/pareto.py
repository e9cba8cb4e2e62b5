"""The cost of size: the error of a group's networks against stored bytes, for several methods.

This is not a stage: nothing in the pipeline needs it. It reads what the stages before `match` wrote.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property, partial
from itertools import groupby
from math import ceil
from pathlib import Path
from typing import Any, get_type_hints

import pyarrow as pa
import pyarrow.parquet as pq

from mtz_core.batches import Batch, divided
from mtz_core.errors import MtzError
from mtz_core.evaluation import Case, Model, error_of, outputs_of
from mtz_core.merging.compatibility import common_part
from mtz_core.network.graph import run as run_network
from mtz_core.planning.search import BudgetSearch, Candidate
from mtz_core.retraining import Targets, retrain_steps
from mtz_core.settings import MOVES, Budget, Method, Move
from mtz_core.zipped.module import ZippedNetwork
from tasks.artifacts.paths import Workspace
from tasks.artifacts.statistics import read_traced
from tasks.data.examples import read_labelled
from tasks.files import InvalidArtifact, sha256, whole_file, write_table
from tasks.home import find_home
from tasks.models.calibration import calibration
from tasks.models.load import load_traced, read_split
from tasks.models.metrics import Named, cases_of, find_metrics
from tasks.params import Params
from tasks.progress import show_progress
from tasks.registry import mlflow_client, publish
from tasks.storage import s3
from tasks.studies.charts import Curve, Panel, draw_curves

METHODS: Mapping[str, tuple[Method, Sequence[Move]]] = {
    "mixture": ("refit", MOVES),
    "round": ("refit", ("round",)),
    "drop": ("refit", ("drop",)),
    "share": ("refit", ("share",)),
    "paper": ("paper", ("share",)),
}
"""How bytes are saved: the method of zipping, and the moves that it may make."""

SIZES = (0.15, 0.25, 0.35, 0.5, 0.75)
"""Stored bytes, relative to the originals' bytes."""

NAMES = {"mixture": "mixture", "round": "round only", "drop": "drop only", "share": "share only", "paper": "paper"}
"""Names of the methods in tables and figures."""


class InvalidPareto(MtzError):
    """The sizes or methods cannot be compared."""


@dataclass(frozen=True)
class Row:
    """The quality of one network on one task; the fields are the table's columns.

    Attributes:
        group: The group's name.
        method: How bytes were saved, a key of `METHODS`.
        retrained: Whether the network was retrained lightly.
        task: The task, or one of several outputs as ``task.output``.
        stored_bytes: Stored bytes of the whole network, payload only.
        original_bytes: Bytes of all originals, payload only.
        stored_fraction: Stored bytes relative to the originals' bytes, 0 to 1.
        least_fraction: The least that the method can store, relative to the originals' bytes, 0 to 1.
        metric: The metric of the model, or of the output.
        error: Error on the test split by that metric, in percent.
        error_original: The same of the original, in percent.
        rise: The difference of the two, in points.
        held_out_loss: Held-out distillation loss by which the plan was chosen, in nats.
        original_neurons: Hidden neurons of the original.
        kept_neurons: Hidden neurons that the task keeps.
        shared_neurons: Hidden neurons that are shared.
    """

    group: str
    method: str
    retrained: bool
    task: str
    stored_bytes: int
    original_bytes: int
    stored_fraction: float
    least_fraction: float
    metric: str
    error: float
    error_original: float
    rise: float
    held_out_loss: float
    original_neurons: int
    kept_neurons: int
    shared_neurons: int

    @property
    def curve(self) -> str:
        """Name of the curve that the row belongs to."""
        return NAMES[self.method] + (", retrained" if self.retrained else "")


@dataclass(frozen=True)
class Asked:
    """The networks to compare.

    Attributes:
        sizes: Stored bytes relative to the originals' bytes, ascending, above 0 and at most 1.
        methods: Keys of `METHODS`.
        retraining: Whether the networks are also retrained lightly.
    """

    sizes: Sequence[float] = SIZES
    methods: Sequence[str] = tuple(METHODS)
    retraining: bool = False

    @classmethod
    def parse(cls, sizes: str | None = None, methods: str | None = None, retraining: bool = False) -> Asked:
        """Parse the command line's texts, in any order.

        Args:
            sizes: Sizes such as `0.25,0.5`; None for `SIZES`.
            methods: Methods such as `mixture,paper`; None for all.
            retraining: Whether the networks are also retrained lightly.

        Returns:
            The networks to compare.

        Raises:
            InvalidPareto: A size is out of range, or a method is unknown.
        """
        return cls(
            SIZES if sizes is None else _parse_sizes(sizes),
            tuple(METHODS) if methods is None else _parse_methods(methods),
            retraining,
        )


def _parse_sizes(text: str) -> tuple[float, ...]:
    try:
        sizes = sorted({float(part) for part in text.split(",")})
    except ValueError:
        sizes = []
    if not sizes or not all(0 < size <= 1 for size in sizes):
        raise InvalidPareto(
            f"--sizes {text}: is no list of sizes. Allowed: numbers above 0, at most 1, such as 0.25,0.5."
        )
    return tuple(sizes)


def _parse_methods(text: str) -> tuple[str, ...]:
    asked = [part.strip() for part in text.split(",")]
    for name in asked:
        if name not in METHODS:
            raise InvalidPareto(f"--methods {text}: there is no method {name!r}. Methods: {', '.join(METHODS)}.")
    return tuple(name for name in METHODS if name in asked)


def run(params: Params, workspace: Workspace, asked: Asked) -> None:
    """Write the table, as Parquet and as CSV for DVC's plots, and the figure; record them in MLflow.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.
        asked: The networks to compare.

    Raises:
        MtzError: A network cannot be made or measured, or the storage or the registry cannot be used.
    """
    rows = measure_rows(params, workspace, asked)
    files = write(workspace.pareto, rows)
    home = find_home(workspace.root)
    study = as_study(params, rows, asked, files)
    with s3.connect(params.storage, home) as store:
        mlflow_client.prepare(params.tracking, home)
        new = publish.record_study(params.tracking, home, store, study)
    show_progress(f"MLflow run {study.name}: {'recorded' if new else 'there already'}")


def measure_rows(params: Params, workspace: Workspace, asked: Asked) -> list[Row]:
    """Make a network for every method and size, and measure it.

    If a method does not reach all sizes, the least that it can store is measured in place of those that it does not
    reach.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from.
        asked: The networks to compare.

    Returns:
        A row for each network and task.

    Raises:
        InvalidPareto: No method reaches any of the sizes.
        MtzError: A network cannot be made or measured.
    """
    group = _Group(params, workspace)
    searches = {method: group.budget_search(method) for method in asked.methods}
    least = {method: _least(budget_search) for method, budget_search in searches.items()}
    if max(asked.sizes) < min(least.values()):
        known = ", ".join(f"{NAMES[method]} {as_percent(size)} %" for method, size in least.items())
        raise InvalidPareto(
            f"no method stores as little as {100 * max(asked.sizes):g} %. Least: {known}. Give larger --sizes."
        )
    found: list[Row] = []
    todo = [(method, size) for method in asked.methods for size in reached(asked.sizes, least[method])]
    for done, (method, size) in enumerate(todo, start=1):
        start = time.monotonic()
        budget_search = searches[method]
        candidate = budget_search.best_of(budget_search.candidates(size))
        zipped = budget_search.zip(candidate.plan)
        rows = group.rows(method, least[method], candidate, zipped, retrained=False)
        message = _errors_by_task(rows)
        if asked.retraining:
            group.retrain(zipped)
            again = group.rows(method, least[method], candidate, zipped, retrained=True)
            rows += again
            message += f"; retrained {_errors_by_task(again)}"
        stored = f"{NAMES[method]} in {100 * rows[0].stored_fraction:.1f} %, {rows[0].stored_bytes:,} bytes"
        show_progress(f"{done} of {len(todo)}: {stored}: error {message} ({time.monotonic() - start:.0f} s)")
        found += rows
    return sorted(found, key=lambda row: (row.retrained, asked.methods.index(row.method), row.stored_bytes, row.task))


def reached(sizes: Sequence[float], least: float) -> list[float]:
    """Return the sizes that a method reaches, the largest first; the last is `least` if it does not reach them all."""
    found = sorted((size for size in set(sizes) if size >= least), reverse=True)
    return found if min(sizes) >= least else [*found, least]


def _least(budget_search: BudgetSearch) -> float:
    """Return the smallest size that a method reaches, as a fraction that is no less than its bytes."""
    planner = budget_search.planner
    return (planner.least_bytes + 0.5) / planner.original_bytes


def _errors_by_task(rows: Sequence[Row]) -> str:
    return ", ".join(f"{row.task} {row.error:.2f} ({row.rise:+.2f})" for row in rows)


def as_percent(fraction: float) -> str:
    """Return a least size in percent, rounded up so that it can be reached."""
    return f"{ceil(1000 * fraction) / 10:g}"


@dataclass(frozen=True)
class _Test:
    """The test data of a model, its metrics with their names, and the original network's outputs."""

    images: Batch
    metrics: Named
    original: Case


class _Group:
    """The networks of a group, their statistics, and the data that they are measured on."""

    def __init__(self, params: Params, workspace: Workspace) -> None:
        self._params, self._workspace = params, workspace
        self.networks = common_part({m: load_traced(params, workspace, m) for m in sorted(params.models)})
        self._traced = {
            model: replace(
                read_traced(workspace, model, network),
                batches=calibration(params, workspace, model, network),
                output=params.models[model].declared_output,
            )
            for model, network in self.networks.items()
        }
        self._tests = {model: self._read_test(model) for model in self.networks}
        self._before = {model: self._errors(model, test.original) for model, test in self._tests.items()}

    def budget_search(self, method: str) -> BudgetSearch:
        """Return the search that makes plans by a method."""
        kind, moves = METHODS[method]
        budget = Budget(size=1.0, moves=moves)
        config = replace(self._params.zip_config(), method=kind, share=None, budget=budget)
        return BudgetSearch(self._traced, config, budget)

    def rows(
        self, method: str, least: float, candidate: Candidate, zipped: ZippedNetwork, retrained: bool
    ) -> list[Row]:
        """Return what a network stores and its errors, for every task, or each of several outputs."""
        report, plan = zipped.report, candidate.plan
        shared = sum(pairing.shared for pairing in plan.pairings.values())
        found = []
        for task, network in self.networks.items():
            errors = self._errors(task, self._tested(task, partial(zipped, task=task)))
            found += [
                Row(
                    group=self._params.group,
                    method=method,
                    retrained=retrained,
                    task=name,
                    stored_bytes=report.stored_bytes,
                    original_bytes=report.original_bytes,
                    stored_fraction=report.stored_bytes / report.original_bytes,
                    least_fraction=least,
                    metric=metric,
                    error=error,
                    error_original=self._before[task][name][1],
                    rise=error - self._before[task][name][1],
                    held_out_loss=candidate.loss[task],
                    original_neurons=sum(network.graph.widths[group.name] for group in network.graph.hidden_groups),
                    kept_neurons=sum(len(neurons) for neurons in plan.keep[task].values()),
                    shared_neurons=shared,
                )
                for name, (metric, error) in errors.items()
            ]
        return found

    def retrain(self, zipped: ZippedNetwork) -> None:
        """Retrain a network lightly, as the stage `retrain` does."""
        training, validation, labels, outputs = self._retraining
        for _ in retrain_steps(
            zipped, {}, training, validation, self._params.retrain.config(), labels=labels, outputs=outputs
        ):
            pass

    @cached_property
    def _retraining(self) -> tuple[Mapping[str, Batch], Mapping[str, Batch], Targets | None, Targets]:
        """Training and validation examples, their labels if retraining uses them, and the originals' outputs."""
        settings = self._params.retrain
        training, training_labels = read_split(self._params, self._workspace, "train", settings.images)
        validation, validation_labels = read_split(self._params, self._workspace, "validation", None)
        outputs = Targets(*({m: self._outputs(m, own[m]) for m in self.networks} for own in (training, validation)))
        return training, validation, Targets(training_labels, validation_labels) if settings.labels else None, outputs

    def _outputs(self, model: str, examples: Batch) -> Any:
        network = self.networks[model]
        batches = divided(examples, self._params.evaluate.batch_size)
        return outputs_of(partial(run_network, network.graph, network.state), batches)

    def _read_test(self, model: str) -> _Test:
        images, labels = read_labelled(self._workspace.root / self._params.models[model].data, "test")
        metrics = find_metrics(self._params, model, self.networks[model].graph.outputs, labels)
        original = self._outputs(model, images)
        return _Test(images, metrics, Case(original, labels, original, self._traced[model].loss))

    def _tested(self, model: str, network: Model) -> Case:
        test = self._tests[model]
        outputs = outputs_of(network, divided(test.images, self._params.evaluate.batch_size))
        return replace(test.original, outputs=outputs)

    def _errors(self, model: str, case: Case) -> dict[str, tuple[str, float]]:
        """Return the metric's name and the error of a model, or of each output."""
        cases = cases_of(self._tests[model].metrics, case, model)
        return {title: (name, error_of(metric, part, title)) for title, (name, metric, part) in cases.items()}


_COLUMNS = {str: pa.string(), bool: pa.bool_(), int: pa.int64(), float: pa.float64()}
_SCHEMA = pa.schema([(field.name, _COLUMNS[get_type_hints(Row)[field.name]]) for field in fields(Row)])


def write(folder: Path, rows: Sequence[Row]) -> dict[str, Path]:
    """Write the table as Parquet, a table for DVC's plots and the figure; return the files by name."""
    files = {name: folder / name for name in ("pareto.parquet", "pareto.csv", "pareto.svg", "pareto.png")}
    with whole_file(files["pareto.parquet"]) as temporary:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], _SCHEMA), temporary)
    write_table(
        files["pareto.csv"],
        ("method", "task", "stored", "rise", "error", "bytes"),
        [(row.curve, row.task, 100 * row.stored_fraction, row.rise, row.error, row.stored_bytes) for row in rows],
    )
    _draw(files["pareto.svg"], rows)
    _draw(files["pareto.png"], rows)
    return files


def read_rows(path: Path) -> list[Row]:
    """Read the table that `write` wrote as Parquet.

    Args:
        path: The file.

    Returns:
        The rows.

    Raises:
        InvalidArtifact: The file cannot be read.
    """
    try:
        return [Row(**row) for row in pq.read_table(path).to_pylist()]
    except (OSError, pa.ArrowException, TypeError) as error:
        raise InvalidArtifact(f"{path} cannot be read: {error}. Run `mtz pareto` again.") from error


def limits(rows: Sequence[Row], smallest: float) -> str:
    """Return a sentence that names the methods that cannot store as little as was asked for; empty if all can."""
    least = {NAMES[row.method]: as_percent(row.least_fraction) for row in rows if row.least_fraction > smallest}
    parts = [
        f"{' and '.join(name for name, _ in same)} cannot store less than {size} %"
        for size, same in groupby(least.items(), key=lambda item: item[1])
    ]
    return "; ".join(parts)


def _draw(path: Path, rows: Sequence[Row]) -> None:
    """Draw a panel for each task and for their mean; then the same after light retraining."""
    tasks = list(dict.fromkeys(row.task for row in rows))
    names = {row.task: row.task if row.metric == "error" else f"{row.task} ({row.metric})" for row in rows}
    panels = []
    for retrained in sorted({row.retrained for row in rows}):
        own = [row for row in rows if row.retrained == retrained]
        state = ", retrained" * retrained
        panels += [Panel(names[task] + state, _curves(own, {task})) for task in tasks]
        panels += [Panel("mean of all tasks" + state, _curves(own, set(tasks)))] if len(tasks) > 1 else []
    draw_curves(
        path,
        panels,
        title=f"{rows[0].group}: what it costs to store {len(tasks)} networks in fewer bytes (lower is better)",
        x_label="stored bytes, % of the originals'",
        y_label="rise of the test error, points",
        note=limits(rows, min(row.stored_fraction for row in rows)),
        columns=min(len(tasks) + (len(tasks) > 1), 4),
    )


def _curves(rows: Sequence[Row], tasks: set[str]) -> list[Curve]:
    """Return the rise of the tasks' mean error by method, starting at the originals, with all bytes and no rise."""
    curves = []
    for method in dict.fromkeys(row.method for row in rows):
        rises: dict[float, list[float]] = {}
        for row in rows:
            if row.method == method and row.task in tasks:
                rises.setdefault(100 * row.stored_fraction, []).append(row.rise)
        mean = {size: sum(values) / len(values) for size, values in rises.items()}
        mean.setdefault(100.0, 0.0)
        curves.append(Curve(NAMES[method], list(mean), list(mean.values())))
    return curves


def as_study(params: Params, rows: Sequence[Row], asked: Asked, files: Mapping[str, Path]) -> publish.Study:
    """Return what MLflow keeps; the same table is the same study."""
    settings = params.model_dump()
    blocks = {
        f"{name}.{key}": value
        for name in ("collect", "match", "merge", "retrain")
        for key, value in settings[name].items()
    }
    return publish.Study(
        name=f"pareto-{params.group}",
        group=params.group,
        content_digest=sha256(files["pareto.parquet"]),
        parameters={"sizes": list(asked.sizes), "methods": list(asked.methods), **blocks},
        metrics=[
            (
                round(100 * row.stored_fraction),
                {
                    f"{row.curve.replace(', ', '-').replace(' ', '-')}/{row.task}/{name}": getattr(row, name)
                    for name in ("error", "rise")
                },
            )
            for row in rows
        ],
        table=[asdict(row) for row in rows],
        files=files,
    )
