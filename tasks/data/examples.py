"""Reading examples: a file per split with labels and either encoded images or tensors.

A split is `{split}.parquet` or `{split}.arrow` (an Arrow IPC file), with the columns

    image: struct<bytes, path>            encoded images, which become values from 0 to 1, or
    input: fixed_shape_tensor<float>      anything else, taken as it is
    label: int64                          class numbers from 0; or numbers, one or several for each example; or none
"""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64, Shaped
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mtz_core.errors import MtzError
from tasks.data.layout import IMAGE, INPUT, LABEL, SUFFIXES


class InvalidData(MtzError):
    """A data set is missing, unreadable, empty, or not in the expected layout."""


LAYOUT = (
    "Expected are the columns image: struct<bytes, path> with encoded images, or input: fixed_shape_tensor<float>; and "
    "label: int64."
)


def read_images(folder: Path, split: str, count: int | None = None, seed: int = 0) -> Float[Tensor, "n ..."]:
    """Read the inputs of a split; labels stay unread.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.
        count: The most examples to read; all by default. If there are more, a seeded sample is read.
        seed: The seed of the sample.

    Returns:
        The inputs, float32. Images are `[n, channels, height, width]` with values from 0 to 1.

    Raises:
        InvalidData: The split is missing, unreadable, empty, or not in the expected layout.
    """
    path = file_of(folder, split)
    table, column = _read(path, [])
    return _inputs(table, column, path, _sample(len(table), count, seed))


def read_examples(
    folder: Path, split: str, count: int | None = None, seed: int = 0
) -> tuple[Float[Tensor, "n ..."], Int64[Tensor, " n"]]:
    """Read the inputs of a split and their labels.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.
        count: The most examples to read; all by default. If there are more, a seeded sample is read.
        seed: The seed of the sample.

    Returns:
        The inputs, as `read_images` returns them, and their class numbers.

    Raises:
        InvalidData: The split is missing, unreadable, empty, or not in the expected layout.
    """
    path = file_of(folder, split)
    table, column = _read(path, [LABEL])
    labels = table.column(LABEL).to_numpy()
    if table.column(LABEL).null_count or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InvalidData(f"{path} has labels that are no class numbers from 0. {LAYOUT}")
    sample = _sample(len(table), count, seed)
    return _inputs(table, column, path, sample), torch.from_numpy(labels[sample].astype(np.int64))


def read_labelled(folder: Path, split: str) -> tuple[Float[Tensor, "n ..."], Shaped[Tensor, "n ..."] | None]:
    """Read the inputs of a split and their labels, if it has any.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.

    Returns:
        The inputs, as `read_images` returns them, and class numbers (int64), other numbers (float32), or None.

    Raises:
        InvalidData: The split is missing, unreadable, empty, or not in the expected layout.
    """
    path = file_of(folder, split)
    if LABEL not in _columns(path):
        return read_images(folder, split), None
    table, column = _read(path, [LABEL])
    labels = table.column(LABEL)
    if pa.types.is_integer(labels.type):
        return read_examples(folder, split)
    inputs = _inputs(table, column, path, np.arange(len(table)))
    if pa.types.is_floating(labels.type) and not labels.null_count:
        numbers = torch.from_numpy(labels.to_numpy().astype(np.float32))
        if bool(torch.isfinite(numbers).all()):
            return inputs, numbers
        raise InvalidData(f"{path} has labels that are not finite. Correct them or leave their examples out.")
    return inputs, _tensors(labels, path, np.arange(len(table)), LABEL)


def file_of(folder: Path, split: str) -> Path:
    """Return the file that holds a split.

    Args:
        folder: The data set's folder.
        split: `train`, `validation` or `test`.

    Returns:
        The Parquet or Arrow file.

    Raises:
        InvalidData: There is no such file, or there are two.
    """
    candidates = [folder / f"{split}{suffix}" for suffix in SUFFIXES]
    found = [path for path in candidates if path.is_file()]
    if not found:
        raise InvalidData(
            f"{candidates[0]}: there is no such file, and no {candidates[1].name} either. Put the data set there, or "
            "name its folder in models.NAME.data."
        )
    if len(found) > 1:
        raise InvalidData(f"{found[0]} and {found[1].name} are both there. Remove the one that is not meant.")
    return found[0]


