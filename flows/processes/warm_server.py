"""A warm interpreter: `python warm_server.py SOCKET MODULE…` imports the modules, then forks a child for each request.

`tasks/warm_client.py` describes the protocol. SOCKET is the descriptor of a listening socket; standard input is a pipe
of which only the owner holds the writing end: when that closes, the server ends with all its children.

The server only imports, so that a child is what a fresh process would be after these imports. The project's own
packages are not among them: a child imports those of its working folder. This file uses the standard library only.
"""

import atexit
import gc
import importlib
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_READ_AT_START = (
    *("PYTHON", "LD_", "LANG", "LC_", "MALLOC_", "OMP_", "GOMP_", "MKL_", "OPENBLAS_", "GOTO_", "NPY_", "ATEN_"),
    *("TORCH_", "TORCHDYNAMO_", "PYTORCH_", "ARROW_", "MPL", "MLFLOW_LOGGING", "DVC_SHOW_TRACEBACK"),
)
"""Prefixes of the environment variables that Python and the libraries read when they start, and never again.

Variables that libraries set themselves on import (TORCHINDUCTOR_CACHE_DIR, KMP_…) are not among them, since an owner
that imports one of these libraries would be refused; nor are those of CUDA, which starts in the children.
"""

_LONGEST_REQUEST = 1 << 20


@dataclass
class _Client:
    """A process that asks for a child.

    Attributes:
        connection: The descriptor of its socket; None once the client is gone.
        child: Process id of the child, 0 before there is one.
        ended: Whether the child is a zombie. It stays one until its client is gone, so that its id is not reused.
    """

    connection: int | None
    child: int = 0
    ended: bool = False


@dataclass(frozen=True)
class _Work:
    """The work of a child.

    Attributes:
        request: The request as JSON.
        streams: Descriptors of its standard streams.
        connection: Descriptor of the socket that receives the answer.
    """

    request: bytes
    streams: list[int]
    connection: int


class _Server:
    """A server that forks children and reports to their clients how they ended.

    Attributes:
        alive: Reading end of a pipe that closes when the server ends.
    """

    def __init__(self, listener: int) -> None:
        self.alive, self._held = os.pipe()
        self._listener = socket.socket(fileno=listener)
        self._ready = selectors.PollSelector()  # unlike epoll it shares nothing with the children
        self._listen_to(0)
        self._listen_to(listener)

    def serve(self) -> _Work:
        """Serve until the owner ends; return in the children only."""
        while True:
            key = self._ready.select()[0][0]  # one at a time: handling one may close the others
            client: _Client | None = key.data
            if key.fd == 0:
                self._end()
            elif client is None:
                connection = self._listener.accept()[0].detach()
                self._listen_to(connection, _Client(connection))
            elif key.fd != client.connection:
                self._tell_end(client, key.fd)
            elif client.child:
                self._pass_signal(client, key.fd)
            elif work := self._start(client, key.fd):
                return work

    def _listen_to(self, descriptor: int, client: _Client | None = None) -> None:
        self._ready.register(descriptor, selectors.EVENT_READ, client)

    def _close(self, descriptor: int) -> None:
        self._ready.unregister(descriptor)
        os.close(descriptor)

    def _start(self, client: _Client, connection: int) -> _Work | None:
        """Fork a child; return its work if this is the child."""
        request, streams = b"", list[int]()
        with socket.socket(fileno=os.dup(connection)) as sender, suppress(ConnectionResetError):
            request, streams, _, _ = socket.recv_fds(sender, _LONGEST_REQUEST, 3)
        try:
            client.child = os.fork() if request else 0
        except OSError as error:
            _tell(connection, f"refused no process can be made: {error.strerror}")
            request = b""
        if request and client.child == 0:
            os.setpgid(0, 0)
            for key in self._ready.get_map().values():
                if key.fd not in (0, connection):
                    os.close(key.fd)
            os.close(self._held)
            return _Work(request, streams, connection)
        for stream in streams:
            os.close(stream)
        if client.child:
            with suppress(OSError):  # both sides do it, and either may come first
                os.setpgid(client.child, client.child)
            self._listen_to(os.pidfd_open(client.child), client)
        else:
            self._close(connection)
        return None

    def _tell_end(self, client: _Client, end: int) -> None:
        self._close(end)
        client.ended = True
        if client.connection is None:
            os.waitpid(client.child, 0)
            return
        result = os.waitid(os.P_PID, client.child, os.WEXITED | os.WNOWAIT)
        assert result is not None
        _tell(client.connection, f"ended {result.si_status if result.si_code == os.CLD_EXITED else -result.si_status}")

    def _pass_signal(self, client: _Client, connection: int) -> None:
        """Pass on a signal; if the client is gone, end its child and all below it."""
        record = b""
        with suppress(ConnectionResetError):
            record = os.read(connection, 1)
        with suppress(ProcessLookupError):
            os.killpg(client.child, record[0] if record else signal.SIGKILL)
        if not record:
            self._close(connection)
            client.connection = None
            if client.ended:
                os.waitpid(client.child, 0)

    def _end(self) -> None:
        for child in {key.data.child for key in self._ready.get_map().values() if key.data} - {0}:
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
        with suppress(OSError):  # an owner that was killed has left these behind
            address = Path(self._listener.getsockname())
            address.unlink()
            address.parent.rmdir()
        os._exit(0)


