"""The only door to MLflow: where its registry is, what it knows, and how a release gets into it.

A version appears in one step, with all its tags, after everything it refers to is stored. So a version that is there
is complete, and whatever was killed before has left none.
"""

import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

import numpy as np

import mtz_core
from tasks.faults import ServiceFault
from tasks.locks import exclusive
from tasks.release import DIGEST_TAG, Release
from tasks.storage import Storage

EMBEDDED = "embedded"

_MODEL_FILE = Path(__file__).with_name("served_model.py")
_SERVING_PACKAGES = ("mlflow", "numpy", "torch", "scipy", "safetensors", "jaxtyping")
_EXAMPLE_ROWS = 2
_PAGE = 10_000
# What a registry says of a request, not of its own state.
_REFUSALS = frozenset(
    {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "BAD_REQUEST"}
)
# MLflow keeps no more of a data set's digest; the tags hold all of it.
_DATASET_DIGEST_LENGTH = 32

_VARIABLES = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_UV_AUTO_DETECT": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_IMPATIENT = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "15", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1"}


class TrackingError(ServiceFault):
    """The MLflow registry cannot be reached, or refuses."""


class TrackingRefused(TrackingError):
    """The registry answers, and what it says will not change by itself: no such model, no access."""


class Settings(Protocol):
    """Where the registry is; `uri` is `embedded` or any MLflow tracking URI."""

    @property
    def uri(self) -> str: ...
    @property
    def experiment(self) -> str: ...


def preload() -> None:
    """Import MLflow, which takes seconds, for all that follows."""
    os.environ.update(_VARIABLES)
    import mlflow  # noqa: F401


def tracking_uri(settings: Settings, home: Path) -> str:
    """The MLflow tracking URI, which is the registry's too."""
    return f"sqlite:///{_database(home)}" if settings.uri == EMBEDDED else settings.uri


def prepare(settings: Settings, home: Path) -> None:
    """Make the registry ready: create or migrate the embedded one, or see that another one answers.

    Raises `TrackingError`, within about half a minute where a server does not answer.
    """
    with _explained(settings, home):
        if settings.uri == EMBEDDED:
            home.mkdir(parents=True, exist_ok=True)
            with _alone(settings, home):
                _prepare_database(_database(home))
        else:
            with _variables(_IMPATIENT):
                _client(settings, home).search_experiments(max_results=1)


def find_version(
    settings: Settings, home: Path, model: str, content_digest: str, store: Storage | None = None
) -> int | None:
    """The version of `model` with this content, None where the registry at hand has none.

    With `store`, only a version counts whose files lie there. Raises `TrackingError`.
    """
    if settings.uri == EMBEDDED and not _database(home).exists():
        return None
    with _explained(settings, home):
        client = _client(settings, home)
        condition = f"name = '{model}' and tag.`{DIGEST_TAG}` = '{content_digest}'"
        numbers = [int(version.version) for version in client.search_model_versions(condition)]
        if store is not None:
            numbers = [number for number in numbers if _is_stored(client, store, model, number)]
    return min(numbers, default=None)


def find_versions(settings: Settings, home: Path, store: Storage) -> dict[tuple[str, str], int]:
    """The version of each content of each model, by ``(model, content digest)``: all that `find_version` would find.

    Only versions count whose files lie in `store`. Raises `TrackingError` and `StorageError`.
    """
    if settings.uri == EMBEDDED and not _database(home).exists():
        return {}
    with _explained(settings, home):
        client = _client(settings, home)
        condition = f"tag.`{DIGEST_TAG}` LIKE '%'"
        found = list(_paged(lambda token: client.search_model_versions(condition, _PAGE, page_token=token)))
        locations = _logged_models(client, store) if found else {}
    sources = [str(version.source).removeprefix("models:/") for version in found]
    places = [_place(store, locations.get(source, source)) for source in sources]
    stored = store.exist(f"{place}/MLmodel" for place in places if place is not None)
    versions: dict[tuple[str, str], int] = {}
    for version, place in zip(found, places, strict=True):
        if place is not None and f"{place}/MLmodel" in stored:
            key, number = (version.name, version.tags[DIGEST_TAG]), int(version.version)
            versions[key] = min(number, versions.get(key, number))
    return versions


