"""What rounding is expected to cost, against the cost that it has, and the best bits at a price, against all others."""

import itertools
from functools import cache

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor, nn

from mtz_core.merging.judging import judge
from mtz_core.merging.rounding import Rounder, choose_scales
from mtz_core.merging.walk import finish, merge
from mtz_core.network.tracing import trace
from mtz_core.planning.options import Prices
from mtz_core.planning.planner import Choice, Planner
from mtz_core.planning.precision import Precisions
from mtz_core.planning.sizes import Bits
from mtz_core.settings import BITS, MOVES
from mtz_core.statistics.calibration import as_batches
from mtz_core.zipped.structure import scale_name
from tests.support.fleets import CONFIG, FLEETS, drawn_bits, measured_fleet, planner
from tests.support.networks import measured

pytestmark = pytest.mark.long

on_all_fleets = pytest.mark.parametrize("name", FLEETS)
on_some_fleets = pytest.mark.parametrize("name", ["three mlps", "no bias, other inputs", "residual", "depthwise"])


def whole(name: str) -> Planner:
    return planner(name, MOVES)


def precisions(name: str) -> Precisions:
    return whole(name).precisions


def drawn_counts(name: str, seed: int) -> dict[str, np.ndarray]:
    """The counts of a state of every group that is drawn at random."""
    generator = np.random.default_rng(seed)
    return {group: table.counts[generator.integers(len(table.counts))] for group, table in whole(name).options.items()}


def drawn_prices(name: str, seed: int) -> Prices:
    generator = np.random.default_rng(seed)
    return Prices(generator.uniform(0.2, 3.0, len(whole(name).tasks)), 1.0, 1.0, float(generator.uniform(0.5, 2.0)))


def changed(bits: Bits, layer: str, owners: int, number: int) -> Bits:
    own = bits[layer].copy()
    own[owners] = number
    return {**bits, layer: own}


# Alone


@on_some_fleets
def test_fewer_bits_do_more_damage_and_none_does_none(name: str) -> None:
    own, sizes = precisions(name), whole(name).sizes
    counts, prices = drawn_counts(name, 0), drawn_prices(name, 0)
    assert own.damage(counts, own.none(), prices) == 0
    damages = [own.damage(counts, sizes.bits_of(bits), prices) for bits in BITS]
    assert all(1.5 * more < few for more, few in itertools.pairwise(damages))
    assert damages[-1] == own.damage(counts, own.least(), prices)


@on_some_fleets
def test_damage_adds_up_over_tasks_as_these_are_weighed(name: str) -> None:
    own, sizes = precisions(name), whole(name).sizes
    counts, bits, prices = drawn_counts(name, 1), drawn_bits(sizes, 1), drawn_prices(name, 1)
    by_task = own.by_task(counts, bits)
    assert bool((by_task > 0).all())
    assert own.damage(counts, bits, prices) == pytest.approx(prices.rounding * float(prices.tasks @ by_task))


@on_some_fleets
def test_what_tasks_share_does_its_damage_to_each(name: str) -> None:
    """Counts of owners that a task is not among do nothing to it; each task has the same of its own or shared."""
    own, sizes = precisions(name), whole(name).sizes
    counts, bits = drawn_counts(name, 2), sizes.bits_of(3)
    alone = {}
    for group, owners in counts.items():
        alone[group] = np.zeros_like(owners)
        alone[group][: len(sizes.tasks)] = owners @ sizes.owners
    np.testing.assert_allclose(own.by_task(counts, bits), own.by_task(alone, bits))


@on_some_fleets
def test_without_rounding_nothing_is_offered(name: str) -> None:
    own = planner(name).precisions
    counts, prices = drawn_counts(name, 0), drawn_prices(name, 0)
    assert own.offered == (whole(name).sizes.full_bits,)
    assert all((bits == own.offered[0]).all() for bits in own.best(counts, 1.0, prices).values())
    assert own.damage(counts, own.none(), prices) == 0
    assert not list(own.finer(counts, own.none(), 1e9, prices))
    assert own.names(counts, own.none()) == {}


# Around a group


@on_all_fleets
def test_what_depends_on_a_group_is_what_changes_with_it(name: str) -> None:
    """Bytes but for what packing rounds up, which is less than one byte for each block."""
    check_around(whole(name), drawn_counts(name, 3), drawn_prices(name, 3))


