"""Child processes that never outlive this one, and that can all be stopped at once."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from tasks import warm_client

_LIFELINE = Path(__file__).with_name("lifeline.py")
_GRACE_SECONDS = 20.0
_RUN_WARM = ("dvc", "dvc_index")

_running: set["Child"] = set()
_guard = threading.Lock()
_stopping = threading.Event()


class Interrupted(Exception):
    """The run is being stopped; no child may start any more."""


class Child:
    """A Python module that runs in a process group of its own, which ends when this process does.

    Args:
        arguments: The module's name, or a `.py` file, then its arguments.
        folder: The working folder.
        environment: All environment variables of the child.
        output: Where standard output and error go; by default a pipe that `lines()` reads.
        server: Whether it is stopped only by its starter and not by `stop_all`, so that flows being stopped can still
            report to it.

    Raises:
        Interrupted: The run is being stopped; nothing was started.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        output: IO[bytes] | None = None,
        server: bool = False,
    ) -> None:
        self._output: IO[bytes] | None = None
        if output is None:
            reading, sink = os.pipe()
            self._output = open(reading, "rb")  # noqa: SIM115, PTH123 - closed by wait()
        else:
            sink = os.dup(output.fileno())
        try:
            warm_process = None if server else _start_warm(arguments, folder, environment, sink)
            with _guard:
                if _stopping.is_set():
                    if warm_process:
                        warm_process.signal(signal.SIGKILL)
                    raise Interrupted
                self._process = warm_process or _start_cold(arguments, folder, environment, sink)
                if not server:
                    _running.add(self)
        finally:
            os.close(sink)

    def lines(self) -> Iterator[str]:
        """Yield the lines of output as they come, until the child closes it."""
        assert self._output is not None
        for line in self._output:
            yield line.decode(errors="replace").rstrip("\r\n")

    def ended(self) -> bool:
        """Return whether the child has ended."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        status = self._process.wait()
        self._forget()
        if self._output is not None:
            self._output.close()
        return status

    def stop(self) -> None:
        """End the whole process group with SIGTERM, and after twenty seconds with SIGKILL."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired, TimeoutError):
            self._process.wait(_GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._forget()

    def _signal(self, number: signal.Signals) -> None:
        if isinstance(self._process, warm_client.Running):
            self._process.signal(number)
            return
        with suppress(ProcessLookupError, PermissionError):  # gone; macOS raises PermissionError for a group of zombies
            os.killpg(self._process.pid, number)

    def _forget(self) -> None:
        if isinstance(self._process, warm_client.Running):
            self._process.release()
        elif self._process.stdin is not None:
            self._process.stdin.close()
        with _guard:
            _running.discard(self)


def _start_warm(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], sink: int
) -> warm_client.Running | None:
    """Start a module in its warm interpreter; if it cannot run there, return None and write why to the output."""
    if Path(arguments[0]).stem not in _RUN_WARM or warm_client.VARIABLE not in environment or _stopping.is_set():
        return None
    with open(os.devnull, "rb") as nothing:  # noqa: PTH123
        try:
            address = Path(environment[warm_client.VARIABLE], "dvc")
            return warm_client.Running(address, arguments, folder, environment, (nothing.fileno(), sink, sink))
        except warm_client.NotWarm as reason:
            os.write(sink, f"{warm_client.cold_start(reason)}\n".encode())
            return None


def _start_cold(
    arguments: Sequence[str], folder: Path, environment: Mapping[str, str], sink: int
) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        [sys.executable, "-P", str(_LIFELINE), *arguments],
        cwd=folder,
        env=dict(environment),
        stdin=subprocess.PIPE,
        stdout=sink,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def stop_all() -> None:
    """Stop every child except servers, and let no new one start."""
    _stopping.set()
    with _guard:
        children = list(_running)
    for child in children:
        child._signal(signal.SIGTERM)
    for child in children:
        child.stop()


def stopping() -> bool:
    """Return whether `stop_all` was called."""
    return _stopping.is_set()


def python_environment(**extra: str) -> dict[str, str]:
    """Return this process's environment with this Python first on the path, so that a stage's `python` is this one."""
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts:
        path = os.pathsep.join((scripts, path))
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **extra}
