"""An S3 server's unreliable double on loopback: it passes requests on, and does something else with some of them.

Requests reach the server behind it byte by byte as they were sent, so signatures stay valid. A share of them, drawn
with a seed, meets a fault instead:

    500, 503     an error answer; the request never arrives
    stalled      nothing for some seconds, then the connection is closed; the request never arrives
    reset        the connection is reset (TCP RST); the request never arrives
    truncated    the answer promises its whole length, and the connection is closed after half of it (GET)
    lost         the request is carried out, and the answer is 500 (PUT, POST, DELETE)

    python -m tests.faults.proxy --to http://127.0.0.1:8333 --fraction 0.2
"""

from __future__ import annotations

import argparse
import http
import random
import socket
import socketserver
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, Protocol
from urllib.parse import urlsplit

Fault = Literal["500", "503", "stalled", "reset", "truncated", "lost"]
ANYWHERE: tuple[Fault, ...] = ("500", "503", "stalled", "reset")
OF_METHOD: dict[str, tuple[Fault, ...]] = {
    "GET": (*ANYWHERE, "truncated"),
    "HEAD": ANYWHERE,
    **dict.fromkeys(("PUT", "POST", "DELETE"), (*ANYWHERE, "lost")),
}

_HOST = "127.0.0.1"
_BLOCK = 1 << 16
_IDLE_SECONDS = 120.0
_CODES = {500: "InternalError", 503: "SlowDown"}
_NO_BODY = (http.HTTPStatus.NO_CONTENT, http.HTTPStatus.NOT_MODIFIED)


class FaultyProxy:
    """The proxy of the server at `target`, an `http://` URL; serves between entering and leaving.

    Args:
        fraction: share of requests that meet a fault; may be changed at any time.
        stall_seconds: how long a stalled connection is held.
        faults: the kinds to draw from; a request meets only those that its method allows.

    Attributes:
        requests: how many came.
        counts: how many faults of each kind were made.
    """

    def __init__(
        self,
        target: str,
        fraction: float = 0.2,
        seed: int = 0,
        stall_seconds: float = 2.0,
        faults: tuple[Fault, ...] = (*ANYWHERE, "truncated", "lost"),
        port: int = 0,
    ) -> None:
        address = urlsplit(target)
        self.target = (address.hostname or _HOST, address.port or 80)
        self.fraction = fraction
        self.stall_seconds = stall_seconds
        self.requests = 0
        self.counts: Counter[Fault] = Counter()
        self.closing = threading.Event()
        self._faults = faults
        self._drawing = random.Random(seed)
        self._guard = threading.Lock()
        self._server = _Server(self, port)

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://{_HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> FaultyProxy:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()

    def draw(self, method: str) -> Fault | None:
        """The fault that the next request meets, if any."""
        with self._guard:
            self.requests += 1
            possible = [fault for fault in OF_METHOD.get(method, ANYWHERE) if fault in self._faults]
            # Both are drawn each time, so the n-th request's luck does not depend on the methods before it.
            luck, which = self._drawing.random(), self._drawing.random()
            return possible[int(which * len(possible))] if possible and luck < self.fraction else None

    def happened(self, fault: Fault) -> None:
        """Count a fault that was made."""
        with self._guard:
            self.counts[fault] += 1


class _Stream(Protocol):
    """What is read from a connection."""

    def readline(self, size: int = ..., /) -> bytes: ...
    def read1(self, size: int = ..., /) -> bytes: ...


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, proxy: FaultyProxy, port: int) -> None:
        self.proxy = proxy
        super().__init__((_HOST, port), _Connection)

    def shutdown_request(self, request: object) -> None:
        """Close without a farewell, which would come before a reset."""
        self.close_request(request)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """Connections that break are what this is for; anything else is a mistake in here and must be seen."""
        if not isinstance(sys.exc_info()[1], OSError | _Closed):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Closed(Exception):
    """The other side has closed the connection in the middle of a message."""


class _Lost(Exception):
    """The client is to get no more of an answer."""


