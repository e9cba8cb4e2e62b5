"""Plans fit their budgets, do little damage compared with every other plan, and are what merging makes of them."""

import itertools
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import mtz_core
from mtz_core import ZippedNetwork
from mtz_core.errors import InvalidConfig
from mtz_core.merging.walk import finish, merge
from mtz_core.network.narrowing import LEAST
from mtz_core.planning.options import Prices
from mtz_core.planning.planner import NEVER, Plan, Planner
from mtz_core.settings import BITS, MOVES, Move
from mtz_core.statistics.calibration import as_batches
from tests.support.fleets import (
    BOTH,
    CONFIG,
    EXAMPLES,
    FLEETS,
    droppable,
    measured_fleet,
    planner,
    statistics,
    traced_fleet,
)
from tests.support.networks import joined

pytestmark = pytest.mark.slow

on_all_fleets = pytest.mark.parametrize("name", FLEETS)
on_some_fleets = pytest.mark.parametrize("name", ["two mlps", "other widths and classes", "lenet-5", "residual"])
SIZES = (0.75, 0.5)


def possible(own: Planner, size: float) -> bool:
    return own.least_bytes <= size * own.original_bytes


def size_of(own: Planner, stored: int) -> float:
    """The budget for so many bytes, a little more to make up for rounding."""
    return (stored + 0.5) / own.original_bytes


@cache
def planned(name: str, size: float = 0.5) -> Plan:
    """The plan for a size, or for the least that is possible."""
    own = planner(name)
    return own.plan(max(size, size_of(own, own.least_bytes)))


def alike(own: Planner) -> Prices:
    """The damage to all tasks counts alike."""
    return Prices(np.ones(len(own.tasks)))


@cache
def summed(name: str, size: float = 0.5) -> Plan:
    """The plan of least damage to all tasks together, however uneven."""
    own = planner(name)
    return own._plan(own._cheapest(max(size, size_of(own, own.least_bytes)), alike(own)))


@cache
def merged(name: str) -> ZippedNetwork:
    plan = planned(name)
    batches = {task: as_batches(x, task) for task, x in FLEETS[name].examples(EXAMPLES).items()}
    steps = merge(
        joined(traced_fleet(name), sensitivity=statistics(name)[1], batches=batches),
        plan.pairings,
        CONFIG,
        keep=plan.keep,
    )
    return finish(steps)


def counts(own: Planner, plan: Plan) -> dict[str, np.ndarray]:
    return {group: own.sizes.each(pairing.members).sum(axis=0) for group, pairing in plan.pairings.items()}


@on_all_fleets
def test_a_plan_fits_its_budget_and_says_how_many_bytes_it_stores(name: str) -> None:
    own = planner(name)
    for size in SIZES:
        plan = planned(name, size)
        assert plan.bytes <= max(size * own.original_bytes, own.least_bytes)
        assert plan.bytes == own.sizes.stored(counts(own, plan))
        assert plan.damage == sum(plan.sharing.values()) + sum(plan.dropping.values())
        assert plan.damage == pytest.approx(sum(plan.lost.values()))
        assert all(value >= -1e-15 for value in (*plan.sharing.values(), *plan.dropping.values()))


@on_all_fleets
def test_no_unit_can_be_taken_back(name: str) -> None:
    """No state of any group that does less damage fits: not even one unit more."""
    own = planner(name)
    for size in SIZES:
        plan = summed(name, size)
        budget = max(size * own.original_bytes, own.least_bytes)
        counted = counts(own, plan)
        for group, table in own.options.items():
            damage = plan.sharing[group] + plan.dropping[group]
            better = table.damage(alike(own)) < damage * (1 - 1e-9) - 1e-12
            around = own.sizes.around(group, {**counted, group: table.counts[better]})
            more = around - own.sizes.around(group, counted)
            assert bool((plan.bytes + more > budget).all())


