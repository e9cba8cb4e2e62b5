"""Predicted bytes against the bytes of networks that are really zipped, counts and pairings drawn at random."""

import itertools
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.merging.pairing import Pairing
from mtz_core.merging.walk import finish, merge
from mtz_core.planning.sizes import Sizes, owner_sets
from mtz_core.settings import BITS
from mtz_core.statistics.calibration import as_batches
from mtz_core.zipped.codes import SCALES
from tests.support.fleets import FLEETS, Kept, drawn, drawn_bits, rounded_fleet, statistics, traced_fleet
from tests.support.networks import joined

on_all_fleets = pytest.mark.parametrize("name", FLEETS)


def counts(keep: Kept, pairings: Mapping[str, Pairing]) -> tuple[list[dict[str, int]], dict[str, int]]:
    kept = [{group: len(neurons) for group, neurons in own.items()} for own in keep.values()]
    return kept, {group: pairing.shared for group, pairing in pairings.items()}


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "some"), [(0, False), (1, True)])
@on_all_fleets
def test_the_bytes_are_those_of_the_zipped_network(name: str, seed: int, some: bool) -> None:
    networks, examples = traced_fleet(name), FLEETS[name].examples(6)
    keep, pairings = drawn(name, seed, some=some)
    batches = {task: as_batches(x, task) for task, x in examples.items()}
    config = ZipConfig(patches=2, refit_rounds=0, damping=0.1)
    zipped = finish(
        merge(joined(networks, sensitivity=statistics(name)[1], batches=batches), pairings, config, keep=keep)
    )
    sizes = Sizes(networks, owner_sets(pairing.members for pairing in pairings.values()))
    counted = {group: sizes.each(pairing.members).sum(axis=0) for group, pairing in pairings.items()}
    assert sizes.stored(counted) == zipped.report.stored_bytes
    if not some:
        assert sizes.stored(sizes.counts(*counts(keep, pairings))) == zipped.report.stored_bytes
    assert zipped.report.stored_bytes == sum(t.numel() * t.element_size() for t in zipped.tensors().values())
    assert zipped.report.original_bytes == sum(network.bytes for network in networks.values())


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
@on_all_fleets
def test_the_bytes_of_rounded_networks_are_those_on_disk(name: str, seed: int, tmp_path: Path) -> None:
    fleet = rounded_fleet(name, seed)
    stored = fleet.zipped.report.stored_bytes
    assert fleet.sizes.stored(fleet.counts, fleet.bits) == stored
    assert stored == sum(t.numel() * t.element_size() for t in stored_tensors(fleet.zipped, tmp_path).values())
    content = (tmp_path / "weights.safetensors").read_bytes()
    assert stored == len(content) - 8 - int.from_bytes(content[:8], "little")


def stored_tensors(zipped: ZippedNetwork, folder: Path) -> dict[str, Tensor]:
    zipped.save(folder)
    return load_file(folder / "weights.safetensors")


@on_all_fleets
def test_what_depends_on_a_group_is_what_changes_with_it_where_weights_are_rounded(name: str) -> None:
    """Blocks are packed each by itself, so that the bytes of a block are not in proportion to its bits."""
    sizes = Sizes(traced_fleet(name))
    kept, shared = counts(*drawn(name, 3))
    bits = drawn_bits(sizes, 3)
    start = sizes.counts(kept, shared)
    for group in shared:
        more = sizes.counts([{**own, group: own[group] + 3} for own in kept], shared)
        difference = sizes.stored(more, bits) - sizes.stored(start, bits)
        assert sizes.around(group, more, bits) - sizes.around(group, start, bits) == difference
        together = {**start, group: np.stack([start[group], more[group]])}
        assert np.diff(sizes.around(group, together, bits)).tolist() == [difference]


@on_all_fleets
def test_fewer_bits_never_store_more_but_for_scales(name: str) -> None:
    sizes = Sizes(traced_fleet(name))
    counted = sizes.counts(*counts(*drawn(name, 4)))
    stored = [sizes.stored(counted, sizes.bits_of(bits)) for bits in BITS]
    assert all(few < more for more, few in itertools.pairwise(stored))
    rows = sum(int(sizes.extents(layer, counted)[0].sum()) for layer in sizes.layers)
    assert stored[0] < sizes.stored(counted, sizes.bits_of(sizes.full_bits)) + SCALES.itemsize * rows


@pytest.mark.slow
@on_all_fleets
def test_keeping_everything_apart_stores_all_originals(name: str) -> None:
    networks = traced_fleet(name)
    keep, pairings = drawn(name, 0, drop=False, share=False)
    sizes = Sizes(networks)
    assert sizes.stored(sizes.counts(*counts(keep, pairings))) == sum(network.bytes for network in networks.values())


@on_all_fleets
def test_what_depends_on_a_group_is_what_changes_with_it(name: str) -> None:
    """Arrays of counts give an array, a state each."""
    sizes = Sizes(traced_fleet(name))
    kept, shared = counts(*drawn(name, 3))
    for group in shared:
        least = min(own[group] for own in kept)
        states = [(kept, {**shared, group: count}) for count in range(least + 1)]
        states += [([{**own, group: own[group] + more} for own in kept], shared) for more in range(3)]
        counted = [sizes.counts(*state) for state in states]
        stored = [sizes.stored(own) for own in counted]
        around = [sizes.around(group, own) for own in counted]
        assert np.array_equal(np.array(stored) - stored[0], np.array(around) - around[0])
        together = {**counted[0], group: np.array([own[group] for own in counted])}
        assert sizes.around(group, together).tolist() == around


@on_all_fleets
def test_sharing_more_and_keeping_less_never_stores_more(name: str) -> None:
    sizes = Sizes(traced_fleet(name))
    kept, shared = counts(*drawn(name, 4))
    before = sizes.stored(sizes.counts(kept, shared))
    for group, count in shared.items():
        if count < min(own[group] for own in kept):
            assert sizes.stored(sizes.counts(kept, {**shared, group: count + 1})) <= before
        for t, own in enumerate(kept):
            if own[group] > count:
                fewer = [*kept[:t], {**own, group: own[group] - 1}, *kept[t + 1 :]]
                assert sizes.stored(sizes.counts(fewer, shared)) < before


@on_all_fleets
def test_widths_are_those_of_the_hidden_groups(name: str) -> None:
    networks = traced_fleet(name)
    sizes = Sizes(networks)
    assert sizes.tasks == tuple(networks)
    for own, network in zip(sizes.widths, networks.values(), strict=True):
        assert own == {group.name: network.graph.widths[group.name] for group in network.graph.hidden_groups}
