"""The only door to S3: one bucket, in which everything of a project lies under one prefix.

    <prefix>/dvc/        DVC's remote
    <prefix>/mlflow/     MLflow's artifacts
    <prefix>/releases/   one bundle per released network

Every object that is stored here carries the SHA-256 of its content: the server checks it on arrival, we check it on
the way back. (DVC and MLflow move theirs by themselves.)
"""

import base64
import functools
import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

import boto3
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, ParamValidationError

from tasks import embedded_s3, s3_errors
from tasks.faults import ServiceFault
from tasks.files import sha256

EMBEDDED = "embedded"
AWS = "aws"

_DEFAULT_REGION = "us-east-1"
_LOOPBACK = "127.0.0.1,localhost"
_DIGEST = "sha256"
_FULL_DISK_BYTES = 64 << 20

# A first answer within ten seconds, also from a host that drops packets or accepts and says nothing.
_IMPATIENT = {"connect_timeout": 3, "read_timeout": 3, "retries": {"mode": "standard", "total_max_attempts": 2}}
_STARTING = {"connect_timeout": 1, "read_timeout": 4, "retries": {"total_max_attempts": 1}}
_PATIENT = {"connect_timeout": 5, "read_timeout": 60, "retries": {"mode": "standard", "total_max_attempts": 6}}


class StorageError(ServiceFault):
    """The S3 storage cannot be reached, does not let us in, or does not hold what was asked for."""


class Settings(Protocol):
    """Where the storage is; `endpoint` is `embedded`, `aws`, or a URL."""

    @property
    def endpoint(self) -> str: ...
    @property
    def bucket(self) -> str: ...
    @property
    def prefix(self) -> str: ...
    @property
    def region(self) -> str: ...