@dataclass(frozen=True)
class ModelVersion:
    """A version in the registry; `location` is the URI below which its files lie."""

    name: str
    number: int
    location: str


def find_model(settings: Settings, home: Path, name: str, number_or_alias: int | str) -> ModelVersion:
    """A version of a registered model, by its number or by an alias.

    Raises `TrackingRefused` where there is none, `TrackingError` where the registry cannot be used.
    """
    if settings.uri == EMBEDDED and not _database(home).exists():
        raise TrackingRefused(f"There is no MLflow registry in {home} yet. Set tracking.uri in params.yaml to yours.")
    with _explained(settings, home):
        client = _client(settings, home)
        version = (
            client.get_model_version(name, str(number_or_alias))
            if isinstance(number_or_alias, int)
            else client.get_model_version_by_alias(name, number_or_alias)
        )
        return ModelVersion(name, int(version.version), _location(client, name, int(version.version)))


def model_files(settings: Settings, home: Path, version: ModelVersion) -> list[str]:
    """The paths of all files of a version. Raises `TrackingError`."""
    with _explained(settings, home):
        repository, files, folders = _repository(settings, home, version), list[str](), [""]
        while folders:
            for entry in repository.list_artifacts(folders.pop()):
                (folders if entry.is_dir else files).append(entry.path)
    return sorted(files)


def fetch_model_file(settings: Settings, home: Path, version: ModelVersion, file: str, target: Path) -> None:
    """Write a file of a version to `target`. Raises `TrackingError`."""
    with _explained(settings, home), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fetched = _repository(settings, home, version).download_artifacts(file, dst_path=folder)
        Path(fetched).replace(target)


def register_release(settings: Settings, home: Path, store: Storage, release: Release) -> int:
    """Record a run and register the network as a version of `release.model`; returns the version's number.

    Content that is registered already gives its version back and changes nothing. Raises `TrackingError`.
    """
    with _explained(settings, home), store.explained(), _alone(settings, home), _variables(store.environment()):
        client = _client(settings, home)
        _end_interrupted_runs(client, settings, release.content_digest)
        found = find_version(settings, home, release.model, release.content_digest, store)
        if found is not None:
            return found
        tags = {**release.tags, "mtz.release": store.url(release.folder), DIGEST_TAG: release.content_digest}
        number = _register(client, tracking_uri(settings, home), _experiment(client, settings, store), release, tags)
        # Another machine may have registered the same at the same time: the first one counts, on both.
        first = find_version(settings, home, release.model, release.content_digest, store)
        if first is not None and first != number:
            client.delete_model_version(release.model, str(number))
            return first
        return number


@dataclass(frozen=True)
class Study:
    """A comparison of networks to be looked at: what was measured, and files.

    `metrics` are values by name, each set at a step; `table` has one row per measurement.
    """

    name: str
    group: str
    content_digest: str
    parameters: Mapping[str, object]
    metrics: Sequence[tuple[int, Mapping[str, float]]]
    table: Sequence[Mapping[str, object]]
    files: Mapping[str, Path]


