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

_LIFELINE = Path(__file__).with_name("lifeline.py")
_GRACE_SECONDS = 5.0

_running: set["Child"] = set()
_guard = threading.Lock()
_stopping = threading.Event()


class Interrupted(Exception):
    """The run is being stopped; no child may start any more."""


class Child:
    """A Python module running in a process group of its own, which ends when this process does.

    Args:
        arguments: the module's name, or a `.py` file, then its arguments.
        folder: the working folder.
        environment: all of its environment variables.
        output: where standard output and error go; by default to a pipe, read with `lines()`.
        server: it is stopped by whoever started it, not by `stop_all`, so that flows being stopped can still say so.
    """

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        output: IO[bytes] | None = None,
        server: bool = False,
    ) -> None:
        with _guard:
            if _stopping.is_set():
                raise Interrupted
            self._process = subprocess.Popen(
                [sys.executable, "-P", str(_LIFELINE), *arguments],
                cwd=folder,
                env=dict(environment),
                stdin=subprocess.PIPE,
                stdout=output or subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            if not server:
                _running.add(self)

    def lines(self) -> Iterator[str]:
        """Yield the lines of output as they come, until the child has closed it."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield line.decode(errors="replace").rstrip("\r\n")

    def ended(self) -> bool:
        """Tell whether the child has ended."""
        return self._process.poll() is not None

    def wait(self) -> int:
        """Wait for the end; return the exit status, negative for a signal."""
        status = self._process.wait()
        self._forget()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        return status

    def stop(self) -> None:
        """End the whole process group: politely first, by force after a few seconds."""
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()
        self._forget()

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):  # gone; macOS says PermissionError of a group of zombies
            os.killpg(self._process.pid, number)

    def _forget(self) -> None:
        with _guard:
            _running.discard(self)


def stop_all() -> None:
    """Stop every child but servers, and let no new one start."""
    _stopping.set()
    with _guard:
        children = list(_running)
    for child in children:
        child._signal(signal.SIGTERM)
    for child in children:
        child.stop()


def stopping() -> bool:
    """Tell whether `stop_all` was called."""
    return _stopping.is_set()


def python_environment(**extra: str) -> dict[str, str]:
    """Return this process's environment with this Python first on the path, so that a stage's `python` is this one."""
    scripts = str(Path(sys.executable).parent)
    path = os.environ.get("PATH", os.defpath)
    if path.split(os.pathsep)[0] != scripts:
        path = os.pathsep.join((scripts, path))
    return {**os.environ, "PATH": path, "PYTHONUNBUFFERED": "1", **extra}
