"""Groups of models: limits are kept, no order matters, what is alike comes together, and who is alone learns why."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from itertools import combinations
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtz_core import ZipConfig
from mtz_core.errors import InvalidConfig
from mtz_core.grouping.affinity import Affinities, Affinity, Comparer, Profile
from mtz_core.grouping.groups import Alone, Grouping, Limits, choose_groups
from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import sensitivities
from tests.support.networks import mlp, permuted

SAVED = 100


def fleet(
    similarity: Mapping[tuple[str, str], float],
    tags: Mapping[str, frozenset[str]] | None = None,
    models: str = "",
) -> Affinities:
    """Models of one letter each; pairs that are not given have a tenth in common, negative ones are not comparable."""
    names = sorted(set(models) | {name for pair in similarity for name in pair})
    pairs = {}
    for pair in combinations(names, 2):
        value = similarity.get(pair, similarity.get(pair[::-1], 0.1))
        found = Affinity(value, (1 - value, 2 * (1 - value)), SAVED)
        pairs[pair] = found if value >= 0 else Affinity(0.0, (0.0, 0.0), 0, "their inputs differ: 3 and 4")
    return Affinities(dict.fromkeys(names, 150), tags or {}, pairs)


def together(grouping: Grouping) -> set[str]:
    return {"".join(group.models) for group in grouping.groups}


@st.composite
def fleets(draw: st.DrawFn) -> Affinities:
    names = "abcdefghij"[: draw(st.integers(1, 10))]
    tags = {
        name: draw(st.sampled_from([frozenset(), frozenset("x"), frozenset("y"), frozenset("xz")])) for name in names
    }
    values = st.sampled_from([-1.0, 0.2, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    return fleet({pair: draw(values) for pair in combinations(names, 2)}, tags, names)


limits = st.builds(
    Limits,
    size=st.integers(2, 5),
    similarity=st.sampled_from([0.0, 0.5, 0.7, 0.95]),
    damage=st.sampled_from([0.5, 1.0, float("inf")]),
    separate=st.sampled_from([frozenset(), frozenset("x"), frozenset("xyz")]),
)


@given(fleets(), limits)
def test_all_limits_are_kept_and_every_model_is_there_once(affinities: Affinities, limits: Limits) -> None:
    found = choose_groups(affinities, limits)
    grouped = [model for group in found.groups for model in group.models]
    assert sorted([*grouped, *(one.model for one in found.alone)]) == list(affinities.models)
    for group in found.groups:
        assert 2 <= len(group.models) <= limits.size
        assert len({affinities.tags[model] & limits.separate for model in group.models}) == 1
        pairs = {pair: affinities.of(*pair) for pair in combinations(group.models, 2)}
        assert all(pair.comparable for pair in pairs.values())
        for model in group.models:
            others = [affinities.of(model, other) for other in group.models if other != model]
            assert np.mean([other.similarity for other in others]) >= limits.similarity - 1e-9
            lost = 2 * sum(other.damage[0] for other in others) / len(group.models)
            assert group.damage[model] == pytest.approx(lost)
            assert lost <= limits.damage + 1e-9
        assert group.similarity == pytest.approx(np.mean([pair.similarity for pair in pairs.values()]))
        assert group.least == min(pair.similarity for pair in pairs.values())
        assert (group.bytes, group.saved) == (150 * len(group.models), SAVED * (len(group.models) - 1))
    assert found.bytes == 150 * len(affinities.models)
    assert all(one.why for one in found.alone)


@given(fleets(), limits, st.randoms(use_true_random=False))
def test_the_order_of_models_makes_no_difference(affinities: Affinities, limits: Limits, random: Random) -> None:
    def shuffled(mapping: Mapping[Any, Any]) -> dict[Any, Any]:
        return dict(random.sample(list(mapping.items()), len(mapping)))

    other = Affinities(shuffled(affinities.bytes), shuffled(affinities.tags), shuffled(affinities.pairs))
    assert choose_groups(other, limits) == choose_groups(affinities, limits)


@given(fleets(), limits)
def test_models_that_could_be_together_are_not_both_alone(affinities: Affinities, limits: Limits) -> None:
    found = choose_groups(affinities, limits)
    for one, other in combinations([one.model for one in found.alone], 2):
        pair = affinities.of(one, other)
        assert (
            not pair.comparable
            or pair.similarity < limits.similarity
            or max(pair.damage) > limits.damage
            or affinities.tags[one] & limits.separate != affinities.tags[other] & limits.separate
        )


@given(fleets(), st.integers(0, 8))
def test_identical_networks_come_together_first(affinities: Affinities, number: int) -> None:
    """A twin of a model, which is to all others what the model is, is in its group, even of two."""
    models = affinities.models
    model = models[number % len(models)]
    pairs = dict(affinities.pairs)
    pairs = {pair: replace(found, similarity=min(found.similarity, 0.9)) for pair, found in pairs.items()}
    for other in models:
        if other != model:
            found = affinities.of(other, model)
            pairs[other, "twin"] = replace(found, similarity=min(found.similarity, 0.9))
    pairs[model, "twin"] = Affinity(1.0, (0.0, 0.0), SAVED)
    twins = Affinities({**affinities.bytes, "twin": 150}, {}, pairs)
    for size in (2, 20):
        groups = choose_groups(twins, Limits(size=size)).groups
        assert any({model, "twin"} <= set(group.models) for group in groups)


COMPARER = Comparer()
NAMES = ("ann", "ben", "cat", "dan", "eve")
EXAMPLES = torch.randn(60, 8, generator=torch.Generator().manual_seed(0))


@cache
def traced_once() -> Network:
    """The graph that all of them have; tracing takes most of the time of a small network."""
    return trace(mlp((7, 6), 3, inputs=8).eval(), EXAMPLES[:2])


@cache
def profile_of(number: int, order: int) -> Profile:
    """One of two families of alike networks, its neurons in another order; 0 is the first one."""
    with torch.random.fork_rng():
        torch.manual_seed(number // 3)
        network = mlp((7, 6), 3, inputs=8).eval()
        torch.manual_seed(10 + number)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
    changed = permuted(network, ["0", "2", "4"], order)[0] if order else network
    batches = as_batches(EXAMPLES, NAMES[number])
    traced = replace(traced_once(), state=changed.state_dict())
    return Profile.of(traced, original_moments(traced, batches, ZipConfig()), sensitivities(traced, batches))


@pytest.mark.slow
@settings(max_examples=6)
@given(st.integers(0, 4), st.integers(0, 9))
def test_permuting_the_neurons_of_a_network_changes_nothing(changed: int, order: int) -> None:
    profiles = [profile_of(number, order if number == changed else 0) for number in range(len(NAMES))]
    numbers = list(combinations(range(len(NAMES)), 2))
    pairs = {(NAMES[i], NAMES[j]): COMPARER.compare(profiles[i], profiles[j]) for i, j in numbers}
    found = choose_groups(Affinities(dict.fromkeys(NAMES, 1000), {}, pairs), Limits(similarity=0.9))
    assert [group.models for group in found.groups] == [NAMES[:3], NAMES[3:]]


def test_families_come_together_and_the_largest_saving_comes_first() -> None:
    near = {("a", "b"): 0.8, ("b", "c"): 0.9, ("a", "c"): 0.8, ("d", "e"): 0.95}
    found = choose_groups(fleet(near), Limits())
    assert [group.models for group in found.groups] == [("a", "b", "c"), ("d", "e")]
    first = found.groups[0]
    assert (first.saved, first.after, found.saved) == (200, 250, 300)
    assert first.mean_damage == pytest.approx(sum(first.damage.values()) / 3)
    assert not found.alone


def test_the_mean_decides_not_the_nearest() -> None:
    chain = {("a", "b"): 0.9, ("b", "c"): 0.8, ("a", "c"): 0.2}
    found = choose_groups(fleet(chain), Limits(similarity=0.6))
    assert together(found) == {"ab"}
    assert found.alone[0].model == "c"
    assert "would not hold" in found.alone[0].why


def test_a_remainder_is_spread_where_only_size_is_in_the_way() -> None:
    names = "abcdefghi"
    near = dict.fromkeys(combinations(names, 2), 0.8)
    for family in ("abc", "def", "ghi"):
        near |= dict.fromkeys(combinations(family, 2), 0.9)
    found = choose_groups(fleet(near), Limits(size=5))
    assert sorted(len(group.models) for group in found.groups) == [4, 5]


def test_who_is_alone_learns_why() -> None:
    def why(
        similarity: Mapping[tuple[str, str], float], tags: Mapping[str, frozenset[str]] | None = None, **limits: Any
    ) -> dict[str, Alone]:
        return {one.model: one for one in choose_groups(fleet(similarity, tags), Limits(**limits)).alone}

    far = why({("a", "b"): 0.4, ("a", "c"): 0.3})["a"]
    assert far.why == "the nearest, b, has 40.0% in common with it; at least 60.0% are asked for"
    assert (far.nearest, far.similarity, far.bytes) == ("b", 0.4, 150)
    odd = why({("a", "b"): 0.9, ("a", "c"): -1, ("b", "c"): -1})["c"]
    assert odd.why == "no other model can be compared with it; of 2: their inputs differ: 3 and 4"
    assert odd.nearest is None
    full = why({("a", "b"): 0.9, ("a", "c"): 0.8, ("b", "c"): 0.8}, size=2)["c"]
    assert (
        full.why == "the nearest, a, has 80.0% in common with it, but every group that it would fit is full (2 models)"
    )
    tags = {"a": frozenset({"x"}), "b": frozenset({"y", "z"})}
    two = why({("a", "b"): 0.9}, tags=tags, separate=frozenset("xy"))["a"]
    assert two.why.endswith("but the tags x and y keep them apart, as from all others")
    three = why({("a", "b"): 0.9, ("a", "c"): 0.5}, tags={"b": frozenset("y")}, separate=frozenset("y"))["a"]
    assert three.why.endswith("of the others the nearest, c, has 50.0%; at least 60.0% are asked for")
    costly = why({("a", "b"): 0.7}, damage=0.5)["a"]
    assert costly.why.endswith("but sharing would cost 0.6 nats; at most 0.5 are allowed")
    assert [one.why for one in choose_groups(fleet({}, models="a"), Limits()).alone] == ["there is no other model"]
    assert choose_groups(fleet({}), Limits()) == Grouping((), (), Limits())


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"size": 1}, "size: 1"), ({"similarity": 1.5}, "similarity: 1.5"), ({"damage": 0.0}, "damage: 0")],
)
def test_impossible_limits_are_refused(settings: Mapping[str, float], said: str) -> None:
    with pytest.raises(InvalidConfig, match=said):
        Limits(**settings)  # type: ignore[arg-type]