def _columns(path: Path) -> list[str]:
    """Return the names of a file's columns."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_schema(path).names)
        with pa.memory_map(str(path)) as source:
            return list(pa.ipc.open_file(source).schema.names)
    except (OSError, pa.ArrowException) as error:
        raise InvalidData(f"{path} cannot be read: {error}. {LAYOUT}") from error


def _read(path: Path, columns: list[str]) -> tuple[pa.Table, str]:
    """Return a table of the inputs and the given other columns, and the name of the inputs' column."""
    try:
        if path.suffix == ".parquet":
            file = pq.ParquetFile(path)
            names, read = file.schema_arrow.names, file.read
        else:
            source = pa.memory_map(str(path))
            names, read = pa.ipc.open_file(source).schema.names, lambda wanted: _arrow_columns(source, wanted)
        inputs = [name for name in (IMAGE, INPUT) if name in names]
        if len(inputs) != 1:
            raise InvalidData(
                f"{path} has {'both columns' if inputs else 'no column'} {IMAGE!r} or {INPUT!r}. {LAYOUT}"
            )
        missing = [column for column in columns if column not in names]
        if missing:
            raise InvalidData(f"{path} has no column {missing[0]!r}. {LAYOUT}")
        table = read([*inputs, *columns])
    except (OSError, pa.ArrowException) as error:
        raise InvalidData(f"{path} cannot be read: {error}. {LAYOUT}") from error
    if not table.num_rows:
        raise InvalidData(f"{path} is empty. Give at least one example.")
    return table, inputs[0]


def _arrow_columns(source: pa.MemoryMappedFile, columns: list[str]) -> pa.Table:
    """Return columns of an Arrow IPC file; nothing is read before it is used."""
    with pa.ipc.open_file(source) as reader:
        return reader.read_all().select(columns)


def _sample(total: int, count: int | None, seed: int) -> Int64[np.ndarray, " n"]:
    """Return the rows of a seeded sample, in ascending order."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def _inputs(table: pa.Table, column: str, path: Path, index: Int64[np.ndarray, " n"]) -> Float[Tensor, "n ..."]:
    read = _decode if column == IMAGE else _tensors
    return read(table.column(column), path, index)


def _tensors(
    column: pa.ChunkedArray, path: Path, index: Int64[np.ndarray, " n"], name: str = INPUT
) -> Float[Tensor, "n ..."]:
    if not isinstance(column.type, pa.FixedShapeTensorType) or not pa.types.is_floating(column.type.value_type):
        raise InvalidData(f"{path}: column {name} is {column.type}. {LAYOUT}")
    if column.null_count or any(chunk.storage.flatten().null_count for chunk in column.chunks):
        raise InvalidData(f"{path}: column {name} has rows without a value. Leave them out.")
    parts, first = [], 0
    for chunk in column.chunks:
        within = index[(index >= first) & (index < first + len(chunk))]
        mapped = chunk.to_numpy_ndarray()
        values = (mapped if len(within) == len(chunk) else mapped[within - first]).astype(np.float32, copy=False)
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        if not finite.all():
            raise InvalidData(
                f"{path}, row {within[~finite][0]} has NaN or infinite values. Correct it or leave it out."
            )
        parts.append(values)
        first += len(chunk)
    return torch.from_numpy(np.concatenate(parts))


def _decode(column: pa.ChunkedArray, path: Path, index: Int64[np.ndarray, " n"]) -> Float[Tensor, "n ..."]:
    images = column.combine_chunks()
    if not pa.types.is_struct(images.type) or images.type.get_field_index("bytes") < 0:
        raise InvalidData(f"{path}: column image is {images.type}. {LAYOUT}")
    encoded = images.field("bytes")
    decoded = [_pixels(encoded[i].as_py(), f"{path}, image {i}") for i in index.tolist()]
    if len({pixels.shape for pixels in decoded}) != 1:
        raise InvalidData(f"{path} mixes images of different sizes or colours. Bring them to one.")
    pixels = torch.from_numpy(np.stack(decoded))
    return pixels.permute(0, 3, 1, 2).to(torch.float32).div_(255).contiguous()


def _pixels(encoded: bytes | None, where: str) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(encoded or b"")) as image:
            grey = image.mode in ("1", "L", "I;16")
            return np.asarray(image.convert("L" if grey else "RGB")).reshape(image.height, image.width, -1)
    except (UnidentifiedImageError, OSError, ValueError) as error:
        raise InvalidData(f"{where} is not a readable image: {error}. Make the data set again.") from error
