"""A snapshot: every file that a pipeline reads, by its content, and its parameters: all that its results depend on.

Where the files came from, who runs the pipeline, and when, is no part of it: the same snapshot gives the same results
on any machine that has the contents. Its own digest is the *fingerprint* of the work.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from flows.spec.fleet_file import FLEET_WIDE, GroupPlan
from mtz_core.errors import MtzError
from tasks.sources import Access, resolve_data, resolve_program, resolve_weights
from tasks.storage.contents import Contents

CODE = ("mtz_core", "tasks")
"""Packages that `python -m tasks` imports in every stage."""

PIPELINE = "dvc.yaml"
PARAMS = "params.yaml"

_SETTINGS_OF_DVC = (".dvcignore",)
_NEVER_TAKEN = ("__pycache__", ".git", ".DS_Store")
_PLACES = ("networks", "data")
"""Folders for the files of models whose sources the fleet declares."""
_TEMPLATE = re.compile(r"\$\{([^}]+)\}")


class MissingSource(MtzError):
    """A file that a stage reads does not exist."""


class InvalidPipeline(MtzError):
    """The file dvc.yaml cannot be read."""


@dataclass(frozen=True)
class Snapshot:
    """The files and parameters of a workspace.

    Attributes:
        files: The SHA-256 of each file, by its path in the workspace.
        params: The content of params.yaml, without the settings that do not change results, such as those of the
            storage.
    """

    files: Mapping[str, str]
    params: Mapping[str, Any]

    def content(self) -> bytes:
        """Return the snapshot as the JSON whose digest is the fingerprint."""
        return json.dumps({"files": self.files, "params": self.params}, sort_keys=True, indent=0).encode()

    def keep(self, contents: Contents) -> str:
        """Put the snapshot into the contents; return its fingerprint."""
        return contents.add_bytes(self.content())

    @classmethod
    def load(cls, contents: Contents, fingerprint: str) -> "Snapshot":
        """Read a snapshot.

        Args:
            contents: The store of contents.
            fingerprint: The snapshot's fingerprint.

        Returns:
            The snapshot.

        Raises:
            MissingContent: It is neither here nor in the storage.
            StorageError: The storage cannot be used.
        """
        return cls(**json.loads(contents.read(fingerprint)))


class Project:
    """The files of a project, each read at most once for all its groups.

    Args:
        root: The folder of the project.
        contents: The store that receives the files.

    Attributes:
        root: The folder of the project.
    """

    def __init__(self, root: Path, contents: Contents) -> None:
        self.root = root
        self._contents = contents
        self._digests: dict[str, str] = {}

    def group(self, plan: GroupPlan, access: Access) -> Snapshot:
        """Take the snapshot of a group, its models' sources included.

        Args:
            plan: The group.
            access: How the models' sources are fetched.

        Returns:
            The snapshot.

        Raises:
            MissingSource: The project lacks a file.
            InvalidPipeline: The file dvc.yaml is damaged.
            SourceError: A model's source cannot be fetched.
            ServiceFault: A service failed in a way that may pass by itself.
        """
        return self.take(plan.content, sources_of(plan, access), modules_of(plan))

    def model(self, plan: GroupPlan, access: Access) -> Snapshot:
        """Take the snapshot of those stages that a model's statistics need; errors are those of `group`."""
        snapshot = self.group(plan, access)
        stages = {name: stage for name, stage in self._pipeline["stages"].items() if "foreach" in stage}
        trimmed = yaml.safe_dump({"stages": stages}, sort_keys=False, allow_unicode=True)
        return Snapshot({**snapshot.files, PIPELINE: self._contents.add_bytes(trimmed.encode())}, snapshot.params)

    def take(
        self, params: Mapping[str, Any], placed: Mapping[str, str] | None = None, modules: Iterable[str] = CODE
    ) -> Snapshot:
        """Take the snapshot of the pipeline under some parameters.

        Args:
            params: The parameters.
            placed: The SHA-256 of files that come from elsewhere, by their path in the workspace; the folders for
                models' files are then not the project's.
            modules: Modules in the project that the stages import, whether or not dvc.yaml lists all of their files.

        Returns:
            The snapshot.

        Raises:
            MissingSource: The project lacks a file.
            InvalidPipeline: The file dvc.yaml is damaged.
        """
        names = {PIPELINE, *(name for name in _SETTINGS_OF_DVC if (self.root / name).exists())}
        names |= {name for module in modules for start in (module, f"{module}.py") for name in self._files(start)}
        names |= self._sources(params, skipped=_PLACES if placed else ())
        files = {**{name: self._digest(name) for name in names}, **(placed or {})}
        kept = {name: block for name, block in params.items() if name not in FLEET_WIDE}
        return Snapshot(dict(sorted(files.items())), kept)

    @cached_property
    def _pipeline(self) -> dict[str, Any]:
        file = self.root / PIPELINE
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
            assert isinstance(content["stages"], dict)
        except (OSError, yaml.YAMLError, KeyError, TypeError, AssertionError) as error:
            raise InvalidPipeline(f"{file} cannot be read: {' '.join(str(error).split())}. Restore it.") from error
        return dict(content)

    def _digest(self, name: str) -> str:
        if name not in self._digests:
            self._digests[name] = self._contents.add(self.root / name)
        return self._digests[name]

    def _sources(self, params: Mapping[str, Any], skipped: Iterable[str]) -> set[str]:
        """Return the files inside the project that stages read and no stage makes."""
        # Stages of a group read the folders for models' files as a whole: of these, what its parameters name is taken.
        stages = [expanded for stage in self._pipeline["stages"].values() for expanded in _expanded(stage, params)]
        outputs = {os.path.normpath(path) for stage in stages for path in _outputs(stage)}
        named = {os.path.normpath(text) for text in _texts(params) if text}
        sources: set[str] = set()
        for name in {os.path.normpath(str(path)) for stage in stages for path in stage.get("deps", ())}:
            if name == PARAMS or Path(name).is_absolute() or Path(name).parts[0] in skipped or _within(name, outputs):
                continue
            if name.startswith(os.pardir):
                raise MissingSource(
                    f"dvc.yaml: the dependency {name} lies outside of the project. Give its absolute path, "
                    "or move it in."
                )
            made_later = any(_within(output, {name}) for output in outputs)
            if not (self.root / name).exists() and not made_later:
                raise MissingSource(
                    f"{name} does not exist in {self.root}. Put it there, or correct the path in params.yaml "
                    "or dvc.yaml."
                )
            files = (file for file in self._files(name) if not _within(file, outputs))
            sources.update(file for file in files if name not in _PLACES or _within(file, named))
        return sources

    def _files(self, name: str) -> Iterator[str]:
        """Yield the file, or all files of the folder, as paths relative to the project."""
        start = self.root / name
        if start.is_file():
            yield name
        for path in start.rglob("*"):
            relative = path.relative_to(self.root)
            if path.suffix != ".pyc" and not set(relative.parts) & set(_NEVER_TAKEN) and path.is_file():
                yield str(relative)


