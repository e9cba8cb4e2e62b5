"""Real servers that can be killed and started again on the same ports: an S3 server (`weed mini`) and MLflow's."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from flows.processes.servers import free_port
from tasks.storage import embedded
from tests.support.waiting import until

BUCKET = "mtz"
REGION = "us-east-1"

_HOST = "127.0.0.1"
_STOP_SECONDS = 10.0
_GRPC_OFFSET = 10_000


class Server:
    """A process group that serves, from entering to leaving."""

    def __init__(self, name: str, folder: Path, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.name = name
        self.folder = folder
        self._command = command
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._guard = threading.Lock()

    def start(self) -> None:
        """Start the processes; they are not ready yet."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=self.folder,
                env=dict(self._environment),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill_and_restart(self) -> int:
        """End all its processes by SIGKILL and start new ones at once; returns the id of the one that was killed."""
        with self._guard:
            assert self._process is not None
            killed = self._process.pid
            self._end(signal.SIGKILL)
            self.start()
            return killed

    def wait(self) -> None:
        """Wait until it is ready."""
        until(self.is_ready, f"{self.name} is ready; its log is {self.folder / 'server.log'}")

    def is_ready(self) -> bool:
        """Whether it does what it is for."""
        raise NotImplementedError

    def __enter__(self) -> Any:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._guard:
            self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        process = self._process
        if process is None:
            return
        with suppress(ProcessLookupError, subprocess.TimeoutExpired):
            os.killpg(process.pid, how)
            process.wait(_STOP_SECONDS)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        until(lambda: not _is_group(process.pid))
        self._process = None


class S3Server(Server):
    """An S3 server with one bucket; its data lie in the folder."""

    def __init__(self, folder: Path) -> None:
        ports = embedded._free_ports({})
        command = [embedded._binary(), "-logtostderr=true", "mini", *embedded._OPTIONS]
        for name, port in ports.items():
            command += [f"-{name}.port={port}", f"-{name}.port.grpc={port + _GRPC_OFFSET}"]
        keys = {name: secrets.token_hex(16) for name in ("access_key", "secret_key", "signing_key")}
        super().__init__("S3", folder, command, embedded._environment(folder, keys))
        self._ports = ports
        self.url = f"http://{_HOST}:{ports['s3']}"
        self.credentials = {"AWS_ACCESS_KEY_ID": keys["access_key"], "AWS_SECRET_ACCESS_KEY": keys["secret_key"]}
        self._session = boto3.Session(*self.credentials.values())

    def start(self) -> None:
        """Start it; the sockets of one that was killed are in its way."""
        (self.folder / "data").mkdir(parents=True, exist_ok=True)
        self._remove_sockets()
        super().start()

    def client(self, url: str | None = None, **options: Any) -> Any:
        """A boto3 client of this server, or of a proxy of it."""
        config = Config(s3={"addressing_style": "path"}, proxies={}, **options)
        return self._session.client("s3", endpoint_url=url or self.url, region_name=REGION, config=config)

    def is_ready(self) -> bool:
        """Whether an object can be stored, and one of before is found; makes the bucket."""
        client = self.client(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 1})
        try:
            with suppress(client.exceptions.BucketAlreadyOwnedByYou, client.exceptions.BucketAlreadyExists):
                client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"")
            if not client.list_objects_v2(Bucket=BUCKET, Prefix="old")["KeyCount"]:
                client.put_object(Bucket=BUCKET, Key="old", Body=b"stored by the first start")
            client.get_object(Bucket=BUCKET, Key="old")["Body"].read()
        except (BotoCoreError, ClientError):
            return False
        return True

    def _end(self, how: signal.Signals) -> None:
        super()._end(how)
        self._remove_sockets()

    def _remove_sockets(self) -> None:
        for name, port in self._ports.items():
            Path(f"/tmp/seaweedfs-{name}-grpc-{port + _GRPC_OFFSET}.sock").unlink(missing_ok=True)
        for socket in self.folder.glob("*.sock"):
            socket.unlink(missing_ok=True)


class MlflowServer(Server):
    """MLflow's server on an SQLite file in the folder. Artifacts go to S3 past it."""

    def __init__(self, folder: Path) -> None:
        port = free_port()
        options = ("--host", _HOST, "--port", str(port), "--workers", "1")
        store = ("--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}")
        settings = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = (sys.executable, "-m", "mlflow", "server", *options, *store)
        super().__init__("MLflow", folder, command, {**os.environ, **settings})
        self.url = f"http://{_HOST}:{port}"

    def is_ready(self) -> bool:
        """Whether it answers."""
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(f"{self.url}/health", timeout=30) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False


def _is_group(number: int) -> bool:
    try:
        os.killpg(number, 0)
    except ProcessLookupError:
        return False
    return True
