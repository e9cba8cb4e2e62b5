"""Sources of a model's files: a location becomes the digest of its content in the store of contents.

A location is one of these:

    networks/digits.safetensors          a file of the project
    s3://bucket/key                      an object at the storage's endpoint, with the same credentials
    models:/NAME@ALIAS, models:/NAME/3   a version in the MLflow registry: its one .safetensors file, or for a program
                                         its one .pt2 file, which MLflow's flavour for torch writes
    models:/NAME@ALIAS#PATH              that file of it

Weights may be several files, too. Then the location is their index, or their folder; `s3://bucket/prefix/` ends with a
slash. They become one file.
"""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtz_core.errors import MtzError
from tasks.data.factories import recall_key
from tasks.data.layout import SAVED, SAVED_STATE, SPLITS, SUFFIXES
from tasks.faults import EXIT_TRY_AGAIN, ServiceFault
from tasks.files import InvalidArtifact
from tasks.models.shards import INDEX, WEIGHTS, shards_of
from tasks.registry import mlflow_client
from tasks.registry.mlflow_client import ModelVersion, TrackingError, TrackingRefused
from tasks.storage.contents import Contents, SourceChanged
from tasks.storage.s3 import NoSuchObject, Storage, StorageError, StorageRefused

_S3, _REGISTRY = "s3://", "models:/"
_PROGRAM = ".pt2"
_ATTEMPTS = 3
_CALIBRATION = "calibration"


class SourceError(MtzError):
    """A source cannot be fetched as it is named; trying again does not help."""


@dataclass(frozen=True)
class Access:
    """Everything that is needed to resolve a source.

    Attributes:
        project: The project's folder.
        home: The folder of its runtime state.
        contents: The store that receives the files.
        store: The storage whose endpoint and credentials are used for `s3://` locations.
        registry: The settings of the MLflow registry for `models:/` locations.
    """

    project: Path
    home: Path
    contents: Contents
    store: Storage
    registry: mlflow_client.TrackingSettings


def resolve_file(name: str, location: str, access: Access) -> str:
    """Put a file into the contents; files that were fetched before and have not changed are not fetched again.

    Args:
        name: The name of the setting for error messages, such as `models.digits.weights`.
        location: A path in the project, `s3://bucket/key` or `models:/name@alias`.
        access: Where to look, and where to put the file.

    Returns:
        The SHA-256 of the content, hexadecimal.

    Raises:
        SourceError: The location is wrong, or its file cannot be fetched.
        ServiceFault: A service failed in a way that may pass by itself.
    """
    with _errors_named(f"{name}: {location}"):
        return _file(location, access, WEIGHTS)


def resolve_program(name: str, location: str, access: Access) -> str:
    """Put an exported program into the contents, as `resolve_file` does; of a registered version, its `.pt2` file."""
    with _errors_named(f"{name}: {location}"):
        return _file(location, access, _PROGRAM)


def resolve_weights(name: str, location: str, access: Access) -> str:
    """Put a network's weights into the contents as one file.

    Args:
        name: The name of the setting for error messages.
        location: As for `resolve_file`; or the index of several files, or a folder of them.
        access: Where to look, and where to put the file.

    Returns:
        The SHA-256 of a safetensors file with all weights.

    Raises:
        SourceError: The location is wrong, a file cannot be fetched, or the files do not belong together.
        ServiceFault: A service failed in a way that may pass by itself.
    """
    with _errors_named(f"{name}: {location}"):
        folder, _, last = location.rpartition("/")
        if location.startswith(_REGISTRY):
            return _file(location, access, WEIGHTS)
        if last.endswith(INDEX):
            return _joined(_Folder.at(folder, access), last, access)
        if (location.startswith(_S3) and not last) or (access.project / location).is_dir():
            return _joined(_Folder.at(location, access), None, access)
        return _file(location, access, WEIGHTS)


