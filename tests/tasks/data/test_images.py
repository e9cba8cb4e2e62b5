"""Tests of images: the same picture has the same values, whatever its file counts in, and no brightness is guessed."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tasks.data.images import InvalidImage, pixels_of

GREY = np.linspace(0, 1, 20).reshape(4, 5)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def of(values: np.ndarray, dtype: type, largest: int) -> Image.Image:
    return Image.fromarray((values * largest).round().astype(dtype))


def with_alpha(picture: Image.Image, mode: str) -> Image.Image:
    """The same picture with an alpha channel that is transparent in part."""
    changed = picture.convert(mode)
    changed.putalpha(Image.fromarray(np.arange(20, dtype=np.uint8).reshape(4, 5) * 12))
    return changed


def grey_of_16_bits_with_alpha(values: np.ndarray) -> bytes:
    """A PNG, which Pillow does not write of such pictures."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = values.shape
    pixels = np.stack([(values * 65535).round(), np.full(values.shape, 30000)], axis=-1).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, 4, 0, 0, 0)
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


EIGHT, SIXTEEN = of(GREY, np.uint8, 255), of(GREY, np.uint16, 65535)
COLOUR = Image.merge("RGB", [EIGHT, EIGHT.rotate(180), EIGHT])


@pytest.mark.parametrize(
    ("file", "close"),
    [
        (encoded(EIGHT), 0.5 / 255),
        (encoded(SIXTEEN), 0.5 / 65535),
        (encoded(SIXTEEN, "TIFF"), 0.5 / 65535),
        (encoded(SIXTEEN, "PPM"), 0.5 / 65535),
        (encoded(Image.fromarray(GREY.astype(np.float32)), "TIFF"), 1e-7),
        (encoded(with_alpha(EIGHT, "LA")), 0.5 / 255),
        (grey_of_16_bits_with_alpha(GREY), 1 / 255),
    ],
)
def test_a_grey_picture_is_the_same_in_every_file(file: bytes, close: float) -> None:
    pixels = pixels_of(file)
    assert pixels.shape == (4, 5, 1) and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[..., 0], GREY, atol=close)


@pytest.mark.parametrize(
    "file",
    [
        encoded(COLOUR),
        encoded(COLOUR.quantize(64, dither=Image.Dither.NONE)),
        encoded(COLOUR.quantize(64, dither=Image.Dither.NONE), "GIF"),
        encoded(with_alpha(COLOUR, "RGBA")),
    ],
)
def test_a_picture_in_colour_is_the_same_in_every_file(file: bytes) -> None:
    pixels = pixels_of(file)
    assert pixels.shape == (4, 5, 3)
    np.testing.assert_allclose(pixels, np.asarray(COLOUR) / 255, atol=1.5 / 255)


def test_half_bright_is_half() -> None:
    """Pillow itself clips this picture to white."""
    picture = Image.fromarray(np.full((3, 3), 32768, np.uint16))
    assert np.asarray(picture.convert("L")).min() >= 128
    np.testing.assert_allclose(pixels_of(encoded(picture)), 32768 / 65535, rtol=1e-6)


def test_black_and_white() -> None:
    assert pixels_of(encoded(Image.fromarray(GREY > 0.5))).ravel().tolist() == (GREY > 0.5).ravel().tolist()


def test_twelve_bits_go_up_to_4095() -> None:
    """Pillow reads such TIFF files, two values in three bytes, but writes none."""
    tags = {256: 2, 257: 1, 258: 12, 259: 1, 262: 1, 273: 110, 278: 1, 279: 3}  # width, height, bits, …
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4)
    assert len(header) == tags[273]
    pixels = pixels_of(header + b"\xff\xf8\x00")  # 4095 and 2048
    np.testing.assert_allclose(pixels.ravel(), [1, 2048 / 4095], rtol=1e-6)


def test_values_of_eight_bits_are_what_they_were() -> None:
    picture = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    expected = torch.arange(256, dtype=torch.uint8).to(torch.float32).div_(255)
    assert torch.equal(torch.from_numpy(pixels_of(encoded(picture))).flatten(), expected)


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        (Image.fromarray(GREY.astype(np.float32) * 255), r"values from 0 to 255, .*Scale it, or give"),
        (Image.fromarray(-GREY.astype(np.float32)), r"values from -1 to"),
        (Image.fromarray(np.full((2, 2), np.nan, np.float32)), "NaN or infinite"),
        (Image.fromarray((GREY * 1e9).astype(np.int32)), "not known which of them is white"),
    ],
)
def test_pictures_whose_white_is_unknown_are_refused(picture: Image.Image, said: str) -> None:
    with pytest.raises(InvalidImage, match=said):
        pixels_of(encoded(picture, "TIFF"))


def test_remedies_for_them_work() -> None:
    floats = Image.fromarray((np.asarray(Image.fromarray(GREY.astype(np.float32) * 255)) / 255).astype(np.float32))
    np.testing.assert_allclose(pixels_of(encoded(floats, "TIFF"))[..., 0], GREY, atol=1e-6)


@pytest.mark.parametrize("file", [None, b"", b"no image", encoded(EIGHT)[:-30]])
def test_what_is_no_picture(file: bytes | None) -> None:
    with pytest.raises(InvalidImage, match="is not a readable image"):
        pixels_of(file)


def test_a_picture_that_would_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(InvalidImage, match="is not a readable image"):
        pixels_of(encoded(EIGHT))
