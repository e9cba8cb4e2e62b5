"""Neuron groups: which layers write and read the same neurons, and that these can be permuted together."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.errors import UnsupportedModule
from mtz_core.network.graph import FIXED, INPUT, KERNEL, Axis, Network, run
from mtz_core.network.groups import Analysis, analyse
from mtz_core.network.tracing import trace
from tests.support.networks import CASES, Case, hidden_layers
from tests.support.written import Apply

Group = tuple[str, str, str, int]
"""Name, writers, readers, width. A name in parentheses is that of a group that cannot be shared."""


class Written(nn.Module):
    """Layers by name, and how they are run."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups)


def pooled(x: Tensor) -> Tensor:
    return x.mean((2, 3))


def residual() -> nn.Module:
    return Written(
        lambda m, x: m.head(pooled((h := m.norm(m.stem(x)).relu()) + m.norm2(m.second(m.first(h).relu())))),
        stem=conv(2, 6),
        norm=nn.BatchNorm2d(6),
        first=conv(6, 4),
        second=conv(4, 6),
        norm2=nn.BatchNorm2d(6),
        head=nn.Linear(6, 3),
    )


def projected_residual() -> nn.Module:
    return Written(
        lambda m, x: m.head(pooled((m.shortcut(h := m.stem(x)) + m.second(m.first(h).relu())).relu())),
        stem=conv(2, 4),
        first=conv(4, 5, stride=2),
        second=conv(5, 6),
        shortcut=conv(4, 6, 1, stride=2),
        head=nn.Linear(6, 3),
    )


def padded_shortcut(m: nn.Module, x: Tensor) -> Tensor:
    x = m.stem(x)  # type: ignore[operator]
    wider = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 1, 2)) + m.first(x)  # type: ignore[operator]
    out: Tensor = m.head(pooled(wider.relu()))  # type: ignore[operator]
    return out


def dense_block(m: nn.Module, x: Tensor) -> Tensor:
    x = m.stem(x)  # type: ignore[operator]
    x = torch.cat([x, m.first(m.norm(x).relu())], 1)  # type: ignore[operator]
    x = torch.cat([x, m.second(x)], 1)  # type: ignore[operator]
    out: Tensor = m.head(pooled(x))  # type: ignore[operator]
    return out


def squeeze_excite(m: nn.Module, x: Tensor) -> Tensor:
    x = m.stem(x)  # type: ignore[operator]
    gate = m.up(m.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()  # type: ignore[operator]
    out: Tensor = m.head(pooled(x * gate))  # type: ignore[operator]
    return out


def u_net(m: nn.Module, x: Tensor) -> Tensor:
    left = m.left(x).relu()  # type: ignore[operator]
    low = m.low(F.max_pool2d(left, 2)).relu()  # type: ignore[operator]
    out: Tensor = m.head(torch.cat([left, m.up(low)], 1))  # type: ignore[operator]
    return out


def packed(m: nn.Module, x: Tensor) -> Tensor:
    parts = m.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4).unbind(0)  # type: ignore[operator]
    out: Tensor = m.head(m.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)).mean(1))  # type: ignore[operator]
    return out


def separate(m: nn.Module, x: Tensor) -> Tensor:
    parts = [layer(x).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (m.query, m.key, m.value)]  # type: ignore[operator]
    scores = (parts[0] @ parts[1].transpose(-1, -2) / 2).softmax(-1)
    out: Tensor = m.head(m.out((scores @ parts[2]).transpose(1, 2).flatten(2)).mean(1))  # type: ignore[operator]
    return out


def grouped_queries(m: nn.Module, x: Tensor) -> Tensor:
    query = m.query(x).unflatten(-1, (4, 2)).transpose(1, 2)  # type: ignore[operator]
    key, value = (layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (m.key, m.value))  # type: ignore[operator]
    mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    out: Tensor = m.head(mixed.transpose(1, 2).flatten(2).mean(1))  # type: ignore[operator]
    return out