@on_all_fleets
def test_larger_budgets_do_no_more_damage(name: str) -> None:
    damages = [summed(name, size).damage for size in (*sorted(SIZES), 1.0)]
    assert all(after <= before * 1.02 for before, after in itertools.pairwise(damages))
    assert damages[-1] == pytest.approx(0, abs=1e-12)


@on_all_fleets
def test_who_keeps_what_is_written_down_without_contradictions(name: str) -> None:
    plan, networks = planned(name), traced_fleet(name)
    assert tuple(plan.keep) == tuple(networks)
    for group, pairing in plan.pairings.items():
        assert pairing.tasks == tuple(networks)
        for t, (task, network) in enumerate(networks.items()):
            kept = plan.keep[task][group]
            assert np.array_equal(kept, np.unique(kept))
            assert kept.min() >= 0
            assert kept.max() < network.graph.widths[group]
            if group not in droppable(name):
                assert len(kept) == network.graph.widths[group]
            assert len(kept) >= min(LEAST, network.graph.widths[group])
            column = pairing.members[:, t]
            assert np.array_equal(np.sort(column[column >= 0]), np.arange(len(kept)))


@on_some_fleets
def test_plans_with_one_move_do_nothing_else(name: str) -> None:
    networks, size = traced_fleet(name), 0.7
    drop, share = planner(name, ("drop",)), planner(name, ("share",))
    plan = drop.plan(max(size, size_of(drop, drop.least_bytes)))
    assert not any(pairing.shared for pairing in plan.pairings.values())
    assert not any(plan.sharing.values())
    plan = share.plan(max(size, size_of(share, share.least_bytes)))
    assert not any(plan.dropping.values())
    for task, network in networks.items():
        assert {group: len(kept) for group, kept in plan.keep[task].items()} == {
            group.name: network.graph.widths[group.name] for group in network.graph.hidden_groups
        }


@on_some_fleets
def test_a_move_that_is_never_worth_it_is_made_only_where_it_costs_nothing(name: str) -> None:
    own = planner(name)
    if own.reaches(0.7, {"drop"}):
        assert sum(own.plan(0.7, sharing=NEVER).sharing.values()) == pytest.approx(0, abs=1e-12)
    if own.reaches(0.7, {"share"}):
        assert sum(own.plan(0.7, dropping=NEVER).dropping.values()) == pytest.approx(0, abs=1e-12)


@on_all_fleets
def test_the_plan_of_doing_nothing_stores_the_originals(name: str) -> None:
    own = planner(name)
    plan = own.whole()
    assert plan.bytes == own.original_bytes == sum(network.bytes for network in traced_fleet(name).values())
    assert plan.damage == 0
    assert plan.same(own.whole())
    assert not plan.same(planned(name))
    assert not any(pairing.shared for pairing in plan.pairings.values())


@pytest.mark.parametrize("moves", [BOTH, ("share",), ("drop",)], ids="+".join)
@pytest.mark.parametrize("name", ["other widths and classes", "lenet-5", "norm of groups"])
def test_impossible_budgets_are_refused_with_the_least_possible_size(name: str, moves: tuple[Move, ...]) -> None:
    own = planner(name, moves)
    with pytest.raises(InvalidConfig, match=r"budget\.size: 0\.001 is impossible") as caught:
        own.plan(0.001)
    (told,) = re.findall(r"\(([\d,]+)\)", str(caught.value))
    least = int(told.replace(",", ""))
    assert least == own.least_bytes
    assert own.plan(size_of(own, least)).bytes == least
    with pytest.raises(InvalidConfig):
        own.plan(size_of(own, least - 1))


@pytest.mark.parametrize("move", BOTH)
@on_all_fleets
def test_what_can_be_reached_by_one_move_alone(name: str, move: Move) -> None:
    own, alone = planner(name), planner(name, (move,))
    for size in np.linspace(0.05, 1, 20):
        assert own.reaches(float(size), {move}) == possible(alone, float(size))


# Against all plans


