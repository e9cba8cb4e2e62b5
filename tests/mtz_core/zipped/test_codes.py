"""Codes: packed in as few bytes as they fit and back, and values that come back exactly from what is stored."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from mtz_core.merging.rounding import choose_scales, storable
from mtz_core.settings import BITS
from mtz_core.zipped import codes as codes_module
from mtz_core.zipped.codes import SCALES, codes_of, middle, nearest, pack, packed_bytes, unpack, values_of

on_all_bits = pytest.mark.parametrize("bits", BITS)
on_both_types = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def drawn(count: int, bits: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**bits, (count,), generator=generator, dtype=torch.uint8)


def by_hand(codes: list[int], bits: int) -> list[int]:
    """The bytes of one long number whose lowest bits are the first code."""
    number = sum(code << bits * i for i, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@on_all_bits
@given(data=st.data())
def test_packed_codes_are_one_number_the_first_in_its_lowest_bits(bits: int, data: st.DataObject) -> None:
    codes = data.draw(st.lists(st.integers(0, 2**bits - 1), max_size=40))
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == by_hand(codes, bits)
    assert len(packed) == packed_bytes(len(codes), bits)
    assert unpack(packed, bits, len(codes)).tolist() == codes


@on_all_bits
@pytest.mark.parametrize("count", range(26))
def test_any_number_of_codes_comes_back(bits: int, count: int) -> None:
    codes = drawn(count, bits)
    packed = pack(codes, bits)
    assert len(packed) == -(-count * bits // 8)
    found = unpack(packed, bits, count)
    assert found.dtype == torch.uint8
    assert torch.equal(found, codes)


@on_all_bits
@pytest.mark.parametrize("count", [8 * 5 - 1, 8 * 5, 8 * 5 + 1, 8 * 11 + 3])
def test_many_codes_are_packed_part_by_part(bits: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = drawn(count, bits)
    whole = pack(codes, bits)
    monkeypatch.setattr(codes_module, "_WORDS", 5)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, count), codes)


@on_all_bits
def test_rows_are_packed_one_after_the_other_without_a_gap(bits: int) -> None:
    codes = drawn(21, bits)
    assert torch.equal(pack(codes.reshape(3, 7), bits), pack(codes, bits))
    strided = codes.reshape(3, 7).T
    assert torch.equal(unpack(pack(strided, bits), bits, 21).reshape(7, 3), strided)


@on_all_bits
def test_packing_and_unpacking_leave_what_they_are_given(bits: int) -> None:
    codes = drawn(13, bits)
    before, packed = codes.clone(), pack(codes, bits)
    packed.zero_()
    assert torch.equal(codes, before)


@on_all_bits
def test_the_grid_is_symmetric_and_evenly_spaced(bits: int) -> None:
    levels = values_of(torch.arange(2**bits, dtype=torch.uint8)[None], torch.tensor([2.0]), bits)[0]
    assert torch.equal(levels, -levels.flip(0))
    assert bool((levels.diff() == 2).all())
    assert float(levels[-1]) == 2 * middle(bits)


@on_both_types
def test_the_levels_of_few_bits_are_among_those_of_more(dtype: torch.dtype) -> None:
    scales = storable(torch.tensor([1e-3, 0.7, 3.3], dtype=dtype))
    levels = {b: values_of(torch.arange(2**b, dtype=torch.uint8).expand(3, -1), scales, b) for b in BITS}
    for more, few in ((more, few) for more in BITS for few in BITS if few < more):
        assert bool(torch.isin(levels[few], levels[more]).all())
        again = values_of(codes_of(levels[few], scales, more), scales, more)
        assert torch.equal(again, levels[few])


SCALE = st.floats(min_value=2.0**-126, max_value=2.0**119, allow_nan=False)
"""Scales whose levels in 8 bits float32 can hold."""


@on_all_bits
@on_both_types
@given(scale=SCALE)
@example(scale=2.0**-133)  # the least bfloat16
@example(scale=2.0**119)
def test_codes_come_back_from_values_and_values_are_exact(bits: int, dtype: torch.dtype, scale: float) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8)[None]
    scales = torch.tensor([scale], dtype=dtype).to(SCALES).to(dtype)
    values = values_of(codes, scales, bits)
    exact = (codes.to(torch.float64) - middle(bits)) * scales.to(torch.float64)[:, None]
    assert values.dtype == dtype
    assert torch.equal(values.to(torch.float64), exact)
    assert torch.equal(codes_of(values, scales, bits), codes)


@on_all_bits
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_codes_come_back_from_values_of_half_the_precision(bits: int, dtype: torch.dtype) -> None:
    codes = torch.arange(2**bits, dtype=torch.uint8).expand(4, -1)
    scales = torch.tensor([2e-4, 0.0123, 1.0, 200.0]).to(SCALES).to(dtype)
    assert torch.equal(codes_of(values_of(codes, scales, bits), scales, bits), codes)


@on_all_bits
def test_values_go_to_the_nearest_level_and_outliers_to_the_last(bits: int) -> None:
    generator = torch.Generator().manual_seed(3)
    scales = storable(torch.rand(5, generator=generator, dtype=torch.float64) + 0.1)
    values = torch.randn(5, 30, generator=generator, dtype=torch.float64)
    values[0, :2] = torch.tensor([1e30, -1e30])
    levels = values_of(torch.arange(2**bits, dtype=torch.uint8).expand(5, -1), scales, bits)
    least = (values[:, :, None] - levels[:, None]).abs().amin(dim=2)
    found = values_of(codes_of(values, scales, bits), scales, bits)
    torch.testing.assert_close((values - found).abs(), least)
    assert torch.equal(nearest(values, scales[:, None], bits), found)
    assert found[0, :2].tolist() == [levels[0, -1], levels[0, 0]]


@on_all_bits
@on_both_types
def test_a_row_of_scale_0_is_all_zero(bits: int, dtype: torch.dtype) -> None:
    values = torch.zeros(2, 5, dtype=dtype)
    scales = choose_scales(values, torch.ones(5, dtype=dtype), bits)
    assert not scales.any()
    assert torch.equal(nearest(values, scales[:, None], bits), values)
    assert torch.equal(values_of(codes_of(values, scales, bits), scales, bits), values)
