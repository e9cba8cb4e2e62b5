"""Client of a warm interpreter: a server that has already imported the libraries and forks a child for each request.

`flows/processes/warm.py` starts the servers; `flows/processes/warm_server.py` is their program. Their sockets are in
the folder that the environment variable MTZ_WARM names, one for each kind of work. Both sides send records
(SOCK_SEQPACKET):

    client  the request as JSON, with standard input, output and error attached
    server  "started", or "refused REASON": then nothing has run
    client  one byte: a signal for the child's process group
    server  "ended STATUS", negative for a signal
    client  closes its side: whatever is left of the process group is killed

A client that dies therefore takes its child along. If the server dies, so do its children, and their clients notice.

This file uses the standard library only, since the process of every stage imports it before anything else.
"""

import json
import os
import select
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

VARIABLE = "MTZ_WARM"
"""Environment variable: the folder of the warm interpreters' sockets. If unset, every process starts on its own."""

_LONGEST_RECORD = 4096


class NotWarm(Exception):
    """The warm interpreter cannot run this and nothing has run; the message is the reason."""


class Running:
    """A Python module that runs in a child of a warm interpreter.

    Args:
        interpreter: The socket of the warm interpreter.
        arguments: The module's name, or a `.py` file, then its arguments.
        folder: The working folder.
        environment: All environment variables of the child.
        streams: Descriptors of its standard input, output and error.
        from_folder: If true, the working folder comes first on the module path, as with `python -m`; otherwise it is
            not on the path.

    Raises:
        NotWarm: The interpreter does not answer or refuses; nothing has run.
    """

    def __init__(
        self,
        interpreter: Path,
        arguments: Sequence[str],
        folder: Path,
        environment: Mapping[str, str],
        streams: tuple[int, int, int],
        from_folder: bool = False,
    ) -> None:
        request = {
            "arguments": list(arguments),
            "folder": str(folder),
            "environment": dict(environment),
            "from_folder": from_folder,
            "prefix": sys.prefix,
        }
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._status: int | None = None
        try:
            self._socket.connect(str(interpreter))
            socket.send_fds(self._socket, [json.dumps(request).encode()], streams)
            answer = self._socket.recv(_LONGEST_RECORD).decode()
        except OSError as error:
            raise NotWarm(f"it does not answer: {error.strerror}") from None
        if answer != "started":
            raise NotWarm(answer.removeprefix("refused ") or "it ended")

    def __del__(self) -> None:
        self._socket.close()

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while the child runs."""
        with suppress(TimeoutError):
            return self.wait(0)
        return None

    def wait(self, seconds: float | None = None) -> int:
        """Wait for the end of the child.

        Several threads may wait. A child whose server died counts as killed.

        Args:
            seconds: The longest time to wait; None for no limit.

        Returns:
            The exit status, negative for a signal.

        Raises:
            TimeoutError: The child still runs.
        """
        if self._status is None:
            ready = select.poll()
            ready.register(self._socket, select.POLLIN)
            if not ready.poll(None if seconds is None else seconds * 1000):
                raise TimeoutError
            record = b""
            with suppress(ConnectionResetError):
                record = self._socket.recv(_LONGEST_RECORD, socket.MSG_PEEK)  # other threads must see it too
            self._status = int(record.split()[1]) if record else -signal.SIGKILL
        return self._status

    def signal(self, number: int) -> None:
        """Send a signal to the child's process group."""
        with suppress(OSError):
            self._socket.send(bytes([number]))

    def release(self) -> None:
        """Release the child: whatever is left of its process group is killed."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)


def hand_over() -> None:
    """Run this `python -m tasks …` in the warm interpreter and end with its status; return if it must run here."""
    sockets = os.environ.pop(VARIABLE, None)
    if sockets is None:
        return
    arguments = ("tasks", *sys.argv[1:])
    try:
        running = Running(Path(sockets, "tasks"), arguments, Path.cwd(), os.environ, (0, 1, 2), from_folder=True)
    except NotWarm as reason:
        print(cold_start(reason), file=sys.stderr, flush=True)
        return
    status = running.wait()
    if status < 0:
        with suppress(OSError):  # what cannot be caught cannot be reset
            signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    sys.exit(status)


def cold_start(reason: NotWarm) -> str:
    """Return the line that explains why a process starts without the warm interpreter."""
    return f"The warm interpreter is not used: {reason}. Starting without it, which takes some seconds longer."
