"""Reading examples: a table per split with labels and either encoded images, tensors or tokens.

A split is `{split}.parquet`; `{split}.arrow`, an Arrow IPC file or stream; or a folder `{split}` of such streams, as
`save_to_disk` of Hugging Face datasets writes it. Its columns are

    image: struct<bytes, path>            encoded images, which become values from 0 to 1, or
    input: fixed_shape_tensor or lists    anything else, taken as it is: floating-point numbers, or tokens, or
    NAME: the same                        one of several inputs, by its name in the network's forward pass
    label: int64                          class numbers from 0; or numbers, one or several for each example; or none
    label.NAME: the same                  those of one of several outputs, by its name

Tables are read in pieces, so they may be larger than memory where only a sample or a batch at a time is wanted.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from jaxtyping import Int64

from mtz_core.batches import NamedTensors
from mtz_core.errors import MtzError
from tasks.data.images import InvalidImage, pixels_of
from tasks.data.layout import IMAGE, INPUT, LABEL, LABEL_OF, SAVED, SAVED_STATE, SUFFIXES
from tasks.files import read_json


class InvalidData(MtzError):
    """A data set is missing, unreadable, empty, or not in the expected layout."""


LAYOUT = (
    "Expected are the columns image: struct<bytes, path> with encoded images, or input: fixed_shape_tensor (or lists "
    "of one length) of floating-point numbers, or of whole ones for tokens, or such columns by the names of the "
    "network's inputs; and label: int64, or such columns label.NAME for outputs by name."
)

_ROWS = 128
"""The most rows that are held at a time, beside those that are wanted."""

_FILE = b"ARROW1"
"""What an Arrow IPC file begins with; a stream does not."""

_Arrays = Mapping[str, np.ndarray]
"""Inputs or labels by the names of their columns."""

_Piece = tuple[_Arrays, _Arrays]
"""Inputs, and their labels, none if they are not wanted."""


def read_images(folder: Path, split: str, count: int | None = None, seed: int = 0) -> Any:
    """Read the inputs of a split; labels stay unread.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.
        count: The most examples to read; all by default. If there are more, a seeded sample is read.
        seed: The seed of the sample.

    Returns:
        The inputs, float32, or int64 if they are tokens; of several columns `NamedTensors`. Images are `[n, channels,
        height, width]` with values from 0 to 1.

    Raises:
        InvalidData: The split is missing, unreadable, empty, or not in the expected layout.
    """
    table = _Table.of(folder, split)
    return table.read(_sample(table.rows, count, seed), ())[0]


def read_examples(
    folder: Path, split: str, count: int | None = None, seed: int = 0, several: bool = False
) -> tuple[Any, Any]:
    """Read the inputs of a split and their labels, which are class numbers.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.
        count: The most examples to read; all by default. If there are more, a seeded sample is read.
        seed: The seed of the sample.
        several: Whether labels may be those of several outputs.

    Returns:
        The inputs, as `read_images` returns them, and their class numbers; of several outputs a dict by name, without
        labels that are other numbers.

    Raises:
        InvalidData: The split is missing, unreadable, empty, or not in the expected layout.
    """
    table = _Table.of(folder, split)
    if not (table.labels if several else LABEL in table.labels):
        raise InvalidData(f"{table.path} has no column {LABEL!r}. {LAYOUT}")
    classes = [name for name in table.labels if pa.types.is_integer(table.schema.field(name).type)]
    if LABEL in table.labels and not classes:
        raise InvalidData(f"{table.path} has labels that are no class numbers from 0. {LAYOUT}")
    inputs, labels = table.read(_sample(table.rows, count, seed), classes)
    return inputs, {} if labels is None else labels.tensors if isinstance(labels, NamedTensors) else labels


def read_labelled(folder: Path, split: str) -> tuple[Any, Any]:
    """Read the inputs of a split and their labels, if it has any.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.

    Returns:
        The inputs, as `read_images` returns them, and class numbers (int64), other numbers (float32), or None; of
        several outputs `NamedTensors`.

    Raises:
        InvalidData: The split is missing, unreadable, empty, or not in the expected layout.
    """
    table = _Table.of(folder, split)
    return table.read(np.arange(table.rows), table.labels)


def read_batches(folder: Path, split: str, size: int, labelled: bool = True) -> Iterator[tuple[Any, Any]]:
    """Read a split batch by batch, so that no more than a batch of it is in memory.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.
        size: Examples in each batch but the last.
        labelled: Whether labels are read, if there are any.

    Yields:
        What `read_labelled` returns, in batches.

    Raises:
        InvalidData: The split is missing, unreadable, empty, or not in the expected layout.
    """
    table = _Table.of(folder, split)
    held: list[_Piece] = []
    for piece in table.pieces(np.arange(table.rows), table.labels if labelled else ()):
        held.append(piece)
        while sum(_count(inputs) for inputs, _ in held) >= size:
            whole = _together(held)
            yield _tensors(*_part(whole, slice(size)))
            held = [_part(whole, slice(size, None))]
    if any(_count(inputs) for inputs, _ in held):
        yield _tensors(*_together(held))


def class_ranges(folder: Path, split: str) -> dict[str, tuple[int, int]]:
    """Find the least and the largest class number of a split; inputs stay unread.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.

    Returns:
        Both for each output that has class numbers, by its name; by ``""`` if there is one output.

    Raises:
        InvalidData: The split is missing, unreadable or empty, or labels are less than 0.
    """
    table, found = _Table.of(folder, split), dict[str, tuple[int, int]]()
    classes = [name for name in table.labels if pa.types.is_integer(table.schema.field(name).type)]
    for batch in table._batches(classes) if classes else ():
        for name in classes:
            output = "" if name == LABEL else name.removeprefix(LABEL_OF)
            labels = table._labels(batch.column(name), name)
            seen = (*found.get(output, ()), int(labels.min()), int(labels.max()))
            found[output] = min(seen), max(seen)
    return found


def files_of(folder: Path, split: str) -> list[Path]:
    """Return the files that hold a split.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.

    Returns:
        The Parquet or Arrow file, or the Arrow files of the split's folder.

    Raises:
        InvalidData: There is none, there is more than one place, or a file of the folder is missing.
    """
    candidates = [*(folder / f"{split}{suffix}" for suffix in SUFFIXES), folder / split]
    found = [
        path for path in candidates if path.is_file() or any(path.glob(f"*{SAVED}")) or (path / SAVED_STATE).exists()
    ]
    if not found:
        raise InvalidData(
            f"{candidates[0]}: there is no such file, and no {candidates[1].name} either. Put the data set there, or "
            "name its folder in models.NAME.data."
        )
    if len(found) > 1:
        raise InvalidData(f"{found[0]} and {found[1].name} are both there. Remove the one that is not meant.")
    return _saved(found[0]) if found[0].is_dir() else found


def _saved(folder: Path) -> list[Path]:
    """Return the files of a split's folder, in order."""
    there = sorted(file.name for file in folder.iterdir() if file.name.endswith(SAVED))
    state = read_json(folder / SAVED_STATE) if (folder / SAVED_STATE).exists() else {}
    named = [entry["filename"] for entry in state["_data_files"]] if "_data_files" in state else there
    if not named or sorted(named) != there:
        wrong = min(set(named) ^ set(there), default="every file")
        raise InvalidData(
            f"{folder}: {wrong} is missing, or {SAVED_STATE} does not name it. Write it again with save_to_disk."
        )
    return [folder / name for name in named]


