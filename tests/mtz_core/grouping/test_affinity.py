"""What two networks have in common, against the exact matching; and its laws: identity, symmetry, order of neurons."""

import copy
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

from mtz_core import ZipConfig
from mtz_core.grouping.affinity import Affinity, Comparer, Profile
from mtz_core.merging.compatibility import shared_counts
from mtz_core.merging.matching import match
from mtz_core.network.tracing import trace
from mtz_core.planning.sizes import Sizes
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import sensitivities
from tests.support.fleets import statistics, traced_fleet
from tests.support.networks import CASES, Case, Residual, hidden_layers, joined, lenet5, mlp, permuted

pytestmark = pytest.mark.slow

BY_NAME = {case.name: case for case in CASES}


def profile(network: nn.Module, examples: Tensor, like: Profile | None = None) -> Profile:
    """The profile of a network, traced anew unless one of the same graph is given."""
    traced = replace(like.network, state=network.state_dict()) if like else trace(network, examples[:2])
    batches = as_batches(examples, "model")
    return Profile.of(traced, original_moments(traced, batches, ZipConfig()), sensitivities(traced, batches))


def compare(first: Profile, second: Profile) -> Affinity:
    return Comparer().compare(first, second)


@cache
def fleet_profiles(name: str) -> Mapping[str, Profile]:
    moments, sensitivity = statistics(name)
    return {task: Profile.of(network, moments[task], sensitivity[task]) for task, network in traced_fleet(name).items()}


