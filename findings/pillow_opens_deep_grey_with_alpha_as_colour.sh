#!/bin/sh
# Pillow 13.0.0 opens a grey PNG of 16 bits as such, in mode I;16. With an alpha channel, the same picture becomes colour,
# in mode RGBA with 8 bits: one channel is four, and of a difference of 255 between two greys, one is left. Nothing is said.
# A network for one channel then refuses the picture, or, behind a conversion to grey, reads it coarser than the pictures
# that it was trained on.
#
# Expected: LA, as for grey with alpha of 8 bits, or a grey mode of 16 bits. Seen: RGBA of 8 bits.
# Remedy: before the pixels are read, `image.tile` has the raw mode "LA;16B", the only trace. There, convert to L, and
# know that the lower 8 bits are gone; or write the pictures without alpha.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check pillow==13.0.0

cat >"$folder/modes.py" <<'PY'
import io
import struct
import zlib

from PIL import Image

GREY, GREY_WITH_ALPHA = 0, 4


def png(colour: int, bits: int, *values: int) -> bytes:
    """One row of pixels as PNG; opaque where there is alpha."""
    sample = {8: ">B", 16: ">H"}[bits]
    alpha = struct.pack(sample, 2**bits - 1) if colour == GREY_WITH_ALPHA else b""
    row = b"\0" + b"".join(struct.pack(sample, value) + alpha for value in values)
    head = struct.pack(">IIBBBBB", len(values), 1, bits, colour, 0, 0, 0)
    parts = ((b"IHDR", head), (b"IDAT", zlib.compress(row)), (b"IEND", b""))
    chunks = (struct.pack(">I", len(p)) + k + p + struct.pack(">I", zlib.crc32(k + p)) for k, p in parts)
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


for colour, bits, values in ((GREY, 16, (1000, 1255)), (GREY_WITH_ALPHA, 8, (3, 4)), (GREY_WITH_ALPHA, 16, (1000, 1255))):
    with Image.open(io.BytesIO(png(colour, bits, *values))) as image:
        raw = image.tile[0][3]  # gone once the pixels are read
        print(bits, image.mode, raw, image.getpixel((0, 0)), image.getpixel((1, 0)))
PY
seen=$("$folder/venv/bin/python" "$folder/modes.py")
echo "$seen"
[ "$seen" = "16 I;16 I;16B 1000 1255
8 LA LA (3, 255) (4, 255)
16 RGBA LA;16B (3, 3, 3, 255) (4, 4, 4, 255)" ]
