"""Servers that a run, or `mtz ui`, starts on loopback and stops again: Prefect's and MLflow's."""

import os
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from flows.processes.child import Child, python_environment
from mtz_core.errors import MtzError

_HOST = "127.0.0.1"
_POLL_SECONDS = 0.1
_START_SECONDS = 600.0  # Prefect makes its database on the first start: 12 s alone, minutes on a busy machine
_ANSWER_SECONDS = 30.0


class ServiceFailed(MtzError):
    """A server did not start or does not answer."""


@dataclass(frozen=True)
class StartedServer:
    """A server that was started and may not answer yet.

    Attributes:
        name: The server's name for messages.
        url: Its address.
        health: The path that answers once the server is ready.
        log: The file of its output.
        child: Its process.
    """

    name: str
    url: str
    health: str
    log: Path
    child: Child

    def wait(self) -> None:
        """Wait until the server answers.

        Raises:
            ServiceFailed: The server ended, or did not answer in time.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not _answers(self.url + self.health):
            if self.child.ended():
                raise ServiceFailed(f"{self.name} did not start; its log says why: {self.log}")
            if time.monotonic() > deadline:
                raise ServiceFailed(
                    f"{self.name} did not answer within {_START_SECONDS:.0f} s; see its log: {self.log}"
                )
            time.sleep(_POLL_SECONDS)


def prefect_environment(home: Path, debug: bool = False) -> dict[str, str]:
    """Return the settings of Prefect for its server and for flows; they must be set before Prefect is imported.

    Its console handler is silent unless `debug` is set: it would break the progress display, and the server keeps the
    log.

    Args:
        home: The folder of the project's runtime state.
        debug: Whether Prefect's log is printed.

    Returns:
        The environment variables.
    """
    settings = {
        "DO_NOT_TRACK": "1",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "INFO" if debug else "CRITICAL",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "PREFECT_CLI_PROMPT": "false",
    }
    if not uses_own_prefect_server():
        settings["PREFECT_HOME"] = str(home / "prefect")
    return settings


def uses_own_prefect_server() -> bool:
    """Return whether the user runs a Prefect server and names it in PREFECT_API_URL."""
    return bool(os.environ.get("PREFECT_API_URL"))


def check_own_prefect_server() -> None:
    """Check that the server that PREFECT_API_URL names answers.

    Raises:
        ServiceFailed: It does not answer.
    """
    url = os.environ["PREFECT_API_URL"].rstrip("/")
    if not _answers(f"{url}/health", urllib.request.build_opener()):
        raise ServiceFailed(
            f"no Prefect server answers at PREFECT_API_URL ({url}). Start it, correct the address, or unset the "
            "variable: then a server is started for the run."
        )


@contextmanager
def prefect_server(home: Path, port: int | None = None) -> Iterator[StartedServer]:
    """Start Prefect's server with its database in the home; yield at once, and stop it at the end of the block."""
    port = port or free_port()
    options = ("--host", _HOST, "--port", str(port), "--analytics-off", "--log-level", "WARNING")
    environment = {
        **prefect_environment(home, debug=True),
        "PREFECT_API_URL": f"http://{_HOST}:{port}/api",
        # The pages call the address that they were loaded from.
        "PREFECT_UI_API_URL": f"http://{_HOST}:{port}/api",
        # With the default, in memory, places that were held when a server ended would never be freed.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    with _serving(
        "Prefect", ("prefect", "server", "start", *options), port, "/api/health", home, environment
    ) as server:
        yield server


@contextmanager
def mlflow_server(
    home: Path, store: str, environment: Mapping[str, str], port: int | None = None
) -> Iterator[StartedServer]:
    """Start MLflow's server on the tracking store; stop it at the end of the block.

    Args:
        home: The folder of the project's runtime state.
        store: URI of the tracking store.
        environment: The storage's address and credentials, which the server needs to show artifacts.
        port: The port; any free one by default.

    Yields:
        The server, at once: it may not answer yet.
    """
    port = port or free_port()
    options = ("--host", _HOST, "--port", str(port), "--backend-store-uri", store, "--workers", "1")
    # Job execution would take half a minute to start and is not used.
    settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", **environment}
    with _serving("MLflow", ("mlflow", "server", *options), port, "/health", home, settings) as server:
        yield server


@contextmanager
def _serving(
    name: str, command: Sequence[str], port: int, health: str, home: Path, environment: Mapping[str, str]
) -> Iterator[StartedServer]:
    log = home / "logs" / f"{name.lower()}-server.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        output = stack.enter_context(log.open("wb"))
        child = Child(command, home, python_environment(**environment), output, server=True)
        stack.callback(child.stop)
        yield StartedServer(name, f"http://{_HOST}:{port}", health, log, child)


def free_port(preferred: int = 0) -> int:
    """Return a free port on loopback.

    Args:
        preferred: The port to return if it is free.

    Returns:
        The preferred port, or else any free one.

    Raises:
        ServiceFailed: No port is free.
    """
    for port in (preferred, 0):
        with socket.socket() as probe:
            try:
                probe.bind((_HOST, port))
            except OSError:
                continue
            number: int = probe.getsockname()[1]
            return number
    raise ServiceFailed("No port is free on loopback. Close some programs and try again.")


_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def _answers(url: str, opener: urllib.request.OpenerDirector = _DIRECT) -> bool:
    try:
        with opener.open(url, timeout=_ANSWER_SECONDS) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False
