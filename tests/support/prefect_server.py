"""A Prefect server, and workers of its pools, for the tests of one process."""

import atexit
import functools
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from prefect.context import refresh_global_settings_context

from flows.processes import servers
from tasks.registry.mlflow_client import variables_set
from tests.support import interpreters
from tests.support.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]

SETTINGS = {
    # Looked at more often than where nobody waits for it.
    "PREFECT_SERVER_SERVICES_REPOSSESSOR_LOOP_SECONDS": "1",
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
}

_until_stopped = ExitStack()
atexit.register(_until_stopped.close)


@functools.cache
def running() -> tuple[str, Path]:
    """The address of a server that ends with this process, if not before, and its home."""
    home = Path(
        _until_stopped.enter_context(tempfile.TemporaryDirectory(prefix="mtz-prefect-", ignore_cleanup_errors=True))
    )
    with variables_set({**SETTINGS, "PREFECT_API_URL": ""}):
        server = _until_stopped.enter_context(servers.prefect_server(home))
    server.wait()
    return f"{server.url}/api", home


def stop() -> None:
    """Stop the server, if it runs."""
    _until_stopped.close()
    running.cache_clear()


@contextmanager
def used(**variables: str) -> Iterator[Path]:
    """Let this process, and those that it starts, use the server; give the server's home."""
    url, home = running()
    with variables_set({**servers.prefect_environment(home), "PREFECT_API_URL": url, **variables}):
        refresh_global_settings_context()
        yield home
    refresh_global_settings_context()


@contextmanager
def pool_worker(pool: str, folder: Path, limit: int = 1) -> Iterator[None]:
    """A worker as `mtz fleet worker` starts one, in a folder of its own, while the block runs."""
    (folder / ".mtz").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MTZ_")}
    environment |= {"PYTHONPATH": str(ROOT), "PREFECT_WORKER_QUERY_SECONDS": "1", **interpreters.running(str(ROOT))}
    program = f"from flows.commands.schedule import worker; worker({pool!r}, {limit})"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", program], cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield
        finally:
            process.terminate()
            process.wait(PATIENCE_SECONDS)
