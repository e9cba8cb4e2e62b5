"""What must hold after a fleet has gone through faults. Each function returns what does not hold, a line each."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mlflow
import psutil  # type: ignore[import-untyped]
import yaml

from tests.faults.servers import BUCKET

Digests = Mapping[str, str]
"""Content digest of each group."""

RELEASE = "releases"
MANIFEST = "release.json"
DIGEST_TAG = "mtz.content_digest"

_NAMED_BY_SHA256 = "contents"
_NOT_OURS = ("dvc", "mlflow")
_UNFINISHED = (".partial", ".tmp")
_INCOMING = "incoming"
_OF_DVC = ".dvc"
_RWLOCK = "rwlock"
_OF_WORKERS = "dask"
_NO_LOCK = "dvc.lock"
_THREADS = 8


@dataclass(frozen=True)
class Bucket:
    """All objects below a prefix of the storage, read once: key relative to the prefix → content and metadata."""

    client: Any
    prefix: str

    @cached_property
    def objects(self) -> dict[str, tuple[bytes, Mapping[str, str]]]:
        """Everything, whole."""
        root = f"{self.prefix}/"
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=root)
        keys = [item["Key"] for page in pages for item in page.get("Contents", [])]
        with ThreadPoolExecutor(_THREADS) as pool:
            return {key.removeprefix(root): found for key, found in zip(keys, pool.map(self._get, keys), strict=True)}

    def _get(self, key: str) -> tuple[bytes, Mapping[str, str]]:
        answer = self.client.get_object(Bucket=BUCKET, Key=key)
        return answer["Body"].read(), answer["Metadata"]

    def below(self, folder: str) -> dict[str, bytes]:
        """Name → content of the objects below a folder."""
        root = f"{folder}/"
        return {key.removeprefix(root): content for key, (content, _) in self.objects.items() if key.startswith(root)}


@dataclass(frozen=True)
class Version:
    """A registered version: its model, the digest of its content, and the key of its model's artifacts."""

    model: str
    number: int
    digest: str
    artifacts: str


class Registry:
    """An MLflow server's registry."""

    def __init__(self, url: str) -> None:
        self._client = mlflow.MlflowClient(tracking_uri=url, registry_uri=url)

    @cached_property
    def versions(self) -> list[Version]:
        """All versions of all models."""
        return [
            Version(found.name, int(found.version), found.tags[DIGEST_TAG], self._location(found.name, found.version))
            for found in _all_pages(self._client.search_model_versions)
        ]

    def running(self) -> list[str]:
        """The ids of all runs that have not ended."""
        experiments = [found.experiment_id for found in _all_pages(self._client.search_experiments)]
        runs = self._client.search_runs(experiments, "attributes.status = 'RUNNING'", max_results=1000)
        return [run.info.run_id for run in runs]

    def _location(self, model: str, number: str) -> str:
        location = self._client.get_model_version_download_uri(model, number)
        if location.startswith("models:/"):
            location = self._client.get_logged_model(location.removeprefix("models:/")).artifact_location
        return str(location.removeprefix(f"s3://{BUCKET}/"))


def _all_pages(search: Any) -> Iterator[Any]:
    token = None
    while True:
        page = search(max_results=100, page_token=token)
        yield from page
        if not (token := page.token):
            return


def same_digests(found: Digests, expected: Digests) -> list[str]:
    """Every group has come to the content that an undisturbed run came to."""
    return [
        f"{group}: {found.get(group, 'nothing')} instead of {expected.get(group, 'nothing')}"
        for group in sorted({*found, *expected})
        if found.get(group) != expected.get(group)
    ]


def registered_once(registry: Registry, expected: Iterable[Digests]) -> list[str]:
    """Each content that a run came to is registered, once, and no other is. (A group's model has the group's name.)"""
    wanted = {(group, digest) for digests in expected for group, digest in digests.items()}
    counts = Counter((version.model, version.digest) for version in registry.versions)
    return [
        *(f"{model}: content {digest} is registered {n} times" for (model, digest), n in counts.items() if n > 1),
        *(f"{model}: content {digest} is not registered" for model, digest in sorted(wanted - {*counts})),
        *(
            f"{model}: content {digest} is registered and nobody made it"
            for model, digest in sorted({*counts} - wanted)
        ),
    ]