def least_damage(own: Planner, size: float) -> float:
    """The least damage of all pairs of states of two groups that fit."""
    (first, one), (second, two) = own.options.items()
    start = {first: one.counts[0], second: two.counts[0]}
    alone = {first: one.counts[0], second: two.counts[None]}
    both = {first: one.counts[:, None], second: two.counts[None]}
    stored = own.sizes.stored(start)
    stored = stored + own.sizes.around(second, alone) - own.sizes.around(second, start)
    stored = stored + own.sizes.around(first, both) - own.sizes.around(first, alone)
    for i, j in ((0, 0), (3, 7), (len(one.gone) - 1, 5)):
        assert own.sizes.stored({first: one.counts[i], second: two.counts[j]}) == stored[i, j]
    damage = one.damage(alike(own))[:, None] + two.damage(alike(own))[None]
    return float(damage[stored <= size * own.original_bytes].min())


@pytest.mark.parametrize("name", ["two mlps", "other widths and classes", "layer norm", "norm of groups"])
def test_a_plan_does_hardly_more_damage_than_the_best_of_all(name: str) -> None:
    own = planner(name)
    assert len(own.options) == 2
    excess = []
    for size in np.linspace(1.02 * own.least_bytes / own.original_bytes, 0.97, 8):
        found = own._plan(own._cheapest(float(size), alike(own))).damage
        best = least_damage(own, float(size))
        assert found >= best * (1 - 1e-9)
        excess.append(found / max(best, 1e-12))
    assert max(excess) < 1.15
    assert np.mean(excess) < 1.03


def test_a_task_that_counts_for_more_loses_less() -> None:
    own = planner("two mlps")
    first, second = own.tasks
    even = own.plan(0.4).lost
    for favoured, other in ((first, second), (second, first)):
        lost = own.plan(0.4, counted={favoured: 8.0, other: 1.0}).lost
        assert lost[favoured] < even[favoured]
        assert lost[other] > even[other]


# Merged


@on_all_fleets
def test_a_merged_plan_has_its_bytes(name: str) -> None:
    plan, zipped = planned(name), merged(name)
    assert zipped.report.stored_bytes == plan.bytes
    assert zipped.report.original_bytes == planner(name).original_bytes
    shared = {group: int(((members >= 0).sum(axis=1) > 1).sum()) for group, members in zipped.structure.members.items()}
    assert shared == {group: pairing.shared for group, pairing in plan.pairings.items()}


@on_all_fleets
def test_one_task_alone_is_narrower_and_computes_the_same(name: str) -> None:
    zipped, plan = merged(name), planned(name)
    examples = FLEETS[name].examples(5)
    for task, network in traced_fleet(name).items():
        plain, x = zipped.network(task), examples[task]
        expected = zipped(x, task)
        assert bool(torch.isfinite(expected).all())
        torch.testing.assert_close(plain(x), expected, rtol=1e-4, atol=1e-5)
        lost = sum(network.graph.widths[group] - len(kept) for group, kept in plan.keep[task].items())
        assert lost > 0
        fewer = sum(tensor.numel() for tensor in plain.state_dict().values())
        assert fewer < sum(tensor.numel() for tensor in network.state.values())


@on_all_fleets
def test_saved_and_loaded_it_is_the_same(name: str, tmp_path: Path) -> None:
    zipped = merged(name)
    zipped.save(tmp_path / "first")
    again = mtz_core.load(tmp_path / "first")
    again.save(tmp_path / "second")
    for path in (tmp_path / "first").iterdir():
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes()
    assert again.report == zipped.report
    for task, x in FLEETS[name].examples(5).items():
        assert torch.equal(again(x, task), zipped(x, task))


@on_all_fleets
def test_taking_a_task_out_changes_no_other(name: str, tmp_path: Path) -> None:
    zipped, examples = merged(name), FLEETS[name].examples(5)
    networks = traced_fleet(name)
    for task in zipped.tasks:
        left = zipped.without(task)
        rest = [other for other in networks if other != task]
        assert left.tasks == tuple(rest)
        assert all(torch.equal(left(examples[other], other), zipped(examples[other], other)) for other in rest)
        assert left.report.original_bytes == sum(networks[other].bytes for other in rest)
        assert left.report.stored_bytes == sum(t.numel() * t.element_size() for t in left.tensors().values())
        left.save(tmp_path / task)
        again = mtz_core.load(tmp_path / task)
        assert all(torch.equal(again(examples[other], other), left(examples[other], other)) for other in rest)