TABLE: dict[str, tuple[nn.Module, tuple[int, ...], Sequence[Group]]] = {
    "residual sum": (
        residual(),
        (2, 6, 6),
        [("stem", "stem second", "first head", 6), ("first", "first", "second", 4), ("(head)", "head", "", 3)],
    ),
    "projected residual": (
        projected_residual(),
        (2, 6, 6),
        [
            ("stem", "stem", "shortcut first", 4),
            ("shortcut", "shortcut second", "head", 6),
            ("first", "first", "second", 5),
            ("(head)", "head", "", 3),
        ],
    ),
    "sum that is the output": (
        Written(lambda m, x: (h := m.first(x)) + m.second(h.relu()), first=nn.Linear(4, 4), second=nn.Linear(4, 4)),
        (4,),
        [("(first)", "first second", "second", 4)],
    ),
    "shortcut padded with zeros": (
        Written(padded_shortcut, stem=conv(2, 4), first=conv(4, 7, stride=2), head=nn.Linear(7, 3)),
        (2, 6, 6),
        [("stem", "stem first", "first head", 4), ("first", "first", "head", 3), ("(head)", "head", "", 3)],
    ),
    "concatenation": (
        Written(
            lambda m, x: m.head(torch.cat([m.a(x).relu(), m.b(x)], 1)),
            a=nn.Linear(4, 5),
            b=nn.Linear(4, 6),
            head=nn.Linear(11, 3),
        ),
        (4,),
        [("a", "a", "head", 5), ("b", "b", "head", 6), ("(head)", "head", "", 3)],
    ),
    "dense block": (
        Written(
            dense_block,
            stem=conv(2, 4),
            norm=nn.BatchNorm2d(4),
            first=conv(4, 3),
            second=conv(7, 2),
            head=nn.Linear(9, 3),
        ),
        (2, 6, 6),
        [
            ("stem", "stem", "first second head", 4),
            ("first", "first", "second head", 3),
            ("second", "second", "head", 2),
            ("(head)", "head", "", 3),
        ],
    ),
    "squeeze and excite": (
        Written(squeeze_excite, stem=conv(2, 6), down=conv(6, 2, 1), up=conv(2, 6, 1), head=nn.Linear(6, 3)),
        (2, 6, 6),
        [("stem", "stem up", "down head", 6), ("down", "down", "up", 2), ("(head)", "head", "", 3)],
    ),
    "depthwise": (
        nn.Sequential(conv(2, 6, 1), conv(6, 6, groups=6), nn.ReLU6(), conv(6, 3, 1)),
        (2, 6, 6),
        [("0", "0 1", "1 3", 6), ("(3)", "3", "", 3)],
    ),
    "depthwise with two filters a channel": (
        nn.Sequential(conv(2, 3, 1), conv(3, 6, groups=3), conv(6, 3, 1)),
        (2, 6, 6),
        [("0", "0 1", "1 2", 3), ("(2)", "2", "", 3)],
    ),
    "grouped": (
        nn.Sequential(conv(2, 6, 1), nn.ReLU(), conv(6, 4, groups=2), conv(4, 3, 1)),
        (2, 6, 6),
        [("0", "0 2", "2 3", 2), ("(3)", "3", "", 3)],
    ),
    "grouped on the input": (
        nn.Sequential(conv(2, 4, groups=2), conv(4, 3, 1)),
        (2, 6, 6),
        [("0", "0", "0 1", 2), ("(1)", "1", "", 3)],
    ),
    "flatten": (
        nn.Sequential(conv(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5), nn.Linear(5, 3)),
        (2, 6, 6),
        [("0", "0", "3", 4), ("3", "3", "4", 5), ("(4)", "4", "", 3)],
    ),
    "u-net": (
        Written(u_net, left=conv(2, 4), low=conv(4, 6), up=nn.ConvTranspose2d(6, 5, 2, stride=2), head=conv(9, 3, 1)),
        (2, 6, 6),
        [
            ("left", "left", "low head", 4),
            ("low", "low", "up", 6),
            ("up", "up", "head", 5),
            ("(head)", "head", "", 3),
        ],
    ),
    "gated": (
        Written(
            lambda m, x: m.head(F.silu(m.gate(x)) * m.up(x)),
            gate=nn.Linear(4, 7),
            up=nn.Linear(4, 7),
            head=nn.Linear(7, 3),
        ),
        (4,),
        [("gate", "gate up", "head", 7), ("(head)", "head", "", 3)],
    ),
    "attention, packed": (
        Written(packed, qkv=nn.Linear(6, 24), out=nn.Linear(8, 5), head=nn.Linear(5, 3)),
        (7, 6),
        [("qkv", "qkv", "out", 2), ("out", "out", "head", 5), ("(head)", "head", "", 3)],
    ),
    "attention, spelt out": (
        Written(
            separate,
            query=nn.Linear(6, 8),
            key=nn.Linear(6, 8),
            value=nn.Linear(6, 8),
            out=nn.Linear(8, 5),
            head=nn.Linear(5, 3),
        ),
        (7, 6),
        [("query", "query key value", "out", 2), ("out", "out", "head", 5), ("(head)", "head", "", 3)],
    ),
    "attention, several queries a key": (
        Written(
            grouped_queries,
            query=nn.Linear(6, 8),
            key=nn.Linear(6, 4),
            value=nn.Linear(6, 4),
            head=nn.Linear(8, 3),
        ),
        (7, 6),
        [("query", "query key value", "head", 2), ("(head)", "head", "", 3)],
    ),
    "one layer": (nn.Sequential(nn.Linear(4, 3), nn.Softmax(1)), (4,), [("(0)", "0", "", 3)]),
    "some outputs are dropped": (
        Written(lambda m, x: m.head(m.first(x))[:, :2], first=nn.Linear(4, 5), head=nn.Linear(5, 3)),
        (4,),
        [("first", "first", "head", 5), ("(head)", "head", "", 2), ("head[2]", "head", "", 1)],
    ),
}