def sources_of(plan: GroupPlan, access: Access) -> dict[str, str]:
    """Put the sources of the models that the fleet declares into the contents.

    Args:
        plan: The group.
        access: How the sources are fetched.

    Returns:
        The SHA-256 of each file, by its path in the workspace.

    Raises:
        SourceError: A source cannot be fetched.
        ServiceFault: A service failed in a way that may pass by itself.
        InvalidProgram: An exported program cannot be read.
    """
    placed: dict[str, str] = {}
    for name, model in plan.models.items():
        where = f"models.{name}"
        if model.program is not None:
            placed[f"networks/{name}.pt2"] = resolve_program(f"{where}.program", model.program, access)
        if model.source is not None:
            placed[f"networks/{name}.safetensors"] = resolve_weights(f"{where}.source", model.source, access)
        elif model.program is not None:
            placed[f"networks/{name}.safetensors"] = weights_of_program(placed[f"networks/{name}.pt2"], access.contents)
        spec = model.data if isinstance(model.data, str) else model.data.model_dump()
        for file, digest in resolve_data(f"{where}.data", spec, access).items():
            placed[f"data/{name}/{file}"] = digest
    return placed


def weights_of_program(digest: str, contents: Contents) -> str:
    """Put the weights of an exported program into the contents, as safetensors.

    Args:
        digest: The SHA-256 of the program.
        contents: The store with the program, which receives the weights.

    Returns:
        The SHA-256 of the weights.

    Raises:
        InvalidProgram: The program cannot be read.
    """
    key = f"weights of program {digest}"
    known = contents.recall(key)
    if known is None:
        from safetensors.torch import save_file

        from tasks.models.programs import extract_weights

        known = contents.add_made(lambda file: save_file(extract_weights(contents.path(digest)), file))
        contents.remember(key, known)
    return known


def modules_of(plan: GroupPlan) -> tuple[str, ...]:
    """Return the top-level modules of the networks' factories, which may be the user's own, beside the project's."""
    own = {model.network.partition(":")[0].partition(".")[0] for model in plan.params.models.values()}
    return tuple(sorted({*CODE, *own}))


def _expanded(stage: Mapping[str, Any], params: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the stages that a stage of dvc.yaml stands for, with its templates filled in."""
    if "foreach" not in stage:
        yield _filled(stage, params)
        return
    items = _filled(stage["foreach"], params)
    pairs = items.items() if isinstance(items, Mapping) else enumerate(items)
    for key, item in pairs:
        yield _filled(stage["do"], {**params, "key": key, "item": item})


def _filled(value: Any, names: Mapping[str, Any]) -> Any:
    if isinstance(value, Mapping):
        return {_filled(key, names): _filled(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [_filled(inner, names) for inner in value]
    if not isinstance(value, str):
        return value
    if whole := _TEMPLATE.fullmatch(value):
        return _lookup(whole[1], names)
    return _TEMPLATE.sub(lambda match: str(_lookup(match[1], names)), value)


def _lookup(path: str, names: Mapping[str, Any]) -> Any:
    found: Any = names
    for part in path.strip().split("."):
        try:
            found = found[part]
        except (KeyError, TypeError):
            raise InvalidPipeline(
                f"dvc.yaml: ${{{path}}} is not in params.yaml. Add it, or correct dvc.yaml."
            ) from None
    return found


def _texts(value: Any) -> Iterator[str]:
    """Yield every text in nested parameters."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping | list):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from _texts(part)


def _outputs(stage: Mapping[str, Any]) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        for entry in stage.get(kind, ()):
            yield from entry if isinstance(entry, Mapping) else [entry]


def _within(name: str, folders: set[str]) -> bool:
    return name in folders or any(str(parent) in folders for parent in Path(name).parents)