@pytest.mark.parametrize("name", ["two mlps", "other widths and classes"])
def test_the_order_of_the_tasks_makes_no_difference(name: str) -> None:
    traced = measured_fleet(name)
    other = Planner({task: traced[task] for task in sorted(traced, reverse=True)}, CONFIG, BOTH)
    plan, expected = other.plan(0.5), planned(name, 0.5)
    assert plan.same(expected)
    assert (plan.bytes, plan.sharing, plan.dropping) == (expected.bytes, expected.sharing, expected.dropping)


@on_all_fleets
def test_stepping_back_undoes_the_groups_that_do_most_damage_first(name: str) -> None:
    own, plan = planner(name), planned(name)
    whole = own.whole()
    damage = {group: plan.sharing[group] + plan.dropping[group] for group in plan.pairings}
    hurt = sorted((group for group in damage if damage[group] > 0), key=lambda group: -damage[group])
    steps = list(own.stepped_back(plan, whole))
    assert [names for names, _ in steps] == [", ".join(hurt[:count]) for count in range(1, len(hurt))]
    for count, (_, step) in enumerate(steps, start=1):
        assert step.bytes == own.sizes.stored(counts(own, step))
        assert step.damage == pytest.approx(sum(damage[group] for group in hurt[count:]))
        assert all(step.sharing[group] == step.dropping[group] == 0 for group in hurt[:count])


# Rounded


ROUNDING: tuple[tuple[Move, ...], ...] = (MOVES, ("share", "round"), ("round",))
on_rounded_fleets = pytest.mark.parametrize("name", ["no bias, other inputs", "other widths and classes", "depthwise"])
with_rounding = pytest.mark.parametrize("moves", ROUNDING, ids="+".join)


@cache
def planned_with(name: str, moves: tuple[Move, ...], size: float) -> Plan:
    """The plan for a size, or for the least that is possible."""
    own = planner(name, moves)
    return own.plan(max(size, size_of(own, own.least_bytes)))


@with_rounding
@on_rounded_fleets
def test_a_plan_that_rounds_fits_its_budget_and_says_what_it_stores(name: str, moves: tuple[Move, ...]) -> None:
    own = planner(name, moves)
    for size in (0.9, 0.4, 0.0):
        plan = planned_with(name, moves, size)
        assert plan.bytes <= max(size * own.original_bytes, own.least_bytes)
        assert plan.bytes == own.sizes.stored(counts(own, plan), own.precisions.named(plan.bits))
        parts = (plan.sharing, plan.dropping, plan.rounding)
        assert plan.damage == pytest.approx(sum(sum(part.values()) for part in parts))
        assert plan.damage == pytest.approx(sum(plan.lost.values()))
        assert set(plan.bits.values()) <= {*BITS}
        assert not sum(plan.rounding.values()) or plan.bits
    assert plan.bits


@with_rounding
@on_rounded_fleets
def test_moves_that_are_off_are_never_made(name: str, moves: tuple[Move, ...]) -> None:
    networks = traced_fleet(name)
    for size in (0.4, 0.0):
        plan = planned_with(name, moves, size)
        if "share" not in moves:
            assert not any(plan.sharing.values())
            assert not any(pairing.shared for pairing in plan.pairings.values())
        if "drop" not in moves:
            assert not any(plan.dropping.values())
            for task, network in networks.items():
                kept = {group: len(neurons) for group, neurons in plan.keep[task].items()}
                assert kept == {group.name: network.graph.widths[group.name] for group in network.graph.hidden_groups}
        assert plan.bits


