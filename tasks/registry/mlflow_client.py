"""The only module that talks to MLflow: where its registry is, what it contains, and the tools to write to it.

A version appears in one step, with all its tags, after everything it refers to is stored. A version that exists is
therefore complete, and a process that was killed earlier has left none.
"""

import logging
import os
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import quote

from tasks.faults import ServiceFault
from tasks.locks import exclusive
from tasks.registry.release import DIGEST_TAG
from tasks.storage.s3 import Storage

EMBEDDED = "embedded"
_PAGE = 10_000

# Errors of a request, not of the registry's own state.
_REFUSALS = frozenset(
    {"RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "PERMISSION_DENIED", "UNAUTHENTICATED", "BAD_REQUEST"}
)

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
    """The MLflow registry cannot be reached, or refuses a request."""


class TrackingRefused(TrackingError):
    """The registry refuses, and will go on refusing: there is no such model, or no access."""


class TrackingSettings(Protocol):
    """Where the registry is."""

    @property
    def uri(self) -> str:
        """`embedded`, or any MLflow tracking URI."""

    @property
    def experiment(self) -> str:
        """Name of the MLflow experiment for runs."""


def preload() -> None:
    """Import MLflow, which takes seconds, for all later calls."""
    os.environ.update(_VARIABLES)
    import mlflow  # noqa: F401


def tracking_uri(settings: TrackingSettings, home: Path) -> str:
    """Return the MLflow tracking URI, which is the registry's URI too."""
    return f"sqlite:///{_database(home)}" if settings.uri == EMBEDDED else settings.uri


def prepare(settings: TrackingSettings, home: Path) -> None:
    """Make the registry ready: create or migrate the embedded one, or check that another one answers.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.

    Raises:
        TrackingError: The registry cannot be used; raised within about half a minute if a server does not answer.
    """
    with explained(settings, home):
        if settings.uri == EMBEDDED:
            home.mkdir(parents=True, exist_ok=True)
            with alone(settings, home):
                _prepare_database(_database(home))
        else:
            with variables_set(_IMPATIENT):
                connect(settings, home).search_experiments(max_results=1)


def find_version(
    settings: TrackingSettings, home: Path, model: str, content_digest: str, store: Storage | None = None
) -> int | None:
    """Find a version by its content.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.
        model: The registered model's name.
        content_digest: The digest of the content.
        store: If given, only versions whose files lie in this storage count.

    Returns:
        The first such version's number; None if the registry has none.

    Raises:
        TrackingError: The registry cannot be used.
    """
    if settings.uri == EMBEDDED and not _database(home).exists():
        return None
    with explained(settings, home):
        client = connect(settings, home)
        condition = f"name = '{model}' and tag.`{DIGEST_TAG}` = '{content_digest}'"
        numbers = [int(version.version) for version in client.search_model_versions(condition)]
        if store is not None:
            numbers = [number for number in numbers if _is_stored(client, store, model, number)]
    return min(numbers, default=None)


def find_versions(settings: TrackingSettings, home: Path, store: Storage) -> dict[tuple[str, str], int]:
    """Find all versions that `find_version` would find.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.
        store: Only versions whose files lie in this storage count.

    Returns:
        The first version's number by `(model, content digest)`.

    Raises:
        TrackingError: The registry cannot be used.
        StorageError: The storage cannot be used.
    """
    if settings.uri == EMBEDDED and not _database(home).exists():
        return {}
    with explained(settings, home):
        client = connect(settings, home)
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
    """A version in the registry.

    Attributes:
        name: The registered model's name.
        number: The version's number.
        location: The URI below which its files lie.
    """

    name: str
    number: int
    location: str


def find_model(settings: TrackingSettings, home: Path, name: str, number_or_alias: int | str) -> ModelVersion:
    """Find a version of a registered model.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.
        name: The registered model's name.
        number_or_alias: The version's number, or an alias of it.

    Returns:
        The version.

    Raises:
        TrackingRefused: There is no such version.
        TrackingError: The registry cannot be used.
    """
    if settings.uri == EMBEDDED and not _database(home).exists():
        raise TrackingRefused(f"There is no MLflow registry in {home} yet. Set tracking.uri in params.yaml to yours.")
    with explained(settings, home):
        client = connect(settings, home)
        version = (
            client.get_model_version(name, str(number_or_alias))
            if isinstance(number_or_alias, int)
            else client.get_model_version_by_alias(name, number_or_alias)
        )
        return ModelVersion(name, int(version.version), _location(client, name, int(version.version)))


def model_files(settings: TrackingSettings, home: Path, version: ModelVersion) -> list[str]:
    """List the files of a version.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.
        version: The version.

    Returns:
        Their paths, sorted.

    Raises:
        TrackingError: The registry cannot be used.
    """
    with explained(settings, home):
        repository, files, folders = _repository(settings, home, version), list[str](), [""]
        while folders:
            for entry in repository.list_artifacts(folders.pop()):
                (folders if entry.is_dir else files).append(entry.path)
    return sorted(files)


def fetch_model_file(settings: TrackingSettings, home: Path, version: ModelVersion, file: str, target: Path) -> None:
    """Write a file of a version to a local path.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.
        version: The version.
        file: Path of the file in the version.
        target: The local path.

    Raises:
        TrackingError: The registry cannot be used.
    """
    with explained(settings, home), tempfile.TemporaryDirectory(dir=target.parent) as folder:
        fetched = _repository(settings, home, version).download_artifacts(file, dst_path=folder)
        Path(fetched).replace(target)


def _is_stored(client: Any, store: Storage, model: str, number: int) -> bool:
    place = _place(store, _location(client, model, number))
    return place is not None and store.exists(f"{place}/MLmodel")


def _location(client: Any, model: str, number: int) -> str:
    location: str = client.get_model_version_download_uri(model, str(number))
    if location.startswith("models:/"):
        location = client.get_logged_model(location.removeprefix("models:/")).artifact_location
    return location


def _place(store: Storage, location: str) -> str | None:
    """Return the folder of the storage that a URI names; None if it lies elsewhere."""
    root = store.url() + "/"
    return location.removeprefix(root) if location.startswith(root) else None


def _logged_models(client: Any, store: Storage) -> dict[str, str]:
    """Return where each logged model's files lie, by id, for all experiments that keep their files in the storage."""
    experiments = _paged(lambda token: client.search_experiments(page_token=token))
    ids = [experiment.experiment_id for experiment in experiments if _place(store, experiment.artifact_location)]
    models = _paged(lambda token: client.search_logged_models(ids, page_token=token)) if ids else ()
    return {model.model_id: model.artifact_location for model in models}


def _paged(search: Callable[[str | None], Any]) -> Iterator[Any]:
    """Yield all results of a search, page by page."""
    page = search(None)
    yield from page
    while page.token:
        page = search(page.token)
        yield from page


def _repository(settings: TrackingSettings, home: Path, version: ModelVersion) -> Any:
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    uri = tracking_uri(settings, home)
    return get_artifact_repository(version.location, tracking_uri=uri, registry_uri=uri)


def _database(home: Path) -> Path:
    return home.resolve() / "mlflow.db"


def _prepare_database(file: Path) -> None:
    """Create or migrate the database on a copy, which takes the file's place when it is complete."""
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
    """Return the schema's revision; MLflow's own check migrates some files in place, and a kill would break them."""
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
            f"{file} cannot be migrated to MLflow {installed('mlflow')}: {reason}. It is unchanged; move it away to "
            "start with an empty registry, or install the MLflow that wrote it."
        )