def record_study(settings: Settings, home: Path, store: Storage, study: Study) -> bool:
    """Record a study as a run; False where there is a finished run of that name with the same content already.

    Raises `TrackingError`.
    """
    with _explained(settings, home), store.explained(), _alone(settings, home), _variables(store.environment()):
        import mlflow

        client = _client(settings, home)
        _end_interrupted_runs(client, settings, study.content_digest)
        experiment = _experiment(client, settings, store)
        tags = {DIGEST_TAG: study.content_digest, "mtz.group": study.group}
        same = f"tags.`{DIGEST_TAG}` = '{study.content_digest}' and attributes.run_name = '{study.name}'"
        if client.search_runs([experiment], f"{same} and attributes.status = 'FINISHED'", max_results=1):
            return False
        mlflow.set_tracking_uri(tracking_uri(settings, home))
        with mlflow.start_run(experiment_id=experiment, run_name=study.name, tags=tags, log_system_metrics=False):
            mlflow.log_params(dict(study.parameters))
            for step, values in study.metrics:
                mlflow.log_metrics(dict(values), step=step)
            mlflow.log_table(_by_column(study.table), artifact_file="table.json")
            for file in study.files.values():
                mlflow.log_artifact(str(file))
    return True


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
        with _ignoring_existing():
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

    mlflow.log_params(dict(release.parameters))
    mlflow.log_metrics(dict(release.metrics))
    for row in release.learning_curve:
        values = {f"retrain/{name}": value for name, value in row.items() if name != "step"}
        mlflow.log_metrics(values, step=int(row["step"]))
    for layer in release.layers:
        numbers = {name: value for name, value in layer.items() if isinstance(value, int | float)}
        mlflow.log_metrics({f"layers/{layer['layer']}/{name}": value for name, value in numbers.items()})
    mlflow.log_table(_by_column(release.layers), artifact_file="layers.json")
    for task, path in release.data_paths.items():
        with warnings.catch_warnings(action="ignore"):  # that a path can mean several kinds of local path
            source = resolve_dataset_source(path)
        # mypy: MLflow's class leaves a property of its base abstract, and instantiates all the same.
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
    shapes = [network.structure.networks[task].input_shape for task in network.tasks]
    common = (sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True))
    signature = ModelSignature(
        inputs=Schema([TensorSpec(np.dtype(np.float32), (-1, *common))]),
        outputs=Schema([TensorSpec(np.dtype(np.float32), (-1, -1))]),
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
            pip_requirements=[f"{name}=={_installed(name)}" for name in _SERVING_PACKAGES],
            signature=signature,
            input_example=(_example(shapes[0]), {"task": network.tasks[0]}),
        )


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """MLflow imports the model's code where it is about to be stored from; bytecode would be stored with it."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _check_served(mlflow: Any, model_uri: str, folder: Path) -> None:
    """What was stored must come back from the storage and compute the same."""
    import torch

    network = mtz_core.load(folder)
    with tempfile.TemporaryDirectory() as copy:
        served = mlflow.pyfunc.load_model(model_uri, dst_path=copy)
        for task in network.tasks:
            x = _example(network.structure.networks[task].input_shape)
            with torch.inference_mode():
                expected = network(torch.from_numpy(x), task=task).numpy()
            if not np.array_equal(served.predict(x, params={"task": task}), expected):
                raise TrackingError(f"The logged model gives other outputs for task '{task}' than {folder}. Run again.")


def _example(shape: Sequence[int]) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).random((_EXAMPLE_ROWS, *shape), dtype=np.float32)


def _installed(package: str) -> str:
    """The version as the package index names it, without a build's suffix such as `+cpu`."""
    return metadata.version(package).partition("+")[0]


def _experiment(client: Any, settings: Settings, store: Storage) -> str:
    """The experiment's id. An experiment cannot move its artifacts: each storage beyond the first gets its own."""
    location = store.url("mlflow")
    for name in (settings.experiment, f"{settings.experiment} in {location}"):
        with _ignoring_existing():
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


def _end_interrupted_runs(client: Any, settings: Settings, content_digest: str) -> None:
    """Close what a killed process left open: finished where its version came about, else killed."""
    experiments = client.search_experiments(filter_string=f"name LIKE '{settings.experiment}%'")
    ids = [experiment.experiment_id for experiment in experiments]
    condition = f"attributes.status = 'RUNNING' and tags.`{DIGEST_TAG}` = '{content_digest}'"
    for run in client.search_runs(ids, condition) if ids else []:
        registered = client.search_model_versions(f"run_id = '{run.info.run_id}'")
        client.set_terminated(run.info.run_id, "FINISHED" if registered else "KILLED")


def _is_stored(client: Any, store: Storage, model: str, number: int) -> bool:
    place = _place(store, _location(client, model, number))
    return place is not None and store.exists(f"{place}/MLmodel")


def _location(client: Any, model: str, number: int) -> str:
    location: str = client.get_model_version_download_uri(model, str(number))
    if location.startswith("models:/"):
        location = client.get_logged_model(location.removeprefix("models:/")).artifact_location
    return location


def _place(store: Storage, location: str) -> str | None:
    """The folder of `store` that a URI names; None where it lies elsewhere."""
    root = store.url() + "/"
    return location.removeprefix(root) if location.startswith(root) else None