class Stream(nn.Module):
    """Layers that read and write the neurons of one stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Linear(5, 6), nn.Linear(6, 3)
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.first(x).relu()
        out: Tensor = self.head(x + self.second(x).relu())
        return out


def test_layers_that_read_and_write_a_group_depend_on_it_twice() -> None:
    examples = {task: torch.randn(30, 5) for task in "ab"}
    networks = {task: trace(Stream().eval(), x[:2]) for task, x in examples.items()}
    own = Planner(measured(networks, examples, CONFIG), CONFIG, MOVES)
    (table,) = own.options.values()
    check_around(own, dict.fromkeys(own.options, table.counts[-1]), Prices(np.array([0.7, 1.4]), rounding=1.3))


def check_around(planner: Planner, counts: dict[str, np.ndarray], prices: Prices) -> None:
    own, sizes = planner.precisions, planner.sizes
    bits = drawn_bits(sizes, 3)
    for group, table in planner.options.items():
        states = np.unique(np.linspace(0, len(table.counts) - 1, 5).astype(int))
        given = {**counts, group: table.counts[states].astype(np.float64)}
        bytes_, damage = own.around(group, given, bits, prices)
        several = [{**counts, group: table.counts[state]} for state in states]
        exact = np.array([own.damage(one, bits, prices) for one in several])
        np.testing.assert_allclose(damage - damage[0], exact - exact[0], rtol=1e-9, atol=1e-12)
        stored = np.array([sizes.stored(one, bits) for one in several])
        blocks = len(sizes.owners) ** 2 * len(sizes.layers_around(group))
        assert float(np.abs((bytes_ - bytes_[0]) - (stored - stored[0])).max()) < blocks
        plain, none = own.around(group, given, own.none(), prices)
        unrounded = np.array([sizes.stored(one) for one in several])
        np.testing.assert_allclose(plain - plain[0], unrounded - unrounded[0], rtol=1e-12, atol=1e-6)
        assert not none.any()


# At a price


@on_some_fleets
@pytest.mark.parametrize("price", [1e-9, 1e-6, 1e-5, 1e-4, 1.0])
def test_no_other_bits_are_better_at_the_price(name: str, price: float) -> None:
    own, sizes = precisions(name), whole(name).sizes
    counts, prices = drawn_counts(name, 4), drawn_prices(name, 4)

    def cost(bits: Bits) -> float:
        return own.damage(counts, bits, prices) + price * sizes.stored(counts, bits)

    best = own.best(counts, price, prices)
    lowest = cost(best)
    packing = price * len(sizes.owners)  # what packing rounds up is not looked at
    for layer in sizes.layers:
        for owners in range(len(sizes.owners)):
            for number in own.offered:
                assert lowest <= cost(changed(best, layer, owners, number)) + packing + 1e-12


@on_some_fleets
def test_the_higher_the_price_the_fewer_the_bits(name: str) -> None:
    own = precisions(name)
    counts, prices = drawn_counts(name, 5), drawn_prices(name, 5)
    found = [np.stack(list(own.best(counts, price, prices).values())) for price in np.geomspace(1e-12, 1e3, 12)]
    assert all(bool((after <= before).all()) for before, after in itertools.pairwise(found))
    rows = np.stack([whole(name).sizes.extents(layer, counts)[0] for layer in whole(name).sizes.layers])
    assert set(found[0][rows > 0].tolist()) <= {own.offered[0], 8}
    assert set(found[-1][rows > 0].tolist()) == {2}


@on_some_fleets
def test_finer_lists_what_fits_and_saves_most(name: str) -> None:
    own, sizes = precisions(name), whole(name).sizes
    counts, prices = drawn_counts(name, 6), drawn_prices(name, 6)
    bits = drawn_bits(sizes, 6)
    before, stored = own.damage(counts, bits, prices), sizes.stored(counts, bits)
    packing = len(sizes.owners)
    for spare in (3.0, 40.0, 1e6):
        listed = {
            (layer, owners): (more, saved) for layer, owners, more, saved in own.finer(counts, bits, spare, prices)
        }
        for layer in sizes.layers:
            for owners in range(len(sizes.owners)):
                options = {}
                for number in own.offered:
                    other = changed(bits, layer, owners, number)
                    saved = before - own.damage(counts, other, prices)
                    if sizes.stored(counts, other) - stored <= spare - packing:
                        options[number] = saved
                more, told = listed.get((layer, owners), (int(bits[layer][owners]), 0.0))
                assert told >= max(options.values(), default=0.0) - 1e-12
                other = changed(bits, layer, owners, more)
                assert sizes.stored(counts, other) - stored <= spare + packing or told == 0
                assert told == pytest.approx(before - own.damage(counts, other, prices), abs=1e-12)


# Names


@on_some_fleets
def test_bits_come_back_from_the_names_of_scales(name: str) -> None:
    own, sizes = precisions(name), whole(name).sizes
    counts, bits = drawn_counts(name, 7), drawn_bits(sizes, 7)
    names = own.names(counts, bits)
    assert all(type(number) is int and number in BITS for number in names.values())
    again = own.named(names)
    assert own.names(counts, again) == names
    assert sizes.stored(counts, again) == sizes.stored(counts, bits)
    assert scale_name("nowhere", ("a",)) not in names
    assert all((numbers == sizes.full_bits).all() for numbers in own.named({}).values())


# Against what it really costs


@on_some_fleets
def test_predicted_damage_of_a_layer_is_near_what_rounding_it_costs(name: str) -> None:
    """``½ Σ f eᵀ H e`` with the error of rounding all of its rows as it is done in merging."""
    own, sizes = precisions(name), whole(name).sizes
    told, found = [], []
    counts = {group: table.counts[0] for group, table in whole(name).options.items()}
    for t, traced in enumerate(measured_fleet(name).values()):
        assert traced.sensitivity is not None
        alone = Prices(np.eye(len(sizes.tasks))[t])
        for node in traced.network.graph.layers:
            if node.layer.conv_groups(node.arguments) > 1:
                continue
            hessian, free = traced.moments[node.name].hessian(CONFIG.fixed_damping), int(node.bias is not None)
            weights, rounder = traced.network.matrix(node).double(), Rounder(hessian, free)
            left = weights.shape[1] - free
            for bits in BITS:
                scales = choose_scales(weights[:, :left], rounder.importance[:left], bits)
                error = rounder.round(weights, scales, bits) - weights
                felt = traced.sensitivity[node.name].double()
                found.append(0.5 * float((felt * hessian.energies(error.T)).sum()))
                one = {**own.none(), node.name: np.full(len(sizes.owners), bits)}
                told.append(own.damage(counts, one, alone))
    ratios = np.array(found) / told
    assert 0.5 < np.exp(np.log(ratios).mean()) < 2
    assert ratios.min() > 0.1 and ratios.max() < 8
    assert spearmanr(told, found).statistic > 0.95


@cache
def rounded_alone(name: str) -> tuple[np.ndarray, np.ndarray]:
    """The damage to every task by rounding all layers to each number of bits, as told and as measured."""
    own, traced = whole(name), measured_fleet(name)
    generator = torch.Generator().manual_seed(77)
    examples = {
        task: as_batches(torch.randn(300, *shape, generator=generator, dtype=FLEETS[name].dtype), task)
        for task, shape in zip(traced, FLEETS[name].shapes, strict=True)
    }
    told, found = [], []
    for bits in BITS:
        plan = own._plan(Choice(dict.fromkeys(own.options, 0), own.sizes.bits_of(bits)))
        zipped = finish(merge(traced, plan.pairings, CONFIG, (), plan.keep, plan.damping, plan.bits))
        assert zipped.report.stored_bytes == plan.bytes
        judged = judge(zipped, traced, examples)
        told.append([plan.lost[task] for task in traced])
        found.append([judged[task].lost for task in traced])
    return np.array(told), np.array(found)


@pytest.mark.parametrize("name", ["three mlps", "lenet-5", "residual", "concatenated, other sizes", "layer norm"])
def test_predicted_damage_is_near_what_tasks_lose(name: str) -> None:
    """On examples that nothing was fitted to, in the same units, ranked alike."""
    told, found = rounded_alone(name)
    ratios = found / told
    assert ratios.min() > 1 / 7 and ratios.max() < 7
    assert spearmanr(told.flatten(), found.flatten()).statistic > 0.9
    for t in range(told.shape[1]):
        assert spearmanr(told[:, t], found[:, t]).statistic > 0.9