def resolve_data(name: str, spec: str | Mapping[str, Any], access: Access) -> dict[str, str]:
    """Put a model's data into the contents.

    Args:
        name: The name of the setting for error messages.
        spec: The location of a folder (of the project, or `s3://bucket/prefix/`); or `{train: file, validation: file,
            test: file}`, with `calibration` as another word for `train`; or `{factory: "package.module:function",
            arguments: {…}}`, see `tasks.data.factories`.
        access: Where to look, and where to put the files.

    Returns:
        The SHA-256 of each file, by its name: `train`, `validation` and `test` with the suffix `.parquet` or `.arrow`,
            or the files of folders of these names.

    Raises:
        SourceError: The specification is wrong, or a file cannot be fetched.
        ServiceFault: A service failed in a way that may pass by itself.
    """
    if isinstance(spec, str):
        files = _folder(name, spec, access)
    elif "factory" in spec:
        return _made(name, spec, access)
    else:
        files = _named(name, spec)
    return {file: resolve_file(name, location, access) for file, location in files.items()}


def _file(location: str, access: Access, suffix: str) -> str:
    if location.startswith(_S3):
        return _object(*_bucket_and_key(location), access)
    if location.startswith(_REGISTRY):
        return _registered(location, access, suffix)
    if "://" in location:
        raise SourceError("is no location. Give a path in the project, s3://bucket/key or models:/name@alias.")
    return _local(access.project / location, access)


@dataclass(frozen=True)
class _Folder:
    """The files of a folder, wherever it lies.

    Attributes:
        names: Their names.
        fetch: Puts the file of a name into the contents, and returns its digest.
    """

    names: Sequence[str]
    fetch: Callable[[str], str]

    @classmethod
    def at(cls, location: str, access: Access) -> _Folder:
        """Return a folder of the project or of S3."""
        if location.startswith(_S3):
            bucket, prefix = _bucket_and_key(location)
            names = [name for name in access.store.elsewhere(bucket).names(prefix) if "/" not in name]
            return cls(names, lambda name: _object(bucket, f"{prefix}/{name}", access))
        folder = access.project / location
        names = [file.name for file in folder.iterdir()] if folder.is_dir() else []
        return cls(names, lambda name: _local(folder / name, access))


def _joined(folder: _Folder, index: str | None, access: Access) -> str:
    """Return the digest of one file with the weights of several: those that an index names, or all of a folder."""
    from tasks.models.weights import join_weights  # imports torch

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        fetched: dict[str, str] = {}

        def fetch(names: Iterable[str]) -> None:
            for name in names:
                fetched[name] = folder.fetch(name)
                (place / name).symlink_to(access.contents.path(fetched[name]).absolute())

        try:
            if index is None:
                fetch(name for name in folder.names if name.endswith((WEIGHTS, INDEX)))
            else:
                fetch([index])
                fetch(name for name in sorted(set(shards_of(place / index).values())) if name in folder.names)
            known = f"weights of {json.dumps(fetched, sort_keys=True)}"
            digest = access.contents.recall(known)
            if digest is None:
                digest = access.contents.add_made(lambda partial: join_weights(place, partial))
                access.contents.remember(known, digest)
        except InvalidArtifact as error:  # it speaks of the temporary folder
            raise SourceError(re.sub(rf"{re.escape(temporary)}(/|: | )", "", str(error))) from error
    return digest


def _local(path: Path, access: Access) -> str:
    if path.is_dir():
        raise SourceError("is a folder. Name a file in it.")
    try:
        return access.contents.add(path)
    except FileNotFoundError as error:
        raise SourceError(f"there is no such file in {access.project}. Put it there, or correct the path.") from error


def _object(bucket: str, key: str, access: Access) -> str:
    place = access.store.elsewhere(bucket)
    version = place.version(key)
    for _ in range(_ATTEMPTS):
        if version is None:
            raise SourceError("there is no such object, or no such bucket. Put it there, or correct the location.")
        known = f"{access.store.endpoint or 'aws'} {place.url(key)} {version}"
        if (digest := access.contents.recall(known)) is not None:
            return digest
        digest = access.contents.add_made(lambda partial: place.get(key, partial))
        if (after := place.version(key)) == version:
            access.contents.remember(known, digest)
            return digest
        version = after
    raise SourceError("changes while it is read. Store it once, then run again.")