@pytest.mark.parametrize("name", ["mlp", "no bias, float64", "strides, paddings, dilations"])
def test_networks_that_compute_the_same_have_everything_in_common(name: str) -> None:
    case = BY_NAME[name]
    network, examples = case.network(1), case.examples(60)
    order = hidden_layers(case)
    last = [n for n, part in network.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    layers = [*order, *(name for name in last if name not in order)]
    shuffled, _ = permuted(network, layers, seed=3)
    torch.testing.assert_close(shuffled(examples), network(examples))
    own = profile(network, examples)
    for other in (own, profile(shuffled, examples, own)):
        found = compare(own, other)
        assert found.similarity == pytest.approx(1.0, abs=1e-3)
        assert max(found.damage) < 1e-3 * own.stake
    unlike = compare(own, profile(case.network(2), case.examples(60, seed=1), own))
    assert unlike.similarity < 0.9


def shuffled_stream(network: Residual) -> Residual:
    """The same function, the neurons of the residual stream and of the branches in another order."""
    changed = copy.deepcopy(network)
    state = changed.state_dict()
    stream = torch.randperm(len(state["stem.0.weight"]))
    for name, tensor in state.items():
        if name.startswith("stem") and tensor.ndim:
            state[name] = tensor[stream]
        elif name == "head.weight":
            state[name] = tensor[:, stream]
    for number in (0, 1):
        inner = torch.randperm(len(state[f"branches.{number}.0.weight"]))
        for name, tensor in list(state.items()):
            if name.startswith(f"branches.{number}.") and tensor.ndim:
                part = int(name.split(".")[2])
                rows = inner if part < 2 else stream
                state[name] = tensor[rows]
                if part == 0:
                    state[name] = state[name][:, stream]
                elif part == 3 and tensor.ndim == 4:
                    state[name] = state[name][:, inner]
    changed.load_state_dict(state)
    return changed


def test_coupled_groups_are_matched_in_whatever_order_their_neurons_are() -> None:
    torch.manual_seed(4)
    network = Residual((7, 5, 6), 3).eval()
    examples = torch.randn(60, 1, 7, 6)
    shuffled = shuffled_stream(network)
    torch.testing.assert_close(shuffled(examples), network(examples))
    own = profile(network, examples)
    assert compare(own, profile(shuffled, examples, own)).similarity == pytest.approx(1.0, abs=1e-3)


@pytest.mark.parametrize("name", ["other widths and classes", "depthwise", "kept separate", "layer norm"])
def test_every_kind_of_network_is_compared_alike_from_both_sides_and_saves_what_sharing_all_does(name: str) -> None:
    profiles, networks = fleet_profiles(name), traced_fleet(name)
    a, b = profiles["a"], profiles["b"]
    found, other = compare(a, b), compare(b, a)
    if a.network.input_shape != b.network.input_shape:
        assert found.why == f"their inputs differ: {shape(a)} and {shape(b)}"
        assert found == replace(other, why=found.why)
        return
    assert 0 <= found.similarity < 1
    assert other.reversed.similarity == pytest.approx(found.similarity, abs=1e-4)
    assert other.reversed.damage == pytest.approx(found.damage, rel=1e-3)
    pair = {"a": networks["a"], "b": networks["b"]}
    sizes = Sizes(pair)
    shared = shared_counts(pair, ZipConfig())
    assert found.saved == sum(n.bytes for n in pair.values()) - sizes.stored(sizes.counts(sizes.widths, shared)) > 0


def shape(profile: Profile) -> str:
    return " × ".join(map(str, profile.network.input_shape))


def test_the_cost_of_all_that_is_shared_is_the_matching_s_own() -> None:
    """One hidden layer, tasks as sensitive to one row as to another: similarity is 1 − cost / energy, with `match`'s
    exact cost."""
    case = Case("one hidden layer", mlp, (12,), (9,), dtype=torch.float64)
    networks = {task: trace(case.network(seed), case.examples(2)) for seed, task in enumerate("ab")}
    moments = {t: original_moments(n, as_batches(case.examples(60), t), ZipConfig()) for t, n in networks.items()}
    sensitivity = {
        t: {node.name: torch.ones(9 if node.name == "0" else 3) for node in n.graph.layers} for t, n in networks.items()
    }
    (exact,) = match(joined(networks, moments, sensitivity), ZipConfig())
    a, b = (Profile.of(networks[t], moments[t], sensitivity[t]) for t in "ab")
    found = compare(a, b)
    # Same inputs, so P = H/4; energies without means are those of the stakes: ½ Σ Var.
    energy = 0.25 * (a.stake + b.stake)
    assert 1 - found.similarity == pytest.approx(exact.cost / energy, rel=1e-3)
    assert found.damage == pytest.approx(
        (0.5 * (1 - found.similarity) * a.stake, 0.5 * (1 - found.similarity) * b.stake)
    )


def test_rows_that_are_fewer_than_inputs_give_what_their_dense_hessian_does() -> None:
    torch.manual_seed(0)
    networks = [mlp((30, 20), 3, inputs=90).eval() for _ in range(2)]
    examples = [torch.randn(25, 90) for _ in range(2)]
    first = profile(networks[0], examples[0])
    few = [first, profile(networks[1], examples[1], first)]
    assert not any("0" in one.images for one in few)
    found = compare(*few)
    twice = [profile(network, torch.cat([x] * 4), first) for network, x in zip(networks, examples, strict=True)]
    assert all("0" in one.images for one in twice)
    dense = compare(
        *(replace(many, sensitivity=one.sensitivity, stake=one.stake) for many, one in zip(twice, few, strict=True))
    )
    assert found.similarity == pytest.approx(dense.similarity, abs=0.03)
    mixed = compare(few[0], replace(twice[1], sensitivity=few[1].sensitivity, stake=few[1].stake))
    assert mixed.similarity == pytest.approx(dense.similarity, abs=0.03)
    assert compare(few[0], few[0]).similarity == pytest.approx(1.0, abs=1e-3)


def test_a_narrow_network_that_is_part_of_a_wide_one_has_everything_in_common_with_it() -> None:
    torch.manual_seed(0)
    wide, narrow = mlp((12,), 3).eval(), mlp((8,), 3).eval()
    with torch.no_grad():
        state = wide.state_dict()
        state |= {"0.weight": state["0.weight"][2:10], "0.bias": state["0.bias"][2:10]}
        narrow.load_state_dict(state | {"2.weight": state["2.weight"][:, 2:10]})
    examples = torch.randn(80, 12)
    found = compare(profile(wide, examples), profile(narrow, examples))
    assert found.similarity > 0.99
    assert found.saved == 4 * 8 * 13


def test_dead_inputs_change_nothing() -> None:
    torch.manual_seed(0)
    examples = torch.randn(60, 12) * (torch.arange(12) < 7)
    network = mlp((9, 7), 3).eval()
    noisy = copy.deepcopy(network)
    with torch.no_grad():
        noisy.get_parameter("0.weight")[:, 7:] += 50 * torch.randn(9, 5)
    own = profile(network, examples)
    found = compare(own, profile(noisy, examples, own))
    assert found.similarity == pytest.approx(1.0, abs=1e-4)


def test_networks_of_another_topology_or_type_say_why_they_cannot_be_compared() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 12)
    plain = profile(mlp((9, 7), 3).eval(), x)
    deeper = compare(plain, profile(mlp((9, 7, 5), 3).eval(), x))
    assert not deeper.comparable
    assert deeper.why.startswith("their topologies differ: ")
    assert (deeper.similarity, deeper.damage, deeper.saved) == (0.0, (0.0, 0.0), 0)
    tanh = compare(plain, profile(mlp((9, 7), 3, activation=nn.Tanh).eval(), x))
    assert "relu" in tanh.why and "tanh" in tanh.why
    double = compare(plain, profile(mlp((9, 7), 3).double().eval(), x.double()))
    assert "float32" in double.why and "float64" in double.why
    one_layer = profile(mlp((), 3).eval(), x)
    assert compare(one_layer, one_layer).why == "no layer can be shared"


def test_a_task_that_feels_nothing_loses_nothing() -> None:
    torch.manual_seed(0)
    x = torch.randn(30, 12)
    one = profile(mlp((9, 7), 3).eval(), x)
    other = profile(mlp((9, 7), 3).eval(), x, one)
    numb = replace(
        other, sensitivity={name: torch.zeros_like(rows) for name, rows in other.sensitivity.items()}, stake=0.0
    )
    found = compare(one, numb)
    assert found.damage[1] == 0.0 < found.damage[0]
    assert compare(numb, numb).similarity == 1.0


def test_convolutions_behind_a_flatten_are_matched_by_channels() -> None:
    torch.manual_seed(0)
    network, x = lenet5((4, 6, 10), 3).eval(), torch.randn(40, 1, 20, 20)
    shuffled, _ = permuted(network, ["0", "3", "7", "9"], seed=1)
    own = profile(network, x)
    assert compare(own, profile(shuffled, x, own)).similarity == pytest.approx(1.0, abs=1e-3)
