"""A group's workspace: a self-contained snapshot of the project with the group's own params.yaml and DVC repository.

    .mtz/workspaces/<group>/
        .dvc/config          no_scm; the cache is the project's, the remote is the storage
        dvc.yaml             as in the project
        params.yaml          the project's, with the group's overrides
        mtz_core/ tasks/     the stages' code
        data/ …              every file that a stage reads and no stage makes: copies, or hard links of large files
        (all else)           what DVC keeps there: dvc.lock and the stages' outputs

Relative paths, commands and parameters are those of the project, so DVC's run cache serves the project and all
workspaces alike.
"""

import filecmp
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import yaml
from filelock import FileLock, Timeout

from flows.pipeline import Pipeline, Stage
from mtz_core.errors import MtzError
from tasks.params import Params

CODE = ("mtz_core", "tasks")
"""Packages that every stage's `python -m tasks` imports."""

LINKED_FROM_BYTES = 1 << 20
"""Files of this size and above are linked. Editing such a file in place changes it for running stages too."""

_COPIED_FILES = ("dvc.yaml", ".dvcignore")
_NEVER_COPIED = ("__pycache__", ".git", ".DS_Store")
_PARAMS = "params.yaml"
_REMOTE = "storage"
_SECTION = f"'remote \"{_REMOTE}\"'"
_BROUGHT = Path(".dvc", "brought.json")


class WorkspaceBusy(MtzError):
    """Another process works in the workspace."""


class MissingSource(MtzError):
    """A file that a stage reads does not exist."""


@dataclass(frozen=True)
class Remote:
    """Where DVC shares data: an `s3://` URL, or a folder."""

    url: str
    endpoint: str | None = None
    region: str | None = None


def folder_of(home: Path, group: str) -> Path:
    """Return the folder of the group's workspace."""
    return home / "workspaces" / group


@contextmanager
def held(home: Path, group: str) -> Iterator[Path]:
    """Hold the group's workspace for this process; yield its folder.

    Raises:
        WorkspaceBusy: another process holds it, or a DVC that someone started by hand works in it.
    """
    folder = folder_of(home, group)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.with_name(f"{group}.lock"), blocking=False)
    try:
        lock.acquire()
    except Timeout:
        raise WorkspaceBusy(
            f"group '{group}': another mtz is at work in {folder}. Wait for it to end, or stop it."
        ) from None
    try:
        _release_locks_of_the_dead(folder, group)
        yield folder
    finally:
        lock.release()


def prepare(
    project: Path,
    folder: Path,
    params: Mapping[str, Any],
    remote: Remote,
    environment: Mapping[str, str],
    code: Iterable[str] = CODE,
) -> tuple[Pipeline, tuple[Stage, ...]]:
    """Bring the workspace up to date with the project; return its pipeline and stages.

    Files are replaced by renaming, and only where their content differs, so DVC need not hash them again and nobody
    sees half a file; files that are gone from the project are removed; stages' outputs are left alone. Being killed in
    between does no harm. The caller must hold the workspace.

    Args:
        code: modules in the project that the stages import, whether or not dvc.yaml lists all of their files.

    Raises:
        MissingSource: the project lacks a file that a stage reads.
        DvcFailed: DVC does not understand the pipeline.
    """
    cache = project / ".dvc" / "cache"
    configure(folder, cache, remote)
    for name in _COPIED_FILES:
        if (project / name).exists():
            _bring(project / name, folder / name)
    _write(folder / _PARAMS, yaml.safe_dump(dict(params), sort_keys=False, allow_unicode=True))
    pipeline = Pipeline(folder, environment)
    stages = pipeline.stages()
    sources = {*_code(project, code), *_sources(project, stages)}
    known = _recorded(folder)
    _record(folder, known | sources)
    for name in sources:
        _bring(project / name, folder / name)
    for name in known - sources:
        (folder / name).unlink(missing_ok=True)
    _record(folder, sources)
    return pipeline, stages


def modules_of(params: Params) -> tuple[str, ...]:
    """Return the top modules of the networks' factories, which may be the user's own, beside ours."""
    return tuple(sorted({model.network.partition(":")[0].partition(".")[0] for model in params.models.values()}))


def configure(folder: Path, cache: Path, remote: Remote) -> None:
    """Write the DVC configuration of a workspace. Credentials are no part of it: they come from the environment."""
    core = {"no_scm": "true", "analytics": "false", "check_update": "false", "remote": _REMOTE}
    # DVC compares fetched files with their digests only on request.
    shared = {"url": remote.url, "verify": "true"}
    local = {key: value for key, value in (("endpointurl", remote.endpoint), ("region", remote.region)) if value}
    cache_dir = os.path.relpath(cache, folder / ".dvc")
    _write(folder / ".dvc" / "config", _ini({"core": core, "cache": {"dir": cache_dir}, _SECTION: shared}))
    _write(folder / ".dvc" / "config.local", _ini({_SECTION: local} if local else {}))