def connect(settings: TrackingSettings, home: Path) -> Any:
    """Return MLflow's client. MLflow takes seconds to import, so call this only inside `explained`."""
    from mlflow import MlflowClient

    uri = tracking_uri(settings, home)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def alone(settings: TrackingSettings, home: Path) -> Iterator[None]:
    """Let one process at a time work on an SQLite registry; a server takes care of that itself."""
    if settings.uri == EMBEDDED:
        with exclusive(home / "mlflow.lock"):
            yield
    else:
        yield


@contextmanager
def variables_set(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables while the block runs."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def ignoring_existing() -> Iterator[None]:
    """Ignore the error that something exists already, since another process may have created it first."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


@contextmanager
def explained(settings: TrackingSettings, home: Path) -> Iterator[None]:
    """Turn errors of MLflow inside the block into `TrackingError`, with cause and remedy but without passwords.

    Args:
        settings: Where the registry is.
        home: The folder of the project's runtime state.

    Yields:
        Nothing; MLflow is imported before the block runs.

    Raises:
        TrackingRefused: The registry refuses, and will go on refusing.
        TrackingError: The registry cannot be used.
    """
    preload()
    from mlflow.exceptions import MlflowException
    from requests import RequestException
    from sqlalchemy.exc import SQLAlchemyError

    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    except (MlflowException, RequestException, SQLAlchemyError) as error:
        uri, reason = tracking_uri(settings, home), f"{error}".partition("\n")[0].rstrip(".")
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
        what = f"The MLflow registry at {uri} {'refuses' if refused else 'cannot be used'}: {reason}"
        without_password = re.sub(r"//[^/@\s]*@", "//", what)
        raise (TrackingRefused if refused else TrackingError)(f"{without_password}. {remedy}") from error


def _is_refusal(error: Exception) -> bool:
    """Return whether a registry, or the storage behind it, would refuse again."""
    status = getattr(getattr(error, "response", None), "status_code", 0)
    client_error = 400 <= status < 500 and status not in (408, 429)
    return client_error or getattr(error, "error_code", None) in _REFUSALS


def installed(package: str) -> str:
    """Return a package's version as the package index names it, without a build's suffix such as `+cpu`."""
    return metadata.version(package).partition("+")[0]
