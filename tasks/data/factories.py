"""Data sets made by a function: `python -m tasks.data.factories FACTORY JSON_ARGUMENTS OUT_FOLDER`.

FACTORY is `package.module:function`. For each of train, validation and test, `function(split, **arguments)` returns
either `(inputs, labels)` or a `torch.utils.data.Dataset` of such pairs. Inputs are tensors or arrays `[n, …]` of
floating-point numbers, or of whole ones for tokens. Labels are class numbers from 0, `[n]`; those of train may be None.
Each split becomes the file `{split}.arrow`, see `tasks.data.examples`.

The random number generators of torch, numpy and Python are seeded before each call, so that the files are the same each
time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mtz_core.errors import MtzError
from tasks.data.layout import INPUT, LABEL, SPLITS
from tasks.faults import EXIT_TRY_AGAIN, ServiceFault
from tasks.files import whole_file

_BATCH_BYTES = 16 << 20


class InvalidDataset(MtzError):
    """The factory of a data set cannot be used, or does not return a data set."""


Batch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any] | None]


def recall_key(factory: str, arguments: Mapping[str, Any], project: Path) -> str:
    """Return a key for the files that a factory makes, without importing anything.

    The key covers the factory's name, its arguments and its module's file. Whatever else the factory reads should be
    named in its arguments.

    Args:
        factory: The function, as `package.module:function`.
        arguments: Its keyword arguments beside the split.
        project: The folder in which the module is looked up first.

    Returns:
        The key.

    Raises:
        InvalidDataset: The module does not exist.
    """
    code = hashlib.sha256(_module_file(factory, project).read_bytes()).hexdigest()
    return f"dataset {factory} {json.dumps(dict(arguments), sort_keys=True)} {code}"


def materialise(factory: str, arguments: Mapping[str, Any], folder: Path) -> None:
    """Write the file `{split}.arrow` of every split.

    Args:
        factory: The function, as `package.module:function`.
        arguments: Its keyword arguments beside the split.
        folder: The folder to write to.

    Raises:
        InvalidDataset: The factory fails, or does not return a data set.
    """
    function = _function(factory)
    for split in SPLITS:
        where = f"{factory}, split {split}"
        batches = _batches(where, _called(where, function, split, arguments))
        with whole_file(folder / f"{split}.arrow") as partial:
            _write(partial, where, batches, labelled=split != "train")


def _module_file(factory: str, project: Path) -> Path:
    name = factory.partition(":")[0]
    places: list[str] | None = [str(project), *sys.path]
    spec: ModuleSpec | None = None
    for end in range(1, name.count(".") + 2):
        spec = PathFinder.find_spec(".".join(name.split(".")[:end]), places)
        if spec is None:
            break
        places = list(spec.submodule_search_locations or ())
    if spec is None or spec.origin is None:
        raise InvalidDataset(
            f"{factory}: there is no module {name} in the project or the environment. Put its file there, or correct "
            "the name."
        )
    return Path(spec.origin)


def _function(factory: str) -> Callable[..., object]:
    module, _, attribute = factory.partition(":")
    try:
        function: Callable[..., object] = getattr(importlib.import_module(module), attribute)
    except Exception as error:  # a user's module may raise anything
        raise InvalidDataset(f"{factory} cannot be imported: {error!r}. Name it as package.module:function.") from error
    return function


def _called(where: str, function: Callable[..., object], split: str, arguments: Mapping[str, Any]) -> object:
    import torch  # imported here, since keys do not need it

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    try:
        return function(split, **arguments)
    except MtzError:
        raise
    except Exception as error:  # a user's factory may raise anything
        raise InvalidDataset(f"{where}: it failed with arguments {dict(arguments)}: {error!r}. Correct it.") from error


def _batches(where: str, given: object) -> Iterator[Batch]:
    if isinstance(given, tuple) and len(given) == 2:
        yield from _sliced(where, *given)
    elif hasattr(given, "__getitem__") and hasattr(given, "__len__"):
        yield from _collected(where, given)
    else:
        raise InvalidDataset(
            f"{where}: it gave {type(given).__name__}. Return (inputs, labels), or a torch Dataset of such pairs."
        )


def _sliced(where: str, inputs: object, labels: object) -> Iterator[Batch]:
    values, classes = _array(inputs), None if labels is None else _array(labels)
    if values.ndim < 2 or (classes is not None and classes.shape != values.shape[:1]):
        shapes = f"{list(values.shape)} and {None if classes is None else list(classes.shape)}"
        raise InvalidDataset(
            f"{where}: inputs and labels have shapes {shapes}, not [n, …] and [n]. Correct the factory."
        )
    rows = _rows(values[:1])
    for start in range(0, len(values), rows):
        part = slice(start, start + rows)
        yield values[part], None if classes is None else classes[part]


def _collected(where: str, dataset: Any) -> Iterator[Batch]:
    inputs: list[np.ndarray[Any, Any]] = []
    labels: list[Any] = []
    for index in range(len(dataset)):
        try:
            value, label = dataset[index]
        except Exception as error:  # a user's data set may raise anything
            raise InvalidDataset(
                f"{where}: item {index} is no pair of input and label: {error!r}. Correct it."
            ) from error
        inputs.append(_array(value))
        labels.append(label)
        if inputs[-1].shape != inputs[0].shape or inputs[0].ndim == 0 or (label is None) != (labels[0] is None):
            raise InvalidDataset(f"{where}: item {index} has another shape, or other labels, than those before it.")
        if len(inputs) == _rows(inputs[0]):
            yield _stacked(inputs, labels)
            inputs, labels = [], []
    if inputs:
        yield _stacked(inputs, labels)


def _stacked(inputs: list[np.ndarray[Any, Any]], labels: list[Any]) -> Batch:
    return np.stack(inputs), None if labels[0] is None else np.array([_array(label) for label in labels])


def _array(values: object) -> np.ndarray[Any, Any]:
    import torch

    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _rows(example: np.ndarray[Any, Any]) -> int:
    """Return how many examples make a batch."""
    return max(1, _BATCH_BYTES // max(1, 4 * example.size))


def _write(path: Path, where: str, batches: Iterator[Batch], labelled: bool) -> None:
    writer: pa.ipc.RecordBatchFileWriter | None = None
    schema: pa.Schema = None
    row = 0
    for inputs, labels in batches:
        _check(where, inputs, labels, row, labelled)
        values = np.ascontiguousarray(inputs, np.float32 if np.issubdtype(inputs.dtype, np.floating) else np.int64)
        columns = {INPUT: pa.FixedShapeTensorArray.from_numpy_ndarray(values)}
        if labels is not None:
            columns[LABEL] = pa.array(labels.astype(np.int64))
        batch = pa.record_batch(columns)
        if writer is None:
            schema = batch.schema
            writer = pa.ipc.new_file(path, schema)
        if batch.schema != schema:
            raise InvalidDataset(f"{where}: example {row} has another shape, or other labels, than those before it.")
        writer.write_batch(batch)
        row += len(inputs)
    if writer is None:
        raise InvalidDataset(f"{where}: it gave no example. Give at least one.")
    writer.close()


def _check(
    where: str, inputs: np.ndarray[Any, Any], labels: np.ndarray[Any, Any] | None, row: int, labelled: bool
) -> None:
    if not np.issubdtype(inputs.dtype, np.floating) and not np.issubdtype(inputs.dtype, np.integer):
        raise InvalidDataset(f"{where}: inputs are {inputs.dtype}, not numbers. Convert them.")
    finite = np.isfinite(inputs).all(axis=tuple(range(1, inputs.ndim)))
    if not finite.all():
        bad = row + int(np.flatnonzero(~finite)[0])
        raise InvalidDataset(f"{where}: example {bad} has NaN or infinite values. Correct it or leave it out.")
    if labels is None:
        if labelled:
            raise InvalidDataset(f"{where}: it has no labels, and errors are measured on it. Give them.")
    elif labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InvalidDataset(f"{where}: labels are no class numbers from 0, as integers. Correct the factory.")


def main(arguments: list[str]) -> int:
    """Write a data set to files, print any error as one line, and return the exit status of a stage."""
    if len(arguments) != 3:
        print("usage: python -m tasks.data.factories FACTORY JSON_ARGUMENTS OUT_FOLDER", file=sys.stderr)
        return 2
    factory, given, folder = arguments
    try:
        materialise(factory, json.loads(given), Path(folder))
    except (MtzError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_TRY_AGAIN if isinstance(error, ServiceFault) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
