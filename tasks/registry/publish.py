"""Registration of releases and studies with MLflow."""

import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import mtz_core
from mtz_core.batches import flattened, tensors_of
from mtz_core.network.graph import given_name
from mtz_core.zipped.structure import TaskStructure
from tasks.registry.mlflow_client import (
    TrackingError,
    TrackingSettings,
    alone,
    connect,
    explained,
    find_version,
    ignoring_existing,
    installed,
    tracking_uri,
    variables_set,
)
from tasks.registry.release import DIGEST_TAG, Release
from tasks.storage.s3 import Storage

_MODEL_FILE = Path(__file__).with_name("served_model.py")
_SERVING_PACKAGES = ("mlflow", "numpy", "torch", "scipy", "safetensors", "jaxtyping")
_EXAMPLE_ROWS = 2
# MLflow keeps no more of a data set's digest; the tags have all of it.
_DATASET_DIGEST_LENGTH = 32


def register_release(settings: TrackingSettings, home: Path, store: Storage, release: Release) -> int:
    """Record a run and register the network as a version of `release.model`.

    If this content is registered already, nothing changes.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.
        store: The storage for the version's files.
        release: The release.

    Returns:
        The number of the version, new or existing.

    Raises:
        TrackingError: The registry cannot be used, or the stored model gives other outputs than the network.
        StorageError: The storage cannot be used.
    """
    with (
        explained(settings, home),
        store.explained(),
        alone(settings, home),
        variables_set(store.environment()),
    ):
        client = connect(settings, home)
        _end_interrupted_runs(client, settings, release.content_digest)
        found = find_version(settings, home, release.model, release.content_digest, store)
        if found is not None:
            return found
        tags = {**release.tags, "mtz.release": store.url(release.folder), DIGEST_TAG: release.content_digest}
        number = _register(client, tracking_uri(settings, home), _experiment(client, settings, store), release, tags)
        # Another machine may have registered the same content at the same time: the first version counts, on both.
        first = find_version(settings, home, release.model, release.content_digest, store)
        if first is not None and first != number:
            client.delete_model_version(release.model, str(number))
            return first
        return number


@dataclass(frozen=True)
class Study:
    """A comparison of networks to look at: measurements and files.

    Attributes:
        name: Name of the MLflow run.
        group: The group's name.
        content_digest: SHA-256 of the content.
        parameters: The settings of the comparison.
        metrics: Values by name, each set at a step.
        table: One row per measurement.
        files: Files to store with the run, by name.
    """

    name: str
    group: str
    content_digest: str
    parameters: Mapping[str, object]
    metrics: Sequence[tuple[int, Mapping[str, float]]]
    table: Sequence[Mapping[str, object]]
    files: Mapping[str, Path]


def record_study(settings: TrackingSettings, home: Path, store: Storage, study: Study) -> bool:
    """Record a study as a run.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.
        store: The storage for the run's files.
        study: The study.

    Returns:
        False if there already is a finished run of this name with the same content, True otherwise.

    Raises:
        TrackingError: The registry cannot be used.
        StorageError: The storage cannot be used.
    """
    with (
        explained(settings, home),
        store.explained(),
        alone(settings, home),
        variables_set(store.environment()),
    ):
        import mlflow

        client = connect(settings, home)
        _end_interrupted_runs(client, settings, study.content_digest)
        experiment = _experiment(client, settings, store)
        tags = {DIGEST_TAG: study.content_digest, "mtz.group": study.group}
        same = f"tags.`{DIGEST_TAG}` = '{study.content_digest}' and attributes.run_name = '{study.name}'"
        if client.search_runs([experiment], f"{same} and attributes.status = 'FINISHED'", max_results=1):
            return False
        mlflow.set_tracking_uri(tracking_uri(settings, home))
        with mlflow.start_run(experiment_id=experiment, run_name=study.name, tags=tags, log_system_metrics=False):
            mlflow.log_params(_allowed(study.parameters))
            for step, values in study.metrics:
                mlflow.log_metrics(_allowed(values), step=step)
            mlflow.log_table(_by_column(study.table), artifact_file="table.json")
            for file in study.files.values():
                mlflow.log_artifact(str(file))
    return True


