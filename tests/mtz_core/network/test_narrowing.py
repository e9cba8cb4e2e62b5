"""A narrower network computes what the whole one does when nobody reads the neurons that it lacks."""

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from mtz_core.network.graph import Axis, Network, run
from mtz_core.network.groups import analyse
from mtz_core.network.narrowing import LEAST, CannotDrop, Dropper, Keep, Reduced
from mtz_core.network.to_module import build_module
from mtz_core.network.topology import first_difference
from mtz_core.network.tracing import trace
from mtz_core.zipped.ownership import positions_of
from tests.support.networks import Residual
from tests.support.zoo.laws import assert_close, module, plain_attention, traced
from tests.support.zoo.table import OWN

pytestmark = pytest.mark.slow

CASES = {case.name: case for case in OWN}
BOUND: Mapping[str, Sequence[str]] = {
    "mlp": (),
    "lenet-5": (),
    "vgg-16, normalised": (),
    "resnet-18": (),
    "resnext": ("1.branch.0.0", "2.branch.0.0", "3.branch.0.0"),
    "mobilenet-v2": (),
    "squeeze-excite": (),
    "densenet": (),
    "u-net": (),
    "temporal": (),
    "convnext": (),
    "groupnorm": ("0", "1.branch.2", "2", "3.branch.2"),
    "vit": ("encoder.0.attention.qkv", "encoder.1.attention.qkv"),
    "bert": ("encoder.0.attention.query", "encoder.1.attention.query"),
}
"""The groups that cannot lose neurons: of several normalisation groups, of two heads, of two convolution groups."""

NORMALISED: Mapping[str, Sequence[str]] = {
    "convnext": ("stages.0", "stages.5"),
    "vit": ("patches",),
    "bert": ("positions",),
}
"""Groups that are normalised together: without some of them, the others have other values."""

FREE = [name for name in BOUND if name != "groupnorm"]
on_free_networks = pytest.mark.parametrize("name", FREE)
on_some_networks = pytest.mark.parametrize("name", ["lenet-5", "mobilenet-v2", "densenet", "vit"])


@cache
def dropper(name: str) -> Dropper:
    return Dropper(traced(CASES[name], "narrow"))


def random_keep(name: str, seed: int) -> dict[str, np.ndarray]:
    """For one group or more that can lose neurons without a change of others, some that stay, at least `LEAST`."""
    generator = np.random.default_rng(seed)
    network = dropper(name).network
    groups = [g.name for g in network.graph.hidden_groups if g.name not in (*BOUND[name], *NORMALISED.get(name, ()))]
    chosen = [group for group in groups if generator.random() < 0.7] or groups[:1]
    keep = {}
    for group in chosen:
        width = network.graph.widths[group]
        count = int(generator.integers(min(LEAST, width - 1), width))
        keep[group] = np.sort(generator.permutation(width)[:count])
    return keep


def gone(axis: Axis, keep: Keep, widths: Mapping[str, int]) -> np.ndarray:
    """The positions on an axis that belong to neurons that do not stay."""
    lost = [
        positions_of(axis, group)[np.setdiff1d(np.arange(widths[group]), kept)].ravel()
        for group, kept in keep.items()
        if group in axis.groups
    ]
    return np.concatenate([np.zeros(0, dtype=np.int64), *lost])


def unread(network: Network, keep: Keep) -> dict[str, Tensor]:
    """The tensors of the whole network, in which no layer reads the neurons that do not stay."""
    state = {name: tensor.clone() for name, tensor in network.state.items()}
    for node in network.graph.layers:
        weight = state[node.weight]
        matrix = node.layer.matrix(weight).clone()
        matrix[:, torch.from_numpy(gone(network.graph.columns[node.name], keep, network.graph.widths))] = 0
        state[node.weight] = node.layer.from_matrix(matrix, tuple(weight.shape))
    return state


@on_free_networks
@plain_attention()
def test_a_narrower_network_computes_what_the_whole_one_does_with_unread_neurons(name: str) -> None:
    case, network, keep = CASES[name], dropper(name).network, random_keep(name, 0)
    x = case.examples(5, seed=9)
    original = copy.deepcopy(module(case, "narrow"))
    original.load_state_dict(unread(network, keep), strict=False)
    narrow = dropper(name).narrow(keep).network
    expected = original(x)
    assert_close(run(narrow.graph, narrow.state, x), expected)
    plain = build_module(narrow).eval()
    assert_close(plain(x), expected)
    shapes = {name: tuple(parameter.shape) for name, parameter in plain.named_parameters()}
    assert shapes == {name: tuple(narrow.state[name].shape) for name in network.trainable}
    assert narrow.parameters < network.parameters
    assert narrow.bytes < network.bytes