def configure_by_hand(folder: Path, remote: Remote) -> dict[str, str]:
    """Write, into `folder`, a configuration in which the remote is the default one; return how DVC finds it.

    It has the lowest rank of all, so whatever the project's and the user's own configurations say comes first.
    """
    options = {"url": remote.url, "verify": "true", "endpointurl": remote.endpoint, "region": remote.region}
    section = {key: value for key, value in options.items() if value}
    _write(folder / "config", _ini({"core": {"remote": _REMOTE}, _SECTION: section}))
    return {"DVC_SYSTEM_CONFIG_DIR": str(folder)}


def _ini(sections: Mapping[str, Mapping[str, str]]) -> str:
    lines = [
        [f"[{name}]", *(f"    {key} = {value}" for key, value in options.items())] for name, options in sections.items()
    ]
    return "\n".join(line for section in lines for line in section) + "\n"


def _code(project: Path, modules: Iterable[str]) -> set[str]:
    return {name for module in modules for start in (module, f"{module}.py") for name in _files(project, start)}


def _sources(project: Path, stages: Iterable[Stage]) -> set[str]:
    """Return the files inside the project that stages read and no stage makes."""
    outputs = {os.path.normpath(output) for stage in stages for output in stage.outputs}
    sources: set[str] = set()
    for stage in stages:
        for dependency in stage.dependencies:
            name = os.path.normpath(dependency)
            if name == _PARAMS or Path(name).is_absolute() or _is_within(name, outputs):
                continue
            if name.startswith(os.pardir):
                raise MissingSource(
                    f"{stage.name}: its dependency {dependency} lies outside of the project. "
                    "Give its absolute path, or move it in."
                )
            made_later = any(_is_within(output, {name}) for output in outputs)
            if not (project / name).exists() and not made_later:
                raise MissingSource(
                    f"{stage.name}: {dependency} does not exist in {project}. "
                    "Put it there, or correct the path in params.yaml or dvc.yaml."
                )
            sources.update(file for file in _files(project, name) if not _is_within(file, outputs))
    return sources


def _is_within(name: str, outputs: set[str]) -> bool:
    return name in outputs or any(str(parent) in outputs for parent in Path(name).parents)


def _files(project: Path, name: str) -> Iterator[str]:
    """Yield the file, or all files of the folder, as paths relative to the project."""
    start = project / name
    if start.is_file():
        yield name
    for path in sorted(start.rglob("*")):
        relative = path.relative_to(project)
        if path.is_file() and path.suffix != ".pyc" and not set(relative.parts) & set(_NEVER_COPIED):
            yield str(relative)


def _bring(source: Path, target: Path) -> None:
    if _same(source, target):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(target)
    partial.unlink(missing_ok=True)
    if source.stat().st_size >= LINKED_FROM_BYTES:
        try:
            partial.hardlink_to(source.resolve())
        except OSError:  # another file system, or one without links
            shutil.copy2(source, partial)
    else:
        shutil.copy2(source, partial)
    partial.replace(target)


def _same(source: Path, target: Path) -> bool:
    if not target.is_file():
        return False
    ours, theirs = target.stat(), source.stat()
    if (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino):
        return True
    return ours.st_size == theirs.st_size and filecmp.cmp(
        source, target, shallow=ours.st_mtime_ns == theirs.st_mtime_ns
    )


def _write(path: Path, text: str) -> None:
    """Write the file by renaming, unless it says this already."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial(path)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _partial(path: Path) -> Path:
    """Return the name under which a file is made first; fixed, so the next run uses up what a killed one left."""
    return path.with_name(f".{path.name}.partial")


def _recorded(folder: Path) -> set[str]:
    try:
        return set(json.loads((folder / _BROUGHT).read_text(encoding="utf-8")))
    except FileNotFoundError:
        return set()


def _record(folder: Path, names: Iterable[str]) -> None:
    _write(folder / _BROUGHT, json.dumps(sorted(names), indent=0))


def _release_locks_of_the_dead(folder: Path, group: str) -> None:
    """Remove DVC's list of readers and writers if none of them lives.

    DVC does so itself, but takes any process that has got the number of a dead one for a DVC.
    """
    entries = folder / ".dvc" / "tmp" / "rwlock"
    try:
        locks = json.loads(entries.read_text(encoding="utf-8") or "{}")
    except FileNotFoundError:
        return
    except json.JSONDecodeError:  # written half when its writer was killed
        locks = {}
    readers = [reader for paths in locks.get("read", {}).values() for reader in paths]
    for holder in (*readers, *locks.get("write", {}).values()):
        if _is_dvc(holder["pid"]):
            raise WorkspaceBusy(
                f"group '{group}': a DVC process ({holder['pid']}) is at work in {folder}. "
                "Wait for it to end, or stop it."
            )
    entries.unlink(missing_ok=True)


def _is_dvc(pid: int) -> bool:
    try:
        return any("dvc" in Path(part).name for part in psutil.Process(pid).cmdline())
    except psutil.Error:
        return False
