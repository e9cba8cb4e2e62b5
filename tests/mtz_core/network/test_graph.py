"""Graphs as data: nodes and what they refer to, running them, and the first difference between two."""

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.network.graph import (
    GETITEM,
    INPUT,
    LayerGraph,
    Network,
    Node,
    free_unused,
    leaves,
    operator,
    resolve,
    run,
    run_node,
)
from mtz_core.network.topology import describe, first_difference
from mtz_core.network.tracing import trace


def graph(*nodes: Node) -> LayerGraph:
    """A graph that has nodes and no groups; the last node is the output."""
    return LayerGraph(nodes, nodes[-1].name, (), {}, {}, {})


LINEAR = Node(
    "fc",
    "linear",
    {"input": {"value": INPUT}, "weight": {"state": "fc.weight"}, "bias": {"state": "fc.bias"}},
    "",
    True,
)
STATE = {"fc.weight": torch.arange(8.0).reshape(2, 4), "fc.bias": torch.tensor([10.0, 20.0])}


def test_a_node_names_what_it_reads_and_is_given() -> None:
    node = Node("i", "index.Tensor", {"self": {"value": "a"}, "indices": [None, {"state": "at"}, {"value": "b"}]})
    assert node.sources == ("a", "b")
    assert node.state == ("at",)
    assert (LINEAR.source, LINEAR.weight, LINEAR.bias) == (INPUT, "fc.weight", "fc.bias")
    unbiased = Node("fc", "linear", {"input": {"value": INPUT}, "weight": {"state": "fc.weight"}}, "", True)
    assert unbiased.bias is None
    assert list(leaves([1, [2, [None]], "a"])) == [1, 2, None, "a"]


def test_references_are_replaced_by_what_they_stand_for() -> None:
    values, state = {"a": torch.ones(2)}, {"w": torch.zeros(3)}
    given = [{"value": "a"}, [{"state": "w"}, None], {"batch": [2, -1]}, {"dtype": "float64"}, 0.5, "mean"]
    found = resolve(given, values, state, batch=7)
    assert found == [values["a"], [state["w"], None], 13, torch.float64, 0.5, "mean"]


@pytest.mark.parametrize(
    ("kind", "overload"), [("relu", "default"), ("add.Tensor", "Tensor"), ("conv2d.padding", "padding")]
)
def test_a_kind_names_an_operator_of_aten(kind: str, overload: str) -> None:
    found = operator(kind)
    assert (found.namespace, found._overloadname) == ("aten", overload)
    with pytest.raises(AttributeError):
        operator("no_such_operator")


def test_nodes_run_on_values_and_state() -> None:
    x = torch.randn(3, 4)
    assert torch.equal(run_node(LINEAR, {INPUT: x}, STATE, 3), F.linear(x, STATE["fc.weight"], STATE["fc.bias"]))
    rows = Node("rows", "view", {"self": {"value": INPUT}, "size": [{"batch": [2, 0]}, 2]})
    assert run_node(rows, {INPUT: x}, {}, 3).shape == (6, 2)
    second = Node("second", GETITEM, {"value": {"value": "parts"}, "index": 1})
    assert torch.equal(run_node(second, {"parts": x.chunk(2, 1)}, {}, 3), x[:, 2:])