@pytest.mark.parametrize("moves", [BOTH, ("share",), ("drop",)], ids="+".join)
def test_without_rounding_plans_are_what_they_were(moves: tuple[Move, ...]) -> None:
    plan = planned_with("three mlps", moves, 0.7)
    assert plan.bits == {}
    assert set(plan.rounding.values()) == {0.0}


@pytest.mark.parametrize("seed", range(3))
@on_rounded_fleets
def test_no_bits_can_be_given_back(name: str, seed: int) -> None:
    """What is left of the budget is less than any saving of damage would take."""
    own = planner(name, MOVES)
    size = (0.5, 0.25, 0.13)[seed]
    size = max(size, size_of(own, own.least_bytes))
    choice = own._cheapest(size, alike(own))
    counted = {group: own.options[group].counts[state] for group, state in choice.states.items()}
    damage, budget = own.precisions.damage(counted, choice.bits, alike(own)), int(size * own.original_bytes + 1e-6)
    for layer, present in choice.bits.items():
        for owners in range(len(own.sizes.owners)):
            for number in own.precisions.offered:
                bits = {**choice.bits, layer: np.where(np.arange(len(present)) == owners, number, present)}
                if own.precisions.damage(counted, bits, alike(own)) < damage * (1 - 1e-9) - 1e-12:
                    assert own.sizes.stored(counted, bits) > budget - len(own.sizes.owners)


@on_rounded_fleets
def test_larger_budgets_do_no_more_damage_where_weights_are_rounded(name: str) -> None:
    own = planner(name, MOVES)
    least = own.least_bytes / own.original_bytes
    sizes = [1.02 * least, 1.5 * least, 2.5 * least, 0.5, 0.8, 1.0]
    damages = [own._plan(own._cheapest(size, alike(own))).damage for size in sorted(sizes)]
    assert all(after <= before * 1.05 for before, after in itertools.pairwise(damages))
    assert damages[-1] == pytest.approx(0, abs=1e-12)


@on_rounded_fleets
def test_all_moves_together_are_expected_to_do_no_more_damage_than_fewer(name: str) -> None:
    for size in (0.9, 0.3):
        damages = {}
        for moves in (*ROUNDING, BOTH, ("drop",)):
            own = planner(name, moves)
            if possible(own, size):
                damages[moves] = own._plan(own._cheapest(size, alike(own))).damage
        assert all(damages[MOVES] <= 1.05 * damage + 1e-12 for damage in damages.values())


@pytest.mark.parametrize("size", [0.8, 0.5, 0.25, 0.2, 0.15])
@pytest.mark.parametrize("name", ["two mlps", "no bias, other inputs", "layer norm"])
def test_rounding_alone_does_hardly_more_damage_than_the_best_bits_of_all(name: str, size: float) -> None:
    own = planner(name, ("round",))
    size = max(size, size_of(own, own.least_bytes))
    found = own._plan(own._cheapest(size, alike(own))).damage
    assert found <= 1.1 * best_bits(own, int(size * own.original_bytes)) + 1e-12


def best_bits(own: Planner, budget: int) -> float:
    """The least damage of any bits of the tasks' layers, by dynamic programming over bytes."""
    nothing = {group: table.counts[0] for group, table in own.options.items()}
    unrounded = own.sizes.stored(nothing)
    least = np.full(unrounded + 1, np.inf)
    least[unrounded] = 0.0  # by how many bytes are stored
    for layer in own.sizes.layers:
        for owners in np.flatnonzero(own.sizes.extents(layer, nothing)[0]):
            before, least = least, np.full_like(least, np.inf)
            for number in own.precisions.offered:
                bits = {name: some.copy() for name, some in own.precisions.none().items()}
                bits[layer][owners] = number
                saved = unrounded - own.sizes.stored(nothing, bits)
                damage = own.precisions.damage(nothing, bits, alike(own))
                shifted = before[saved:] if saved >= 0 else np.concatenate([np.full(-saved, np.inf), before[:saved]])
                least[: len(shifted)] = np.minimum(least[: len(shifted)], shifted + damage)
    return float(least[: budget + 1].min())


