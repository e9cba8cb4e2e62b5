"""Encoded images as values from 0 to 1, whatever their files count in."""

from __future__ import annotations

import io

import numpy as np
from jaxtyping import Float32
from PIL import Image, UnidentifiedImageError

from mtz_core.errors import MtzError

_GREY = ("1", "L", "LA")
_GREY_OF_16_BITS = ("I;16", "I;16L", "I;16B", "I;16N")
_GREY_AS_COLOUR = "LA;16B"
"""How a file stores grey of 16 bits with alpha, which Pillow opens as colour."""

_WIDENED = ("PNG", "PPM")
"""Formats of which Pillow gives 16 bits as 32."""

_TIFF_BITS = 258


class InvalidImage(MtzError):
    """An image cannot be read, or it is not known which of its values is the brightest."""


def pixels_of(encoded: bytes | None) -> Float32[np.ndarray, "height width channels"]:
    """Decode an image.

    Args:
        encoded: The content of a file of any format that Pillow reads.

    Returns:
        One channel for grey, three for colour, with values from 0 to 1. The brightest value that the file's bits can
        hold is 1; floating-point values stay as they are. Transparency is left out.

    Raises:
        InvalidImage: It cannot be read, or its values go beyond the range from 0 to 1.
    """
    try:
        with Image.open(io.BytesIO(encoded or b"")) as image:
            values, largest = _values(image)
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise InvalidImage(f"is not a readable image: {error}. Make the data set again.") from error
    if largest is None:
        raise InvalidImage(
            "has whole numbers of 32 bits, and it is not known which of them is white. Save it with 8 or 16 bits, or "
            "in floating-point numbers from 0 to 1."
        )
    pixels = values.astype(np.float32).reshape(*values.shape[:2], -1)
    if not bool(np.isfinite(pixels).all()):
        raise InvalidImage("has values that are NaN or infinite. Replace them by numbers from 0 to 1.")
    if values.dtype.kind == "f" and not bool(((pixels >= 0) & (pixels <= 1)).all()):
        raise InvalidImage(
            f"has values from {pixels.min():g} to {pixels.max():g}, but images have values from 0 to 1. Scale it, or "
            "give the numbers in a column input."
        )
    return pixels / np.float32(largest)


def _values(image: Image.Image) -> tuple[np.ndarray, int | None]:
    """Return the values of an image, and the largest that its bits can hold, if that is known."""
    if image.mode == "F":
        return np.asarray(image), 1
    if image.mode == "I":
        return np.asarray(image), 2**16 - 1 if image.format in _WIDENED else None
    if image.mode in _GREY_OF_16_BITS:
        (bits, *_) = getattr(image, "tag_v2", {}).get(_TIFF_BITS, (16,))
        return np.asarray(image), 2 ** int(bits) - 1
    grey = image.mode in _GREY or any(tile[3] == _GREY_AS_COLOUR for tile in image.tile)  # type: ignore[attr-defined]
    return np.asarray(image.convert("L" if grey else "RGB")), 255
