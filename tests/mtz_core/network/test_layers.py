"""Layers as matrices: rows against torch's own unfolding, and rows times matrix against the operator's own output."""

import math
from functools import cache
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtz_core.network import layers
from mtz_core.network.graph import Network, Node, run_node
from mtz_core.network.layers import LAYERS, Convolution, with_ones
from mtz_core.network.tracing import trace

side = st.integers(1, 3)
geometries = st.fixed_dictionaries(
    {
        "kernel_size": st.tuples(side, side),
        "stride": st.tuples(side, side),
        "padding": st.tuples(st.integers(0, 2), st.integers(0, 2)),
        "dilation": st.tuples(side, side),
    }
)


def fits(geometry: dict[str, tuple[int, int]], size: tuple[int, int]) -> bool:
    return all(
        n + 2 * p > d * (k - 1)
        for n, p, d, k in zip(size, geometry["padding"], geometry["dilation"], geometry["kernel_size"], strict=True)
    )


@given(geometries, st.tuples(st.integers(1, 8), st.integers(1, 8)), st.booleans(), st.sampled_from([0.0, math.inf]))
def test_patches_are_the_unfolded_input(
    geometry: dict[str, tuple[int, int]], size: tuple[int, int], channels_last: bool, few: float
) -> None:
    assume(fits(geometry, size))
    arguments = {key: list(value) for key, value in geometry.items() if key != "kernel_size"}
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer, weight = LAYERS["conv2d"], (5, 2, *geometry["kernel_size"])
    unfolded = F.unfold(x, **geometry).transpose(1, 2)
    count = layer.positions(x, weight, arguments)
    assert count == unfolded.shape[1]
    positions = torch.randperm(count)[: max(1, count // 2)].sort().values
    with patch.object(layers, "FEW", few):
        rows = layer.rows(x, weight, arguments, positions)
    assert torch.equal(rows, unfolded[:, positions].flatten(0, 1))


def test_rows_of_a_view_come_from_the_view() -> None:
    whole = torch.randn(4, 3, 6, 6)
    rows = LAYERS["conv2d"].rows(whole[1:3, 1:], (5, 2, 2, 2), {}, torch.arange(25))
    assert torch.equal(rows, F.unfold(whole[1:3, 1:].contiguous(), 2).transpose(1, 2).flatten(0, 1))


def product(rows: Tensor, matrix: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """What every group's rows make of every group's part of the matrix, one group after the other."""
    if bias is not None:
        matrix = torch.cat([matrix, bias[:, None]], dim=1)
    fed = with_ones(rows, groups, bias is not None)
    assert fed.shape[1] == groups * matrix.shape[1]
    parts = [x @ m.T for x, m in zip(fed.chunk(groups, 1), matrix.chunk(groups), strict=True)]
    return torch.cat(parts, dim=1)


CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(2, 5, 3), (2, 9)),
    "1d, everything": (nn.Conv1d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2), (4, 11)),
    "1d, same": (nn.Conv1d(2, 5, 4, padding="same", dilation=3), (2, 9)),
    "2d, strided": (nn.Conv2d(2, 5, (3, 2), stride=(1, 2)), (2, 7, 8)),
    "2d, dilated": (nn.Conv2d(2, 5, 3, dilation=(2, 1)), (2, 7, 8)),
    "2d, padded": (nn.Conv2d(2, 5, (1, 3), padding=(2, 1)), (2, 5, 4)),
    "2d, same": (nn.Conv2d(2, 5, (2, 3), padding="same"), (2, 7, 8)),
    "2d, valid": (nn.Conv2d(2, 5, (2, 3), padding="valid", stride=2), (2, 7, 8)),
    "2d, no bias": (nn.Conv2d(2, 5, 3, bias=False), (2, 7, 8)),
    "2d, grouped": (nn.Conv2d(6, 9, 3, groups=3, padding=1), (6, 5, 5)),
    "2d, grouped, no bias": (nn.Conv2d(6, 4, 2, groups=2, bias=False), (6, 5, 5)),
    "2d, depthwise": (nn.Conv2d(4, 4, 3, groups=4, stride=2), (4, 7, 8)),
    "2d, depthwise, twice the channels": (nn.Conv2d(4, 8, 3, groups=4, padding="same"), (4, 5, 5)),
    "3d": (nn.Conv3d(2, 3, (1, 2, 3), stride=(1, 2, 1), padding=(0, 1, 1)), (2, 4, 5, 4)),
    "3d, same": (nn.Conv3d(2, 3, 2, padding="same"), (2, 3, 4, 3)),
    "transposed 1d": (nn.ConvTranspose1d(2, 5, 3), (2, 7)),
    "transposed 1d, everything": (
        nn.ConvTranspose1d(2, 5, 3, stride=3, padding=1, output_padding=2, dilation=2),
        (2, 7),
    ),
    "transposed 2d, strided": (nn.ConvTranspose2d(2, 5, 2, stride=2), (2, 4, 3)),
    "transposed 2d, padded": (nn.ConvTranspose2d(2, 5, (3, 4), padding=(1, 2)), (2, 4, 5)),
    "transposed 2d, output padding": (
        nn.ConvTranspose2d(2, 5, 3, stride=2, padding=1, output_padding=(1, 0)),
        (2, 4, 5),
    ),
    "transposed 2d, dilated, no bias": (nn.ConvTranspose2d(2, 5, 3, dilation=(1, 2), bias=False), (2, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 3, 2, stride=(1, 2, 1), padding=(0, 1, 0)), (2, 2, 3, 3)),
}
LINEARS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "linear": (nn.Linear(4, 3), (4,)),
    "linear, no bias": (nn.Linear(4, 3, bias=False), (4,)),
    "linear on tokens": (nn.Linear(4, 3), (5, 4)),
    "linear on places": (nn.Linear(4, 3), (2, 5, 4)),
}


