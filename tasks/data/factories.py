"""Data sets made by a function: `python -m tasks.data.factories FACTORY JSON_ARGUMENTS OUT_FOLDER`.

FACTORY is `package.module:function`. For each of train, validation and test, `function(split, **arguments)` returns
either `(inputs, labels)` or a `torch.utils.data.Dataset` of such pairs. Inputs are tensors or arrays `[n, …]` of
floating-point numbers, or of whole ones for tokens; several are a dict by the names of the network's inputs, and may be
masks. Labels are class numbers from 0, `[n]`, or numbers `[n, …]`; those of several outputs are a dict by name. None
are None. Each split becomes the file `{split}.arrow`, see `tasks.data.examples`.

The random number generators of torch, numpy and Python are seeded before each call, so that the files are the same each
time.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mtz_core.errors import MtzError
from tasks.data.layout import IMAGE, INPUT, LABEL, LABEL_OF, SPLITS
from tasks.faults import EXIT_TRY_AGAIN, ServiceFault
from tasks.files import whole_file

_BATCH_BYTES = 16 << 20


class InvalidDataset(MtzError):
    """The factory of a data set cannot be used, or does not return a data set."""


Array = np.ndarray[Any, Any]
Batch = tuple[dict[str, Array], dict[str, Array]]
"""Inputs and labels by the names of their columns."""


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
            _write(partial, where, batches)


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


def _sliced(where: str, given: object, labels: object) -> Iterator[Batch]:
    inputs, known = _columns(where, given, labels)
    sizes = {values.shape[:1] for values in (*inputs.values(), *known.values())}
    if any(values.ndim < 2 for values in inputs.values()) or len(sizes) != 1 or () in sizes:
        raise InvalidDataset(
            f"{where}: inputs and labels have shapes {_shapes(inputs)} and {_shapes(known)}, not [n, …] and [n] or "
            "[n, …]. Correct the factory."
        )
    rows = _rows(values[:1] for values in inputs.values())
    for start in range(0, len(next(iter(inputs.values()))), rows):
        part = slice(start, start + rows)
        yield ({name: values[part] for name, values in inputs.items()}, {n: own[part] for n, own in known.items()})


def _collected(where: str, dataset: Any) -> Iterator[Batch]:
    items: list[Batch] = []
    for index in range(len(dataset)):
        try:
            value, label = dataset[index]
        except Exception as error:  # a user's data set may raise anything
            raise InvalidDataset(
                f"{where}: item {index} is no pair of input and label: {error!r}. Correct it."
            ) from error
        items.append(_columns(where, value, label))
        first, last = ([{name: own.shape for name, own in part.items()} for part in items[i]] for i in (0, -1))
        if first != last or () in last[0].values():
            raise InvalidDataset(f"{where}: item {index} has another shape, or other labels, than those before it.")
        if len(items) == _rows(items[0][0].values()):
            yield _stacked(items)
            items = []
    if items:
        yield _stacked(items)


def _stacked(items: list[Batch]) -> Batch:
    inputs, labels = ({n: np.stack([item[i][n] for item in items]) for n in items[0][i]} for i in (0, 1))
    return inputs, labels


def _columns(where: str, given: object, labels: object) -> Batch:
    """Return inputs and labels by the names of their columns."""
    inputs = {str(n): _array(own) for n, own in given.items()} if isinstance(given, Mapping) else {INPUT: _array(given)}
    for name in inputs:
        if name in (IMAGE, LABEL) or name.startswith(LABEL_OF) or (name == INPUT and len(inputs) > 1):
            raise InvalidDataset(f"{where}: no input can be called {name!r}, which is another column. Rename it.")
    if isinstance(labels, Mapping):
        return inputs, {f"{LABEL_OF}{name}": _array(own) for name, own in labels.items()}
    return inputs, {} if labels is None else {LABEL: _array(labels)}


def _array(values: object) -> Array:
    import torch

    return values.detach().cpu().numpy() if isinstance(values, torch.Tensor) else np.asarray(values)


def _shapes(arrays: Mapping[str, Array]) -> str:
    """Return shapes in words, of several with their names."""
    shapes = {name: list(values.shape) for name, values in arrays.items()}
    if len(shapes) > 1:
        return ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return str(next(iter(shapes.values()), None))


def _rows(examples: Iterable[Array]) -> int:
    """Return how many examples make a batch, by the inputs of one."""
    return max(1, _BATCH_BYTES // max(1, 4 * sum(example.size for example in examples)))


def _write(path: Path, where: str, batches: Iterator[Batch]) -> None:
    writer: pa.ipc.RecordBatchFileWriter | None = None
    schema: pa.Schema = None
    row = 0
    for inputs, labels in batches:
        for name, values in inputs.items():
            _check_input(where, name, values, row)
        for values in labels.values():
            _check_labels(where, values, row)
        batch = pa.record_batch({name: _column(values) for name, values in (inputs | labels).items()})
        if writer is None:
            schema = batch.schema
            writer = pa.ipc.new_file(path, schema)
        if batch.schema != schema:
            raise InvalidDataset(f"{where}: example {row} has another shape, or other labels, than those before it.")
        writer.write_batch(batch)
        row += len(batch)
    if writer is None:
        raise InvalidDataset(f"{where}: it gave no example. Give at least one.")
    writer.close()


def _column(values: Array) -> pa.Array:
    """Return values as a column: masks as lists, which can hold truth values, anything else as tensors or numbers."""
    if values.dtype == bool:
        return pa.array(values.tolist())
    values = np.ascontiguousarray(values, np.float32 if np.issubdtype(values.dtype, np.floating) else np.int64)
    return pa.array(values) if values.ndim == 1 else pa.FixedShapeTensorArray.from_numpy_ndarray(values)


def _check_input(where: str, name: str, values: Array, row: int) -> None:
    if not _is_number(values) and (name == INPUT or values.dtype != bool):
        raise InvalidDataset(f"{where}: inputs are {values.dtype}, not numbers. Convert them.")
    _check_finite(where, values, row)


def _check_labels(where: str, values: Array, row: int) -> None:
    classes = np.issubdtype(values.dtype, np.integer) and values.ndim == 1
    if not _is_number(values) or (classes and values.min() < 0):
        raise InvalidDataset(
            f"{where}: labels are no class numbers from 0, as integers, and no other numbers. Correct the factory."
        )
    _check_finite(where, values, row)


def _check_finite(where: str, values: Array, row: int) -> None:
    finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    if not finite.all():
        bad = row + int(np.flatnonzero(~finite)[0])
        raise InvalidDataset(f"{where}: example {bad} has NaN or infinite values. Correct it or leave it out.")


def _is_number(values: Array) -> bool:
    return np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)


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
