"""Who owns which rows and columns: axes put side by side, blocks cut from matrices, names, shapes and sizes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtz_core.network.graph import FIXED, INPUT, KERNEL, Axis, Network
from mtz_core.network.tracing import trace
from mtz_core.zipped.ownership import NOT_A_MEMBER, Arrangement, Segment, arrange, positions_of
from mtz_core.zipped.report import LayerReport, ZipReport
from mtz_core.zipped.structure import (
    TASK_NAME,
    TaskStructure,
    ZippedStructure,
    bias_name,
    block_name,
    can_share,
    own_name,
    to_blocks,
)

NO = NOT_A_MEMBER


def axis(*places: tuple[str, int] | None) -> Axis:
    """An axis whose positions belong to these neurons, given as (group, neuron); None: to none."""
    names = tuple(dict.fromkeys(place[0] for place in places if place))
    return Axis(
        names,
        np.array([names.index(place[0]) if place else FIXED for place in places]),
        np.array([place[1] if place else FIXED for place in places]),
    )


def members(*rows: Sequence[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1)


def described(arrangement: Arrangement) -> list[tuple[str, Mapping[str, list[int]]]]:
    return [("+".join(r.owners), {task: p.tolist() for task, p in r.places.items()}) for r in arrangement.segments]


def test_positions_of_every_neuron_in_order() -> None:
    one = axis(("h", 1), None, ("g", 0), ("h", 0), ("h", 1), ("h", 0))
    assert positions_of(one, "h").tolist() == [[3, 5], [0, 4]]
    assert positions_of(one, "g").tolist() == [[2]]
    assert positions_of(one, "other").shape == (0, 0)


def test_paired_neurons_lie_together_each_task_in_its_own_order() -> None:
    axes = {"a": axis(("g", 0), ("g", 1), ("g", 2)), "b": axis(("g", 0), ("g", 1), ("g", 2), ("g", 3))}
    found = arrange(("a", "b"), axes, {"g": members([0, 3], [2, 0], [1, NO], [NO, 1], [NO, 2])})
    assert described(found) == [("a+b", {"a": [0, 2], "b": [3, 0]}), ("a", {"a": [1]}), ("b", {"b": [1, 2]})]
    assert found.shared() == 2
    assert found.order("b").tolist() == [3, 0, 1, 2]
    assert [segment.owners for segment in found.of("a")] == [("a", "b"), ("a",)]


def test_neurons_of_some_tasks_among_many() -> None:
    three = {task: axis(("g", 0), ("g", 1)) for task in "abc"}
    found = arrange(("a", "b", "c"), three, {"g": members([0, 0, 1], [NO, 1, 0], [1, NO, NO])})
    assert described(found) == [
        ("a+b+c", {"a": [0], "b": [0], "c": [1]}),
        ("b+c", {"b": [1], "c": [0]}),
        ("a", {"a": [1]}),
    ]
    assert found.shared() == 2


def test_what_corresponds_by_itself_and_what_never_does() -> None:
    axes = {
        "a": axis((INPUT, 0), (INPUT, 0), ("unpaired", 0), None),
        "b": axis((INPUT, 0), (INPUT, 0), None, ("unpaired", 0)),
    }
    found = arrange(("a", "b"), axes, {})
    assert described(found) == [
        ("a+b", {"a": [0, 1], "b": [0, 1]}),
        ("a", {"a": [2, 3]}),
        ("b", {"b": [2, 3]}),
    ]
    kernel = {"a": axis((KERNEL, 0), (KERNEL, 0)), "b": axis((KERNEL, 0), (KERNEL, 0))}
    assert arrange(("a", "b"), kernel, {}).shared() == 2


def test_inputs_of_other_sizes_do_not_correspond() -> None:
    axes = {"a": axis((INPUT, 0)), "b": axis((INPUT, 0), (INPUT, 0))}
    assert described(arrange(("a", "b"), axes, {})) == [("a", {"a": [0]}), ("b", {"b": [0, 1]})]


def test_neurons_of_other_sizes_do_not_correspond() -> None:
    axes = {"a": axis(("g", 0), ("g", 1)), "b": axis(("g", 0), ("g", 0), ("g", 1), ("g", 1))}
    assert arrange(("a", "b"), axes, {"g": members([0, 0], [1, 1])}).shared() == 0


def test_heads_correspond_as_a_whole() -> None:
    axes = {task: axis(("h", 1), ("h", 0), ("h", 1), ("h", 0)) for task in "ab"}
    found = arrange(("a", "b"), axes, {"h": members([0, 1], [1, NO], [NO, 0])})
    assert described(found)[0] == ("a+b", {"a": [1, 3], "b": [0, 2]})


def test_separate_layers_have_nothing_in_common() -> None:
    axes = {task: axis(("g", 0), ("g", 1), (INPUT, 0)) for task in "ab"}
    found = arrange(("a", "b"), axes, {"g": members([0, 0], [1, 1])}, all_separate=True)
    assert found.shared() == 0
    assert sorted(found.order("a").tolist()) == [0, 1, 2]


@st.composite
def zipped_axes(draw: Any) -> tuple[tuple[str, ...], dict[str, Axis], dict[str, np.ndarray]]:
    """Axes of some tasks over two groups (several positions per neuron), some positions of no neuron, and members."""
    tasks = ("a", "b", "c")[: draw(st.integers(1, 3))]
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    slots = {"g": int(generator.integers(1, 3)), "h": int(generator.integers(1, 4))}
    widths = {name: {task: int(generator.integers(1, 5)) for task in tasks} for name in slots}
    table = {}
    for name, of in widths.items():
        count = int(generator.integers(max(of.values()), sum(of.values()) + 1))
        rows = np.full((count, len(tasks)), NO)
        for column, task in enumerate(tasks):
            rows[generator.permutation(count)[: of[task]], column] = generator.permutation(of[task])
        table[name] = rows[(rows >= 0).any(axis=1)]
    axes = {}
    for task in tasks:
        places = [(name, i) for name, of in widths.items() for i in range(of[task]) for _ in range(slots[name])]
        some = [*places, *[None] * int(generator.integers(0, 3))]
        axes[task] = axis(*(some[i] for i in generator.permutation(len(some))))
    return tasks, axes, table


@given(zipped_axes())
def test_every_position_lies_in_one_run(drawn: tuple[tuple[str, ...], dict[str, Axis], dict[str, np.ndarray]]) -> None:
    tasks, axes, table = drawn
    found = arrange(tasks, axes, table)
    for task in tasks:
        assert sorted(found.order(task).tolist()) == list(range(len(axes[task].group)))
        assert len(found.order(task)) == sum(segment.size for segment in found.of(task))
    for segment in found.segments:
        for position in range(segment.size) if len(segment.owners) > 1 else ():
            where = {task: int(segment.places[task][position]) for task in segment.owners}
            names = {axes[task].groups[axes[task].group[place]] for task, place in where.items()}
            assert len(names) == 1
            rows = table[names.pop()]
            neurons = [int(axes[task].neuron[where[task]]) if task in where else NO for task in tasks]
            assert neurons in rows.tolist()


@given(zipped_axes(), zipped_axes(), st.booleans())
def test_a_matrix_is_its_blocks(drawn: Any, other: Any, bias: bool) -> None:
    tasks = tuple(task for task in drawn[0] if task in other[0])
    rows = arrange(tasks, {t: drawn[1][t] for t in tasks}, restricted(drawn, tasks))
    columns = arrange(tasks, {t: other[1][t] for t in tasks}, restricted(other, tasks))
    generator = torch.Generator().manual_seed(7)
    matrices = {t: torch.randn(len(rows.order(t)), len(columns.order(t)) + bias, generator=generator) for t in tasks}
    blocks: dict[str, Tensor] = {}
    for task in tasks:
        known = dict(blocks)
        found = to_blocks("fc", task, matrices[task], rows, columns, bias, known)
        assert not found.keys() & known.keys()
        blocks |= found
    for task in tasks:
        for row in rows.of(task):
            first = row.owners[0]
            for column in columns.of(task):
                owner = next(t for t in tasks if t in row.owners and t in column.owners)
                block = blocks[block_name("fc", row.owners, column.owners)]
                assert torch.equal(block, matrices[owner][row.places[owner]][:, column.places[owner]])
            if bias:
                assert torch.equal(blocks[bias_name("fc", row.owners)], matrices[first][row.places[first], -1])


def restricted(drawn: Any, tasks: Sequence[str]) -> dict[str, np.ndarray]:
    columns = [drawn[0].index(task) for task in tasks]
    tables = {name: rows[:, columns] for name, rows in drawn[2].items()}
    return {name: rows[(rows >= 0).any(axis=1)] for name, rows in tables.items()}


class Tied(nn.Module):
    """Two layers of one weight, then two to share."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.again = nn.Linear(4, 4)
        self.again.weight = self.first.weight
        self.norm = nn.BatchNorm1d(4)
        self.hidden = nn.Linear(4, width)
        self.head = nn.Linear(width, classes, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.again(self.first(x).relu()))
        out: Tensor = self.head(self.hidden(x).relu())
        return out


