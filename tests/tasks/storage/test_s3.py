"""Tests of the door to S3, against a real server: what is stored, what is refused, and what is said then."""

import dataclasses
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from botocore.exceptions import ClientError
from botocore.retries.standard import ExponentialBackoff

from tasks.storage import errors, s3
from tasks.storage.s3 import NoSuchObject, Storage, StorageError, StorageRefused
from tests.faults.proxy import FaultyProxy
from tests.support.services import Place
from tests.support.waiting import PATIENCE_SECONDS, until


class Clock:
    """A clock that nothing but waiting by it moves."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def refusal(place: Place, home: Path, read_timeout: float = PATIENCE_SECONDS) -> str:
    """What is said when the storage at `place` cannot be used: at once, or after the promised time."""
    clock = Clock()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(s3, "time", clock)
        patch.setattr(s3, "_IMPATIENT", {**s3._IMPATIENT, "read_timeout": read_timeout})
        patch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.02)
        with pytest.raises(StorageError) as caught, s3.connect(place, home):
            pass
    assert clock.now <= (0 if isinstance(caught.value, StorageRefused) else s3._PATIENCE_AT_FIRST)
    return str(caught.value)


@pytest.fixture
def other(store: Storage, place: Place, monkeypatch: pytest.MonkeyPatch) -> Place:
    """The session's server as a stranger sees it: by its URL, with credentials from the environment."""
    for name, value in store.credentials.items():
        monkeypatch.setenv(name, value)
    assert store.endpoint is not None
    return dataclasses.replace(place, endpoint=store.endpoint)


def test_keys_and_urls(store: Storage, place: Place) -> None:
    assert store.url("dvc") == f"s3://{place.bucket}/{place.prefix}/dvc"
    assert store.url() == f"s3://{place.bucket}/{place.prefix}"
    assert dataclasses.replace(store, prefix="").url("dvc") == f"s3://{place.bucket}/dvc"
    assert dataclasses.replace(store, prefix="a/b/").key("c/", "d") == "a/b/c/d"


