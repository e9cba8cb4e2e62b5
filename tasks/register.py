"""Stage `register`: a release bundle in the storage, and a version in the MLflow registry that points to it.

It may be killed at any moment and run again: what is there already is neither sent nor registered twice.
"""

from __future__ import annotations

import json
from pathlib import Path

from tasks import storage, tracking
from tasks.faults import Refused
from tasks.files import read_json, write_json
from tasks.home import find_home
from tasks.params import Params
from tasks.progress import say
from tasks.release import Release, gather
from tasks.storage import Storage, content_digest
from tasks.workspace import Workspace

_MANIFEST = "release.json"


def run(params: Params, workspace: Workspace) -> None:
    """Store and register the group's zipped network; write `registration.json`.

    Raises `Refused` where a task loses more than its floor allows, and `MtzError` in its other kinds.
    """
    _check_floors(params, workspace)
    home = find_home(workspace.root)
    release = gather(params, workspace)
    with storage.connect(params.storage, home) as store:
        sent = _upload(store, release)
        say(f"bundle: {store.url(release.folder)} ({f'{sent} objects' if sent else 'there already'})")
        tracking.prepare(params.tracking, home)
        version = tracking.register_release(params.tracking, home, store, release)
    write_json(workspace.registration, release.registration())
    say(f"registered: {release.model} version {version}, content {release.content_digest[:12]}")


def verify(params: Params, workspace: Workspace, home: Path, store: Storage) -> int | None:
    """The version that `registration.json` stands for; None where the registry or the storage at hand lacks it.

    Raises `StorageError` or `TrackingError` where they cannot be asked.
    """
    if not workspace.registration.exists():
        return None
    registration = read_json(workspace.registration)
    if not _is_whole(store, registration["release"]):
        return None
    model, digest = registration["model"], registration["content_digest"]
    return tracking.find_version(params.tracking, home, model, digest, store)


def manifest_key(folder: str) -> str:
    """The key of a bundle's manifest, which is stored last: a bundle that has it is whole."""
    return f"{folder}/{_MANIFEST}"


def _check_floors(params: Params, workspace: Workspace) -> None:
    tasks = read_json(workspace.metrics)["tasks"]
    lost = {task: tasks[task]["error_retrained"] - tasks[task]["error_original"] for task in params.register.floors}
    broken = [
        f"{task} loses {points:.2f} points of test error, and {params.register.floors[task]:g} are allowed"
        for task, points in lost.items()
        if points > params.register.floors[task]
    ]
    if broken:
        raise Refused(f"{'; '.join(broken)}. Store more (match), retrain more, allow more, or leave that model out.")


def _upload(store: Storage, release: Release) -> int:
    """Store the bundle, its manifest last, unless it is there; returns how many objects were sent."""
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
    """Whether a bundle has its manifest, and every file with the content that the manifest states."""
    if not store.exists(manifest_key(folder)):
        return False
    files = json.loads(store.read(manifest_key(folder)))["files"]
    return all(store.digest(f"{folder}/{name}") == digest for name, digest in files.items())