def bundles_complete(registry: Registry, bucket: Bucket) -> list[str]:
    """Each version has a bundle with all that its manifest states, and artifacts with the same network."""
    wrong = []
    for version in registry.versions:
        named = f"{version.model} version {version.number}"
        bundle = bucket.below(f"{RELEASE}/{version.model}/{version.digest}")
        if MANIFEST not in bundle:
            wrong.append(f"{named}: its bundle has no {MANIFEST}")
            continue
        files: dict[str, str] = json.loads(bundle[MANIFEST])["files"]
        digests = {name: _sha256(content) for name, content in bundle.items()}
        wrong += [
            f"{named}: {name} is not what its manifest states" for name in files if digests.get(name) != files[name]
        ]
        artifacts = bucket.below(version.artifacts.removeprefix(f"{bucket.prefix}/"))
        stored = {_sha256(content) for content in artifacts.values()}
        network = {name: digest for name, digest in files.items() if name.startswith("network/")}
        wrong += [
            f"{named}: MLflow's artifacts lack {name}" for name, digest in network.items() if digest not in stored
        ]
        if "MLmodel" not in artifacts:
            wrong.append(f"{named}: MLflow's artifacts have no MLmodel")
    return wrong


def objects_whole(bucket: Bucket) -> list[str]:
    """Each object that this project stores carries its digest, each of DVC's is named by it; and they are right."""
    return [
        f"{key}: {fault}"
        for key, (content, metadata) in bucket.objects.items()
        if (fault := _fault(key, content, metadata))
    ]


def _fault(key: str, content: bytes, metadata: Mapping[str, str]) -> str:
    folder, _, name = key.partition("/")
    if folder == "dvc":
        return _fault_of_dvc(name, content)
    if folder in _NOT_OURS:
        return ""
    digest = _sha256(content)
    if "sha256" not in metadata:
        return "was stored without a digest"
    if metadata["sha256"] != digest:
        return f"has the digest {digest} and was stored with {metadata['sha256']}"
    if folder == _NAMED_BY_SHA256 and name.rpartition("/")[2] != digest:
        return f"has the digest {digest}"
    return ""


def _fault_of_dvc(name: str, content: bytes) -> str:
    kind, _, rest = name.partition("/")
    if kind == "runs":
        with suppress(yaml.YAMLError):
            return "" if isinstance(yaml.safe_load(content), dict) else "is not a record of a run"
        return "is not YAML"
    digest = hashlib.md5(content, usedforsecurity=False).hexdigest()
    named = rest.removeprefix("md5/").replace("/", "").removesuffix(".dir")
    return "" if named == digest else f"has the MD5 {digest}"


def nothing_unfinished(folder: Path) -> list[str]:
    """No file is left that was being written. (What comes into the contents has a place that is cleared once a day.)"""
    return [
        f"{path.relative_to(folder)}"
        for path in folder.rglob("*")
        if path.name.endswith(_UNFINISHED) and not {_INCOMING, _OF_DVC} & set(path.relative_to(folder).parts)
    ]


def no_locks(folder: Path) -> list[str]:
    """Nobody holds a lock, and DVC's lists of readers and writers are empty.

    A cluster's worker that was killed leaves its list in its own workspace until it works there again.
    """
    wrong = []
    for path in folder.rglob("*"):
        if path.name == _RWLOCK and path.is_file():
            if _OF_WORKERS in path.relative_to(folder).parts:
                continue
            text = path.read_text()
            if any(json.loads(text or "{}").values()):
                wrong.append(f"{path.relative_to(folder)}: {text[:200]}")
        elif path.is_file() and (path.suffix == ".lock" or path.name == "lock") and path.name != _NO_LOCK:
            with closing(_Descriptor(path)) as descriptor:
                if not descriptor.can_be_locked():
                    wrong.append(f"{path.relative_to(folder)} is held")
    return wrong


class _Descriptor:
    def __init__(self, path: Path) -> None:
        self._number = os.open(path, os.O_RDWR)

    def can_be_locked(self) -> bool:
        try:
            fcntl.flock(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(self._number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        os.close(self._number)


def no_runs_open(registry: Registry) -> list[str]:
    """No MLflow run is left RUNNING."""
    return [f"MLflow run {run} is RUNNING" for run in registry.running()]


def no_processes(marker: str) -> list[str]:
    """No process is left that has the marker, NAME=VALUE, in its environment."""
    return [str(process) for process in marked(marker)]


def marked(marker: str) -> list[psutil.Process]:
    """The living processes that have the marker in their environment."""
    name, _, value = marker.partition("=")
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def all_unchanged(report: Mapping[str, Any]) -> list[str]:
    """A run that came after has found nothing to do."""
    if not report:
        return ["it has left no report"]
    return [f"{group['group']}: {group['status']}" for group in report["groups"] if group["status"] != "unchanged"]


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
