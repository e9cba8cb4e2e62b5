"""Inputs for the real networks, in splits without labels.

Faces are crops of the pictures that come with scikit-image. Files, whose types are to be told, are those of this
machine's Python environment. Test inputs are of pictures, and of packages, that no other split has seen.
"""

from __future__ import annotations

import hashlib
import io
import sysconfig
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from examples.real.networks import BYTES, FACE_SIZE, PADDING
from mtz_core.errors import MtzError
from tasks.data.layout import IMAGE, INPUT
from tasks.files import whole_file

Pictures = npt.NDArray[np.uint8]
Tokens = npt.NDArray[np.float32]

FACES = 100
"""How many pictures of the subset are faces; the others are not."""

CROPS = 8
"""Crops of every picture."""

FILES = {"train": 900, "validation": 150, "test": 600}
"""How many files each split has, at most."""

_PICTURES = {"train": 0.7, "validation": 0.1, "test": 0.2}
_OF_ONE_SUFFIX = 0.08
_LEAST_BYTES = 64
_BLOCK = 4096


class UnusableInputs(MtzError):
    """There are no inputs where they should be."""


def write_faces(pictures: Path, folder: Path, seed: int = 0) -> dict[str, int]:
    """Write crops of faces, as PNG in Parquet. All crops of a picture are in one split.

    Args:
        pictures: The subset of Labeled Faces in the Wild that comes with scikit-image: grey
            values from 0 to 1, `[200, 25, 25]`.
        folder: The folder to write to.
        seed: The seed of the splits and of the crops.

    Returns:
        The number of crops by split.

    Raises:
        UnusableInputs: The file is no such array.
    """
    try:
        values = np.load(pictures, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise UnusableInputs(f"{pictures} holds no pictures: {error}. Fetch its package again.") from error
    if values.ndim != 3 or values.dtype != np.float64 or len(values) < FACES:
        raise UnusableInputs(
            f"{pictures} holds {values.dtype} of shape {list(values.shape)}, not {FACES} grey pictures or more. Fetch "
            "its package again."
        )
    faces: Pictures = np.rint(255 * values[:FACES]).astype(np.uint8)
    generator = np.random.default_rng(seed)
    order = generator.permutation(FACES)
    ends = np.cumsum([round(FACES * share) for share in _PICTURES.values()])
    counts: dict[str, int] = {}
    for split, members in zip(_PICTURES, np.split(order, ends[:-1]), strict=True):
        images = [
            {"bytes": _png(crop(faces[member], generator)), "path": f"lfw-{member:03d}-{number}.png"}
            for member in members.tolist()
            for number in range(CROPS)
        ]
        column = pa.array(images, pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
        with whole_file(folder / f"{split}.parquet") as partial:
            pq.write_table(pa.table({IMAGE: column}), partial)
        counts[split] = len(images)
    return counts


def crop(face: Pictures, generator: np.random.Generator) -> Image.Image:
    """Return a crop of a grey picture in the size of the networks: moved, scaled, mirrored or not, lighter or darker.

    Args:
        face: Grey values, `[height, width]`.
        generator: The source of randomness.

    Returns:
        The crop, in colours that are all grey.
    """
    height, width = face.shape
    left, right, top, bottom = generator.uniform(0, 0.12, size=4)
    box = (left * width, top * height, (1 - right) * width, (1 - bottom) * height)
    resized = Image.fromarray(face).resize((FACE_SIZE, FACE_SIZE), Image.Resampling.BICUBIC, box)
    grey = np.asarray(resized, np.float32)[:, :: generator.choice((-1, 1))]
    lit = grey * generator.uniform(0.75, 1.2) + generator.uniform(-15, 15)
    return Image.fromarray(np.clip(np.rint(lit), 0, 255).astype(np.uint8)).convert("RGB")


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_files(folder: Path, roots: Mapping[str, Path] | None = None) -> dict[str, int]:
    """Write the tokens of files, as Arrow. All files of a package are in one split, and no type has most of it.

    Args:
        folder: The folder to write to.
        roots: Folders with packages; those of this Python environment by default.

    Returns:
        The number of files by split.

    Raises:
        UnusableInputs: There are too few packages to give every split a file.
    """
    roots = roots or _environment()
    tokens: dict[str, list[Tokens]] = {split: [] for split in FILES}
    suffixes: dict[str, Counter[str]] = {split: Counter() for split in FILES}
    seen: set[bytes] = set()
    for package, file in _candidates(roots):
        split = _split(package)
        most = max(1, int(_OF_ONE_SUFFIX * FILES[split]))
        if len(tokens[split]) == FILES[split] or suffixes[split][file.suffix.lower()] == most:
            continue
        content = file.read_bytes()
        digest = hashlib.sha256(content).digest()
        if len(content) < _LEAST_BYTES or digest in seen:
            continue
        seen.add(digest)
        suffixes[split][file.suffix.lower()] += 1
        tokens[split].append(tokens_of(content))
    if empty := [split for split, rows in tokens.items() if not rows]:
        raise UnusableInputs(
            f"the packages below {', '.join(map(str, roots.values()))} give no file for {empty[0]}. Name folders "
            "with more of them."
        )
    for split, rows in tokens.items():
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack(rows))
        table = pa.table({INPUT: column})
        with whole_file(folder / f"{split}.arrow") as partial, pa.ipc.new_file(partial, table.schema) as writer:
            writer.write_table(table)
    return {split: len(rows) for split, rows in tokens.items()}


def tokens_of(content: bytes) -> Tokens:
    """Return what a content-type network reads of a file: bytes as numbers, 256 where there is none.

    Args:
        content: The file's content.

    Returns:
        The first 1,024 bytes that are not blank, filled at their end, and the last ones, filled at their beginning.
    """
    begin = np.frombuffer(content[:_BLOCK].lstrip()[:BYTES], np.uint8)
    end = np.frombuffer(content[-_BLOCK:].rstrip()[-BYTES:], np.uint8)
    tokens = np.full(2 * BYTES, PADDING, np.float32)
    tokens[: len(begin)] = begin
    tokens[2 * BYTES - len(end) :] = end
    return tokens


def _environment() -> dict[str, Path]:
    return {name: Path(sysconfig.get_path(name)) for name in ("purelib", "stdlib")}


def _candidates(roots: Mapping[str, Path]) -> Iterator[tuple[str, Path]]:
    """Yield packages and their files, in an order that depends on names alone."""
    found: list[tuple[str, str, Path]] = []
    for name, root in roots.items():
        for file in root.rglob("*"):
            relative = file.relative_to(root)
            if "__pycache__" in relative.parts or (name == "stdlib" and "site-packages" in relative.parts):
                continue
            if file.is_file() and not file.is_symlink():
                package = relative.parts[0].partition("-")[0].partition(".")[0].lower()
                found.append((_digest(f"{name}/{relative.as_posix()}"), package, file))
    for _, package, file in sorted(found):
        yield package, file


def _split(package: str) -> str:
    """Return the split of a package: 60, 10 and 30 of a hundred packages go to the three."""
    place = int(_digest(package)[:8], 16) % 100
    return "train" if place < 60 else "validation" if place < 70 else "test"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