def _registered(location: str, access: Access, suffix: str) -> str:
    reference, _, file = location.removeprefix(_REGISTRY).partition("#")
    found = re.fullmatch(r"(?P<name>[^/@#]+)(/(?P<number>\d+)|@(?P<alias>[^/@#]+))", reference)
    if not found:
        raise SourceError(
            "names no version. Write models:/name@alias or models:/name/3, and #path for one of its files."
        )
    wanted = int(found["number"]) if found["number"] else found["alias"]
    version = mlflow_client.find_model(access.registry, access.home, found["name"], wanted)
    registry = re.sub(r"//[^/@]*@", "//", mlflow_client.tracking_uri(access.registry, access.home))
    known = f"{registry} models:/{version.name}/{version.number} {version.location} {file or suffix}"
    digest = access.contents.recall(known)
    if digest is None:
        digest = _fetched(version, file, access, suffix)
        access.contents.remember(known, digest)
    return digest


def _fetched(version: ModelVersion, file: str, access: Access, suffix: str) -> str:
    """Return the digest of a version's file, fetched with our own S3 client if it lies in S3."""
    if version.location.startswith(_S3):
        bucket, prefix = _bucket_and_key(version.location)
        place = access.store.elsewhere(bucket)
        files = place.names(prefix)
    else:
        files = mlflow_client.model_files(access.registry, access.home, version)

    def fetch(wanted: str) -> str:
        if wanted not in files:
            raise SourceError(f"version {version.number} has no file {wanted}. It has {', '.join(files) or 'none'}.")
        if version.location.startswith(_S3):
            return _object(bucket, f"{prefix}/{wanted}", access)
        return access.contents.add_made(
            lambda partial: mlflow_client.fetch_model_file(access.registry, access.home, version, wanted, partial)
        )

    file = file or _only(version, files, suffix)
    folder, _, last = file.rpartition("/")
    if suffix != WEIGHTS or not last.endswith(INDEX):
        return fetch(file)
    beside = [name.removeprefix(f"{folder}/") for name in files if name.rpartition("/")[0] == folder]
    return _joined(_Folder(beside, lambda name: fetch(f"{folder}/{name}".lstrip("/"))), last, access)


def _only(version: ModelVersion, files: Sequence[str], suffix: str) -> str:
    """Return the one file of a version that ends in a suffix, or the index of several such files."""
    found = [file for file in files if file.endswith(suffix)]
    indices = [file for file in files if suffix == WEIGHTS and file.endswith(INDEX)]
    if len(found) == 1 or len(indices) == 1:
        return [*indices, *found][0]
    has = ", ".join(found) or f"none among {len(files)} files"
    reference = f"models:/{version.name}/{version.number}"
    programs = [file for file in files if file.endswith(_PROGRAM)]
    if suffix == WEIGHTS and programs and not found:
        raise SourceError(
            f"version {version.number} has no {WEIGHTS} file, but an exported program, {programs[0]}. Write program: "
            f"{reference}#{programs[0]} in place of source and network."
        )
    what = "a state_dict" if suffix == WEIGHTS else "an exported program (MLflow's serialization_format='pt2')"
    raise SourceError(
        f"version {version.number} should have one {suffix} file, {what}, and has {has}. Register one, or "
        f"name it: {reference}#path/in/artifacts{suffix}."
    )