@with_rounding
@pytest.mark.parametrize("name", ["other widths and classes", "depthwise"])
def test_impossible_budgets_of_rounding_are_refused_with_the_least_possible_size(
    name: str, moves: tuple[Move, ...]
) -> None:
    own = planner(name, moves)
    with pytest.raises(InvalidConfig, match=r"budget\.size: 0\.001 is impossible") as caught:
        own.plan(0.001)
    (told,) = re.findall(r"\(([\d,]+)\)", str(caught.value))
    (size,) = re.findall(r"stored in is ([\d.]+) of", str(caught.value))
    least = int(told.replace(",", ""))
    assert least == own.least_bytes
    assert own.plan(size_of(own, least)).bytes == least
    assert own.plan(float(size)).bytes >= least
    with pytest.raises(InvalidConfig):
        own.plan(size_of(own, least - 1))


@on_rounded_fleets
def test_what_can_be_reached_by_rounding_with_and_without_another_move(name: str) -> None:
    own = planner(name, MOVES)
    for moves in (("round",), ("drop", "round")):
        alone = planner(name, moves)
        for size in np.linspace(0.02, 1, 25):
            assert own.reaches(float(size), {*moves}) == possible(alone, float(size))


@pytest.mark.parametrize("name", ["two mlps", "other widths and classes"])
def test_the_order_of_the_tasks_makes_no_difference_to_rounding(name: str) -> None:
    traced = measured_fleet(name)
    other = Planner({task: traced[task] for task in sorted(traced, reverse=True)}, CONFIG, MOVES)
    plan, expected = other.plan(0.3), planner(name, MOVES).plan(0.3)
    assert plan.same(expected)
    assert (plan.bytes, plan.bits, plan.rounding) == (expected.bytes, expected.bits, expected.rounding)


def test_plans_that_round_otherwise_are_not_the_same() -> None:
    plan = planned_with("three mlps", ("round",), 0.2)
    (first, bits), *_ = plan.bits.items()
    assert plan.same(replace(plan, bits=dict(reversed([*plan.bits.items()]))))
    assert not plan.same(replace(plan, bits={**plan.bits, first: 8 if bits < 8 else 6}))
    assert not plan.same(planner("three mlps", ("round",)).whole())


@with_rounding
@on_rounded_fleets
def test_a_merged_plan_that_rounds_has_its_bytes_and_bits(name: str, moves: tuple[Move, ...], tmp_path: Path) -> None:
    own = planner(name, moves)
    for size in (0.4, 0.0):
        plan = planned_with(name, moves, size)
        zipped = finish(merge(measured_fleet(name), plan.pairings, CONFIG, (), plan.keep, plan.damping, plan.bits))
        assert zipped.report.stored_bytes == plan.bytes
        assert zipped.structure.scale_shapes().keys() == plan.bits.keys()
        zipped.save(tmp_path)
        content = (tmp_path / "weights.safetensors").read_bytes()
        assert len(content) - 8 - int.from_bytes(content[:8], "little") == plan.bytes
        assert zipped.report.original_bytes == own.original_bytes


@on_rounded_fleets
def test_what_steps_back_has_the_bits_of_one_of_the_two_plans(name: str) -> None:
    """Rows that the smaller plan does not have, such as a task's own that are shared in it, are as in the larger."""
    own = planner(name, MOVES)
    small = own.plan(size_of(own, int(1.05 * own.least_bytes)))
    large = own.plan(max(0.35, size_of(own, int(1.3 * own.least_bytes))), sharing=NEVER)
    rows = {name for plan in (small, large) for name in plan.bits}
    for _, step in own.stepped_back(small, large):
        assert step.bytes == own.sizes.stored(counts(own, step), own.precisions.named(step.bits))
        for scales, bits in step.bits.items():
            assert bits == small.bits.get(scales, large.bits.get(scales))
        present = own.precisions.names(counts(own, step), own.precisions.least())
        assert all(scales in step.bits for scales in present.keys() & rows)
        assert step.bytes <= 1.5 * large.bytes