@dataclass(frozen=True)
class _Table:
    """A split.

    Attributes:
        path: Its file or folder, for errors.
        files: Its files.
        schema: The columns of each file.
        rows: How many rows it has.
        columns: The names of the inputs' columns.
        labels: The names of the labels' columns.
    """

    path: Path
    files: Sequence[Path]
    schema: pa.Schema
    rows: int
    columns: Sequence[str]
    labels: Sequence[str]

    @classmethod
    def of(cls, folder: Path, split: str) -> _Table:
        """Find a split and look at its columns; nothing else is read."""
        files = files_of(folder, split)
        path = files[0] if files[0].parent == folder else files[0].parent
        with _readable(path):
            schemas, counts = zip(*(_outline(file) for file in files), strict=True)
        labels = [name for name in schemas[0].names if name == LABEL or name.startswith(LABEL_OF)]
        if LABEL in labels and len(labels) > 1:
            raise InvalidData(
                f"{path} has both columns {LABEL!r} and {labels[labels[0] == LABEL]!r}. Give {LABEL!r} for a network "
                f"of one output, columns {LABEL_OF}NAME for one of several."
            )
        columns = [name for name in (IMAGE, INPUT) if name in schemas[0].names]
        if not columns:
            columns = [own.name for own in schemas[0] if own.name not in labels and _is_numbers(own.type, masks=True)]
        if not columns or {IMAGE, INPUT} <= {*columns}:
            raise InvalidData(
                f"{path} has {'both columns' if columns else 'no column'} {IMAGE!r} or {INPUT!r}. {LAYOUT}"
            )
        for file, schema in zip(files, schemas, strict=True):
            if not schema.equals(schemas[0]):
                raise InvalidData(f"{file} has other columns than {files[0].name}. Bring them to one.")
        kind = schemas[0].field(columns[0]).type
        known = _is_image(kind) if columns[0] == IMAGE else _is_numbers(kind)
        if not known:
            raise InvalidData(f"{path}: column {columns[0]} is {kind}. {LAYOUT}")
        if not sum(counts):
            raise InvalidData(f"{path} is empty. Give at least one example.")
        return cls(path, files, schemas[0], sum(counts), columns, labels)

    def read(self, index: Int64[np.ndarray, " n"], labels: Sequence[str]) -> tuple[Any, Any]:
        """Return the inputs of some rows, and the labels that are wanted; None if there are none."""
        return _tensors(*_together(self.pieces(index, labels), len(index)))

    def pieces(self, index: Int64[np.ndarray, " n"], labels: Sequence[str]) -> Iterator[_Piece]:
        """Yield the inputs of some rows in ascending order, and the labels that are wanted, a few at a time."""
        first, shapes = 0, None
        for batch in self._batches([*self.columns, *labels]):
            given = {name: self._labels(batch.column(name), name) for name in labels}
            within = index[slice(*np.searchsorted(index, (first, first + len(batch))))] - first
            inputs = {name: self._inputs(batch.column(name), name, within, first) for name in self.columns}
            first += len(batch)
            if len(within):
                found = [values.shape[1:] for values in inputs.values()]
                shapes = shapes or found
                if found != shapes:
                    raise self._mixed()
                yield inputs, {name: own[within] for name, own in given.items()}

    def _batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield all rows, few at a time."""
        with _readable(self.path):
            for file in self.files:
                for batch in _batches(file, columns):
                    for start in range(0, len(batch), _ROWS):
                        yield batch.slice(start, _ROWS)

    def _inputs(self, column: pa.Array, name: str, within: Int64[np.ndarray, " n"], first: int) -> np.ndarray:
        if name == IMAGE:
            return self._pixels(column.field("bytes"), within, first)
        values = self._numbers(column, name)[within]
        if values.dtype == np.float32:
            finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
            if not finite.all():
                raise InvalidData(
                    f"{self.path}, row {first + within[~finite][0]} has NaN or infinite values. Correct it or leave it "
                    "out."
                )
        return values

    def _pixels(self, encoded: pa.Array, within: Int64[np.ndarray, " n"], first: int) -> np.ndarray:
        decoded = []
        for row in within.tolist():
            try:
                decoded.append(pixels_of(encoded[row].as_py()).transpose(2, 0, 1))
            except InvalidImage as error:
                raise InvalidData(f"{self.path}, image {first + row} {error}") from error
        if len({pixels.shape for pixels in decoded}) > 1:
            raise self._mixed()
        return np.stack(decoded) if decoded else np.empty(0, np.float32)

    def _labels(self, column: pa.Array, name: str) -> np.ndarray:
        """Return labels: class numbers, or numbers, one or several for each example."""
        if pa.types.is_integer(column.type):
            if column.null_count or pc.min(column).as_py() < 0:
                raise InvalidData(f"{self.path} has labels that are no class numbers from 0. {LAYOUT}")
            return column.to_numpy().astype(np.int64)
        if _is_numbers(column.type) or pa.types.is_floating(column.type):
            labels = self._numbers(column, name)
            if np.isfinite(labels).all():
                return labels
            raise InvalidData(f"{self.path} has labels that are not finite. Correct them or leave their examples out.")
        raise InvalidData(f"{self.path}: column {name} is {column.type}. {LAYOUT}")

    def _numbers(self, column: pa.Array, name: str) -> np.ndarray:
        """Return a column of numbers as one array, `[rows, …]`, float32, int64 or bool."""
        shape = [len(column)]
        if isinstance(column.type, pa.FixedShapeTensorType):
            missing = column.null_count or column.storage.flatten().null_count
            values = column if missing else column.to_numpy_ndarray()
        else:
            missing = column.null_count
            while not missing and _is_list(column.type):
                lengths = pc.unique(pc.list_value_length(column)).to_pylist()
                if len(lengths) > 1:
                    raise InvalidData(
                        f"{self.path}: column {name} has lists of {min(lengths)} and {max(lengths)} values. Pad "
                        "them to one length."
                    )
                shape += lengths
                column = column.flatten()
                missing = column.null_count
            values = column if missing else column.to_numpy(zero_copy_only=False).reshape(shape)
        if missing:
            raise InvalidData(f"{self.path}: column {name} has rows without a value. Leave them out.")
        dtype = {"f": np.float32, "b": np.bool_}.get(values.dtype.kind, np.int64)
        return values.astype(dtype, copy=False)

    def _mixed(self) -> InvalidData:
        what = "images of different sizes or colours" if IMAGE in self.columns else "examples of different shapes"
        return InvalidData(f"{self.path} mixes {what}. Bring them to one.")


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InvalidData(f"{path} cannot be read: {error}. {LAYOUT}") from error


def _outline(file: Path) -> tuple[pa.Schema, int]:
    """Return the columns of a file, and how many rows it has."""
    if file.suffix == ".parquet":
        table = pq.ParquetFile(file)
        return table.schema_arrow, table.metadata.num_rows
    with pa.memory_map(str(file)) as source:
        reader = _reader(source)
        return reader.schema, sum(len(batch) for batch in _from(reader))


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    if file.suffix == ".parquet":
        yield from pq.ParquetFile(file, memory_map=True).iter_batches(_ROWS, columns=list(columns))
        return
    with pa.memory_map(str(file)) as source:
        for batch in _from(_reader(source)):
            yield batch.select(list(columns))


def _reader(source: pa.MemoryMappedFile) -> pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader:
    """Open an Arrow IPC file or stream; what is not used is not read from the disk."""
    begins = source.read(len(_FILE))
    source.seek(0)
    return pa.ipc.open_file(source) if begins == _FILE else pa.ipc.open_stream(source)


def _from(reader: pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader) -> Iterator[pa.RecordBatch]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number)
    else:
        yield from reader


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_numbers(kind: pa.DataType, masks: bool = False) -> bool:
    """Return whether a column holds tensors or lists of numbers, or, if `masks` may be there, of truth values."""
    if not isinstance(kind, pa.FixedShapeTensorType) and not _is_list(kind):
        return False
    while isinstance(kind, pa.FixedShapeTensorType) or _is_list(kind):
        kind = kind.value_type
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or (masks and pa.types.is_boolean(kind))


def _sample(total: int, count: int | None, seed: int) -> Int64[np.ndarray, " n"]:
    """Return the rows of a seeded sample, in ascending order."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def _together(pieces: Iterable[_Piece], count: int | None = None) -> _Piece:
    """Return the rows of all pieces in one array each; with their count, they are held once only."""
    if count is None:
        pieces = list(pieces)
        count = sum(_count(inputs) for inputs, _ in pieces)
    whole: tuple[dict[str, np.ndarray], dict[str, np.ndarray]] = ({}, {})
    first = 0
    for piece in pieces:
        part = slice(first, first + _count(piece[0]))
        for arrays, some in zip(whole, piece, strict=True):
            for name, values in some.items():
                if first == 0:
                    arrays[name] = np.empty((count, *values.shape[1:]), values.dtype)
                arrays[name][part] = values
        first = part.stop
    return whole


def _count(inputs: _Arrays) -> int:
    return len(next(iter(inputs.values())))


def _part(piece: _Piece, part: slice) -> _Piece:
    inputs, labels = ({name: values[part] for name, values in arrays.items()} for arrays in piece)
    return inputs, labels


def _tensors(inputs: _Arrays, labels: _Arrays) -> tuple[Any, Any]:
    given, known = ({name: torch.from_numpy(own) for name, own in arrays.items()} for arrays in (inputs, labels))
    one = next((given[name] for name in (IMAGE, INPUT) if name in given), None)
    several = {name.removeprefix(LABEL_OF): own for name, own in known.items()}
    return NamedTensors(given) if one is None else one, known.get(LABEL, NamedTensors(several) if several else None)
