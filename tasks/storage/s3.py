"""The only module that talks to S3: one bucket, in which everything of a project lies under one prefix.

    <prefix>/dvc/        DVC's remote
    <prefix>/mlflow/     MLflow's artifacts
    <prefix>/releases/   one bundle per released network
    <prefix>/contents/   source files and snapshots, by the SHA-256 of their content
    <prefix>/outcomes/   the outcome of each snapshot
    <prefix>/locks/      the newest dvc.lock of each group, and of each model's statistics
    <prefix>/runs/ reports/ logs/   the results of runs of fleets

Every object that is stored here carries the SHA-256 of its content. The server checks it on arrival, and it is checked
again when the object is fetched. (DVC and MLflow move their own objects.)
"""

import base64
import functools
import hashlib
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import Any, Protocol, TypeVar

import boto3
import botocore.session
from boto3.exceptions import Boto3Error, RetriesExceededError, S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError
from botocore.loaders import JSONFileLoader, Loader
from botocore.parsers import ResponseParserError
from s3transfer.exceptions import S3DownloadFailedError  # type: ignore[import-untyped]

from tasks.faults import ServiceFault
from tasks.files import sha256
from tasks.storage import embedded, errors

T = TypeVar("T")

EMBEDDED = "embedded"
AWS = "aws"

_DEFAULT_REGION = "us-east-1"
_LOOPBACK = "127.0.0.1,localhost"
_DIGEST = "sha256"
_OLD_OBJECT = ".readable"
_FULL_DISK_BYTES = 64 << 20
_THREADS = 16
# Larger objects are sent in several parts, in parallel.
_SMALL_BYTES = 8 << 20

_ATTEMPTS = 6
_ATTEMPTS_OF_OTHERS = 10
_TRANSFER = TransferConfig(multipart_threshold=_SMALL_BYTES, num_download_attempts=_ATTEMPTS)

# boto3 retries each request several times, but not when all requests together fail too often, nor after the body of an
# answer was cut off. Such failures are retried for this many seconds, with waits that grow up to the second number.
_PATIENCE = 60.0
_LONGEST_WAIT = 8.0

# A first answer comes within half a minute, even from a host that drops packets or accepts and never answers. What
# fails at once is retried for this many seconds.
_PATIENCE_AT_FIRST = 10.0
_IMPATIENT = {"connect_timeout": 10, "read_timeout": 15, "retries": {"mode": "standard", "total_max_attempts": 2}}
_STARTING = {"connect_timeout": 5, "read_timeout": 10, "retries": {"total_max_attempts": 1}}
_PATIENT = {
    "connect_timeout": 20,
    "read_timeout": 60,
    "retries": {"mode": "standard", "total_max_attempts": _ATTEMPTS},
    "max_pool_connections": 2 * _THREADS,
}


class StorageError(ServiceFault):
    """The S3 storage cannot be reached, does not grant access, or does not contain what was asked for."""


class StorageRefused(StorageError):
    """The storage refuses, and will go on refusing: there is no access, or no such bucket."""


class NoSuchObject(StorageRefused):
    """The storage has no such object."""


class DamagedObject(StorageRefused):
    """An object does not have the content that it was stored with."""


class StorageSettings(Protocol):
    """Where the storage is."""

    @property
    def endpoint(self) -> str:
        """`embedded`, `aws`, or the URL of an S3 server."""

    @property
    def bucket(self) -> str:
        """Name of the bucket."""

    @property
    def prefix(self) -> str:
        """Prefix of all keys in the bucket."""

    @property
    def region(self) -> str:
        """The bucket's region; empty for `us-east-1`."""


