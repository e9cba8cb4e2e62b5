"""The states of a neuron group: their counts are those of their members, their damage that of what was done."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtz_core.merging.matching import Matcher
from mtz_core.merging.pairing import Pairing
from mtz_core.network.narrowing import LEAST
from mtz_core.planning.dropping import Reader, readers
from mtz_core.planning.families import ways_to_share
from mtz_core.planning.options import STARTS, DropPath, Options, Prices
from mtz_core.planning.sizes import Sizes, owner_sets
from mtz_core.settings import Move
from mtz_core.zipped.ownership import NOT_A_MEMBER
from tests.support.fleets import BOTH, CONFIG, FLEETS, droppable, planner, statistics, traced_fleet
from tests.support.networks import joined

pytestmark = pytest.mark.slow

on_all_fleets = pytest.mark.parametrize("name", FLEETS)


def states(table: Options) -> range:
    return range(len(table.gone))


@pytest.mark.parametrize("moves", [BOTH, ("share",), ("drop",)], ids="+".join)
@on_all_fleets
def test_counts_are_those_of_the_members(name: str, moves: tuple[Move, ...]) -> None:
    networks = traced_fleet(name)
    for group, table in planner(name, moves).options.items():
        widths = [network.graph.widths[group] for network in networks.values()]
        for state in states(table):
            members = table.members(state)
            owned = members >= 0
            assert table.kept[:, state].tolist() == owned.sum(axis=0).tolist()
            assert table.counts[state].tolist() == planner(name, moves).sizes.each(members).sum(axis=0).tolist()
            assert table.counts[state].sum() == len(members), "every unit has owners that are known"
            assert table.shared[state] == (owned.sum(axis=1) > 1).sum()
            for t, width in enumerate(widths):
                own = members[owned[:, t], t]
                assert len(set(own.tolist())) == len(own)
                assert set(own.tolist()) <= set(range(width))
        assert (table.path[0], table.gone[0], table.shared[0]) == (0, 0, 0)
        assert table.kept[:, 0].tolist() == widths
        assert not table.sharing[:, 0].any() and not table.dropping[:, 0].any()


@on_all_fleets
def test_only_what_is_allowed_is_done(name: str) -> None:
    networks = traced_fleet(name)
    for group, table in planner(name).options.items():
        if group not in droppable(name):
            assert not table.gone.any()
        else:
            assert table.gone.max() > 0
            assert bool((table.kept >= LEAST).all())
    for group, table in planner(name, ("share",)).options.items():
        assert not table.gone.any()
        assert not table.dropping.any()
        widths = [network.graph.widths[group] for network in networks.values()]
        assert bool((table.kept == np.array(widths)[:, None]).all())
    for table in planner(name, ("drop",)).options.values():
        assert not table.shared.any()
        assert not table.sharing.any()


@on_all_fleets
def test_damage_adds_up_along_a_path_and_never_falls_by_dropping(name: str) -> None:
    for table in planner(name).options.values():
        for number, path in enumerate(table.paths):
            own = np.flatnonzero(table.path == number)
            assert table.gone[own].tolist() == list(range(len(path.order) + 1))
            assert bool((path.dropping >= 0).all() and (path.sharing >= 0).all())
            nothing = np.zeros((1, len(table.kept)))
            spent = np.cumsum(np.concatenate([nothing, path.dropping]), axis=0)
            np.testing.assert_allclose(table.dropping[:, own], spent.T)
            assert bool((np.diff(table.dropping[:, own]) >= 0).all())
            assert bool((np.diff(table.sharing[:, own]) <= 1e-15 + 1e-9 * path.sharing.sum()).all())
            assert bool((np.diff(table.kept[:, own]) <= 0).all())
            assert bool((np.diff(table.kept[:, own].sum(axis=0)) < 0).all())
        weights = np.arange(1.0, 1.0 + len(table.kept))
        expected = weights @ (3.0 * table.sharing + 0.5 * table.dropping)
        np.testing.assert_allclose(table.damage(Prices(weights, 3.0, 0.5)), expected)


@on_all_fleets
def test_the_damage_of_sharing_is_that_of_the_tuples_that_are_left(name: str) -> None:
    networks, (moments, sensitivity) = traced_fleet(name), statistics(name)
    ways = ways_to_share(joined(networks, moments, sensitivity), CONFIG, np.ones(len(networks)))
    for group, table in planner(name).options.items():
        ends = table.path[list(table.complete)]
        for state in list(states(table))[:: max(1, len(states(table)) // 15)]:
            members = table.members(state)
            way = next((own for own, end in zip(ways, ends, strict=True) if table.path[state] <= end), ways[-1])
            expected = np.zeros(len(networks))
            for family in way.families:
                own = members[:, family.places]
                shared = own[((own >= 0).sum(axis=1) > 1) & ((members >= 0).sum(axis=1) == (own >= 0).sum(axis=1))]
                expected += family.damaged(group, shared)[1].sum(axis=0)
            np.testing.assert_allclose(table.sharing[:, state], expected, rtol=1e-6, atol=1e-12)


@on_all_fleets
def test_the_damage_of_dropping_is_that_of_all_the_neurons_that_are_gone(name: str) -> None:
    """One block of all that goes, out of layers that nothing was taken from yet."""
    networks, (moments, sensitivity) = traced_fleet(name), statistics(name)
    planned = planner(name)
    for group, table in planned.options.items():
        if group not in droppable(name):
            continue
        found: list[Sequence[Reader]] = [
            readers(network, group, moments[task], sensitivity[task], CONFIG.fixed_damping)
            for task, network in networks.items()
        ]
        for state in list(states(table))[:: max(1, len(states(table)) // 9)]:
            members = table.members(state)
            expected = np.zeros(len(networks))
            for t, network in enumerate(networks.values()):
                lost = np.setdiff1d(np.arange(network.graph.widths[group]), members[:, t])
                if len(lost):
                    expected[t] = sum(reader.copy().drop(torch.from_numpy(lost)) for reader in found[t])
            np.testing.assert_allclose(table.dropping[:, state], expected, rtol=1e-5, atol=1e-12)


@on_all_fleets
def test_everything_can_be_shared_and_every_start_drops_as_much_as_it_may(name: str) -> None:
    networks, (moments, sensitivity) = traced_fleet(name), statistics(name)
    counts = Matcher(joined(networks, moments, sensitivity), CONFIG).counts
    for group, table in planner(name).options.items():
        everyone = table.members(table.complete[-1])
        assert int((everyone >= 0).all(axis=1).sum()) == counts[group], "all tasks share as much as they can"
        shared = [int(table.shared[state]) for state in np.flatnonzero(table.gone == 0)]
        assert set(planner(name, ("share",)).options[group].shared.tolist()) == set(shared)
        first = 0
        for complete in table.complete:
            last, most = int(table.path[complete]), int(table.shared[complete])
            own = {0: 0} | {shared[number]: number for number in range(first + 1, last + 1)}
            assert {round(start * most) for start in STARTS} <= own.keys() <= set(range(most + 1))
            if group in droppable(name):
                for start in STARTS:
                    assert table.kept[:, table.path == own[round(start * most)]].min() == LEAST
            first = last


@on_all_fleets
def test_shares_between_the_starts_are_the_cheapest_tuples_of_all(name: str) -> None:
    for table in planner(name, ("share",)).options.values():
        first = 0
        for complete in table.complete:
            whole = table.paths[table.path[complete]]
            owners = (whole.units >= 0).sum(axis=1)
            costs = np.sort(whole.sharing[owners > 1].sum(axis=1) / (owners[owners > 1] - 1))
            for path in table.paths[first + 1 : table.path[complete]]:
                shared = (path.units >= 0).sum(axis=1)
                count = int((shared > 1).sum())
                if count not in {round(start * len(costs)) for start in STARTS}:
                    each = np.sort(path.sharing[shared > 1].sum(axis=1) / (shared[shared > 1] - 1))
                    np.testing.assert_allclose(each, costs[:count], rtol=1e-9, atol=1e-15)
            first = table.path[complete]


def test_pairs_at_the_starts_cost_no_more_than_the_cheapest_of_all() -> None:
    for table in planner("two mlps", ("share",)).options.values():
        costs = np.cumsum([0.0, *np.sort(table.paths[-1].sharing.sum(axis=1))])
        for path in table.paths:
            count = int((path.units >= 0).all(axis=1).sum())
            assert path.sharing.sum() <= costs[count] * (1 + 1e-9)


# Paths drawn at random


@given(st.integers(1, 4), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(0, 999))
def test_states_of_any_path_are_what_their_members_say(shared: int, own: list[int], seed: int) -> None:
    generator = np.random.default_rng(seed)
    tasks = tuple("abc"[: len(own)])
    widths = [shared + extra for extra in own]
    tuples = np.stack([generator.permutation(width)[:shared] for width in widths], axis=1)
    units = Pairing.from_tuples(tasks, widths, tuples).members
    sharing = np.where((units >= 0).all(axis=1), generator.random(len(units)), 0.0)[:, None] * np.ones(len(own))
    order = generator.permutation(len(units))[: generator.integers(0, len(units) + 1)]
    path = DropPath(units, sharing, order, generator.random((len(order), len(own))))
    sizes = Sizes({task: traced_fleet("two mlps")["a"] for task in tasks}, owner_sets([units]))
    table = Options.along([path, path], sizes)
    assert table.path.tolist() == [0] * (len(order) + 1) + [1] * (len(order) + 1)
    for state in states(table):
        gone = int(table.gone[state])
        left = [unit for unit in range(len(units)) if unit not in order[:gone].tolist()]
        members = units[left]
        assert np.array_equal(table.members(state), members)
        assert table.kept[:, state].tolist() == (members != NOT_A_MEMBER).sum(axis=0).tolist()
        common = len(own) > 1
        assert table.shared[state] == common * (members != NOT_A_MEMBER).all(axis=1).sum()
        np.testing.assert_allclose(table.sharing[:, state], sharing[left].sum(axis=0), atol=1e-12)
        np.testing.assert_allclose(table.dropping[:, state], path.dropping[:gone].sum(axis=0))