def _tell(connection: int, answer: str) -> None:
    with suppress(OSError):  # the client is gone
        os.write(connection, answer.encode())


def _run(work: _Work, alive: int, started_with: Mapping[str, str]) -> None:
    """Become the process that the client asked for, and run its module."""
    request: dict[str, Any] = json.loads(work.request)
    try:
        _check(request, started_with)
        os.chdir(request["folder"])
    except (_Refused, OSError) as reason:
        _tell(work.connection, f"refused {reason}")
        _at_end.status = 0
        return
    for number, stream in enumerate(work.streams):
        os.dup2(stream, number)
        os.close(stream)
    os.environ.clear()
    os.environ.update(request["environment"])
    if request["from_folder"]:
        sys.path.insert(0, request["folder"])
    _draw_anew()
    threading.Thread(target=_die_with_server, args=(alive,), daemon=True).start()
    _tell(work.connection, "started")
    os.close(work.connection)
    sys.argv[:] = request["arguments"]
    try:
        if sys.argv[0].endswith(".py"):
            runpy.run_path(sys.argv[0], run_name="__main__")
        else:
            runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        _at_end.status = 0
    except SystemExit as end:
        _at_end.status = end.code or 0
        raise


def _draw_anew() -> None:
    """Reseed random generators, so that unseeded numbers differ from other children's; `random` does so by itself."""
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed()
    if "torch" in sys.modules:
        sys.modules["torch"].default_generator.seed()


class _Refused(Exception):
    """A child of this server would differ from a fresh process."""


class _Ending:
    """The last step of a child's exit, after everything that Python does in order: it ends at once.

    Shutting down a process with all these libraries takes half a second, and copies the memory that it shares.
    """

    status: object = None

    def __call__(self) -> None:
        if isinstance(self.status, int):  # otherwise Python prints an error first
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status & 0xFF)


_at_end = _Ending()


def _check(request: Mapping[str, Any], started_with: Mapping[str, str]) -> None:
    if request["prefix"] != sys.prefix:
        raise _Refused(f"it is the Python of {sys.prefix}, not of {request['prefix']}")
    for name in sorted({*request["environment"], *started_with}):
        if name.startswith(_READ_AT_START) and request["environment"].get(name) != started_with.get(name):
            raise _Refused(f"it was started with another value of the environment variable {name}")


def _die_with_server(alive: int) -> None:
    """Wait until the server ends, then kill this process group."""
    os.read(alive, 1)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Import the modules, then serve."""
    atexit.register(_at_end)  # registered first, so that it runs last
    started_with = dict(os.environ)
    if not sys.flags.safe_path:
        del sys.path[0]  # this file's folder
    _, listener, *modules = sys.argv
    for module in modules:
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a child's collector must not write to the shared pages
    server = _Server(int(listener))
    _run(server.serve(), server.alive, started_with)


if __name__ == "__main__":
    main()
