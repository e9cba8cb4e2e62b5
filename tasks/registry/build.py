"""Building a release from the files that the earlier stages left in the workspace."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mtz_core.zipped.module import load
from mtz_core.zipped.report import ZipReport
from tasks.artifacts.paths import Workspace
from tasks.artifacts.plans import read_plan
from tasks.files import InvalidArtifact, read_json, sha256
from tasks.params import Params
from tasks.registry.release import Release

_CODE = ("mtz_core", "tasks")
_PLACES = ("storage", "tracking", "flow")


def gather(params: Params, workspace: Workspace) -> Release:
    """Build the release from the files of the earlier stages.

    Args:
        params: The parameters of the group.
        workspace: The workspace of the group.

    Returns:
        The release.

    Raises:
        MtzError: A file of an earlier stage is missing or damaged.
    """
    root, models = workspace.root, params.models
    report = load(workspace.retrained).report
    metrics = read_json(workspace.metrics)
    plan, limit = read_plan(workspace)
    network = _files(workspace.retrained)
    sources = {task: _weights_digest(root / model.weights) for task, model in models.items()}
    data = {task: _folder_digest(root / model.data) for task, model in models.items()}
    settings = {name: block for name, block in params.model_dump().items() if name not in _PLACES}
    lock = _upstream_lock(root / "dvc.lock")
    content = {
        "network": {name: _file_digest(file) for name, file in network.items()},
        "sources": sources,
        "data": data,
        "metrics": metrics,
    }
    return Release(
        group=params.group,
        model=params.register.name,
        content_digest=_digest(content),
        network=workspace.retrained,
        sources=sources,
        data=data,
        data_paths={task: model.data for task, model in models.items()},
        tags={
            "mtz.group": params.group,
            **{f"mtz.source.{task}": digest for task, digest in sources.items()},
            **{f"mtz.data.{task}": digest for task, digest in data.items()},
            "mtz.params": _digest(settings),
            "mtz.code": _digest({name: _folder_digest(root / name, "*.py") for name in _CODE}),
            "mtz.dvc_lock": hashlib.sha256(lock).hexdigest(),
        },
        parameters={**dict(_flat(settings, ".")), **({"plan.limit": limit} if limit else {})},
        metrics=_numbers({**metrics["tasks"], "stored": metrics["stored"], "plan": plan}),
        layers=_layers(report),
        learning_curve=_learning_curve(workspace.plots / "learning_curve.csv"),
        files={
            **{f"network/{name}": file for name, file in network.items()},
            **{f"plots/{name}": file for name, file in _files(workspace.plots).items()},
            "pairing/pairing.json": workspace.pairing,
            "metrics.json": workspace.metrics,
            "params.yaml": workspace.params,
            "dvc.lock": lock,
        },
    )


def _layers(report: ZipReport) -> list[dict[str, object]]:
    return [
        {
            "layer": layer.layer,
            "kind": layer.kind,
            "shared": layer.shared,
            **{f"neurons/{task}": count for task, count in layer.neurons.items()},
            "cost": layer.cost,
            **{f"output_error/{task}": error for task, error in layer.error.items()},
            "parameters": layer.parameters,
            "original_parameters": sum(layer.original_parameters.values()),
        }
        for layer in report.layers
    ]


def _learning_curve(file: Path) -> list[dict[str, float]]:
    """Return one row per validation, with the losses of all tasks."""
    rows: dict[int, dict[str, float]] = {}
    try:
        with file.open(newline="") as content:
            for line in csv.DictReader(content):
                row = rows.setdefault(int(line["iteration"]), {"step": int(line["iteration"])})
                for loss in ("training_loss", "validation_loss"):
                    if line[loss]:
                        row[f"{line['task']}/{loss}"] = float(line[loss])
    except (OSError, KeyError, ValueError) as error:
        raise InvalidArtifact(f"{file} cannot be read: {error!r}. Run retrain again.") from error
    return list(rows.values())


def _upstream_lock(file: Path) -> bytes:
    """Return the part of `dvc.lock` that precedes this stage, in a canonical form."""
    try:
        lock = yaml.safe_load(file.read_bytes())
        stages = {name: stage for name, stage in lock["stages"].items() if name != "register"}
    except OSError as error:
        raise InvalidArtifact(f"{file}: {error.strerror}. Run the pipeline with `dvc repro` first.") from error
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArtifact(f"{file} is damaged: {error!r}. Delete it and run `dvc repro` again.") from error
    return yaml.safe_dump({**lock, "stages": stages}, sort_keys=True).encode()


def _flat(values: Mapping[str, Any], separator: str = "/", path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, separator, f"{path}{name}{separator}")
        else:
            yield f"{path}{name}", value


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Return all numbers in nested mappings; words, such as a metric's name, belong to the parameters."""
    return {name: value for name, value in _flat(values) if isinstance(value, int | float)}


def _files(folder: Path, pattern: str = "*") -> dict[str, Path]:
    """Return all files below a folder by their relative names, in order; hidden files do not count."""
    files = (file for file in folder.rglob(pattern) if file.is_file() and not file.name.startswith("."))
    return {file.relative_to(folder).as_posix(): file for file in sorted(files)}


def _folder_digest(folder: Path, pattern: str = "*") -> str:
    files = _files(folder, pattern)
    if not files:
        raise InvalidArtifact(f"{folder} is missing or empty. Restore or fetch it first.")
    return _digest({name: _file_digest(file) for name, file in files.items()})


def _weights_digest(path: Path) -> str:
    return _folder_digest(path) if path.is_dir() else _file_digest(path)


def _file_digest(file: Path) -> str:
    try:
        return sha256(file)
    except OSError as error:
        raise InvalidArtifact(f"{file}: {error.strerror}. Make or fetch the file first.") from error


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
