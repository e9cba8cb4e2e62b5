"""The faulty proxy in front of a real S3 server: what it passes on is untouched, and every fault is what it says."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.exceptions import (
    ClientError,
    ConnectionClosedError,
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
)

from tests.faults.proxy import FaultyProxy
from tests.faults.servers import BUCKET, REGION, S3Server
from tests.support.waiting import PATIENCE_SECONDS

LARGE = os.urandom(9 << 20)  # boto3 sends more than 8 MiB in parts
ONE_TRY = {"retries": {"total_max_attempts": 1}, "read_timeout": PATIENCE_SECONDS}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with S3Server(tmp_path_factory.mktemp("s3")) as started:
        started.wait()
        yield started


def connected(proxy: FaultyProxy) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(proxy.url.rpartition(":")[2])), timeout=PATIENCE_SECONDS)


def keys(client: Any, prefix: str) -> set[str]:
    return {item["Key"] for item in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])}


def test_without_faults_nothing_is_changed(server: S3Server, tmp_path: Path) -> None:
    (tmp_path / "large").write_bytes(LARGE)
    with FaultyProxy(server.url, fraction=0) as proxy:
        client = server.client(proxy.url, **ONE_TRY)
        for body in (b"", b"small"):  # `Expect: 100-continue` and a checksum in an aws-chunked trailer
            digest = hashlib.sha256(body).hexdigest()
            client.put_object(
                Bucket=BUCKET, Key="a", Body=body, Metadata={"sha256": digest}, ChecksumAlgorithm="SHA256"
            )
            found = client.get_object(Bucket=BUCKET, Key="a")
            assert (found["Body"].read(), found["Metadata"]) == (body, {"sha256": digest})
        with (tmp_path / "large").open("rb") as file:
            client.put_object(Bucket=BUCKET, Key="in one", Body=file)
        client.upload_file(str(tmp_path / "large"), BUCKET, "in parts", ExtraArgs={"ChecksumAlgorithm": "SHA256"})
        for key in ("in one", "in parts"):
            assert client.head_object(Bucket=BUCKET, Key=key)["ContentLength"] == len(LARGE)
            client.download_file(BUCKET, key, str(tmp_path / "back"))
            assert (tmp_path / "back").read_bytes() == LARGE
        with pytest.raises(ClientError, match="404"):
            client.head_object(Bucket=BUCKET, Key="missing")
        with pytest.raises(ClientError, match="NoSuchKey"):
            client.get_object(Bucket=BUCKET, Key="missing")
        assert keys(client, "in ") == {"in one", "in parts"}
        client.delete_object(Bucket=BUCKET, Key="in one")
        assert keys(client, "in ") == {"in parts"}
    assert not proxy.counts and proxy.requests >= 15


def test_a_connection_is_used_again(server: S3Server) -> None:
    with FaultyProxy(server.url, fraction=0) as proxy, connected(proxy) as connection:
        for _ in range(2):
            connection.sendall(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
            answer = b""
            while not answer.endswith(b"</Error>"):
                answer += connection.recv(1 << 16)
            assert answer.startswith(b"HTTP/1.1 403")


def test_the_server_still_checks_signatures(server: S3Server) -> None:
    with FaultyProxy(server.url, fraction=0) as proxy:
        stranger = boto3.client(
            "s3",
            endpoint_url=proxy.url,
            region_name=REGION,
            aws_access_key_id=server.credentials["AWS_ACCESS_KEY_ID"],
            aws_secret_access_key="wrong",
        )
        with pytest.raises(ClientError, match="SignatureDoesNotMatch"):
            stranger.put_object(Bucket=BUCKET, Key="never", Body=b"x")


@pytest.mark.parametrize(("fault", "code"), [("500", "InternalError"), ("503", "SlowDown")])
def test_an_error_in_the_servers_place(server: S3Server, fault: Any, code: str) -> None:
    with FaultyProxy(server.url, fraction=1, faults=(fault,)) as proxy:
        with pytest.raises(ClientError, match=code):
            server.client(proxy.url, **ONE_TRY).put_object(Bucket=BUCKET, Key=f"refused {fault}", Body=b"x")
        with pytest.raises(ClientError, match=fault):
            server.client(proxy.url, **ONE_TRY).head_object(Bucket=BUCKET, Key="a")
    assert proxy.counts == {fault: 2}
    assert not keys(server.client(), f"refused {fault}")


@pytest.mark.parametrize("fault", ["stalled", "reset"])
def test_a_connection_that_breaks(server: S3Server, fault: Any) -> None:
    with FaultyProxy(server.url, fraction=1, faults=(fault,), stall_seconds=0.3) as proxy:
        client = server.client(proxy.url, **ONE_TRY)
        with pytest.raises(ConnectionClosedError):
            client.put_object(Bucket=BUCKET, Key=f"broken {fault}", Body=b"x")
    assert proxy.counts == {fault: 1}
    assert not keys(server.client(), f"broken {fault}")


def test_a_reset_is_one(server: S3Server) -> None:
    with FaultyProxy(server.url, fraction=1, faults=("reset",)) as proxy, connected(proxy) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            connection.recv(1)


def test_half_an_answer(server: S3Server) -> None:
    server.client().put_object(Bucket=BUCKET, Key="whole", Body=LARGE)
    with FaultyProxy(server.url, fraction=1, faults=("truncated",)) as proxy:
        answer = server.client(proxy.url, **ONE_TRY).get_object(Bucket=BUCKET, Key="whole")
        assert answer["ContentLength"] == len(LARGE)
        with pytest.raises((IncompleteReadError, ResponseStreamingError)):
            answer["Body"].read()
    assert proxy.counts == {"truncated": 1}


def test_a_lost_answer_to_what_was_done(server: S3Server) -> None:
    with FaultyProxy(server.url, fraction=1, faults=("lost",)) as proxy:
        client = server.client(proxy.url, **ONE_TRY)
        with pytest.raises(ClientError, match="InternalError"):
            client.put_object(Bucket=BUCKET, Key="done", Body=b"all the same")
    assert proxy.counts == {"lost": 1}
    assert server.client().get_object(Bucket=BUCKET, Key="done")["Body"].read() == b"all the same"


def test_a_patient_client_gets_everything_done(server: S3Server) -> None:
    with FaultyProxy(server.url, fraction=0.2, seed=1, stall_seconds=0.05) as proxy:
        client = server.client(proxy.url, max_pool_connections=4, **ONE_TRY)

        def patiently(action: Callable[[], Any]) -> Any:
            while True:
                try:
                    return action()
                except (ClientError, HTTPClientError, IncompleteReadError):
                    time.sleep(0.01)

        def there_and_back(number: int) -> bool:
            where, body = {"Bucket": BUCKET, "Key": f"patient/{number}"}, str(number).encode() * 100
            patiently(lambda: client.put_object(**where, Body=body))
            return bool(patiently(lambda: client.get_object(**where)["Body"].read()) == body)

        with ThreadPoolExecutor(4) as pool:
            assert all(pool.map(there_and_back, range(50)))
    assert len(proxy.counts) >= 4
    assert 0.05 < sum(proxy.counts.values()) / proxy.requests < 0.4


def test_the_same_seed_draws_the_same_faults(server: S3Server) -> None:
    drawn = []
    for seed in (1, 1, 2):
        proxy = FaultyProxy(server.url, seed=seed)
        with proxy:
            drawn.append([proxy.draw(method) for method in ("GET", "PUT", "HEAD") * 50])
    assert drawn[0] == drawn[1] != drawn[2]


def test_a_server_that_is_killed_keeps_its_objects(server: S3Server) -> None:
    server.client().put_object(Bucket=BUCKET, Key="kept", Body=b"x")
    server.kill_and_restart()
    server.wait()
    assert server.client().get_object(Bucket=BUCKET, Key="kept")["Body"].read() == b"x"
