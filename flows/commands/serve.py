"""`mtz ui` and `mtz s3`: servers for people and other programs, until Ctrl-C."""

import shlex
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from flows.processes import servers
from mtz_core.errors import MtzError
from tasks.home import find_home
from tasks.params import load_params
from tasks.registry import mlflow_client
from tasks.storage import s3

_PREFECT_PORT = 4200
_MLFLOW_PORT = 5000


class NotEmbedded(MtzError):
    """The command works on the embedded storage, and the settings name another."""


def serve_pages(project: Path, params_file: Path, on_progress: Callable[[str], None]) -> None:
    """Serve MLflow's and Prefect's pages, with the storage behind them, until interrupted.

    Args:
        project: The folder of the project.
        params_file: The parameters file, relative to the project.
        on_progress: Receives the addresses of the pages.

    Raises:
        InvalidParams: The parameters cannot be used.
        StorageError: The storage cannot be used.
        TrackingError: The registry cannot be used.
        ServiceFailed: A server does not start.
    """
    params = load_params(project / params_file)
    home = find_home(project)
    home.mkdir(parents=True, exist_ok=True)
    on_progress("Starting (half a minute on the first time) …")
    with ExitStack() as stack:
        pages: list[tuple[str, str]] = []
        started = []
        if servers.uses_own_prefect_server():
            pages.append(("Prefect", "at your PREFECT_API_URL"))
        else:
            started.append(stack.enter_context(servers.prefect_server(home, servers.free_port(_PREFECT_PORT))))
        store = stack.enter_context(s3.connect(params.storage, home))
        if params.tracking.uri == mlflow_client.EMBEDDED:
            mlflow_client.prepare(params.tracking, home)
            port = servers.free_port(_MLFLOW_PORT)
            uri = mlflow_client.tracking_uri(params.tracking, home)
            started.append(stack.enter_context(servers.mlflow_server(home, uri, store.environment(), port)))
        else:
            pages.append(("MLflow", params.tracking.uri))
        for server in started:
            server.wait()
            pages.append((server.name, server.url))
        for name, url in sorted(pages):
            on_progress(f"{name:8} {url}")
        _until_interrupted(on_progress)


def serve_storage(project: Path, params_file: Path, on_progress: Callable[[str], None]) -> None:
    """Serve the embedded storage until interrupted; print how other programs reach it.

    Args:
        project: The folder of the project.
        params_file: The parameters file, relative to the project.
        on_progress: Receives the lines.

    Raises:
        NotEmbedded: The settings name another storage.
        InvalidParams: The parameters cannot be used.
        StorageError: The storage cannot be used.
    """
    home, settings = _embedded(project, params_file)
    with s3.connect(settings, home) as store:
        on_progress(f"endpoint     {store.endpoint}")
        on_progress(f"bucket       {store.bucket}")
        on_progress(f"DVC remote   {store.url('dvc')}")
        on_progress(f"credentials  {home / 's3' / 'credentials.json'}")
        on_progress(
            'In another terminal: eval "$(mtz s3 --export)" sets the variables that DVC, MLflow and AWS tools read.'
        )
        _until_interrupted(on_progress)


def export_storage(project: Path, params_file: Path, on_progress: Callable[[str], None]) -> None:
    """Print shell commands that set the variables with which other programs reach the embedded storage.

    Args:
        project: The folder of the project.
        params_file: The parameters file, relative to the project.
        on_progress: Receives the commands.

    Raises:
        NotEmbedded: The settings name another storage.
        InvalidParams: The parameters cannot be used.
        StorageError: The storage cannot be used.
    """
    home, settings = _embedded(project, params_file)
    with s3.connect(settings, home) as store:
        for name, value in store.environment().items():
            on_progress(f"export {name}={shlex.quote(value)}")


def _embedded(project: Path, params_file: Path) -> tuple[Path, s3.StorageSettings]:
    settings = load_params(project / params_file).storage
    if settings.endpoint != s3.EMBEDDED:
        raise NotEmbedded(
            f"storage.endpoint in {params_file} is {settings.endpoint}, not {s3.EMBEDDED}: "
            "that server is not ours to start, and its credentials come from your environment."
        )
    return find_home(project), settings


def _until_interrupted(on_progress: Callable[[str], None]) -> None:
    on_progress("Ctrl-C stops.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        on_progress("\nstopping …")
