"""A workspace: the files of a snapshot, with a DVC repository of its own, and the outputs of its stages.

    HOME/workspaces/GROUP/        one per group
    HOME/statistics/MODEL/        one per model whose statistics several groups, or the planner, need
        .dvc/config               no_scm; the cache is shared by all workspaces, the remote is the storage
        dvc.yaml params.yaml      of the snapshot; params.yaml also has the settings of storage and registry
        mtz_core/ tasks/          the stages' code
        networks/ data/ …         every file that a stage reads and no stage makes: copies, or hard links of large files
        (all else)                what DVC keeps there: dvc.lock and the stages' outputs

Relative paths, commands and parameters are those of the project, so DVC's run cache serves the project and all
workspaces alike.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml
from filelock import FileLock, Timeout

from flows.group.dvc import Pipeline, Stage
from flows.spec.snapshot import PARAMS, Snapshot
from mtz_core.errors import MtzError
from tasks.storage.contents import Contents
from tasks.storage.s3 import Storage

LINKED_FROM_BYTES = 1 << 20
"""Files of this size and above are hard links to the contents, where they are read-only."""

_REMOTE = "storage"
_SECTION = f"'remote \"{_REMOTE}\"'"
_BROUGHT = Path(".dvc", "brought.json")
_UNKNOWN: list[Any] = ["", 0, 0]
_TIMEOUTS = {"connect_timeout": "20", "read_timeout": "60"}
"""Seconds; DVC itself would wait for ever."""
_PATIENCE_SECONDS = 60.0  # for the children of a killed run to end
_POLL_SECONDS = 0.2


class WorkspaceBusy(MtzError):
    """Another process works in the workspace."""


@dataclass(frozen=True)
class Remote:
    """Where DVC shares data.

    Attributes:
        url: An `s3://` URL, or a folder.
        endpoint: URL of the S3 server; None for AWS or a folder.
        region: The bucket's region; None for a folder.
    """

    url: str
    endpoint: str | None = None
    region: str | None = None


def folder_of(home: Path, group: str) -> Path:
    """Return the folder of a group's workspace."""
    return home / "workspaces" / group


def statistics_folder(home: Path, model: str) -> Path:
    """Return the folder of the workspace for a model's statistics."""
    return home / "statistics" / model


def remote_of(store: Storage) -> Remote:
    """Return DVC's remote in the storage."""
    return Remote(store.url("dvc"), store.endpoint, store.region)


def environment_of(store: Storage, home: Path) -> dict[str, str]:
    """Return the variables that DVC and the stages need to reach the storage and to find the runtime state."""
    return {**store.environment(), "MTZ_HOME": str(home), "DVC_SITE_CACHE_DIR": str(home / "dvc")}


def cache_of(home: Path) -> Path:
    """Return the cache that all workspaces of a home share: the project's own."""
    return home.parent / ".dvc" / "cache"