@dataclass(frozen=True)
class _Head:
    """The first part of a message, as it came, and what it says."""

    raw: bytes
    first: tuple[str, ...]
    fields: dict[str, str]

    @property
    def status(self) -> int:
        """The status of an answer."""
        return int(self.first[1])

    @property
    def chunked(self) -> bool:
        return self.fields.get("transfer-encoding", "").lower().endswith("chunked")

    @property
    def length(self) -> int | None:
        return int(self.fields["content-length"]) if "content-length" in self.fields else None

    @property
    def has_body(self) -> bool:
        """Whether a request has one."""
        return self.chunked or bool(self.length)

    @property
    def closes(self) -> bool:
        """Whether the connection ends with this message."""
        return self.fields.get("connection", "").lower() == "close" or "HTTP/1.0" in self.first


class _Connection(socketserver.StreamRequestHandler):
    """One client's connection: a thread that answers its requests in turn."""

    disable_nagle_algorithm = True
    timeout = _IDLE_SECONDS
    server: _Server

    def handle(self) -> None:
        proxy = self.server.proxy
        while (head := _read_head(self.rfile)) is not None:
            fault = proxy.draw(head.first[0])
            if fault in ("500", "503"):
                proxy.happened(fault)
                stays = self._refuse(head, int(fault))
            elif fault == "stalled":
                proxy.happened(fault)
                proxy.closing.wait(proxy.stall_seconds)
                stays = False
            elif fault == "reset":
                proxy.happened(fault)
                self._reset()
                stays = False
            else:
                stays = self._pass_on(head, fault)
            if not stays or head.closes:
                return

    def _refuse(self, head: _Head, status: int) -> bool:
        """Answer with an error in the server's place; tells whether the connection can go on."""
        waiting = "expect" in head.fields
        if not waiting:
            for _ in _body(self.rfile, head):
                pass
        self._answer(status, empty=head.first[0] == "HEAD")
        # A client that waits for leave to send may send all the same: what comes next is not known.
        return not waiting

    def _answer(self, status: int, empty: bool) -> None:
        text = f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{_CODES[status]}</Code></Error>'.encode()
        fields = f"Content-Type: application/xml\r\nContent-Length: {0 if empty else len(text)}\r\n\r\n"
        self.wfile.write(f"HTTP/1.1 {status} {http.HTTPStatus(status).phrase}\r\n{fields}".encode())
        if not empty:
            self.wfile.write(text)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _pass_on(self, head: _Head, fault: Fault | None) -> bool:
        """Send the request to the server and its answer to the client; tells whether the connection can go on."""
        proxy = self.server.proxy
        try:
            upstream = socket.create_connection(proxy.target, timeout=_IDLE_SECONDS)
        except OSError:  # as if the client had asked it directly: nobody is there
            self._reset()
            return False
        with upstream, upstream.makefile("rb") as answers:
            upstream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            upstream.sendall(head.raw)
            early = self._leave_to_send(answers) if "expect" in head.fields else None
            sent_all = not head.has_body if early else self._send_body(head, upstream)
            answer = early or _read_answer(answers)
            if answer is None:
                return False
            if fault == "lost":
                for _ in _answer_body(answers, answer, head):
                    pass
                proxy.happened(fault)
                self._answer(500, empty=False)
                return sent_all
            try:
                self._send_answer(answers, answer, head, cut=fault == "truncated")
            except _Lost:
                return False
            return sent_all and not answer.closes and not _ends_by_closing(answer, head)

    def _leave_to_send(self, answers: _Stream) -> _Head | None:
        """Wait until the server asks for the body, and tell the client; or the answer of one that does not want it."""
        head = _read_head(answers)
        if head is None:
            raise _Closed
        if head.status != http.HTTPStatus.CONTINUE:
            return head
        self.wfile.write(head.raw)
        return None

    def _send_body(self, head: _Head, upstream: socket.socket) -> bool:
        """Stream the request's body; False where the server has had enough before the end and answers already."""
        for block in _body(self.rfile, head):
            try:
                upstream.sendall(block)
            except OSError:
                return False
        return True

    def _send_answer(self, answers: _Stream, answer: _Head, request: _Head, cut: bool) -> None:
        """Stream the answer; with `cut` only half of what it promises, and then `_Lost`."""
        body = _answer_body(answers, answer, request)
        if cut and (answer.chunked or (answer.length or 0) > 1):
            self.server.proxy.happened("truncated")
            self.wfile.write(answer.raw)
            if answer.chunked:
                whole = b"".join(body)  # lists and the like; objects come with their length
                self.wfile.write(whole[: len(whole) // 2])
            else:
                left = (answer.length or 0) // 2
                for block in body:
                    self.wfile.write(block[:left])
                    left -= len(block[:left])
                    if not left:
                        break
            raise _Lost
        self.wfile.write(answer.raw)
        for block in body:
            self.wfile.write(block)


def _read_head(stream: _Stream) -> _Head | None:
    """The next message's first line and fields; None where the other side has closed in peace."""
    raw = b""
    while not raw.endswith(b"\r\n\r\n"):
        line = stream.readline(_BLOCK)
        if not line:
            if raw:
                raise _Closed
            return None
        raw += line
    first, *lines = raw.decode("latin-1").strip().split("\r\n")
    pairs = (line.partition(":") for line in lines)
    return _Head(raw, tuple(first.split(" ", 2)), {name.strip().lower(): value.strip() for name, _, value in pairs})


def _read_answer(answers: _Stream) -> _Head | None:
    """The final answer; None where the server has closed without one."""
    with suppress(_Closed, OSError):
        while (head := _read_head(answers)) is not None:
            if head.status >= http.HTTPStatus.OK:
                return head
    return None


def _has_no_body(answer: _Head, request: _Head) -> bool:
    return request.first[0] == "HEAD" or answer.status in _NO_BODY


def _ends_by_closing(answer: _Head, request: _Head) -> bool:
    return not _has_no_body(answer, request) and not answer.chunked and answer.length is None


def _answer_body(stream: _Stream, answer: _Head, request: _Head) -> Iterator[bytes]:
    return iter(()) if _has_no_body(answer, request) else _body(stream, answer, _ends_by_closing(answer, request))


def _body(stream: _Stream, head: _Head, until_closed: bool = False) -> Iterator[bytes]:
    """The body as it came, block by block, with the marks of chunks where it has any."""
    if head.chunked:
        yield from _chunks(stream)
    elif until_closed:
        while block := stream.read1(_BLOCK):
            yield block
    else:
        yield from _exactly(stream, head.length or 0)


def _chunks(stream: _Stream) -> Iterator[bytes]:
    while True:
        line = _line(stream)
        yield line
        size = int(line.split(b";")[0], 16)
        if not size:
            break
        yield from _exactly(stream, size + len(b"\r\n"))
    while (line := _line(stream)) != b"\r\n":
        yield line
    yield line


def _line(stream: _Stream) -> bytes:
    line = stream.readline(_BLOCK)
    if not line.endswith(b"\r\n"):
        raise _Closed
    return line


def _exactly(stream: _Stream, count: int) -> Iterator[bytes]:
    while count:
        block = stream.read1(min(count, _BLOCK))
        if not block:
            raise _Closed
        count -= len(block)
        yield block


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", required=True, help="URL of the S3 server")
    parser.add_argument("--port", type=int, default=0, help="where to listen; default: any free port")
    parser.add_argument("--fraction", type=float, default=0.2, help="share of requests that meet a fault")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stall-seconds", type=float, default=2.0)
    options = parser.parse_args()
    proxy = FaultyProxy(options.to, options.fraction, options.seed, options.stall_seconds, port=options.port)
    with proxy, suppress(KeyboardInterrupt):
        print(proxy.url, flush=True)
        while True:
            time.sleep(3600)
    print(
        f"{proxy.requests} requests", *(f"{count} {fault}" for fault, count in sorted(proxy.counts.items())), sep=", "
    )


if __name__ == "__main__":
    main()