@on_some_networks
def test_the_graph_says_how_many_neurons_are_left(name: str) -> None:
    network, keep = dropper(name).network, random_keep(name, 2)
    narrow = dropper(name).narrow(keep)
    assert narrow.original is network
    graph = narrow.network.graph
    assert graph.widths == {**network.graph.widths, **{group: len(kept) for group, kept in keep.items()}}
    assert graph.groups == network.graph.groups
    assert [node.name for node in graph.nodes] == [node.name for node in network.graph.nodes]
    assert narrow.network.trainable == network.trainable
    assert narrow.network.state.keys() == network.state.keys()


@pytest.mark.parametrize("name", ["lenet-5", "mobilenet-v2", "vit"])
def test_a_narrower_network_is_traced_anew_with_the_same_groups(name: str) -> None:
    narrow = dropper(name).narrow(random_keep(name, 2)).network
    again = trace(build_module(narrow).eval(), CASES[name].examples(2))
    assert sorted(again.graph.widths.values()) == sorted(narrow.graph.widths.values())


@on_free_networks
def test_the_graph_is_the_one_that_is_found_in_the_narrower_network(name: str) -> None:
    for seed in (2, 6):
        narrow = dropper(name).narrow(random_keep(name, seed)).network
        entry = narrow.state, narrow.trainable, narrow.inputs
        found = analyse(narrow.graph.nodes, narrow.graph.output, *entry).graph
        assert (narrow.graph.groups, narrow.graph.widths) == (found.groups, found.widths)
        for axes, expected in ((narrow.graph.rows, found.rows), (narrow.graph.columns, found.columns)):
            assert axes.keys() == expected.keys()
            for layer, axis in axes.items():
                assert axis.groups == expected[layer].groups
                assert np.array_equal(axis.group, expected[layer].group)
                assert np.array_equal(axis.neuron, expected[layer].neuron)


@on_some_networks
def test_what_is_left_of_a_layer_are_the_rows_and_columns_of_the_neurons_that_stay(name: str) -> None:
    network, keep = dropper(name).network, random_keep(name, 3)
    narrow = dropper(name).narrow(keep)
    for node in network.graph.layers:
        matrix = network.matrix(node)
        lost = [
            gone(axes[node.name], keep, network.graph.widths) for axes in (network.graph.rows, network.graph.columns)
        ]
        rows, columns = (np.setdiff1d(np.arange(size), own) for size, own in zip(matrix.shape, lost, strict=True))
        left = narrow.network.matrix(narrow.network.graph.node(node.name))
        assert torch.equal(left, matrix[torch.from_numpy(rows)][:, torch.from_numpy(columns)])
        kept = narrow.kept_rows(node)
        assert np.array_equal(np.arange(len(matrix)) if kept is None else kept.numpy(), rows)
        if not len(lost[0]) and not len(lost[1]):
            assert not narrow.touches(node)
            assert narrow.network.state[node.weight] is network.state[node.weight]


@on_some_networks
def test_the_original_is_never_modified_and_shares_no_memory_that_changes(name: str) -> None:
    network = dropper(name).network
    before, graph = {key: tensor.clone() for key, tensor in network.state.items()}, network.graph
    nodes = copy.deepcopy(network.graph.nodes)
    narrow = dropper(name).narrow(random_keep(name, 4)).network
    with torch.no_grad():
        for key, tensor in narrow.state.items():
            if tensor is not network.state[key] and tensor.is_floating_point():
                tensor.fill_(3)
    assert network.graph is graph
    assert network.graph.nodes == nodes
    assert all(torch.equal(tensor, network.state[key]) for key, tensor in before.items())


@pytest.mark.parametrize("name", ["mlp", "mobilenet-v2", "vit"])
def test_narrowing_nothing_gives_back_the_network_itself(name: str) -> None:
    network = dropper(name).network
    everything = {group.name: np.arange(network.graph.widths[group.name]) for group in network.graph.hidden_groups}
    for keep in ({}, everything):
        narrow = dropper(name).narrow(keep)
        assert narrow.network is narrow.original is network
        assert narrow.keep == {}
        assert not any(narrow.touches(node) for node in network.graph.nodes)
        assert all(narrow.kept_rows(node) is None for node in network.graph.layers)
    whole = Reduced.whole(network)
    assert whole.network is whole.original is network


@on_some_networks
def test_dropping_twice_is_dropping_once(name: str) -> None:
    network, first = dropper(name).network, random_keep(name, 5)
    halfway = dropper(name).narrow(first).network
    second = {group: np.arange(width)[: max(LEAST, width - 1)] for group, width in halfway.graph.widths.items()}
    second = {group: kept for group, kept in second.items() if group in first}
    twice = Dropper(halfway).narrow(second).network
    once = dropper(name).narrow({group: kept[second[group]] for group, kept in first.items()}).network
    assert twice.graph.widths == once.graph.widths
    assert all(torch.equal(tensor, once.state[key]) for key, tensor in twice.state.items())
    assert [node.arguments for node in twice.graph.nodes] == [node.arguments for node in once.graph.nodes]
    assert network.graph.widths != once.graph.widths


