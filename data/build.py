"""Build the example data: class-stratified subsets of MNIST and Fashion-MNIST as Parquet.

Reads the full sets (IDX, gzip) and writes `train.parquet`, `validation.parquet` and `test.parquet` per set. Training
and validation images come from the original training set, test images from the original test set; no image is in two
files. Same sources and library versions give the same bytes.
"""

from __future__ import annotations

import argparse
import gzip
import io
import json
import sys
import tempfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SEED = 2018
SIDE = 28
COUNTS = {"train": 14_000, "validation": 1_500, "test": 4_000}
ORIGINS = {"train": "train", "validation": "train", "test": "t10k"}
CLASS_NAMES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion-mnist": [
        "T-shirt/top",
        "Trouser",
        "Pullover",
        "Dress",
        "Coat",
        "Sandal",
        "Shirt",
        "Sneaker",
        "Bag",
        "Ankle boot",
    ],
}

Bytes = npt.NDArray[np.uint8]
Indices = npt.NDArray[np.int64]


class UnusableSource(Exception):
    """A source file is missing, or is not what its name promises."""


@dataclass(frozen=True)
class LabelledImages:
    """Images and their labels, in the order of the source.

    Attributes:
        images: Grey values from 0 to 255, `[count, 28, 28]`.
        labels: Class numbers from 0 to 9, `[count]`.
    """

    images: Bytes
    labels: Bytes


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Return the array of unsigned bytes in a gzipped IDX file.

    Args:
        path: The file.
        dimensions: Number of dimensions that the array must have.

    Returns:
        The array, in the shape that the file's header states.

    Raises:
        UnusableSource: The file is missing, is not gzip, is not such an IDX file, or does not match its header.
    """
    try:
        content = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise UnusableSource(
            f"{path} is missing: put the original file there, or name its folder with --source"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        raise UnusableSource(f"{path} is not a readable gzip file ({error}): fetch it again") from None
    header = 4 + 4 * dimensions
    magic = bytes([0, 0, 0x08, dimensions])
    if len(content) < header or content[:4] != magic:
        raise UnusableSource(
            f"{path} is not an IDX file of unsigned bytes with {dimensions} dimension(s): "
            f"it starts with {content[:4].hex() or 'nothing'}, not {magic.hex()}"
        )
    shape = tuple(int(size) for size in np.frombuffer(content, ">u4", count=dimensions, offset=4))
    if len(content) - header != np.prod(shape, dtype=np.int64):
        raise UnusableSource(f"{path} promises {shape} bytes and holds {len(content) - header}: fetch it again")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def read_original(folder: Path, origin: str) -> LabelledImages:
    """Read one original set and check that images and labels fit together.

    Args:
        folder: The folder with the original files.
        origin: `train` or `t10k`.

    Returns:
        All images of the set, with their labels.

    Raises:
        UnusableSource: A file cannot be used, an image is not 28 × 28, the counts differ, or a label is above 9.
    """
    image_path = folder / f"{origin}-images-idx3-ubyte.gz"
    label_path = folder / f"{origin}-labels-idx1-ubyte.gz"
    images, labels = read_idx(image_path, 3), read_idx(label_path, 1)
    if images.shape[1:] != (SIDE, SIDE):
        raise UnusableSource(f"{image_path} holds images of {images.shape[1:]}, not {(SIDE, SIDE)}")
    if len(images) != len(labels):
        raise UnusableSource(f"{image_path} holds {len(images)} images, but {label_path} {len(labels)} labels")
    if labels.max(initial=0) > 9:
        raise UnusableSource(f"{label_path} holds label {labels.max()}: labels are 0 to 9")
    return LabelledImages(images, labels)


def apportion(total: int, class_sizes: Indices) -> Indices:
    """Split a total in proportion to the class sizes, by largest remainder."""
    exact = total * class_sizes / class_sizes.sum()
    shares = np.floor(exact).astype(np.int64)
    by_remainder = np.argsort(shares - exact, kind="stable")
    shares[by_remainder[: total - shares.sum()]] += 1
    return shares


def draw(labels: Bytes, counts: dict[str, int], generator: np.random.Generator) -> dict[str, Indices]:
    """Draw disjoint, class-stratified samples.

    Args:
        labels: The label of each image, `[count]`.
        counts: Number of images to draw for each split.
        generator: The source of randomness.

    Returns:
        The ascending positions of each split's images.

    Raises:
        UnusableSource: There are too few images of a class.
    """
    class_sizes = np.bincount(labels, minlength=10)
    shares = {split: apportion(count, class_sizes) for split, count in counts.items()}
    if np.any(sum(shares.values()) > class_sizes):
        raise UnusableSource(f"{len(labels)} images are too few for {sum(counts.values())} with the same class shares")
    picked: dict[str, list[Indices]] = {split: [] for split in counts}
    for label in range(10):
        members = generator.permutation(np.flatnonzero(labels == label))
        for split in counts:
            picked[split].append(members[: shares[split][label]])
            members = members[shares[split][label] :]
    return {split: np.sort(np.concatenate(parts)) for split, parts in picked.items()}


def encode_png(image: Bytes) -> bytes:
    """Return a PNG with stored pixels: the Parquet file compresses many at once, which takes a quarter less space."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=0)
    return buffer.getvalue()