@dataclass(frozen=True)
class Storage:
    """An open, writable storage. Keys and folders are relative to `prefix`."""

    endpoint: str | None
    """URL of the S3 server; None for AWS itself."""
    bucket: str
    prefix: str
    region: str
    client: Any = field(repr=False)
    """The boto3 client."""
    embedded_folder: Path | None = None
    """Where the embedded server keeps its files; None for any other server."""
    credentials: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Environment variables of the embedded server's credentials; empty where boto3 finds them by itself."""

    def key(self, *parts: str) -> str:
        """The full object key of the path `parts`."""
        return "/".join(part.strip("/") for part in (self.prefix, *parts) if part.strip("/"))

    def url(self, *parts: str) -> str:
        """The `s3://` URL of the path `parts`."""
        return f"s3://{self.bucket}/{self.key(*parts)}".rstrip("/")

    def environment(self) -> dict[str, str]:
        """The environment variables with which another process (DVC, MLflow, boto3) reaches this storage."""
        variables = {"AWS_DEFAULT_REGION": self.region, "AWS_REGION": self.region}
        if self.endpoint:
            variables |= {"AWS_ENDPOINT_URL_S3": self.endpoint, "MLFLOW_S3_ENDPOINT_URL": self.endpoint}
        if self.embedded_folder:
            # An empty session token hides one that belongs to another account; loopback never goes through a proxy.
            variables |= {**self.credentials, "AWS_SESSION_TOKEN": ""}
            for name in ("NO_PROXY", "no_proxy"):
                variables[name] = ",".join(filter(None, (os.environ.get(name), _LOOPBACK)))
        return variables

    def exists(self, key: str) -> bool:
        """Whether there is an object `key`."""
        return self._head(key) is not None

    def digest(self, key: str) -> str | None:
        """SHA-256 (hexadecimal) of the object `key`; None where it is not there or was not stored by us."""
        head = self._head(key)
        return None if head is None else head["Metadata"].get(_DIGEST)

    def read(self, key: str) -> bytes:
        """The content of the small object `key`, checked. Raises `StorageError`."""
        with self.explained():
            answer = self.client.get_object(Bucket=self.bucket, Key=self.key(key))
            content: bytes = answer["Body"].read()
        self._check(key, answer["Metadata"].get(_DIGEST), content_digest(content))
        return content

    def put_files(self, folder: str, files: Mapping[str, Path | bytes], last: str | None = None) -> int:
        """Store `files` (name → file or content) below `folder`, `last` after all others; returns how many were sent.

        An object that holds the same content already is not sent again. Each arrives whole or not at all, so a reader
        who waits for `last` never sees a part. Raises `StorageError`.
        """
        names = sorted(files, key=lambda name: (name == last, name))
        return sum(self._put(f"{folder.rstrip('/')}/{name}", files[name]) for name in names)

    def names(self, folder: str) -> list[str]:
        """The names of all objects below `folder`, relative to it."""
        root = self.key(folder) + "/"
        with self.explained():
            pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=root)
            return sorted(item["Key"].removeprefix(root) for page in pages for item in page.get("Contents", []))

    def get_folder(self, folder: str, target: Path) -> list[str]:
        """Fetch all objects below `folder` into `target`, each checked before it appears; returns their names."""
        names = self.names(folder)
        if not names:
            raise StorageError(f"There is nothing at {self.url(folder)}. Check storage.bucket and storage.prefix.")
        for name in names:
            if ".." in PurePosixPath(name).parts or PurePosixPath(name).is_absolute():
                raise StorageError(f"{self.url(folder, name)} would land outside of {target}. Delete that object.")
            self._get(f"{folder.rstrip('/')}/{name}", target / name)
        return names

    def check_writable(self) -> None:
        """Store and delete an empty object. Raises `StorageError`."""
        probe = {"Bucket": self.bucket, "Key": self.key(f".writable-{os.getpid()}")}
        with self.explained():
            self.client.put_object(**probe, Body=b"")
            self.client.delete_object(**probe)

    def _head(self, key: str) -> Any:
        with self.explained():
            try:
                return self.client.head_object(Bucket=self.bucket, Key=self.key(key))
            except ClientError as error:
                if s3_errors.code(error) in ("404", "NoSuchKey"):
                    return None
                raise

    def _put(self, key: str, source: Path | bytes) -> bool:
        digest = content_digest(source)
        if self.digest(key) == digest:
            return False
        metadata = {_DIGEST: digest}
        where = {"Bucket": self.bucket, "Key": self.key(key)}
        with self.explained():
            if isinstance(source, bytes):
                checksum = base64.b64encode(bytes.fromhex(digest)).decode()
                self.client.put_object(**where, Body=source, ChecksumSHA256=checksum, Metadata=metadata)
            else:
                extra = {"ChecksumAlgorithm": "SHA256", "Metadata": metadata}
                self.client.upload_file(str(source), **where, ExtraArgs=extra)
        return True

    def _get(self, key: str, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        try:
            expected = self.digest(key)
            with self.explained():
                self.client.download_file(self.bucket, self.key(key), str(partial))
            self._check(key, expected, content_digest(partial))
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    def _check(self, key: str, expected: str | None, found: str) -> None:
        if expected is not None and expected != found:
            raise StorageError(
                f"{self.url(key)} is damaged: its SHA-256 is {found}, it was stored with {expected}. "
                "Delete the object and run the stage that stored it again."
            )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turns errors of boto3 inside the block, whoever calls it, into `StorageError`."""
        try:
            yield
        except S3UploadFailedError as error:
            # boto3 keeps the reason only as the context of this error.
            reason = error.__context__
            raise self._error(reason if isinstance(reason, Exception) else error) from error
        except (BotoCoreError, ClientError) as error:
            raise self._error(error) from error

    def _error(self, error: Exception) -> StorageError:
        cause, remedy = s3_errors.explain(error)
        if self.embedded_folder and shutil.disk_usage(self.embedded_folder).free < _FULL_DISK_BYTES:
            cause, remedy = f"the disk of {self.embedded_folder} is full", "Free some space and run again."
        place = self.endpoint or "AWS"
        return StorageError(f"S3 bucket '{self.bucket}' at {place} cannot be used: {cause}. {remedy}")


@contextmanager
def connect(settings: Settings, home: Path) -> Iterator[Storage]:
    """Open the storage that `settings` name, checked by storing an object.

    With `endpoint: embedded` the server of `home` is started where none runs, and stopped by its last user.
    Raises `StorageError`, within about ten seconds where the server does not answer, or `EmbeddedServerError`.
    """
    if settings.endpoint == EMBEDDED:
        folder = home / "s3"
        starting = functools.cache(lambda server: _embedded(settings, folder, server, _STARTING))
        with embedded_s3.joined(folder, lambda server: _serves(starting(server))) as server:
            yield _embedded(settings, folder, server, _PATIENT)
    else:
        _remote(settings, _IMPATIENT).check_writable()
        yield _remote(settings, _PATIENT)


def _remote(settings: Settings, patience: Mapping[str, Any]) -> Storage:
    endpoint = None if settings.endpoint == AWS else settings.endpoint
    region = settings.region or _DEFAULT_REGION
    config = Config(s3={"addressing_style": "path" if endpoint else "auto"}, **patience)
    try:
        client = boto3.Session().client("s3", endpoint_url=endpoint, region_name=region, config=config)
    except (BotoCoreError, ValueError) as error:
        cause, remedy = s3_errors.explain(error)
        raise StorageError(f"S3 at {endpoint or 'AWS'} cannot be used: {cause}. {remedy}") from error
    return Storage(endpoint, settings.bucket, settings.prefix, region, client)


def _embedded(settings: Settings, folder: Path, server: embedded_s3.Server, patience: Mapping[str, Any]) -> Storage:
    region = settings.region or _DEFAULT_REGION
    config = Config(s3={"addressing_style": "path"}, proxies={}, **patience)
    session = boto3.Session(server.access_key, server.secret_key)
    client = session.client("s3", endpoint_url=server.url, region_name=region, config=config)
    credentials = {"AWS_ACCESS_KEY_ID": server.access_key, "AWS_SECRET_ACCESS_KEY": server.secret_key}
    return Storage(server.url, settings.bucket, settings.prefix, region, client, folder, credentials)


def _serves(storage: Storage) -> bool:
    """Whether a starting embedded server stores objects already; makes its bucket."""
    try:
        storage.client.create_bucket(Bucket=storage.bucket)
    except ParamValidationError as error:
        raise storage._error(error) from error
    except ClientError as error:
        if s3_errors.code(error) == "InvalidBucketName":
            raise storage._error(error) from error
        if s3_errors.code(error) not in ("BucketAlreadyOwnedByYou", "BucketAlreadyExists"):
            return False
    except BotoCoreError:
        return False
    try:
        storage.check_writable()
    except StorageError:
        return False
    return True


def content_digest(content: Path | bytes) -> str:
    """SHA-256 (hexadecimal) of a file or of bytes."""
    if isinstance(content, bytes):
        return hashlib.sha256(content).hexdigest()
    return sha256(content)