class AddMM(nn.Module):
    """A linear layer that holds its weights the other way round."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.bias = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Later(nn.Module):
    """A linear layer behind another module, so that it reads what is no input of the network."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.part(x)
        return out.mean(1)


MODULES = CONVOLUTIONS | LINEARS | {"addmm": (AddMM(), (4,)), "embedding": (Later(nn.Embedding(9, 4)), (5,))}


def draw(name: str) -> Tensor:
    shape = MODULES[name][1]
    return torch.randint(0, 9, (3, *shape)) if name == "embedding" else torch.randn(3, *shape)


@cache
def traced(name: str) -> Network:
    """A network of one layer, traced once for all tests."""
    return trace(MODULES[name][0], draw(name))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_rows_times_the_matrix_are_the_outputs(name: str) -> None:
    x, network = draw(name), traced(name)
    (node,) = network.graph.layers
    layer = node.layer
    state = {key: tensor.double() for key, tensor in network.state.items()}
    x = x if name == "embedding" else x.double()
    y = run_node(node, {node.source: x}, state, len(x))
    weight, bias = state[node.weight], None if node.bias is None else state[node.bias]
    matrix, kernel = layer.matrix(weight), tuple(weight.shape)
    count = layer.positions(x, kernel, node.arguments)
    assert layer.output_rows(y, torch.arange(count)).shape == (3 * count, matrix.shape[0])
    assert y.shape[layer.channel_axis(y.ndim)] == matrix.shape[0]
    for positions in (torch.arange(count), torch.randperm(count)[: max(1, count // 3)].sort().values):
        rows = layer.rows(x, kernel, node.arguments, positions).double()
        found = product(rows, matrix, bias, layer.conv_groups(node.arguments))
        torch.testing.assert_close(found, layer.output_rows(y, positions))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_a_matrix_and_back_is_the_identity(name: str) -> None:
    network = traced(name)
    (node,) = network.graph.layers
    weight = network.state[node.weight]
    matrix = node.layer.matrix(weight)
    assert torch.equal(node.layer.from_matrix(matrix, tuple(weight.shape)), weight)
    other = torch.randn_like(matrix)
    assert torch.equal(node.layer.matrix(node.layer.from_matrix(other, tuple(weight.shape))), other)


@pytest.mark.parametrize("kind", ["linear", "addmm", "conv2d", "conv_transpose2d.input", "embedding"])
def test_a_matrix_of_fewer_neurons_becomes_a_weight_of_fewer_neurons(kind: str) -> None:
    like: dict[str, tuple[int, ...]] = {"conv2d": (6, 4, 3, 2), "conv_transpose2d.input": (4, 6, 3, 2)}
    shape = like.get(kind, (6, 4) if kind == "linear" else (4, 6))
    layer = LAYERS[kind]
    matrix = layer.matrix(torch.randn(shape))
    fewer = layer.from_matrix(matrix[:2], shape)
    assert torch.equal(layer.matrix(fewer), matrix[:2])
    assert fewer.ndim == len(shape)
    dropper = layer.from_matrix(matrix[:, : matrix.shape[1] // 2], shape)
    assert torch.equal(layer.matrix(dropper), matrix[:, : matrix.shape[1] // 2])


def test_tokens_of_every_type_that_torch_reads_have_the_same_rows() -> None:
    layer, tokens = LAYERS["embedding"], torch.randint(0, 9, (3, 5))
    rows = layer.rows(tokens, (9, 4), {}, torch.arange(5))
    assert torch.equal(layer.rows(tokens.int(), (9, 4), {}, torch.arange(5)), rows)


def test_settings_as_one_number_are_those_of_every_axis() -> None:
    layer, x = LAYERS["conv2d"], torch.randn(2, 2, 9, 9)
    given: dict[str, Any] = {"stride": 2, "padding": [1], "dilation": 2}
    spelt: dict[str, Any] = {"stride": [2, 2], "padding": [1, 1], "dilation": [2, 2]}
    positions = torch.arange(layer.positions(x, (3, 2, 3, 3), spelt))
    assert layer.positions(x, (3, 2, 3, 3), given) == len(positions)
    rows = [layer.rows(x, (3, 2, 3, 3), arguments, positions) for arguments in (given, spelt)]
    assert torch.equal(*rows)


@pytest.mark.parametrize("groups", [1, 3])
def test_ones_are_put_behind_every_group(groups: int) -> None:
    rows = torch.randn(5, 6)
    assert with_ones(rows, groups, bias=False) is rows
    split = with_ones(rows, groups, bias=True).unflatten(1, (groups, -1))
    assert torch.equal(split[..., :-1], rows.unflatten(1, (groups, -1)))
    assert bool((split[..., -1] == 1).all())


def test_every_layer_is_tried() -> None:
    assert LAYERS.keys() <= {node.kind for name in MODULES for node in traced(name).graph.nodes}


def test_a_node_of_a_graph_finds_its_layer() -> None:
    node = Node("c", "conv3d", {"groups": 2})
    assert isinstance(node.layer, Convolution)
    assert node.layer.spatial == 3
    assert node.layer.conv_groups(node.arguments) == 2
