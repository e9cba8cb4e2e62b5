"""Where examples come from: Parquet files of encoded images and labels, one per split."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int64
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from mtz_core.errors import MtzError


class InvalidData(MtzError):
    """A data set is missing, unreadable, empty, or not in the expected layout."""


LAYOUT = "Expected are the columns image: struct<bytes, path> with encoded images, and label: int64."


def read_images(
    folder: Path, split: str, count: int | None = None, seed: int = 0
) -> Float[Tensor, "n channels height width"]:
    """Images of a split as values from 0 to 1; a seeded sample if there are more than `count`. Labels stay unread.

    Raises `InvalidData`.
    """
    table = _read(folder, split, ["image"])
    return _decode(table, folder / f"{split}.parquet", _sample(len(table), count, seed))


def read_examples(
    folder: Path, split: str, count: int | None = None, seed: int = 0
) -> tuple[Float[Tensor, "n channels height width"], Int64[Tensor, " n"]]:
    """The images of `read_images`, and their labels. Raises `InvalidData`."""
    table = _read(folder, split, ["image", "label"])
    labels = table.column("label").to_numpy()
    if table.column("label").null_count or not np.issubdtype(labels.dtype, np.integer) or labels.min() < 0:
        raise InvalidData(f"{folder / f'{split}.parquet'} has labels that are no class numbers from 0. {LAYOUT}")
    sample = _sample(len(table), count, seed)
    return _decode(table, folder / f"{split}.parquet", sample), torch.from_numpy(labels[sample].astype(np.int64))


def _read(folder: Path, split: str, columns: list[str]) -> pa.Table:
    path = folder / f"{split}.parquet"
    if not path.is_file():
        raise InvalidData(
            f"{path}: there is no such file. Put the data set there, or name its folder in models.NAME.data."
        )
    try:
        file = pq.ParquetFile(path)
        missing = [column for column in columns if column not in file.schema_arrow.names]
        if missing:
            raise InvalidData(f"{path} has no column {missing[0]!r}. {LAYOUT}")
        table = file.read(columns)
    except (OSError, pa.ArrowException) as error:
        raise InvalidData(f"{path} cannot be read: {error}. {LAYOUT}") from error
    if not table.num_rows:
        raise InvalidData(f"{path} is empty. Give at least one example.")
    return table


def _sample(total: int, count: int | None, seed: int) -> Int64[np.ndarray, " n"]:
    """The rows that a seeded sample has, in ascending order."""
    if count is None or count >= total:
        return np.arange(total)
    return np.sort(np.random.default_rng(seed).permutation(total)[:count])


def _decode(table: pa.Table, path: Path, index: Int64[np.ndarray, " n"]) -> Float[Tensor, "n channels height width"]:
    images = table.column("image").combine_chunks()
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