_NOT_ALLOWED = re.compile(r"[^/\w.\- :]|(?<=/)/")
"""What MLflow does not allow in the names of parameters and metrics; those of outputs and layers may have anything."""


def _allowed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by names that MLflow allows: other characters are written as their codes."""
    return {_NOT_ALLOWED.sub(lambda found: f"_{ord(found[0]):x}_", name): value for name, value in values.items()}


def _by_column(rows: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _register(client: Any, uri: str, experiment: str, release: Release, tags: Mapping[str, str]) -> int:
    import mlflow

    mlflow.set_tracking_uri(uri)
    mlflow.set_registry_uri(uri)
    run_tags = {DIGEST_TAG: release.content_digest, "mtz.group": release.group}
    with mlflow.start_run(
        experiment_id=experiment, run_name=release.group, tags=run_tags, log_system_metrics=False
    ) as run:
        _log(mlflow, release)
        logged = _log_model(mlflow, release)
        _check_served(mlflow, logged.model_uri, release.network)
        with ignoring_existing():
            client.create_registered_model(release.model)
        version = client.create_model_version(
            release.model,
            source=logged.model_uri,
            run_id=run.info.run_id,
            model_id=logged.model_id,
            tags=tags,
        )
    return int(version.version)


def _log(mlflow: Any, release: Release) -> None:
    from mlflow.data.dataset_source_registry import resolve_dataset_source
    from mlflow.data.meta_dataset import MetaDataset

    mlflow.log_params(_allowed(release.parameters))
    mlflow.log_metrics(_allowed(release.metrics))
    for row in release.learning_curve:
        values = {f"retrain/{name}": value for name, value in row.items() if name != "step"}
        mlflow.log_metrics(_allowed(values), step=int(row["step"]))
    for layer in release.layers:
        numbers = {name: value for name, value in layer.items() if isinstance(value, int | float)}
        mlflow.log_metrics(_allowed({f"layers/{layer['layer']}/{name}": value for name, value in numbers.items()}))
    mlflow.log_table(_by_column(release.layers), artifact_file="layers.json")
    for task, path in release.data_paths.items():
        with warnings.catch_warnings(action="ignore"):  # warns that a path can be several kinds of local source
            source = resolve_dataset_source(path)
        # mypy: MLflow's class leaves a property of its base abstract, but can be instantiated.
        dataset = MetaDataset(source, Path(path).name, release.data[task][:_DATASET_DIGEST_LENGTH])  # type: ignore[abstract]
        mlflow.log_input(dataset, context=task)
    with tempfile.TemporaryDirectory() as folder:
        for name, content in release.files.items():
            target = Path(folder) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content if isinstance(content, bytes) else content.read_bytes())
        mlflow.log_artifacts(folder)


def _log_model(mlflow: Any, release: Release) -> Any:
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    network = mtz_core.load(release.network)
    originals = [network.structure.networks[task] for task in network.tasks]
    example = _example(originals[0])
    specs: list[Any] = []
    for name, own in originals[0].inputs.items():
        shapes = [original.inputs[name].shape for original in originals if name in original.inputs]
        common = (sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))
        dtype = np.dtype(np.float32 if own.dtype.is_floating_point else np.int64)
        specs.append(TensorSpec(dtype, (-1, *common), given_name(name) or None))
    outputs = _outputs(network, network.tasks[0], example)
    signature = ModelSignature(
        inputs=Schema(specs),
        outputs=Schema([TensorSpec(own.dtype, (-1,) * own.ndim, name or None) for name, own in outputs.items()]),
        params=ParamSchema([ParamSpec("task", "string", network.tasks[0])]),
    )
    with tempfile.TemporaryDirectory() as folder, _no_bytecode():
        code = Path(folder) / "mtz_core"
        shutil.copytree(Path(mtz_core.__file__).parent, code, ignore=shutil.ignore_patterns("__pycache__"))
        return mlflow.pyfunc.log_model(
            name=release.model.replace(".", "-"),
            python_model=str(_MODEL_FILE),
            artifacts={"network": str(release.network)},
            code_paths=[str(code)],
            pip_requirements=[f"{name}=={installed(name)}" for name in _SERVING_PACKAGES],
            signature=signature,
            input_example=(example, {"task": network.tasks[0]}),
        )


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Write no bytecode while MLflow imports the model's code from the folder that it is about to store."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _check_served(mlflow: Any, model_uri: str, folder: Path) -> None:
    """Check that the stored model can be loaded from the storage and computes the same."""
    network = mtz_core.load(folder)
    with tempfile.TemporaryDirectory() as copy:
        served = mlflow.pyfunc.load_model(model_uri, dst_path=copy)
        for task in network.tasks:
            x = _example(network.structure.networks[task])
            found, expected = served.predict(x, params={"task": task}), _outputs(network, task, x)
            found = found if isinstance(found, dict) else {"": found}
            if found.keys() != expected.keys() or not all(map(np.array_equal, found.values(), expected.values())):
                raise TrackingError(f"The logged model gives other outputs for task '{task}' than {folder}. Run again.")


def _outputs(network: mtz_core.ZippedNetwork, task: str, x: Any) -> dict[str, np.ndarray]:
    """Return what one task puts out, by name; one output has an empty name."""
    import torch

    given = {n: torch.from_numpy(own) for n, own in x.items()} if isinstance(x, dict) else torch.from_numpy(x)
    with torch.inference_mode():
        outputs = tensors_of(flattened(network(given, task=task)))
    return {name: own.numpy() for name, own in outputs.items()}


def _example(original: TaskStructure) -> Any:
    """Return inputs that any network of this structure takes: numbers, or tokens that every vocabulary has."""
    drawn = np.random.default_rng(0)
    arrays = {}
    for name, own in original.inputs.items():
        shape = (_EXAMPLE_ROWS, *own.shape)
        numbers = own.dtype.is_floating_point
        arrays[given_name(name)] = drawn.random(shape, dtype=np.float32) if numbers else np.zeros(shape, np.int64)
    return arrays.get("", arrays)


def _experiment(client: Any, settings: TrackingSettings, store: Storage) -> str:
    """Return the experiment's id; artifacts of an experiment cannot move, so every further storage gets its own."""
    location = store.url("mlflow")
    for name in (settings.experiment, f"{settings.experiment} in {location}"):
        with ignoring_existing():
            if client.get_experiment_by_name(name) is None:
                client.create_experiment(name, artifact_location=location)
        experiment = client.get_experiment_by_name(name)
        if experiment.lifecycle_stage != "active":
            raise TrackingError(
                f"The MLflow experiment '{name}' was deleted. Change tracking.experiment in params.yaml, or run "
                f"`mlflow experiments restore -x {experiment.experiment_id}`."
            )
        if experiment.artifact_location.rstrip("/") == location:
            return str(experiment.experiment_id)
    raise TrackingError(f"The MLflow experiment '{name}' keeps its artifacts elsewhere. Change tracking.experiment.")


def _end_interrupted_runs(client: Any, settings: TrackingSettings, content_digest: str) -> None:
    """Close the runs that a killed process left open: as finished if their version exists, as killed otherwise."""
    experiments = client.search_experiments(filter_string=f"name LIKE '{settings.experiment}%'")
    ids = [experiment.experiment_id for experiment in experiments]
    condition = f"attributes.status = 'RUNNING' and tags.`{DIGEST_TAG}` = '{content_digest}'"
    for run in client.search_runs(ids, condition) if ids else []:
        registered = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        client.set_terminated(run.info.run_id, "FINISHED" if registered else "KILLED")