@pytest.mark.parametrize("name", BOUND)
@plain_attention()
def test_which_groups_can_lose_neurons(name: str) -> None:
    network, x = dropper(name).network, CASES[name].examples(3)
    droppable = dropper(name).droppable(x)
    assert set(droppable) == {group.name for group in network.graph.hidden_groups} - set(BOUND[name])
    for group in droppable:
        assert network.graph.widths[group] > LEAST


# Normalisation


@settings(max_examples=8)
@given(st.sets(st.integers(0, 4), min_size=LEAST, max_size=4), st.sets(st.integers(0, 3), min_size=LEAST, max_size=3))
def test_parameters_and_statistics_of_a_batch_normalisation_follow(stream: set[int], inner: set[int]) -> None:
    network = residual()
    keep = {"stem.0": np.array(sorted(stream)), "branches.0.0": np.array(sorted(inner))}
    state = Dropper(network).narrow(keep).network.state
    where = {"stem.1": keep["stem.0"], "branches.0.1": keep["branches.0.0"], "branches.0.4": keep["stem.0"]}
    where |= {"branches.1.4": keep["stem.0"], "branches.1.1": np.arange(6)}
    for norm, kept in where.items():
        for tensor in ("weight", "bias", "running_mean", "running_var"):
            name = f"{norm}.{tensor}"
            assert torch.equal(state[name], network.state[name][torch.from_numpy(kept)])


@cache
def residual() -> Network:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return trace(Residual((5, 4, 6), 3).eval(), torch.randn(2, 1, 7, 6))


class Normalised(nn.Module):
    """A normalisation of the neurons that two layers write, then a hidden layer that nothing normalises."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(2, 8, 3), norm
        self.hidden, self.last = nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.hidden(self.norm(self.first(x)).relu()).relu().mean((2, 3)))
        return out


@pytest.mark.parametrize(
    "norm",
    [
        nn.GroupNorm(1, 8),
        nn.LayerNorm((8, 5, 5)),
        nn.LayerNorm((8, 5, 5), elementwise_affine=False),
        nn.RMSNorm((8, 5, 5)),
    ],
    ids=["one group", "layer", "layer, plain", "root mean square"],
)
def test_a_normalisation_across_neurons_is_of_those_that_are_left(norm: nn.Module) -> None:
    x, kept = torch.randn(4, 2, 7, 7), torch.tensor([0, 2, 3, 6])
    for own in norm.parameters():
        nn.init.uniform_(own, 0.5, 1.5)
    module = Normalised(norm).eval()
    narrow = Dropper(trace(module, x)).narrow({"first": kept.numpy()}).network
    left = module.first(x)[:, kept]
    scale, shift = (getattr(norm, name, None) for name in ("weight", "bias"))
    centred = left if isinstance(norm, nn.RMSNorm) else left - left.mean((1, 2, 3), keepdim=True)
    normalised = centred / (centred.square().mean((1, 2, 3), keepdim=True) + 1e-5).sqrt()
    if scale is not None:
        normalised = normalised * scale.reshape(8, *scale.shape[1:] or (1, 1))[kept]
    if shift is not None:
        normalised = normalised + shift.reshape(8, *shift.shape[1:] or (1, 1))[kept]
    hidden = F.conv2d(normalised.relu(), module.hidden.weight[:, kept], module.hidden.bias)
    expected = module.last(hidden.relu().mean((2, 3)))
    assert_close(run(narrow.graph, narrow.state, x), expected)
    assert_close(build_module(narrow).eval()(x), expected)


@pytest.mark.parametrize(
    ("norm", "free"),
    [
        (nn.BatchNorm2d(8), True),
        (nn.InstanceNorm2d(8, affine=True), True),
        (nn.GroupNorm(8, 8), False),
        (nn.GroupNorm(2, 8), False),
        (nn.GroupNorm(1, 8), True),
        (nn.LayerNorm((8, 5, 5)), True),
        (nn.RMSNorm((8, 5, 5)), True),
    ],
    ids=["batch", "instance", "groups of one channel", "two groups", "one group", "layer", "root mean square"],
)
def test_neurons_stay_where_groups_of_them_are_normalised_together(norm: nn.Module, free: bool) -> None:
    x = torch.randn(4, 2, 7, 7)
    found = Dropper(trace(Normalised(norm).eval(), x)).droppable(x)
    assert found == (("first", "hidden") if free else ("hidden",))


class ChannelsLast(nn.Module):
    """A layer normalisation with its neurons on the last axis, where an operator has turned them to it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm((5, 5, 8))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