def structure() -> tuple[dict[str, Network], ZippedStructure]:
    """Networks of 5 and 6 hidden neurons of which 3 are shared, with 2 and 3 classes."""
    traced = {"a": trace(Tied(5, 2), torch.randn(2, 4)), "b": trace(Tied(6, 3), torch.randn(2, 4))}
    pairs = members([4, 0], [1, 5], [2, 2], [0, NO], [3, NO], [NO, 1], [NO, 3], [NO, 4])
    networks = {task: TaskStructure.of(network) for task, network in traced.items()}
    return traced, ZippedStructure(("a", "b"), networks, {"hidden": pairs}, ZipReport("refit", (), 0, 0, 0, 0))


def test_blocks_are_where_owners_have_a_task_in_common() -> None:
    _, zipped = structure()
    assert zipped.block_shapes() == {
        "hidden/weight/a+b/a": (3, 4),
        "hidden/weight/a+b/b": (3, 4),
        "hidden/bias/a+b": (3,),
        "hidden/weight/a/a": (2, 4),
        "hidden/bias/a": (2,),
        "hidden/weight/b/b": (3, 4),
        "hidden/bias/b": (3,),
        "head/weight/a/a+b": (2, 3),
        "head/weight/a/a": (2, 2),
        "head/weight/b/a+b": (3, 3),
        "head/weight/b/b": (3, 3),
    }
    assert [layer.name for layer in zipped.layers] == ["hidden", "head"]
    assert zipped.rows["hidden"].shared() == zipped.columns["head"].shared() == 3