@cache
def traced(name: str) -> Network:
    """A network of the table, its constants all different."""
    module, shape, _ = TABLE[name]
    for part in module.modules():
        if isinstance(part, nn.BatchNorm2d):
            torch.nn.init.normal_(part.weight)
            torch.nn.init.normal_(part.bias)
            assert part.running_mean is not None
            torch.nn.init.normal_(part.running_mean)
    return trace(module, torch.randn(2, *shape))


@pytest.mark.parametrize("name", TABLE)
def test_groups_of_a_network(name: str) -> None:
    expected = TABLE[name][2]
    graph = traced(name).graph
    found = [
        (
            group.name if group.hidden else f"({group.name})",
            " ".join(group.writers),
            " ".join(group.readers),
            graph.widths[group.name],
        )
        for group in graph.groups
        if group.name != INPUT
    ]
    assert found == [(n, w, r, width) for n, w, r, width in expected]


def test_attention_modules_of_torch_have_heads_as_neurons() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 10, batch_first=True, norm_first=True)
    module = nn.Sequential(nn.Linear(6, 8), encoder, nn.Flatten(), nn.Linear(7 * 8, 3))
    graph = trace(module, torch.randn(2, 7, 6)).graph
    groups = {group.name: group for group in graph.hidden_groups}
    assert graph.widths["1.self_attn.in_proj"] == 2
    assert groups["1.self_attn.in_proj"].readers == ("1.self_attn.out_proj",)
    stream = groups["0"]
    assert stream.writers == ("0", "1.self_attn.out_proj", "1.linear2")
    assert stream.readers == ("1.self_attn.in_proj", "1.linear1", "3")
    assert graph.widths["0"] == 8
    assert graph.widths["1.linear1"] == 10


