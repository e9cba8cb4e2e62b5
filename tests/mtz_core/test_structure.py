"""Names and shapes of the blocks of a layer."""

from mtz_core.graph import LayerGraph, NeuronGroup, Node
from mtz_core.structure import LayerReport, ZippedStructure, ZipReport, bias_name, block_name


def structure() -> ZippedStructure:
    nodes = (
        Node("conv", "conv2d", "input", {}, bias=True),
        Node("relu_1", "relu", "conv"),
        Node("fc", "linear", "relu_1", bias=False),
    )
    groups = (
        NeuronGroup("input", (), ("conv",)),
        NeuronGroup("conv", ("conv",), ("fc",)),
        NeuronGroup("fc", ("fc",), ()),
    )
    return ZippedStructure(
        tasks=("a", "b"),
        graph=LayerGraph(nodes, groups),
        input_shape=(2, 5, 5),
        layouts={
            "input": ((("a", "b"), 2),),
            "conv": ((("a", "b"), 3), (("a",), 1), (("b",), 4)),
            "fc": ((("a",), 10), (("b",), 7)),
        },
        columns_per_neuron={"conv": 9, "fc": 4},
        report=ZipReport("refit", (), 30, 40, 120, 160),
    )


def test_blocks_are_where_owners_have_a_task_in_common() -> None:
    assert structure().block_shapes() == {
        "conv/weight/a+b/a+b": (3, 18),
        "conv/bias/a+b": (3,),
        "conv/weight/a/a+b": (1, 18),
        "conv/bias/a": (1,),
        "conv/weight/b/a+b": (4, 18),
        "conv/bias/b": (4,),
        "fc/weight/a/a+b": (10, 12),
        "fc/weight/a/a": (10, 4),
        "fc/weight/b/a+b": (7, 12),
        "fc/weight/b/b": (7, 16),
    }


def test_rows_and_columns_of_a_layer() -> None:
    whole = structure()
    conv, fc = whole.graph.layers
    assert whole.rows(conv) == whole.columns(fc) == whole.layouts["conv"]
    assert whole.columns(conv) == whole.layouts["input"]
    assert [group.name for group in whole.graph.hidden_groups] == ["conv"]


def test_names_and_fractions() -> None:
    assert block_name("fc", ("a", "b"), ("a",)) == "fc/weight/a+b/a"
    assert bias_name("fc", ("b",)) == "fc/bias/b"
    assert structure().report.stored_fraction == 0.75
    assert LayerReport("fc", "linear", {"a": 3}, 0, 0.0, {"a": 0.0}, 1, 1).shared == 0
