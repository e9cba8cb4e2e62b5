"""Ties of labels against a slow oracle, and what is left of labels behind sums."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mtz_core.network.graph import FIXED
from mtz_core.network.ties import THE_INPUT, THE_KERNEL, Ties, compress, varying


def partition(count: int, links: list[tuple[int, int]]) -> list[int]:
    """The least label tied to each, by passing it on until nothing changes."""
    least = list(range(count))
    changed = True
    while changed:
        changed = False
        for a, b in links:
            low = min(least[a], least[b])
            changed |= least[a] != low or least[b] != low
            least[a] = least[b] = low
    return least


links = st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=14)


@given(links, st.integers(0, 14))
def test_ties_are_transitive_whenever_somebody_asks(pairs: list[tuple[int, int]], asked: int) -> None:
    ties = Ties()
    labels = torch.arange(12)
    ties.fresh(10)
    for number, (a, b) in enumerate(pairs):
        if number == asked:
            assert ties.resolve(labels).tolist() == partition(12, pairs[:number])
        ties.tie(torch.tensor([a]), torch.tensor([b]))
    assert ties.resolve(labels).tolist() == partition(12, pairs)
    late = ties.fresh(1)
    assert ties.resolve(late).tolist() == [12]


def test_labels_are_new_and_the_first_two_are_taken() -> None:
    ties = Ties()
    assert (THE_INPUT, THE_KERNEL) == (0, 1)
    assert ties.fresh(3).tolist() == [2, 3, 4]
    assert ties.fresh(2).tolist() == [5, 6]
    assert ties.resolve(torch.arange(7)).tolist() == list(range(7))


def test_ties_broadcast_and_leave_fixed_elements_alone() -> None:
    ties = Ties()
    row = ties.fresh(3)
    column = torch.tensor([[FIXED], [5 - 3]])
    ties.tie(row, torch.full((3,), FIXED))
    assert ties.resolve(row).tolist() == row.tolist()
    ties.tie(row[None, :], column)
    assert ties.resolve(row).tolist() == [2, 2, 2]
    assert ties.resolve(torch.tensor([FIXED, 4])).tolist() == [FIXED, 2]


def test_uniform_ties_along_the_other_axes() -> None:
    ties = Ties()
    labels = ties.fresh(6).reshape(1, 2, 3)
    left = ties.uniform(labels, (1,))
    assert left.shape == (1, 2, 1)
    assert ties.resolve(labels).tolist() == [[[2, 2, 2], [5, 5, 5]]]
    assert left.flatten().tolist() == [2, 5]
    assert ties.uniform(left, (0, 1, 2)).tolist() == left.tolist()
    assert ties.uniform(left, ()).shape == (1, 1, 1)
    assert ties.resolve(labels).unique().tolist() == [2]


def test_a_sum_over_all_neurons_belongs_to_none() -> None:
    ties = Ties()
    labels = ties.fresh(4).reshape(1, 4)
    assert ties.symmetric(labels, [1]).tolist() == [[FIXED]]
    assert ties.resolve(labels).tolist() == labels.tolist()


def test_positions_that_sum_the_same_neurons_in_another_order_leave_them_alone() -> None:
    ties = Ties()
    first = ties.fresh(3)
    labels = torch.stack([first, first.flip(0), first.roll(1)])[None]
    assert ties.symmetric(labels, [2]).tolist() == [[[FIXED], [FIXED], [FIXED]]]
    assert ties.resolve(first).tolist() == first.tolist()


def test_positions_that_sum_other_neurons_make_one_neuron_each() -> None:
    ties = Ties()
    heads = ties.fresh(6).reshape(1, 2, 3)
    left = ties.symmetric(heads, [2])
    assert left.flatten().tolist() == [2, 5]
    assert ties.resolve(heads).tolist() == [[[2, 2, 2], [5, 5, 5]]]


def test_a_sum_along_an_axis_without_change_changes_nothing() -> None:
    ties = Ties()
    labels = ties.fresh(4).reshape(1, 4, 1, 1)
    assert ties.symmetric(labels, [2, 3]).tolist() == labels.tolist()


def test_pins_have_colours_of_their_own_and_skip_what_is_fixed() -> None:
    ties = Ties()
    labels = ties.fresh(3)
    ties.pin(torch.tensor([2, FIXED, 4]), torch.tensor([0, 1, 0]))
    ties.pin(labels[:1], torch.tensor([0]))
    (first, colour), (second, other) = ties.colours
    assert (first.tolist(), second.tolist()) == ([2, 4], [2])
    assert colour.unique().numel() == 1
    assert other.tolist() != colour[:1].tolist()


shapes = st.lists(st.integers(1, 3), min_size=1, max_size=4)


@given(shapes, st.integers(0, 999))
def test_compressed_labels_are_the_same_labels(shape: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    kept = [
        size if keep else 1 for size, keep in zip(shape, torch.rand(len(shape), generator=generator) > 0.5, strict=True)
    ]
    labels = torch.randint(0, 3, kept, generator=generator)
    whole = labels.expand(shape)
    small = compress(whole)
    assert torch.equal(small.expand(shape), whole)
    assert all(size <= before for size, before in zip(small.shape, kept, strict=True))
    for axis, size in enumerate(small.shape):
        assert size == 1 or bool((small != small.narrow(axis, 0, 1)).any())


@pytest.mark.parametrize(
    ("labels", "small"),
    [
        ([[FIXED, 3, 3], [FIXED, 4, 4]], [[3], [4]]),
        ([[FIXED, FIXED]], [[FIXED]]),
        ([[3, FIXED], [FIXED, 3]], [[3]]),
        ([[3, 4], [FIXED, 4]], [[3, 4]]),
    ],
)
def test_what_is_fixed_does_not_keep_labels_from_being_compressed(labels: Any, small: Any) -> None:
    assert compress(torch.tensor(labels)).tolist() == small


def test_axes_along_which_labels_change() -> None:
    assert varying(torch.zeros(1, 3, 1, 2).long()) == {-3, -1}
    assert varying(torch.zeros(1, 1).long()) == set()
    empty: Tensor = torch.zeros(()).long()
    assert varying(empty) == set()