@pytest.mark.parametrize("case", CASES[4:], ids=lambda case: case.name)
def test_groups_of_a_chain(case: Case) -> None:
    module = case.network(1)
    graph = trace(module, case.examples(2)).graph
    layers = [layer.name for layer in graph.layers]
    assert layers[:-1] == hidden_layers(case)
    assert [group.name for group in graph.groups] == [INPUT, *layers]
    assert [group.name for group in graph.hidden_groups] == layers[:-1]
    for before, after in itertools.pairwise(graph.groups):
        assert before.readers == after.writers == (after.name,)
        weight = module.get_parameter(f"{after.name}.weight")
        assert graph.widths[after.name] == len(weight)
        assert graph.rows[after.name].neuron.tolist() == list(range(len(weight)))
        assert graph.columns[after.name].groups == (before.name,)
        each = weight[0].numel() // graph.widths[before.name]
        assert graph.columns[after.name].neuron.tolist() == [i // each for i in range(weight[0].numel())]


def test_axes_of_groups_side_by_side() -> None:
    graph = traced("grouped").graph
    assert graph.rows["0"].neuron.tolist() == [0, 0, 0, 1, 1, 1]
    assert graph.rows["2"].neuron.tolist() == [0, 0, 1, 1]
    assert graph.columns["2"].groups == (KERNEL,)
    assert graph.columns["3"].neuron.tolist() == [0, 0, 1, 1]


def test_what_belongs_to_no_neuron_is_fixed() -> None:
    graph = traced("shortcut padded with zeros").graph
    first = graph.rows["first"]
    assert [first.groups[group] for group in first.group] == ["first", *["stem"] * 4, *["first"] * 2]
    module = nn.Sequential(nn.Linear(4, 5), nn.ConstantPad1d((2, 0), 1.0), nn.Linear(7, 3))
    columns = trace(module, torch.randn(2, 4)).graph.columns["2"]
    assert columns.group.tolist() == [FIXED, FIXED, 0, 0, 0, 0, 0]
    assert columns.neuron.tolist() == [FIXED, FIXED, 0, 1, 2, 3, 4]


def analysed(network: Network) -> Analysis:
    graph = network.graph
    return analyse(graph.nodes, graph.output, network.state, network.trainable, network.inputs)


def moved(tensor: Tensor, axis: Axis, group: str, order: np.ndarray, dim: int) -> Tensor:
    """Neuron i of a group takes the place of neuron order[i], position by position."""
    if group not in axis.groups:
        return tensor
    number, out = axis.groups.index(group), tensor.clone()
    for to, source in enumerate(order.tolist()):
        places = [np.flatnonzero((axis.group == number) & (axis.neuron == n)) for n in (to, source)]
        for a, b in zip(*places, strict=True):
            out.select(dim, int(a)).copy_(tensor.select(dim, int(b)))
    return out


def with_permuted(network: Network, analysis: Analysis, group: str, order: np.ndarray) -> Mapping[str, Tensor]:
    """The network's tensors, the neurons of one group in another order in all rows, columns and constants."""
    state = {
        name: moved(tensor.flatten(), analysis.constants[name], group, order, 0).reshape(tensor.shape)
        if name in analysis.constants
        else tensor
        for name, tensor in network.state.items()
    }
    for node in network.graph.nodes:
        if node.name in analysis.rows:
            weight = network.state[node.weight]
            matrix = moved(node.layer.matrix(weight), analysis.rows[node.name], group, order, 0)
            matrix = moved(matrix, analysis.columns[node.name], group, order, 1)
            state[node.weight] = node.layer.from_matrix(matrix, tuple(weight.shape))
    return state


def within(classes: np.ndarray) -> np.ndarray:
    """An order in which every neuron takes the place of the next of its class."""
    order = np.arange(len(classes))
    for one in np.unique(classes):
        order[classes == one] = np.roll(order[classes == one], 1)
    return order


@pytest.mark.parametrize("name", TABLE)
def test_neurons_of_a_group_can_be_permuted(name: str) -> None:
    network = traced(name)
    x = torch.randn(4, *network.input_shape)
    analysis = analysed(network)
    y = run(network.graph, network.state, x)
    for group in network.graph.hidden_groups:
        order = within(analysis.classes[group.name])
        state = with_permuted(network, analysis, group.name, order)
        torch.testing.assert_close(run(network.graph, state, x), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["residual sum", "attention, packed", "grouped", "shortcut padded with zeros"])
def test_a_graph_analysed_again_is_the_same(name: str) -> None:
    network = traced(name)
    again = analysed(network).graph
    assert (again.groups, again.widths) == (network.graph.groups, network.graph.widths)
    for side in ("rows", "columns"):
        before, after = getattr(network.graph, side), getattr(again, side)
        assert before.keys() == after.keys()
        for layer, axis in before.items():
            assert axis.groups == after[layer].groups
            assert np.array_equal(axis.group, after[layer].group)
            assert np.array_equal(axis.neuron, after[layer].neuron)


def classes_of(module: nn.Module, shape: tuple[int, ...], group: str) -> list[int]:
    return analysed(trace(module, torch.randn(2, *shape))).classes[group].tolist()


def test_channels_that_read_inputs_of_their_own_stay_in_their_place() -> None:
    assert analysed(traced("grouped on the input")).classes["0"].tolist() == [0, 1]


@pytest.mark.parametrize("name", ["residual sum", "attention, packed", "gated", "depthwise", "u-net"])
def test_hidden_neurons_are_all_alike_where_nothing_tells_them_apart(name: str) -> None:
    classes = analysed(traced(name)).classes
    for group, *_, width in TABLE[name][2]:
        if not group.startswith("("):
            assert classes[group].tolist() == [0] * width


def test_channels_stay_in_their_normalisation_group() -> None:
    grouped = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(3, 6), nn.Conv2d(6, 3, 1))
    assert classes_of(grouped, (2, 6, 6), "0") == [0, 0, 1, 1, 2, 2]
    whole = nn.Sequential(nn.Conv2d(2, 6, 3), nn.GroupNorm(1, 6), nn.Conv2d(6, 3, 1))
    assert classes_of(whole, (2, 6, 6), "0") == [0] * 6


