"""Release bundles in the storage: a bundle that has its manifest is complete."""

from __future__ import annotations

import json
from pathlib import Path

from tasks.artifacts.paths import Workspace
from tasks.files import read_json
from tasks.params import Params
from tasks.registry import mlflow_client
from tasks.registry.release import Release
from tasks.storage.s3 import Storage, content_digest

_MANIFEST = "release.json"


def verify(params: Params, workspace: Workspace, home: Path, store: Storage) -> int | None:
    """Check that the registered version and its bundle exist.

    Args:
        params: The parameters of the group.
        workspace: The workspace with `registration.json`.
        home: The folder of the project's runtime state.
        store: The storage.

    Returns:
        The number of the version that `registration.json` stands for; None if the registry or the storage lacks it.

    Raises:
        StorageError: The storage cannot be used.
        TrackingError: The registry cannot be used.
    """
    if not workspace.registration.exists():
        return None
    registration = read_json(workspace.registration)
    if not _is_whole(store, registration["release"]):
        return None
    model, digest = registration["model"], registration["content_digest"]
    return mlflow_client.find_version(params.tracking, home, model, digest, store)


def manifest_key(folder: str) -> str:
    """Return the key of a bundle's manifest, which is stored last: a bundle that has it is complete."""
    return f"{folder}/{_MANIFEST}"


def upload(store: Storage, release: Release) -> int:
    """Store the bundle, its manifest last, unless it is complete already.

    Args:
        store: The storage.
        release: The release.

    Returns:
        How many objects were sent.

    Raises:
        StorageError: The storage cannot be used.
    """
    if _is_whole(store, release.folder):
        return 0
    manifest = {
        "format": "mtz-release",
        "version": 1,
        **release.registration(),
        "tags": dict(release.tags),
        "files": {name: content_digest(content) for name, content in release.files.items()},
    }
    files = {**release.files, _MANIFEST: (json.dumps(manifest, indent=2, sort_keys=True) + "\n").encode()}
    return store.put_files(release.folder, files, last=_MANIFEST)


def _is_whole(store: Storage, folder: str) -> bool:
    """Return whether a bundle has its manifest, and every file with the content that the manifest states."""
    if not store.exists(manifest_key(folder)):
        return False
    files = json.loads(store.read(manifest_key(folder)))["files"]
    return all(store.digest(f"{folder}/{name}") == digest for name, digest in files.items())