def test_everything_but_layers_is_each_tasks_own() -> None:
    traced, zipped = structure()
    tied = ["first.weight", "first.bias", "again.bias"]
    norm = ["norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"]
    shapes = zipped.own_shapes()
    assert shapes.keys() == {own_name(name, task) for name in tied + norm for task in "ab"}
    assert shapes["first.weight/own/b"] == (4, 4)
    one = zipped.networks["a"]
    assert one.matrices == {"hidden.weight", "hidden.bias", "head.weight"}
    assert one.parameters == traced["a"].parameters
    assert one.bytes == traced["a"].bytes == 4 * (one.parameters + 8)


def test_a_report_counts_what_is_stored() -> None:
    traced, zipped = structure()
    shapes = {**zipped.block_shapes(), **zipped.own_shapes()}
    layers = (LayerReport("hidden", "linear", {"a": 5, "b": 6}, 3, 0.1, {"a": 0, "b": 0}, 64, {"a": 25, "b": 30}),)
    report = zipped.reported({name: torch.zeros(shape) for name, shape in shapes.items()}, layers).report
    stored = sum(torch.Size(shape).numel() for shape in shapes.values())
    assert report.layers == layers
    assert report.method == "refit"
    assert report.stored_bytes == 4 * stored
    assert report.stored_parameters == stored - 2 * 8
    assert report.original_parameters == sum(network.parameters for network in traced.values())
    assert report.original_bytes == sum(network.bytes for network in traced.values())
    assert report.stored_fraction == report.stored_parameters / report.original_parameters


def test_a_layer_report_of_the_tasks_that_are_left() -> None:
    whole = LayerReport(
        "fc", "linear", {"a": 3, "b": 4, "c": 5}, 2, 0.5, {"a": 1, "b": 2, "c": 3}, 90, {"a": 9, "b": 8, "c": 7}
    )
    left = whole.of(("a", "c"), 1, {"fc/weight/a/a": torch.zeros(3, 5), "fc/bias/a": torch.zeros(3)})
    assert (left.neurons, left.error, left.original_parameters) == (
        {"a": 3, "c": 5},
        {"a": 1, "c": 3},
        {"a": 9, "c": 7},
    )
    assert (left.shared, left.parameters, left.cost, left.layer) == (1, 18, 0.5, "fc")


def convolutions(kernel: int = 3, groups: int = 1, multiplier: int = 1) -> Network:
    layers = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4 * multiplier, kernel, groups=groups), nn.Flatten())
    return trace(layers, torch.randn(2, 2, 6, 6))


@pytest.mark.parametrize(
    ("other", "possible"),
    [
        ({}, True),
        ({"multiplier": 2}, True),
        ({"kernel": 2}, False),
        ({"groups": 2}, False),
    ],
)
def test_rows_mean_the_same_where_kernels_are_of_one_size(other: dict[str, int], possible: bool) -> None:
    pair = [convolutions(), convolutions(**other)]
    assert can_share("0", pair)
    assert can_share("1", pair) == possible
    assert can_share("1", [TaskStructure.of(network) for network in pair]) == possible


def test_what_one_network_keeps_separate_no_network_shares() -> None:
    module = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    shared, separate = trace(module, torch.randn(2, 4)), trace(module, torch.randn(2, 4), ["0"])
    assert can_share("0", [shared, shared])
    assert not can_share("0", [shared, separate])
    assert can_share("2", [shared, separate])


def test_names() -> None:
    assert block_name("fc", ("a", "b"), ("a",)) == "fc/weight/a+b/a"
    assert bias_name("fc", ("b",)) == "fc/bias/b"
    assert own_name("norm.weight", "b") == "norm.weight/own/b"
    assert all(TASK_NAME.fullmatch(name) for name in ("digits", "Fashion-2", "a_b"))
    assert not any(TASK_NAME.fullmatch(name) for name in ("", "a+b", "a/b", "a b", "ä"))
    assert Segment(("a",), {"a": np.arange(3)}).size == 3
