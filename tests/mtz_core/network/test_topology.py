"""The first difference between two graphs, in words."""

import re
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core.network.graph import (
    INPUT,
    LayerGraph,
    Node,
)
from mtz_core.network.topology import describe, first_difference
from mtz_core.network.tracing import trace


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
    linear = Node(
        "fc", "linear", {"input": {"value": INPUT}, "weight": {"state": "w"}, "bias": {"state": "b"}}, "", True
    )
    assert describe(linear) == "linear 'fc'"
    window = Node("p", "max_pool2d", {"self": {"value": "a"}, "kernel_size": [2, 2], "stride": [2, 1]})
    assert describe(window) == "max_pool2d (kernel_size=[2, 2], stride=[2, 1])"