def _logged_models(client: Any, store: Storage) -> dict[str, str]:
    """Where the files of each logged model lie, by its id, for all experiments that keep theirs in `store`."""
    experiments = _paged(lambda token: client.search_experiments(page_token=token))
    ids = [experiment.experiment_id for experiment in experiments if _place(store, experiment.artifact_location)]
    models = _paged(lambda token: client.search_logged_models(ids, page_token=token)) if ids else ()
    return {model.model_id: model.artifact_location for model in models}


def _paged(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """All that a search finds, page by page."""
    page = search(None)
    yield from page
    while page.token:
        page = search(page.token)
        yield from page


def _repository(settings: Settings, home: Path, version: ModelVersion) -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri = tracking_uri(settings, home)
    return get_artifact_repository(version.location, tracking_uri=uri, registry_uri=uri)


def _database(home: Path) -> Path:
    return home.resolve() / "mlflow.db"


def _prepare_database(file: Path) -> None:
    """Create or migrate, on a copy that takes the file's place when it is whole."""
    from mlflow.store.db.utils import _get_latest_schema_revision

    partial = file.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    if not file.exists():
        _create(partial)
        partial.replace(file)
    elif _revision(file) != _get_latest_schema_revision():  # type: ignore[no-untyped-call]
        shutil.copy2(file, partial)
        _migrate(partial, file)
        shutil.copy2(file, file.with_suffix(".db.old"))
        partial.replace(file)


def _create(file: Path) -> None:
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    store = SqlAlchemyStore(f"sqlite:///{file}", str(file.parent / "mlruns"))  # type: ignore[no-untyped-call]
    store.engine.dispose()


def _revision(file: Path) -> str:
    """The schema's revision. (MLflow's own check migrates some files in place, where a kill would leave a ruin.)"""
    try:
        with closing(sqlite3.connect(f"file:{quote(str(file))}?mode=ro", uri=True)) as database:
            (revision,) = database.execute("SELECT version_num FROM alembic_version").fetchone()
            return str(revision)
    except (sqlite3.Error, TypeError) as error:
        raise TrackingError(
            f"{file} is not a readable MLflow registry: {error}. Move it away to start with an empty one."
        ) from error


def _migrate(partial: Path, file: Path) -> None:
    command = [sys.executable, "-m", "mlflow", "db", "upgrade", f"sqlite:///{partial}"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **_VARIABLES}, check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise TrackingError(
            f"{file} cannot be migrated to MLflow {_installed('mlflow')}: {reason}. It is unchanged; move it away to "
            "start with an empty registry, or install the MLflow that wrote it."
        )


def _client(settings: Settings, home: Path) -> Any:
    """MLflow's client. MLflow takes seconds to import, so nothing here does before `_explained` is entered."""
    from mlflow import MlflowClient

    uri = tracking_uri(settings, home)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def _alone(settings: Settings, home: Path) -> Iterator[None]:
    """One process at a time works on an SQLite registry; a server takes care of that by itself."""
    if settings.uri == EMBEDDED:
        with exclusive(home / "mlflow.lock"):
            yield
    else:
        yield


@contextmanager
def _variables(variables: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def _ignoring_existing() -> Iterator[None]:
    """Let another process be the first to create something."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def _explained(settings: Settings, home: Path) -> Iterator[None]:
    preload()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        uri, said = tracking_uri(settings, home), f"{error}".partition("\n")[0].rstrip(".")
        refused = _is_refusal(error)
        if refused:
            remedy = "Correct the name, version, alias or path that it was asked for, or ask for access."
        elif settings.uri == EMBEDDED:
            remedy = f"Check {_database(home)} and the free disk; move the file away to start with an empty registry."
        else:
            remedy = (
                "Start that server, set its credentials in the environment, or set tracking.uri in params.yaml to "
                "'embedded' or to another MLflow."
            )
        what = f"The MLflow registry at {uri} {'refuses' if refused else 'cannot be used'}: {said}"
        without_password = re.sub(r"//[^/@\s]*@", "//", what)
        raise (TrackingRefused if refused else TrackingError)(f"{without_password}. {remedy}") from error


def _is_refusal(error: Exception) -> bool:
    """Whether a registry, or who keeps its files, would say the same again."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    client_error = 400 <= status < 500 and status not in (408, 429)
    return client_error or getattr(error, "error_code", None) in _REFUSALS