def test_neurons_of_a_normalisation_may_lie_on_any_of_its_axes() -> None:
    x = torch.randn(4, 2, 7, 7)
    assert Dropper(trace(Normalised(ChannelsLast()).eval(), x)).droppable(x) == ("first", "hidden")


class OneOfMany(nn.Module):
    """The first of a layer's neurons is normalised alone."""

    def __init__(self, place: int) -> None:
        super().__init__()
        self.first, self.norm, self.last, self.place = nn.Conv2d(2, 8, 3), nn.BatchNorm2d(1), nn.Linear(8, 3), place

    def forward(self, x: Tensor) -> Tensor:
        before, own, behind = self.first(x).relu().split([self.place, 1, 7 - self.place], 1)
        out: Tensor = self.last(torch.cat([before, self.norm(own), behind], 1).mean((2, 3)))
        return out


@pytest.mark.parametrize("place", range(8))
def test_neurons_stay_where_one_of_them_cannot_go(place: int) -> None:
    x = torch.randn(4, 2, 7, 7)
    assert Dropper(trace(OneOfMany(place).eval(), x)).droppable(x) == ()


# Cuts


class Halves(nn.Module):
    """The halves of a layer's neurons go separate ways."""

    def __init__(self, cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
        super().__init__()
        self.both, self.second, self.head = nn.Linear(5, 12), nn.Linear(6, 4), nn.Linear(10, 3)
        self.cut = cut

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.cut(self.both(x).relu())
        out: Tensor = self.head(torch.cat([a, self.second(b).relu()], 1))
        return out


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x.chunk(2, 1),
        lambda x: x.split(6, -1),
        lambda x: x.split([6, 6], 1),
        lambda x: (x[:, :6], x[:, 6:]),
        lambda x: (x.narrow(1, 0, 6), x[:, -6:]),
        lambda x: x.tensor_split(2, 1),
        lambda x: x.tensor_split((6,), 1),
        lambda x: x.hsplit(2),
        lambda x: x.hsplit([6]),
        lambda x: [part[:, 0] for part in x[:, None].dsplit(2)],
        lambda x: [part.t() for part in x.t().vsplit([6])],
        lambda x: x.unsafe_chunk(2, 1),
        lambda x: x.unsafe_split(6, 1),
        lambda x: x.unsafe_split_with_sizes([6, 6], 1),
    ],
    ids=[
        *("chunk", "split", "sizes", "slices", "narrow", "tensor_split", "indices", "hsplit", "hsplit at", "dsplit"),
        *("vsplit", "unsafe_chunk", "unsafe_split", "unsafe sizes"),
    ],
)
def test_parts_lose_neurons_independently(cut: Callable[[Tensor], Sequence[Tensor]]) -> None:
    x = torch.randn(4, 5)
    network = trace(Halves(cut), x)
    assert Dropper(network).droppable(x) == ("both", "both[2]", "second")
    keep = {"both": np.array([0, 2, 3, 5]), "both[2]": np.array([1, 4])}
    narrow = Dropper(network).narrow(keep).network
    assert first_difference(narrow.graph, network.graph) is None
    unread = {name: tensor.clone() for name, tensor in network.state.items()}
    unread["head.weight"][:, [1, 4]] = 0
    unread["second.weight"][:, [0, 2, 3, 5]] = 0
    assert_close(run(narrow.graph, narrow.state, x), run(network.graph, unread, x))


def test_parts_that_must_lose_the_same_neurons_lose_none() -> None:
    x = torch.randn(4, 5)
    network = trace(Halves(lambda x: x.view(-1, 2, 6).unbind(1)), x)
    assert Dropper(network).droppable(x) == ("second",)


# What is refused


@pytest.mark.parametrize(
    ("name", "keep"),
    [
        ("mlp", {"1": []}),
        ("mlp", {"1": [1, 1, 2]}),
        ("mlp", {"1": [0, 12]}),
        ("mlp", {"1": [-1, 2]}),
        ("lenet-5", {"9": []}),
        ("groupnorm", {"0": [0, 1, 2]}),
        ("groupnorm", {"0": [0]}),
        ("groupnorm", {"2": [0, 1, 2, 3, 4]}),
        ("resnext", {"1.branch.0.0": [0]}),
        ("vit", {"encoder.0.attention.qkv": [1]}),
    ],
    ids=str,
)
def test_what_cannot_be_kept_alone_is_refused(name: str, keep: Mapping[str, list[int]]) -> None:
    with pytest.raises(CannotDrop):
        dropper(name).narrow({group: np.array(kept, dtype=np.int64) for group, kept in keep.items()})


def test_a_refusal_names_the_operator_and_its_module() -> None:
    with pytest.raises(CannotDrop, match=r"group_norm of '1\.branch\.0' is bound to the number of neurons"):
        dropper("groupnorm").narrow({"0": np.array([0, 1, 2])})
