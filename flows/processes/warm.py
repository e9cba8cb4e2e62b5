"""Warm interpreters: servers that have imported the libraries already, and fork a child instead of starting a process.

Each `dvc` command takes a second to start, each stage several seconds, and a group's run starts two dozen of them.
"""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path

from flows.processes.child import python_environment
from tasks.warm_client import VARIABLE

_SERVER = Path(__file__).with_name("warm_server.py")
PRELOADED: dict[str, tuple[str, ...]] = {
    "dvc": (
        *("dvc.cli.parser", "dvc.commands.repro", "dvc.repo.index", "dvc.repo.graph", "dvc.repo.worktree"),
        *("dvc.repo.plots", "dvc.repo.artifacts", "dvc.stage.run", "dvc.cachemgr", "dvc.data_cloud", "dvc.lock"),
        *("dvc.rwlock", "dvc.scm", "dvc.utils.strictyaml", "dvc.analytics", "dvc_data.hashfile.status"),
        *("dvc_data.hashfile.db.local", "dvc_data.index.push", "dvc_data.index.fetch", "dvc_render", "dvc_s3", "s3fs"),
        *("fsspec.implementations.memory", "networkx", "psutil", "rich.json", "configobj", "platformdirs"),
        *("ruamel.yaml",),
    ),
    "tasks": (
        *("argparse", "numpy", "scipy.optimize", "scipy.sparse.csgraph", "torch", "torch.export._trace", "jaxtyping"),
        *("safetensors.torch", "pyarrow.parquet", "pyarrow.pandas_compat", "PIL.PngImagePlugin", "PIL.JpegImagePlugin"),
        *("PIL.PpmImagePlugin", "PIL.GifImagePlugin", "PIL.BmpImagePlugin", "pydantic.dataclasses", "yaml", "boto3"),
        *("boto3.s3.transfer", "matplotlib.figure", "matplotlib.backends.backend_agg", "mlflow.pyfunc"),
        *("mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store", "alembic.command"),
    ),
}
"""Modules that each interpreter imports. DVC has its own because its import changes logging and standard output."""

_IMPORT_SETTINGS = {"MLFLOW_DISABLE_TELEMETRY": "true", "GIT_PYTHON_REFRESH": "quiet"}
"""What `tasks/registry/mlflow_client.py` sets before it imports MLflow; the children's environment is their own."""

_STARTS = 3
_GRACE_SECONDS = 0.5
_keeping = threading.Lock()
_LONGEST_FOLDER = 90  # a socket's path has at most 107 bytes


@contextmanager
def serving(home: Path) -> Iterator[None]:
    """Keep warm interpreters ready for `Child` and for the stages while the block runs.

    The interpreters import while the caller goes on, and the first requests wait for them. They end with the block, or
    with this process however it ends. Their output goes to `home/logs/warm-….log`. A process that was started within
    such a block uses its parent's. On systems other than Linux there are none.

    Args:
        home: The folder of the project's runtime state.

    Yields:
        Nothing, at once.
    """
    before = os.environ.get(VARIABLE)
    if sys.platform != "linux" or (before and Path(before).is_dir()):
        yield
        return
    place = tempfile.gettempdir()
    with ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(prefix="mtz-", dir=place if len(place) < _LONGEST_FOLDER else "/tmp")
        )
        for name, modules in PRELOADED.items():
            interpreter = _Interpreter(Path(folder, name), modules, home / "logs" / f"warm-{name}.log")
            stack.callback(interpreter.close)
        os.environ[VARIABLE] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def keep(home: Path) -> None:
    """Keep warm interpreters ready for as long as this process lives, unless its parent has some."""
    with _keeping:
        _keep(home)


@cache
def _keep(home: Path) -> None:
    servers = ExitStack()
    servers.enter_context(serving(home))
    atexit.register(servers.close)


class _Interpreter:
    """One server, which is started again if it dies; meanwhile processes start on their own."""

    def __init__(self, address: Path, modules: Sequence[str], log: Path) -> None:
        self._address, self._modules, self._log = address, modules, log
        self._closing = threading.Lock()
        self._closed = False
        log.parent.mkdir(parents=True, exist_ok=True)
        log.unlink(missing_ok=True)
        self._process = self._start()
        threading.Thread(target=self._keep, daemon=True).start()

    def _start(self) -> "subprocess.Popen[bytes]":
        # The socket exists before the server answers, so clients wait. Only the server holds it, so they do not wait
        # for a dead one.
        self._address.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, self._log.open("ab") as output:
            listener.bind(str(self._address))
            listener.listen(socket.SOMAXCONN)
            process = subprocess.Popen(
                [sys.executable, str(_SERVER), str(listener.fileno()), *self._modules],
                env=python_environment(**_IMPORT_SETTINGS),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(listener.fileno(),),
                start_new_session=True,
            )
        assert process.stdin is not None
        self._lifeline = process.stdin
        return process

    def _keep(self) -> None:
        for _ in range(_STARTS - 1):
            self._process.wait()
            with self._closing:
                if self._closed:
                    return
                self._lifeline.close()
                self._process = self._start()

    def close(self) -> None:
        """End the server and its children."""
        with self._closing:
            self._closed = True
            self._lifeline.close()
            try:
                self._process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:  # it is still importing
                self._process.kill()
                self._process.wait()