def test_a_folder_comes_back_as_it_was(store: Storage, tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.write_bytes(os.urandom(20 << 20))
    assert store.put_files("bundle", {"small.json": b"{}", "empty": b"", "nested/large é.bin": large}) == 3
    assert store.get_folder("bundle", tmp_path / "copy") == ["empty", "nested/large é.bin", "small.json"]
    assert (tmp_path / "copy" / "nested" / "large é.bin").read_bytes() == large.read_bytes()
    assert sorted(file.name for file in (tmp_path / "copy").iterdir()) == ["empty", "nested", "small.json"]


def test_only_what_differs_is_sent_again(store: Storage) -> None:
    files: dict[str, Path | bytes] = {"a": b"1", "b": b"2", "release.json": b"{}"}
    assert store.put_files("bundle", files, last="release.json") == 3
    assert store.put_files("bundle", files, last="release.json") == 0
    assert store.put_files("bundle", files | {"b": b"changed"}, last="release.json") == 1
    assert store.read("bundle/b") == b"changed"


def test_a_bundle_that_was_cut_off_is_not_visible(store: Storage, tmp_path: Path) -> None:
    files: dict[str, Path | bytes] = {"a": b"1", "z": tmp_path / "missing", "release.json": b"{}"}
    with pytest.raises(FileNotFoundError):
        store.put_files("bundle", files, last="release.json")
    assert store.names("bundle") == ["a"]
    assert store.put_files("bundle", files | {"z": b"here"}, last="release.json") == 2
    assert store.exists("bundle/release.json")


def test_a_damaged_object_is_found(store: Storage, tmp_path: Path) -> None:
    store.put_files("bundle", {"a": b"as it was"})
    metadata = {"sha256": str(store.digest("bundle/a"))}
    store.client.put_object(Bucket=store.bucket, Key=store.key("bundle/a"), Body=b"as it is", Metadata=metadata)
    with pytest.raises(StorageError, match="damaged"):
        store.read("bundle/a")
    with pytest.raises(StorageError, match="damaged"):
        store.get_folder("bundle", tmp_path / "copy")
    assert list((tmp_path / "copy").iterdir()) == []


def test_the_server_refuses_content_that_is_not_what_was_promised(store: Storage) -> None:
    promised = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="
    with pytest.raises(ClientError, match="BadDigest"):
        store.client.put_object(Bucket=store.bucket, Key=store.key("a"), Body=b"1", ChecksumSHA256=promised)


def test_what_is_not_there(store: Storage, tmp_path: Path) -> None:
    assert not store.exists("nothing")
    assert store.digest("nothing") is None
    with pytest.raises(StorageError, match="object is not there"):
        store.read("nothing")
    with pytest.raises(StorageError, match="There is nothing at s3://"):
        store.get_folder("nothing", tmp_path)


def test_no_object_escapes_the_target_folder(store: Storage, tmp_path: Path) -> None:
    with pytest.raises((StorageError, ClientError)):
        store.client.put_object(Bucket=store.bucket, Key=store.key("bundle") + "/../../evil", Body=b"1")
        store.get_folder("bundle", tmp_path / "inner" / "copy")
    assert not (tmp_path / "evil").exists()


def test_the_environment_lets_another_process_in(store: Storage) -> None:
    store.put_files("shared", {"a": b"hello"})
    script = (
        "import boto3, sys; print(boto3.client('s3').get_object(Bucket=sys.argv[1], Key=sys.argv[2])['Body'].read())"
    )
    variables = os.environ | {"HTTP_PROXY": "http://127.0.0.1:9", "AWS_SESSION_TOKEN": "foreign"} | store.environment()
    command = [sys.executable, "-c", script, store.bucket, store.key("shared/a")]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "b'hello'"


def test_any_server_is_reached_by_its_url(other: Place, store: Storage, home: Path) -> None:
    with s3.connect(other, home) as opened:
        opened.put_files("shared", {"a": b"1"})
        assert store.read("shared/a") == b"1"
        variables = opened.environment()
    assert variables["AWS_ENDPOINT_URL_S3"] == variables["MLFLOW_S3_ENDPOINT_URL"] == store.endpoint
    assert "AWS_SECRET_ACCESS_KEY" not in variables


def test_aws_needs_no_endpoint(place: Place) -> None:
    aws = s3._remote(dataclasses.replace(place, endpoint="aws", region="eu-central-1"), s3._PATIENT)
    assert aws.client.meta.endpoint_url == "https://s3.eu-central-1.amazonaws.com"
    variables = aws.environment()
    assert variables == {
        "AWS_DEFAULT_REGION": "eu-central-1",
        "AWS_REGION": "eu-central-1",
        "AWS_RETRY_MODE": "standard",
        "AWS_MAX_ATTEMPTS": "10",
    }


def test_a_wrong_secret(other: Place, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    message = refusal(other, home)
    assert other.bucket in message
    assert other.endpoint in message
    assert "the secret key is wrong" in message
    assert "AWS_SECRET_ACCESS_KEY" in message
    assert "not-the-secret-at-all" not in message


def test_an_unknown_access_key(other: Place, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "unknown")
    assert "the access key is unknown there" in refusal(other, home)


def test_no_credentials(other: Place, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    message = refusal(other, home)
    assert "no complete credentials" in message
    assert "AWS_ACCESS_KEY_ID" in message


def test_half_of_the_credentials(other: Place, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    assert "no complete credentials" in refusal(other, home)


def test_an_unknown_profile(other: Place, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    assert "the profile 'nobody' is unknown" in refusal(other, home)


def test_a_missing_bucket(other: Place, home: Path) -> None:
    message = refusal(dataclasses.replace(other, bucket="not-made-yet"), home)
    assert "not-made-yet" in message
    assert "there is no such bucket. Create it" in message


@pytest.mark.parametrize("endpoint", ["embedded", "url"])
def test_an_impossible_bucket_name(other: Place, home: Path, endpoint: str) -> None:
    where = other.endpoint if endpoint == "url" else endpoint
    for name in ("x", "Not A Name"):
        assert "bucket" in refusal(dataclasses.replace(other, endpoint=where, bucket=name), home)


def test_a_server_that_is_not_there(other: Place, home: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    message = refusal(dataclasses.replace(other, endpoint=url), home)
    assert url in message
    assert "storage.endpoint" in message


def test_a_server_that_says_nothing(other: Place, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "_PATIENCE_AT_FIRST", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert "does not answer" in refusal(dataclasses.replace(other, endpoint=url), home, read_timeout=0.1)


def test_an_endpoint_that_is_no_url(other: Place, home: Path) -> None:
    assert "Invalid endpoint" in refusal(dataclasses.replace(other, endpoint="no url"), home)


@pytest.mark.parametrize(
    ("code", "said"),
    [("AccessDenied", "s3:PutObject"), ("PermanentRedirect", "storage.region"), ("Odd", "the server answered Odd")],
)
def test_what_refusals_mean(code: str, said: str) -> None:
    error = ClientError({"Error": {"Code": code, "Message": "…"}}, "PutObject")
    assert said in " ".join(errors.explain(error))


def test_many_small_objects_at_once(store: Storage) -> None:
    for i in range(30):
        store.put(f"outcomes/{i}", f"{i}".encode())
    keys = [f"outcomes/{i}" for i in range(40)]
    assert store.read_many(keys) == {f"outcomes/{i}": f"{i}".encode() if i < 30 else None for i in range(40)}
    assert store.exist(keys) == set(keys[:30])


def test_a_content_is_put_whatever_was_there(store: Storage, tmp_path: Path) -> None:
    store.put("a", b"1")
    first = store.version("a")
    store.put("a", b"2")
    assert store.read("a") == b"2"
    assert None is not store.version("a") != first
    assert store.version("none") is None
    store.get("a", tmp_path / "a", s3.content_digest(b"2"))
    with pytest.raises(StorageRefused, match="damaged"):
        store.get("a", tmp_path / "b", s3.content_digest(b"1"))
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_what_will_not_pass_is_told_from_what_may(
    store: Storage, other: Place, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NoSuchObject):
        store.read("nothing")
    with pytest.raises(StorageRefused):
        store.elsewhere("no-such-bucket").names("a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageRefused), s3.connect(other, home):
        pass
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    monkeypatch.setattr(s3, "time", Clock())
    with pytest.raises(StorageError) as caught, s3.connect(dataclasses.replace(other, endpoint=url), home):
        pass
    assert not isinstance(caught.value, StorageRefused)


@pytest.fixture
def behind(store: Storage, other: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Storage]]:
    """Opens the storage behind a proxy; waits before further attempts are short."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0.02)
    monkeypatch.setattr(s3, "_LONGEST_WAIT", 0.1)

    def open_behind(proxy: FaultyProxy, read_timeout: float = PATIENCE_SECONDS) -> Storage:
        through = s3._remote(
            dataclasses.replace(other, endpoint=proxy.url), {**s3._PATIENT, "read_timeout": read_timeout}
        )
        return dataclasses.replace(through, patience=PATIENCE_SECONDS)

    yield open_behind


def test_one_failure_in_five_requests_is_survived(
    behind: Callable[..., Storage], store: Storage, tmp_path: Path
) -> None:
    assert store.endpoint is not None
    large = tmp_path / "large"
    large.write_bytes(os.urandom(17 << 20))
    with FaultyProxy(store.endpoint, stall_seconds=0.2) as proxy, ThreadPoolExecutor(8) as pool:
        through = behind(proxy)
        list(pool.map(lambda i: through.put(f"small/{i}", f"{i}".encode() * 1000), range(100)))
        list(pool.map(lambda i: through.put(f"large/{i}", large), range(3)))
        assert through.names("small") == sorted(map(str, range(100)))
        contents = through.read_many(f"small/{i}" for i in range(100))
        assert through.get_folder("large", tmp_path / "copies") == ["0", "1", "2"]
        assert through.digest("large/0") == store.digest("large/0") == s3.content_digest(large)
    assert contents == {f"small/{i}": f"{i}".encode() * 1000 for i in range(100)}
    assert {file.read_bytes() for file in (tmp_path / "copies").iterdir()} == {large.read_bytes()}
    assert set(proxy.counts) == {"500", "503", "stalled", "reset", "truncated", "lost"}


@pytest.mark.usefixtures("behind")
def test_a_server_that_fails_now_and_then_is_connected_to(
    other: Place, store: Storage, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "time", Clock())
    monkeypatch.setattr(s3, "_IMPATIENT", {**s3._IMPATIENT, "read_timeout": PATIENCE_SECONDS})
    assert store.endpoint is not None
    with FaultyProxy(store.endpoint, 0.7, faults=("500", "503", "reset")) as proxy:
        for _ in range(4):
            with s3.connect(dataclasses.replace(other, endpoint=proxy.url), home):
                pass
    assert sum(proxy.counts.values()) >= 4


def test_a_server_that_often_says_nothing(behind: Callable[..., Storage], store: Storage) -> None:
    assert store.endpoint is not None
    with FaultyProxy(store.endpoint, 0.3, stall_seconds=60, faults=("stalled",)) as proxy:
        through = behind(proxy, read_timeout=1)
        through.put("a", b"1")
        assert [through.read("a") for _ in range(6)] == 6 * [b"1"]
    assert proxy.counts["stalled"]


def test_a_server_that_fails_for_a_while(behind: Callable[..., Storage], store: Storage) -> None:
    """When all requests fail, boto3 soon gives up trying again."""
    assert store.endpoint is not None
    with FaultyProxy(store.endpoint, 1.0, faults=("503",)) as proxy, ThreadPoolExecutor(8) as pool:
        through = behind(proxy)
        written = [pool.submit(through.put, f"{i}", b"1") for i in range(32)]
        until(lambda: proxy.counts["503"] >= 400)
        proxy.fraction = 0.0
        assert [future.result() for future in written] == 32 * [None]
    assert len(store.names("")) == 32


def test_patience_has_an_end(behind: Callable[..., Storage], store: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3, "time", Clock())
    assert store.endpoint is not None
    with FaultyProxy(store.endpoint, 1.0, faults=("500",)) as proxy:
        through = dataclasses.replace(behind(proxy), patience=0.5)
        with pytest.raises(StorageError, match="the server answered InternalError"):
            through.read("a")
        assert proxy.counts["500"] > 6