@contextmanager
def held(folder: Path, patience: float = _PATIENCE_SECONDS) -> Iterator[Path]:
    """Hold a workspace for this process, waiting up to a minute for it.

    Args:
        folder: The folder of the workspace.
        patience: The longest time to wait, in seconds.

    Yields:
        The folder.

    Raises:
        WorkspaceBusy: Another process holds the workspace, or a DVC process that was started by hand works in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + patience
    lock = FileLock(folder.with_name(f"{folder.name}.lock"))
    try:
        lock.acquire(timeout=patience, poll_interval=_POLL_SECONDS)
    except Timeout:
        raise WorkspaceBusy(f"another mtz is at work in {folder}. Wait for it to end, or stop it.") from None
    try:
        while (dvc := _release_locks_of_the_dead(folder)) is not None:
            if time.monotonic() > deadline:
                raise WorkspaceBusy(f"a DVC process ({dvc}) is at work in {folder}. Wait for it to end, or stop it.")
            time.sleep(_POLL_SECONDS)
        yield folder
    finally:
        lock.release()


def prepare(
    folder: Path,
    snapshot: Snapshot,
    contents: Contents,
    settings: Mapping[str, Any],
    cache: Path,
    remote: Remote,
    environment: Mapping[str, str],
) -> tuple[Pipeline, tuple[Stage, ...]]:
    """Bring the workspace up to date with a snapshot.

    Files are replaced by renaming, and only where their content differs, so that DVC need not hash them again and
    nobody reads half a file. Files that are no longer in the snapshot are removed; stages' outputs are not touched. A
    kill at any point does no harm. The caller must hold the workspace.

    Args:
        folder: The folder of the workspace.
        snapshot: The files and parameters.
        contents: The store with the files.
        settings: The content of params.yaml: the snapshot's parameters, and the settings of storage and registry.
        cache: DVC's cache, shared by the workspaces of one machine.
        remote: DVC's remote.
        environment: Variables that DVC and the stages need.

    Returns:
        The workspace's pipeline and its stages.

    Raises:
        MissingContent: A file of the snapshot is neither here nor in the storage.
        StorageError: The storage cannot be used.
        DvcFailed: DVC does not understand the pipeline.
    """
    configure(folder, cache, remote)
    _write(folder / PARAMS, yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True))
    known = _recorded(folder)
    there = {name for name, entry in known.items() if _stat(folder / name) == entry[1:]}
    brought = {name: known[name] for name in there if known[name][0] == snapshot.files.get(name)}
    # Recorded before anything is placed, so that files of a killed run are found again and removed when outdated.
    _record(folder, {**dict.fromkeys(snapshot.files, _UNKNOWN), **known})
    for name, digest in snapshot.files.items():
        if name not in brought:
            _bring(contents.path(digest), folder / name)
            brought[name] = [digest, *_stat(folder / name)]
    for name in known.keys() - snapshot.files.keys():
        (folder / name).unlink(missing_ok=True)
    _record(folder, brought)
    pipeline = Pipeline(folder, environment)
    return pipeline, pipeline.stages()


def place(files: Mapping[str, str], contents: Contents, folder: Path) -> None:
    """Put contents into an empty folder.

    Args:
        files: The SHA-256 of each file, by its path in the folder.
        contents: The store with the files.
        folder: The folder.

    Raises:
        MissingContent: A content is neither here nor in the storage.
        StorageError: The storage cannot be used.
    """
    for name, digest in files.items():
        _bring(contents.path(digest), folder / name)


def configure(folder: Path, cache: Path, remote: Remote) -> None:
    """Write the DVC configuration of a workspace, without credentials, which come from the environment."""
    core = {"no_scm": "true", "analytics": "false", "check_update": "false", "remote": _REMOTE}
    # DVC compares fetched files with their digests only on request.
    shared = {"url": remote.url, "verify": "true"}
    if remote.url.startswith("s3:"):
        shared |= _TIMEOUTS
    local = {key: value for key, value in (("endpointurl", remote.endpoint), ("region", remote.region)) if value}
    cache_dir = os.path.relpath(cache, folder / ".dvc")
    _write(folder / ".dvc" / "config", _ini({"core": core, "cache": {"dir": cache_dir}, _SECTION: shared}))
    _write(folder / ".dvc" / "config.local", _ini({_SECTION: local} if local else {}))


def configure_by_hand(folder: Path, remote: Remote) -> dict[str, str]:
    """Write a DVC configuration in which the remote is the default one.

    It has the lowest rank of all, so that the project's and the user's own configurations take precedence.

    Args:
        folder: The folder to write to.
        remote: DVC's remote.

    Returns:
        The environment variables with which DVC finds the configuration.
    """
    options = {
        "url": remote.url,
        "verify": "true",
        **_TIMEOUTS,
        "endpointurl": remote.endpoint,
        "region": remote.region,
    }
    section = {key: value for key, value in options.items() if value}
    _write(folder / "config", _ini({"core": {"remote": _REMOTE}, _SECTION: section}))
    return {"DVC_SYSTEM_CONFIG_DIR": str(folder)}


def _ini(sections: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        [f"[{name}]", *(f"    {key} = {value}" for key, value in options.items())] for name, options in sections.items()
    ]
    return "\n".join(line for section in lines for line in section) + "\n"


def _bring(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    partial.unlink(missing_ok=True)
    if source.stat().st_size >= LINKED_FROM_BYTES:
        try:
            partial.hardlink_to(source)
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, partial)
    else:
        shutil.copyfile(source, partial)
    partial.replace(target)
    # rename(2) of two names of one file does nothing and leaves both.
    partial.unlink(missing_ok=True)


def _stat(file: Path) -> list[int]:
    try:
        status = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [status.st_size, status.st_mtime_ns]


def _write(path: Path, text: str) -> None:
    """Write a file by renaming, unless it has this content already."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _partial(path: Path) -> Path:
    """Return the name under which a file is made first; it is fixed, so the next run reuses what a killed one left."""
    return path.with_name(f".{path.name}.partial")


def _recorded(folder: Path) -> dict[str, list[Any]]:
    """Return the record of the files that were placed: name → digest, size, time of change."""
    with suppress(FileNotFoundError, ValueError):
        recorded = json.loads((folder / _BROUGHT).read_text(encoding="utf-8"))
        if isinstance(recorded, dict):
            return recorded
        return dict.fromkeys(recorded, _UNKNOWN)  # the former format, without digests
    return {}


def _record(folder: Path, brought: Mapping[str, list[Any]]) -> None:
    _write(folder / _BROUGHT, json.dumps(brought, indent=0, sort_keys=True))


def _release_locks_of_the_dead(folder: Path) -> int | None:
    """Remove DVC's list of readers and writers if none of them lives.

    DVC does so itself, but mistakes any process with the id of a dead one for a DVC process.

    Args:
        folder: The folder of the workspace.

    Returns:
        The process id of a living reader or writer; None if there is none.
    """
    entries = folder / ".dvc" / "tmp" / "rwlock"
    try:
        locks = json.loads(entries.read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        return None
    except json.JSONDecodeError:  # its writer was killed while writing
        locks = {}
    readers = [reader for paths in locks.get("read", {}).values() for reader in paths]
    for holder in (*readers, *locks.get("write", {}).values()):
        if _is_dvc(holder["pid"]):
            return int(holder["pid"])
    entries.unlink(missing_ok=True)
    return None


def _is_dvc(pid: int) -> bool:
    try:
        return any("dvc" in Path(part).name for part in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