def as_table(original: LabelledImages, positions: Indices, origin: str, class_names: list[str]) -> pa.Table:
    """Return images and labels in the layout of Hugging Face datasets; `path` is the image's place in the original."""
    features = {"image": {"_type": "Image"}, "label": {"names": class_names, "_type": "ClassLabel"}}
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image_type), ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )
    images = [
        {"bytes": encode_png(original.images[position]), "path": f"{origin}-{position:05d}.png"}
        for position in positions
    ]
    labels = original.labels[positions].astype(np.int64)
    return pa.table([pa.array(images, image_type), pa.array(labels)], schema=schema)


def write_parquet(table: pa.Table, path: Path) -> None:
    """Write under a temporary name, then rename, so that readers see the old file or the whole new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".build-") as folder:
        unfinished = Path(folder) / path.name
        pq.write_table(
            table,
            unfinished,
            compression="zstd",
            compression_level=19,
            use_dictionary=["label"],
            column_encoding={"image.path": "DELTA_BYTE_ARRAY", "image.bytes": "PLAIN"},
            write_statistics=["label"],
        )
        unfinished.replace(path)


def build(source: Path, out: Path, name: str) -> Iterator[tuple[Path, int]]:
    """Write the three files of one data set.

    Args:
        source: The folder that holds the folder `name` with the original files.
        out: The folder to write to; the files go to its folder `name`.
        name: The data set, `mnist` or `fashion-mnist`.

    Yields:
        The path of each file that was written, with its number of images.

    Raises:
        UnusableSource: An original file cannot be used.
        OSError: A file cannot be written.
    """
    generator = np.random.default_rng([SEED, list(CLASS_NAMES).index(name)])
    for origin in ("train", "t10k"):
        original = read_original(source / name, origin)
        counts = {split: count for split, count in COUNTS.items() if ORIGINS[split] == origin}
        for split, positions in draw(original.labels, counts, generator).items():
            path = out / name / f"{split}.parquet"
            write_parquet(as_table(original, positions, origin, CLASS_NAMES[name]), path)
            yield path, len(positions)


def main() -> None:
    """Build both data sets from the command line; exit with one line if that fails."""
    parser = argparse.ArgumentParser(
        description="Build the example data (data/README.md) from the full MNIST and Fashion-MNIST.",
        epilog="Each source folder holds the four original files: {train,t10k}-{images-idx3,labels-idx1}-ubyte.gz",
    )
    parser.add_argument(
        "--source", type=Path, required=True, help="folder with the folders mnist and fashion-mnist of the full sets"
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent, help="folder to write to (default: the one of this script)"
    )
    options = parser.parse_args()
    try:
        for name in CLASS_NAMES:
            for path, count in build(options.source, options.out, name):
                print(f"{path}: {count} images, {path.stat().st_size:,} bytes")
    except (UnusableSource, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