def test_neurons_of_different_parts_are_of_different_classes() -> None:
    def parted(x: Tensor) -> Tensor:
        first, second = x.split([1, 3], 1)
        return torch.cat([first.relu(), second], 1)

    module = nn.Sequential(nn.Linear(4, 4), Apply(parted), nn.Linear(4, 3))
    assert classes_of(module, (4,), "0") == [0, 1, 1, 1]


def test_neurons_that_meet_different_constants_are_of_different_classes() -> None:
    mask = torch.tensor([1.0, 0.0, 3.0, 2.0])
    module = Written(lambda m, x: m.head(m.first(x) * mask), first=nn.Linear(4, 4), head=nn.Linear(4, 3))
    assert len(set(classes_of(module, (4,), "first"))) == 4
    alike = Written(lambda m, x: m.head(m.first(x) * 3 * torch.ones(4)), first=nn.Linear(4, 4), head=nn.Linear(4, 3))
    assert classes_of(alike, (4,), "first") == [0] * 4


def test_what_a_part_that_is_kept_separate_reads_stays_in_its_place() -> None:
    class Cumulative(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    module = nn.Sequential(nn.Linear(4, 5), Cumulative(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    network = trace(module, torch.randn(2, 4), ["1"])
    classes = analysed(network).classes
    assert len(set(classes["0"].tolist())) == 5
    assert classes["2"].tolist() == [0] * 6
    assert network.graph.columns["2"].group.tolist() == [FIXED] * 5


def test_an_operator_without_a_rule_is_refused_with_its_module() -> None:
    class Median(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x - x.median(1, keepdim=True).values

    module = nn.Sequential(nn.Linear(4, 4), nn.Sequential(Median()), nn.Linear(4, 3))
    with pytest.raises(
        UnsupportedModule, match=r"'1\.0': operator median\.dim cannot be zipped.*does not know this operator"
    ):
        trace(module, torch.randn(2, 4))


def test_parameters_of_normalisation_belong_to_the_neurons() -> None:
    network = trace(residual(), torch.randn(2, 2, 6, 6))
    constants = analysed(network).constants
    for name in ("norm.weight", "norm.running_mean", "norm2.bias", "norm2.running_var"):
        assert constants[name].groups == ("stem",)
        assert constants[name].neuron.tolist() == list(range(6))
