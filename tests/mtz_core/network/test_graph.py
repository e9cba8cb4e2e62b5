"""Graphs as data: nodes and what they refer to, and running them."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from mtz_core.network.graph import (
    GETITEM,
    INPUT,
    Input,
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
        graph(LINEAR),
        STATE | {"mask": torch.ones(5, dtype=torch.bool)},
        frozenset(STATE),
        {INPUT: Input((4,), torch.float32)},
    )
    assert torch.equal(network.matrix(LINEAR), torch.tensor([[0, 1, 2, 3, 10.0], [4, 5, 6, 7, 20]]))
    assert network.columns(LINEAR) == 5
    assert network.parameters == 10
    assert network.bytes == 4 * 10 + 5
    unbiased = Node("fc", "linear", {"input": {"value": INPUT}, "weight": {"state": "fc.weight"}}, "", True)
    assert torch.equal(network.matrix(unbiased), STATE["fc.weight"])
    assert network.columns(unbiased) == 4
