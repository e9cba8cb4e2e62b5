"""Predicted bytes against the bytes of networks that are really zipped, counts and pairings drawn at random."""

from collections.abc import Mapping

import numpy as np
import pytest

from mtz_core import ZipConfig
from mtz_core.merging.compatibility import why_separate
from mtz_core.merging.pairing import Pairing
from mtz_core.merging.walk import finish, merge
from mtz_core.network.narrowing import LEAST
from mtz_core.planning.sizes import Sizes, owner_sets
from mtz_core.statistics.calibration import as_batches
from mtz_core.zipped.ownership import NOT_A_MEMBER
from tests.support.fleets import FLEETS, droppable, statistics, traced_fleet
from tests.support.networks import joined

on_all_fleets = pytest.mark.parametrize("name", FLEETS)

Kept = dict[str, dict[str, np.ndarray]]


def drawn(
    name: str, seed: int, drop: bool = True, share: bool = True, some: bool = False
) -> tuple[Kept, dict[str, Pairing]]:
    """Neurons that each task keeps, and tuples of those that are one, of all tasks or of some."""
    networks, generator = traced_fleet(name), np.random.default_rng(seed)
    graph = next(iter(networks.values())).graph
    keep: Kept = {task: {} for task in networks}
    pairings = {}
    for group in graph.hidden_groups:
        left = []
        for task, network in networks.items():
            width = network.graph.widths[group.name]
            count = width
            if drop and group.name in droppable(name) and width > LEAST:
                count = int(generator.integers(LEAST, width + 1))
            keep[task][group.name] = np.sort(generator.permutation(width)[:count])
            left.append(count)
        writers = [node for node in graph.layers if node.name in group.writers]
        possible = share and any(why_separate(networks, node) is None for node in writers)
        shared = int(generator.integers(0, min(left) + 1)) if possible else 0
        tuples = np.stack([generator.permutation(count)[:shared] for count in left], axis=1)
        if some:  # tuples of two and more tasks
            absent = generator.integers(0, len(left), shared)
            tuples[np.arange(shared), absent] = np.where(len(left) > 2, NOT_A_MEMBER, tuples[np.arange(shared), absent])
        pairings[group.name] = Pairing.from_tuples(tuple(networks), left, tuples)
    return keep, pairings


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
