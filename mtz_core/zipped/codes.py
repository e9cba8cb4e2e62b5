"""Weights as integer codes of a few bits, packed, with one scale for each row.

A row is rounded to the grid ``w = s (c − (2ᵇ − 1) / 2)`` with codes ``c`` from 0 to ``2ᵇ − 1``. The grid is symmetric,
and all of its levels are used; 0 lies between two of them, but a row of scale 0 is all zero. Scales are bfloat16: they
have the range of float32, and as codes are found after a scale is rounded, its few digits cost nothing. A level has at
most 8 bits and so has a scale, so that in float32 and float64 their product is exact, and codes come back from values.
The levels of few bits are among those of more.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

SCALES = torch.bfloat16
"""The type that scales are stored in."""

_WORDS = 2**18
"""How many words of 8 codes are packed or unpacked at once."""


def packed_bytes(count: int, bits: int) -> int:
    """The bytes that so many codes take."""
    return -(-count * bits // 8)


def pack(codes: UInt8[Tensor, "..."], bits: int) -> UInt8[Tensor, " bytes"]:
    """Pack codes, the first in the lowest bits.

    Args:
        codes: Codes from 0 to ``2ᵇ − 1``.
        bits: Bits of a code, one of `mtz_core.settings.BITS`.

    Returns:
        The codes, row by row, in as few bytes as they fit.
    """
    flat = codes.flatten()
    if bits == 8:
        return flat.clone()
    count = len(flat)
    padded = torch.zeros(-(-count // 8) * 8, dtype=torch.uint8, device=flat.device)
    padded[:count] = flat
    shifts = bits * torch.arange(8, device=flat.device)
    bytes_ = 8 * torch.arange(bits, device=flat.device)
    parts = []
    for eights in padded.reshape(-1, 8).split(_WORDS):
        words = (eights.to(torch.int64) << shifts).sum(dim=1)
        parts.append(((words[:, None] >> bytes_) & 255).to(torch.uint8))
    joined = torch.cat(parts) if parts else padded
    return joined.flatten()[: packed_bytes(count, bits)].clone()


def unpack(packed: UInt8[Tensor, " bytes"], bits: int, count: int) -> UInt8[Tensor, " count"]:
    """Unpack codes.

    Args:
        packed: What `pack` returned.
        bits: Bits of a code.
        count: How many codes there are.

    Returns:
        The codes.
    """
    if bits == 8:
        return packed
    if bits == 4:
        return torch.stack([packed & 15, packed >> 4], dim=1).flatten()[:count]
    if bits == 2:
        return torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=1).flatten()[:count]
    words = -(-count // 8)
    padded = torch.zeros(words * bits, dtype=torch.uint8, device=packed.device)
    padded[: len(packed)] = packed
    shifts = bits * torch.arange(8, device=packed.device)
    bytes_ = 8 * torch.arange(bits, device=packed.device)
    codes = torch.empty(words, 8, dtype=torch.uint8, device=packed.device)
    for some, into in zip(padded.reshape(-1, bits).split(_WORDS), codes.split(_WORDS), strict=True):
        word = (some.to(torch.int64) << bytes_).sum(dim=1)
        into.copy_((word[:, None] >> shifts) & (2**bits - 1))
    return codes.flatten()[:count]


def values_of(
    codes: UInt8[Tensor, "rows columns"], scales: Float[Tensor, " rows"], bits: int
) -> Float[Tensor, "rows columns"]:
    """The values of codes.

    Args:
        codes: The codes.
        scales: The step of each row.
        bits: Bits of a code.

    Returns:
        The values, in the scales' type.
    """
    return (codes.to(scales.dtype) - middle(bits)) * scales[:, None]


def codes_of(
    values: Float[Tensor, "rows columns"], scales: Float[Tensor, " rows"], bits: int
) -> UInt8[Tensor, "rows columns"]:
    """The codes nearest to values.

    Args:
        values: The values.
        scales: The step of each row, 0 of a row that is all zero.
        bits: Bits of a code.

    Returns:
        The codes.
    """
    steps = torch.where(scales == 0, 1.0, scales.to(torch.float64))
    codes = (values.to(torch.float64) / steps[:, None] + middle(bits)).round_()
    return codes.clamp_(0, 2**bits - 1).to(torch.uint8)


def nearest(values: Float[Tensor, "..."], scales: Float[Tensor, "..."], bits: int) -> Float[Tensor, "..."]:
    """The levels nearest to values; 0 where a scale is 0."""
    half = middle(bits)
    steps = torch.where(scales == 0, 1.0, scales)
    return ((values / steps + half).round_().clamp_(0, 2**bits - 1) - half) * scales


def middle(bits: int) -> float:
    """The code that would stand for 0, between two codes."""
    return (2**bits - 1) / 2
