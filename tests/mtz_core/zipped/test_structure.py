"""Blocks cut from matrices; names, shapes and sizes of what a zipped network stores."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from mtz_core.zipped.ownership import Segment, arrange
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
from tests.support.axes import NO, members, zipped_axes


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
    assert report.stored_fraction == report.stored_bytes / report.original_bytes


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
