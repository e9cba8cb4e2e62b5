"""A Dask cluster on this machine: a scheduler and workers that share no folder, as if on several machines."""

import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from distributed.security import Security

from flows.processes.child import Child, python_environment
from flows.processes.servers import free_port
from tasks.home import HOME_NAME
from tasks.warm_client import VARIABLE as WARM

_CODE = Path(__file__).parents[2]
_HOST = "127.0.0.1"
_WATCH_SECONDS = 0.5
_LONG_LIFE_SECONDS = 30.0
_LONGEST_PAUSE_SECONDS = 30.0
_GIB = 1 << 30

_SETTINGS = {
    # A worker takes a job only when it is free: a job queued at a busy worker would wait for hours.
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_SATURATION": "1.0",
    # If no worker ever starts, jobs fail instead of waiting for ever.
    "DASK_DISTRIBUTED__SCHEDULER__NO_WORKERS_TIMEOUT": "600s",
    "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "300s",
    "DASK_DISTRIBUTED__DIAGNOSTICS__NVML": "false",
}


@dataclass(frozen=True)
class Cluster:
    """The address of a scheduler, and what a client needs to reach it.

    Attributes:
        address: The scheduler's address.
        security: Certificates made for this cluster; None leaves them to Dask's own configuration.
        logs: Folder of the logs, if the processes were started here.
    """

    address: str
    security: Security | None = field(default=None, repr=False)
    logs: Path | None = None


@contextmanager
def local_cluster(home: Path, workers: int, memory: float | None, environment: Mapping[str, str]) -> Iterator[Cluster]:
    """Start a scheduler and workers, which stop at the end of the block; a worker that dies is replaced.

    Each worker has the folder `HOME/dask/worker-N` and, in it, an `.mtz` of its own. All listen on loopback only, and
    accept only clients with the certificate that is made for this cluster: whoever may talk to a scheduler can run any
    code.

    Args:
        home: The folder of the project's runtime state.
        workers: Number of workers.
        memory: GiB above which a worker takes no more jobs; None for no bound.
        environment: Variables for scheduler and workers beside this process's own.

    Yields:
        The cluster, at once: its processes may still be starting.
    """
    folder = home / "dask"
    folder.mkdir(parents=True, exist_ok=True)
    port = free_port()
    security: Security = Security.temporary()  # type: ignore[no-untyped-call]
    with ExitStack() as stack:
        certificate = stack.enter_context(_certificate(security, folder / f"certificate-{os.getpid()}.pem"))
        tls = ("--tls-ca-file", str(certificate), "--tls-cert", str(certificate), "--tls-key", str(certificate))
        address = f"tls://{_HOST}:{port}"
        common = ("--protocol", "tls", *tls, "--dashboard-address", f"{_HOST}:0", "--no-dashboard")
        scheduler = ("dask", "scheduler", "--host", _HOST, "--port", str(port), *common)
        log = stack.enter_context((folder / "scheduler.log").open("wb"))
        settings = {**_SETTINGS, **environment}
        child = Child(scheduler, folder, python_environment(**settings), log, server=True)
        stack.callback(child.stop)
        limit = "0" if memory is None else str(int(memory * _GIB))
        options = ("--host", _HOST, "--nthreads", "1", "--no-nanny", "--memory-limit", limit, *common)
        command = ("dask", "worker", address, *options)
        keeper = _Keeper([_Worker(folder / f"worker-{n}", command, settings) for n in range(workers)])
        stack.callback(keeper.stop)
        keeper.start()
        yield Cluster(address, security, folder)


class _Worker:
    """A place for a worker: its folder, and the process that works there now."""

    def __init__(self, folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._command = (*command, "--name", folder.name, "--local-directory", str(folder / "dask"))
        self._environment = environment
        self._child: Child | None = None
        self._log: IO[bytes] | None = None
        self._started = 0.0
        self._short_lives = 0

    def keep(self) -> None:
        """Start the process if none is running; after short lives, wait longer and longer before that."""
        if self._child is not None:
            if not self._child.ended():
                return
            if time.monotonic() < self._started + self._pause():
                return
            long = time.monotonic() - self._started > _LONG_LIFE_SECONDS
            self._short_lives = 0 if long else self._short_lives + 1
            self.stop()
        own = self._folder / HOME_NAME
        own.mkdir(parents=True, exist_ok=True)
        self._log = (self._folder / "worker.log").open("ab")
        homes = {"MTZ_HOME": str(own), "PREFECT_HOME": str(own / "prefect")}
        # They run the code that starts them, even if that is not the installed one.
        homes["PYTHONPATH"] = os.pathsep.join(filter(None, (str(_CODE), os.environ.get("PYTHONPATH"))))
        everything = python_environment(**{**self._environment, **homes})
        everything.pop(WARM, None)  # each has its own warm interpreters, as on its own machine
        self._child = Child(self._command, self._folder, everything, self._log, server=True)
        self._started = time.monotonic()

    def stop(self) -> None:
        """Stop the process and everything that it started."""
        if self._child is not None:
            self._child.stop()
            self._child = None
        if self._log is not None:
            self._log.close()
            self._log = None

    def _pause(self) -> float:
        return 0.0 if self._short_lives == 0 else min(_LONGEST_PAUSE_SECONDS, 2.0**self._short_lives)


class _Keeper:
    """A thread that keeps all workers running until it is stopped."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="dask-workers", daemon=True)

    def start(self) -> None:
        for worker in self._workers:
            worker.keep()
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join()
        with ThreadPoolExecutor(len(self._workers)) as pool:  # each takes seconds
            list(pool.map(_Worker.stop, self._workers))

    def _watch(self) -> None:
        while not self._stopping.wait(_WATCH_SECONDS):
            for worker in self._workers:
                worker.keep()


@contextmanager
def _certificate(security: Security, file: Path) -> Iterator[Path]:
    """Keep the cluster's key and certificate in a file that only its owner can read while the block runs."""
    file.unlink(missing_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w", encoding="ascii") as content:
            roles = security.get_tls_config_for_role("worker")  # type: ignore[no-untyped-call]
            content.write(f"{roles['key']}{roles['cert']}")
        yield file
    finally:
        file.unlink(missing_ok=True)