@dataclass(frozen=True)
class Storage:
    """An open, writable storage. Keys and folders are relative to its prefix.

    Every method that sends a request raises `StorageError` if the storage cannot be used.

    Attributes:
        endpoint: URL of the S3 server; None for AWS itself.
        bucket: Name of the bucket.
        prefix: Prefix of all keys in the bucket; may be empty.
        region: The bucket's region.
        client: The boto3 client.
        embedded_folder: Where the embedded server keeps its files; None for any other server.
        credentials: Environment variables with the embedded server's credentials; empty if boto3 finds credentials by
            itself.
        patience: For how many seconds a failed request is tried again.
    """

    endpoint: str | None
    bucket: str
    prefix: str
    region: str
    client: Any = field(repr=False)
    embedded_folder: Path | None = None
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    patience: float = 0.0

    def key(self, *parts: str) -> str:
        """Return the full object key of the path `parts`."""
        return "/".join(part.strip("/") for part in (self.prefix, *parts) if part.strip("/"))

    def url(self, *parts: str) -> str:
        """Return the `s3://` URL of the path `parts`."""
        return f"s3://{self.bucket}/{self.key(*parts)}".rstrip("/")

    def elsewhere(self, bucket: str) -> "Storage":
        """Return another bucket as a whole, at the same endpoint and with the same credentials."""
        return replace(self, bucket=bucket, prefix="")

    def environment(self) -> dict[str, str]:
        """Return the environment variables with which another process (DVC, MLflow, boto3) reaches this storage."""
        variables = {
            "AWS_DEFAULT_REGION": self.region,
            "AWS_REGION": self.region,
            "AWS_RETRY_MODE": "standard",
            "AWS_MAX_ATTEMPTS": str(_ATTEMPTS_OF_OTHERS),
        }
        if self.endpoint:
            variables |= {"AWS_ENDPOINT_URL_S3": self.endpoint, "MLFLOW_S3_ENDPOINT_URL": self.endpoint}
        if self.embedded_folder:
            # An empty session token hides one of another account; loopback must never go through a proxy.
            variables |= {**self.credentials, "AWS_SESSION_TOKEN": ""}
            for name in ("NO_PROXY", "no_proxy"):
                variables[name] = ",".join(filter(None, (os.environ.get(name), _LOOPBACK)))
        return variables

    def exists(self, key: str) -> bool:
        """Return whether there is an object `key`."""
        return self._head(key) is not None

    def digest(self, key: str) -> str | None:
        """Return the SHA-256 (hexadecimal) of an object; None if it does not exist or was not stored by this module."""
        head = self._head(key)
        return None if head is None else head["Metadata"].get(_DIGEST)

    def version(self, key: str) -> str | None:
        """Return an identifier that changes whenever the object is stored anew.

        It does not identify the content: the same content, stored again, has another one.

        Args:
            key: The object.

        Returns:
            The identifier; None if there is no such object.
        """
        head = self._head(key)
        return None if head is None else f"{head.get('VersionId', '')} {head['ETag']} {head['ContentLength']}"

    def read(self, key: str) -> bytes:
        """Read a small object and check its content.

        Args:
            key: The object.

        Returns:
            Its content.

        Raises:
            NoSuchObject: There is no such object.
            DamagedObject: The content is not what was stored.
            StorageError: The storage cannot be used.
        """

        def read() -> bytes:
            answer = self.client.get_object(Bucket=self.bucket, Key=self.key(key))
            content: bytes = answer["Body"].read()
            self._check(key, answer["Metadata"].get(_DIGEST), content_digest(content))
            return content

        return self._twice(read)

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes | None]:
        """Read small objects, several at a time.

        Args:
            keys: The objects.

        Returns:
            The content of each object; None if it does not exist.

        Raises:
            StorageError: The storage cannot be used, or an object is damaged.
        """
        wanted = list(dict.fromkeys(keys))

        def read(key: str) -> bytes | None:
            try:
                return self.read(key)
            except NoSuchObject:
                return None

        with ThreadPoolExecutor(_THREADS) as pool:
            return dict(zip(wanted, pool.map(read, wanted), strict=True))

    def exist(self, keys: Iterable[str]) -> set[str]:
        """Return which keys name objects; several are checked at a time.

        Args:
            keys: The objects.

        Returns:
            Those that exist.

        Raises:
            StorageError: The storage cannot be used.
        """
        asked = list(dict.fromkeys(keys))
        with ThreadPoolExecutor(_THREADS) as pool:
            return {key for key, there in zip(asked, pool.map(self.exists, asked), strict=True) if there}

    def get(self, key: str, target: Path, digest: str | None = None) -> None:
        """Fetch an object into a file, which appears when it is complete and checked.

        Args:
            key: The object.
            target: The file.
            digest: The SHA-256 that the content must have; by default the one that it was stored with.

        Raises:
            NoSuchObject: There is no such object.
            DamagedObject: The content has another digest.
            StorageError: The storage cannot be used.
        """
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{uuid.uuid4().hex}.partial")

        def get() -> None:
            stored = self._download(key, partial)
            self._check(key, digest or stored, content_digest(partial))

        try:
            self._twice(get)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def put(self, key: str, content: Path | bytes, digest: str | None = None) -> None:
        """Store a content as an object, whole or not at all, replacing what the object held.

        Args:
            key: The object.
            content: A file, or the content itself.
            digest: The SHA-256 of the content, if it is known.

        Raises:
            StorageError: The storage cannot be used.
        """
        known = digest or content_digest(content)
        self._patiently(lambda: self._send(key, content, known))

    def put_files(self, folder: str, files: Mapping[str, Path | bytes], last: str | None = None) -> int:
        """Store files below a folder.

        An object that has the same content already is not sent again. Each arrives whole or not at all, so a reader who
        waits for `last` never sees an incomplete folder.

        Args:
            folder: The folder in the storage.
            files: Names with files or contents.
            last: The name to store after all others.

        Returns:
            How many objects were sent.

        Raises:
            StorageError: The storage cannot be used.
        """
        names = sorted(files, key=lambda name: (name == last, name))
        return sum(self._put(f"{folder.rstrip('/')}/{name}", files[name]) for name in names)

    def names(self, folder: str) -> list[str]:
        """Return the names of all objects below a folder, relative to it."""
        root = self.key(folder) + "/"

        def names() -> list[str]:
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root)
            return sorted(item["Key"].removeprefix(root) for page in pages for item in page.get("Contents", []))

        return self._patiently(names)

    def get_folder(self, folder: str, target: Path) -> list[str]:
        """Fetch all objects below a folder, each checked before it appears.

        Args:
            folder: The folder in the storage.
            target: The local folder.

        Returns:
            The names of the objects.

        Raises:
            StorageError: There are no objects, one would land outside of `target`, or the storage cannot be used.
        """
        names = self.names(folder)
        if not names:
            raise StorageError(f"There is nothing at {self.url(folder)}. Check storage.bucket and storage.prefix.")
        for name in names:
            if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
                raise StorageError(f"{self.url(folder, name)} would land outside of {target}. Delete that object.")
            self.get(f"{folder.rstrip('/')}/{name}", target / name)
        return names

    def check_writable(self) -> None:
        """Store and delete an empty object.

        Raises:
            StorageError: The storage cannot be used.
        """
        # One name for all: the next process overwrites and deletes what a killed one leaves.
        probe = {"Bucket": self.bucket, "Key": self.key(".writable")}
        self._patiently(lambda: self.client.put_object(**probe, Body=b""))
        self._patiently(lambda: self.client.delete_object(**probe))

    def _head(self, key: str) -> Any:
        try:
            return self._patiently(lambda: self.client.head_object(Bucket=self.bucket, Key=self.key(key)))
        except NoSuchObject:
            return None

    def _put(self, key: str, source: Path | bytes) -> bool:
        digest = content_digest(source)
        if self.digest(key) == digest:
            return False
        self.put(key, source, digest)
        return True

    def _send(self, key: str, source: Path | bytes, digest: str) -> None:
        where = {"Bucket": self.bucket, "Key": self.key(key)}
        metadata = {_DIGEST: digest}
        if isinstance(source, Path) and source.stat().st_size > _SMALL_BYTES:
            extra = {"ChecksumAlgorithm": "SHA256", "Metadata": metadata}
            self.client.upload_file(str(source), **where, ExtraArgs=extra, Config=_TRANSFER)
        else:
            content = source if isinstance(source, bytes) else source.read_bytes()
            checksum = base64.b64encode(bytes.fromhex(digest)).decode()
            self.client.put_object(**where, Body=content, ChecksumSHA256=checksum, Metadata=metadata)

    def _download(self, key: str, target: Path) -> str | None:
        """Write an object to a file; return the digest that it was stored with."""
        answer = self.client.get_object(Bucket=self.bucket, Key=self.key(key))
        stored: str | None = answer["Metadata"].get(_DIGEST)
        with answer["Body"] as body:
            if answer["ContentLength"] <= _SMALL_BYTES:
                target.write_bytes(body.read())
                return stored
        self.client.download_file(self.bucket, self.key(key), str(target), Config=_TRANSFER)
        return stored

    def _twice(self, operation: Callable[[], T]) -> T:
        """Return the result of fetching an object; try again once if it was damaged on its way or has been replaced."""
        try:
            return self._patiently(operation)
        except DamagedObject:
            return self._patiently(operation)

    def _patiently(self, operation: Callable[[], T]) -> T:
        """Return the result of an operation, tried again for `patience` seconds while a failure may pass by itself."""
        end, wait = time.monotonic() + self.patience, 0.1
        while True:
            try:
                with self.explained():
                    return operation()
            except StorageRefused:
                raise
            except StorageError:
                if time.monotonic() + wait > end:
                    raise
            time.sleep(random.uniform(0.5, 1.0) * wait)
            wait = min(2 * wait, _LONGEST_WAIT)

    def _check(self, key: str, expected: str | None, found: str) -> None:
        if expected is not None and expected != found:
            raise DamagedObject(
                f"{self.url(key)} is damaged: its SHA-256 is {found}, it was stored with {expected}. "
                "Delete the object and run the stage that stored it again."
            )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn errors of boto3 inside the block, whoever calls it, into `StorageError`."""
        try:
            yield
        except (BotoCoreError, Boto3Error, ClientError, ResponseParserError, S3DownloadFailedError) as error:
            raise self._error(_reason(error)) from error

    def _error(self, error: Exception) -> StorageError:
        cause, remedy = errors.explain(error)
        kind = StorageRefused if errors.is_refusal(error) else StorageError
        if errors.is_missing(error):
            kind = NoSuchObject
        elif self.embedded_folder and shutil.disk_usage(self.embedded_folder).free < _FULL_DISK_BYTES:
            cause, remedy = f"the disk of {self.embedded_folder} is full", "Free some space and run again."
            kind = StorageRefused
        place = self.endpoint or "AWS"
        return kind(f"S3 bucket '{self.bucket}' at {place} cannot be used: {cause}. {remedy}")


def _reason(error: Exception) -> Exception:
    """Return the cause of a failed transfer, which boto3 keeps as its context, or wraps."""
    if isinstance(error, RetriesExceededError):
        return error.last_exception
    if isinstance(error, S3UploadFailedError) and isinstance(error.__context__, Exception):
        return error.__context__
    return error


@contextmanager
def connect(settings: StorageSettings, home: Path) -> Iterator[Storage]:
    """Open a storage, checked by storing an object.

    With the endpoint `embedded`, the server of `home` is started if none runs, and stopped by its last user.

    Args:
        settings: Where the storage is.
        home: The folder of the project's runtime state.

    Yields:
        The open storage.

    Raises:
        StorageError: The storage cannot be used; raised within about half a minute if the server does not answer.
        EmbeddedServerError: The embedded server does not start.
    """
    if settings.endpoint == EMBEDDED:
        folder = home / "s3"
        starting = functools.cache(lambda server: _embedded(settings, folder, server, _STARTING))
        with embedded.joined(folder, lambda server: _serves(starting(server))) as server:
            yield replace(_embedded(settings, folder, server, _PATIENT), patience=_PATIENCE)
    else:
        replace(_remote(settings, _IMPATIENT), patience=_PATIENCE_AT_FIRST).check_writable()
        yield replace(_remote(settings, _PATIENT), patience=_PATIENCE)


class _ModelsOnce(JSONFileLoader):  # type: ignore[misc]
    """Reads megabytes of JSON that describe S3 once in a process, not for each client."""

    @functools.cache  # noqa: B019 - there is one
    def load_file(self, file_path: str) -> Any:
        return super().load_file(file_path)


_MODELS = _ModelsOnce()


def _session(access_key: str | None = None, secret_key: str | None = None) -> boto3.Session:
    session = botocore.session.get_session()
    session.register_component("data_loader", Loader(file_loader=_MODELS))
    return boto3.Session(access_key, secret_key, botocore_session=session)


def _remote(settings: StorageSettings, patience: Mapping[str, Any]) -> Storage:
    endpoint = None if settings.endpoint == AWS else settings.endpoint
    region = settings.region or _DEFAULT_REGION
    config = Config(s3={"addressing_style": "path" if endpoint else "auto"}, **patience)
    try:
        client = _session().client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except (BotoCoreError, ValueError) as error:
        cause, remedy = errors.explain(error)
        raise StorageError(f"S3 at {endpoint or 'AWS'} cannot be used: {cause}. {remedy}") from error
    return Storage(endpoint, settings.bucket, settings.prefix, region, client)


def _embedded(settings: StorageSettings, folder: Path, server: embedded.Server, patience: Mapping[str, Any]) -> Storage:
    region = settings.region or _DEFAULT_REGION
    config = Config(s3={"addressing_style": "path"}, proxies={}, **patience)
    session = _session(server.access_key, server.secret_key)
    client = session.client("s3", endpoint_url=server.url, region_name=region, config=config)
    credentials = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    return Storage(server.url, settings.bucket, settings.prefix, region, client, folder, credentials)


def _serves(storage: Storage) -> bool:
    """Return whether a starting embedded server stores objects and finds earlier ones; create its bucket."""
    try:
        storage.client.create_bucket(Bucket=storage.bucket)
    except ParamValidationError as error:
        raise storage._error(error) from error
    except ClientError as error:
        if errors.code(error) == "InvalidBucketName":
            raise storage._error(error) from error
        if errors.code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            return False
    except BotoCoreError:
        return False
    try:
        storage.check_writable()
        # It accepts new objects up to five seconds before it finds the old ones.
        root = storage.elsewhere(storage.bucket)
        if not root.exists(_OLD_OBJECT):
            root.put(_OLD_OBJECT, b"stored by the first start")
        root.read(_OLD_OBJECT)
    except StorageError:
        return False
    return True


def content_digest(content: Path | bytes) -> str:
    """Return the SHA-256 (hexadecimal) of a file or of bytes."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return sha256(content)