def test_training_turns_dropout_on_and_lets_statistics_learn() -> None:
    x = torch.randn(50, 4) + 3
    dropout = Node("d", "dropout", {"input": {"value": INPUT}, "p": 0.5, "train": False})
    assert torch.equal(run_node(dropout, {INPUT: x}, {}, 50), x)
    assert bool((run_node(dropout, {INPUT: x}, {}, 50, training=True) == 0).any())
    given = {"input": {"value": INPUT}, "weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    given |= {"running_mean": {"state": "mean"}, "running_var": {"state": "var"}}
    norm = Node("n", "batch_norm", given | {"cudnn_enabled": False})
    state = {"mean": torch.zeros(4), "var": torch.ones(4)}
    torch.testing.assert_close(run_node(norm, {INPUT: x}, state, 50), x, rtol=0, atol=1e-4)
    assert torch.equal(state["mean"], torch.zeros(4))
    normal = run_node(norm, {INPUT: x}, state, 50, training=True)
    torch.testing.assert_close(normal.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(state["mean"], 0.1 * x.mean(0))


def test_values_are_freed_after_their_last_use() -> None:
    first = Node("a", "relu", {"self": {"value": INPUT}})
    second = Node("b", "add.Tensor", {"self": {"value": "a"}, "other": {"value": INPUT}})
    third = Node("c", "mul.Tensor", {"self": {"value": "b"}, "other": {"value": "b"}})
    chain = graph(first, second, third)
    assert chain.last_use == {INPUT: "b", "a": "b", "b": "c"}
    values: dict[str, Any] = {INPUT: 1, "a": 2, "b": 3}
    free_unused(chain, values, first)
    assert values.keys() == {INPUT, "a", "b"}
    free_unused(chain, values, second)
    assert values.keys() == {"b"}
    x = torch.randn(2, 3)
    assert torch.equal(run(chain, {}, x), (x.relu() + x) ** 2)


def test_an_output_that_others_read_too_is_kept() -> None:
    early = LayerGraph(
        (Node("a", "relu", {"self": {"value": INPUT}}), Node("b", "neg", {"self": {"value": "a"}})), "a", (), {}, {}, {}
    )
    x = torch.randn(2, 3)
    assert torch.equal(run(early, {}, x), x.relu())


def test_a_network_as_matrices_and_sizes() -> None:
    network = Network(
        graph(LINEAR), STATE | {"mask": torch.ones(5, dtype=torch.bool)}, frozenset(STATE), (4,), torch.float32
    )
    assert torch.equal(network.matrix(LINEAR), torch.tensor([[0, 1, 2, 3, 10.0], [4, 5, 6, 7, 20]]))
    assert network.columns(LINEAR) == 5
    assert network.parameters == 10
    assert network.bytes == 4 * 10 + 5
    unbiased = Node("fc", "linear", {"input": {"value": INPUT}, "weight": {"state": "fc.weight"}}, "", True)
    assert torch.equal(network.matrix(unbiased), STATE["fc.weight"])
    assert network.columns(unbiased) == 4


class Block(nn.Module):
    """A convolutional network with one choice of everything that may differ."""

    def __init__(
        self,
        width: int = 4,
        kernel: int = 3,
        stride: int = 1,
        bias: bool = True,
        classes: int = 3,
        residual: bool = True,
        norm: bool = False,
        twice: bool = False,
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, kernel, stride=stride, padding=kernel // 2, bias=bias)
        self.norm = nn.BatchNorm2d(width) if norm else nn.Identity()
        self.head = nn.Linear(width, classes)
        self.residual, self.twice = residual, twice

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        after = self.norm(self.second(x.relu()))
        out: Tensor = self.head((x + after if self.residual else after).mean((2, 3)))
        return out.relu() if self.twice else out


@cache
def traced(**choices: Any) -> LayerGraph:
    return trace(Block(**choices), torch.randn(2, 1, 6, 6)).graph


@pytest.mark.parametrize("choices", [{}, {"width": 7}, {"classes": 5}])
def test_widths_and_classes_are_no_difference(choices: dict[str, Any]) -> None:
    assert first_difference(traced(), traced(**choices)) is None


def test_input_sizes_are_no_difference() -> None:
    larger = trace(Block(), torch.randn(2, 1, 9, 9)).graph
    assert first_difference(traced(), larger) is None


def test_a_default_that_is_written_out_is_no_difference() -> None:
    x = torch.randn(2, 1, 6, 6)
    short, long = (
        trace(nn.Sequential(nn.Conv2d(1, 2, 3), pool, nn.Flatten(), nn.Linear(8, 3)), x).graph
        for pool in (nn.MaxPool2d(2), nn.MaxPool2d(2, stride=2, padding=0))
    )
    assert first_difference(short, long) is None


@pytest.mark.parametrize(
    ("choices", "mine", "theirs"),
    [
        ({"residual": False}, r"add.Tensor reading step 0 and step \d", r"mean"),
        (
            {"stride": 2, "residual": False},
            r"conv2d 'second' .*padding=\[1, 1\]\)",
            r"conv2d 'second' .*stride=\[2, 2\]",
        ),
        ({"kernel": 1}, r"conv2d 'second' \(padding=\[1, 1\]\) reading step 1", r"conv2d 'second' reading step 1"),
        ({"bias": False}, r"conv2d 'second' \(padding", r"conv2d 'second' without bias \(padding"),
        ({"norm": True}, r"add\.Tensor", r"batch_norm"),
        ({"twice": True}, r"nothing more", r"relu reading step \d"),
    ],
)
def test_the_first_difference_is_shown_side_by_side(choices: dict[str, Any], mine: str, theirs: str) -> None:
    other = traced(**choices)
    difference = first_difference(traced(), other)
    assert difference is not None
    assert re.search(mine, difference[0])
    assert re.search(theirs, difference[1])
    assert first_difference(other, traced()) == (difference[1], difference[0])


class Renamed(nn.Module):
    """Two linear layers with the given names."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__()
        self.names = first, second
        self.add_module(first, nn.Linear(4, 6))
        self.add_module(second, nn.Linear(6, 3))

    def forward(self, x: Tensor) -> Tensor:
        first, second = (self.get_submodule(name) for name in self.names)
        out: Tensor = second(torch.relu(first(x)))
        return out


def test_other_names_of_layers_are_a_difference() -> None:
    x = torch.randn(2, 4)
    difference = first_difference(trace(Renamed("a", "b"), x).graph, trace(Renamed("a", "c"), x).graph)
    assert difference == ("linear 'b' reading step 1", "linear 'c' reading step 1")


class Heads(nn.Module):
    """Attention whose neurons are its heads; their number and size may differ."""

    def __init__(self, heads: int, size: int) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.packed = nn.Linear(6, 3 * heads * size)
        self.out = nn.Linear(heads * size, 3)

    def forward(self, x: Tensor) -> Tensor:
        parts = self.packed(x).unflatten(-1, (3, self.heads, self.size)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.out(F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)).mean(1)
        return out


def test_groups_are_compared_too() -> None:
    x = torch.randn(2, 5, 6)
    four, two = (trace(Heads(heads, 4), x).graph for heads in (4, 2))
    assert first_difference(four, two) is None
    groups = [group.name for group in four.groups]
    assert "packed" in groups
    fewer = LayerGraph(four.nodes, four.output, four.groups[:-1], four.widths, four.rows, four.columns)
    assert first_difference(four, fewer) == (f"{len(groups)} neuron groups", f"{len(groups) - 1} neuron groups")
    other = LayerGraph(four.nodes, four.output, four.groups[::-1], four.widths, four.rows, four.columns)
    difference = first_difference(four, other)
    assert difference is not None
    assert all("neuron group '" in side for side in difference)


def test_describe() -> None:
    assert describe(LINEAR) == "linear 'fc'"
    window = Node("p", "max_pool2d", {"self": {"value": "a"}, "kernel_size": [2, 2], "stride": [2, 1]})
    assert describe(window) == "max_pool2d (kernel_size=[2, 2], stride=[2, 1])"