def _folder(name: str, location: str, access: Access) -> dict[str, str]:
    """Return the location of each split's file in a folder."""
    with _errors_named(f"{name}: {location}"):
        if location.startswith(_S3):
            bucket, prefix = _bucket_and_key(location)
            there = {name for name in access.store.elsewhere(bucket).names(prefix) if name.count("/") < 2}
        else:
            folder = access.project / location
            if not folder.is_dir():
                raise SourceError(
                    f"there is no such folder in {access.project}. Put the data there, or correct the path."
                )
            there = {file.relative_to(folder).as_posix() for depth in ("*", "*/*") for file in folder.glob(depth)}
        files: list[str] = []
        for split in SPLITS:
            wanted = [f"{split}{suffix}" for suffix in SUFFIXES]
            found = [file for file in wanted if file in there]
            inner = {file.removeprefix(f"{split}/") for file in there if file.startswith(f"{split}/")}
            saved = sorted(f"{split}/{file}" for file in inner if file.endswith(SAVED) or file == SAVED_STATE)
            if len(found) + bool(saved) != 1:
                has = " and ".join([*found, *([f"{split}/"] if saved else [])])
                raise SourceError(
                    f"has {has or 'no file'} for {split}. Have one: {' or '.join(wanted)}, or a folder {split}/ of "
                    f"{SAVED} files."
                )
            files += [*found, *saved]
    return {file: f"{location.rstrip('/')}/{file}" for file in files}


def _named(name: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """Return the location of each split's file as given in a mapping."""
    given = {"train" if key == _CALIBRATION else key: location for key, location in spec.items()}
    if set(given) != set(SPLITS) or len(given) != len(spec):
        raise SourceError(
            f"{name}: names the files {', '.join(map(str, spec)) or 'none'}. Name train (or {_CALIBRATION}), "
            "validation and test, or give a folder, or a factory."
        )
    files = {}
    for split in SPLITS:
        suffix = Path(str(given[split])).suffix
        if suffix not in SUFFIXES:
            raise SourceError(f"{name}: {given[split]}, for {split}, should end with {' or '.join(SUFFIXES)}.")
        files[f"{split}{suffix}"] = str(given[split])
    return files


def _made(name: str, spec: Mapping[str, Any], access: Access) -> dict[str, str]:
    """Return the files of a data set that a factory makes, once and in a process of its own."""
    unknown = set(spec) - {"factory", "arguments"}
    if unknown:
        raise SourceError(f"{name}: {min(unknown)!r} is unknown beside a factory. Known: factory, arguments.")
    factory, arguments, contents = str(spec["factory"]), spec.get("arguments") or {}, access.contents
    with _errors_named(f"{name}: {factory}"):
        known = recall_key(factory, arguments, access.project)
        recalled = contents.recall(known)
        if recalled is not None:
            files: dict[str, str] = json.loads(contents.read(recalled))
            if all(contents.has(digest) for digest in files.values()):
                return files
        with tempfile.TemporaryDirectory() as folder:
            _materialise(factory, arguments, Path(folder), access.project)
            files = {file.name: contents.add(file) for file in sorted(Path(folder).iterdir())}
        contents.remember(known, contents.add_bytes(json.dumps(files).encode()))
    return files


def _materialise(factory: str, arguments: Mapping[str, Any], folder: Path, project: Path) -> None:
    command = [sys.executable, "-m", "tasks.data.factories", factory, json.dumps(arguments), str(folder)]
    paths = (str(Path(__file__).resolve().parents[1]), os.environ.get("PYTHONPATH"))
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, cwd=project, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}."]
        errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines
        raise (ServiceFault if done.returncode == EXIT_TRY_AGAIN else SourceError)(errors[-1])


def _bucket_and_key(location: str) -> tuple[str, str]:
    bucket, _, key = location.removeprefix(_S3).partition("/")
    if not bucket or not key.strip("/"):
        raise SourceError("names no object. Write s3://bucket/key.")
    return bucket, key.strip("/")


@contextmanager
def _errors_named(what: str) -> Iterator[None]:
    """Name the source in errors that the block raises."""
    try:
        yield
    except NoSuchObject as error:
        raise SourceError(f"{what}: there is no such object. Put it there, or correct the location.") from error
    except (StorageRefused, TrackingRefused, SourceChanged, SourceError) as error:
        raise SourceError(f"{what}: {error}") from error
    except (StorageError, TrackingError, ServiceFault) as error:
        raise type(error)(f"{what}: {error}") from error
    except MtzError as error:
        raise SourceError(f"{what}: {error}") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise SourceError(f"{what}: {error.strerror or error}. Make it readable, then run again.") from error
