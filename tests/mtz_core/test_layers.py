"""Layers as matrices: rows against torch's own unfolding, and rows times matrix against the layer's own output."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from mtz_core.graph import trace
from mtz_core.layers import LAYERS, OPERATIONS, from_matrix, to_matrix, with_ones

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


@given(geometries, st.tuples(st.integers(1, 8), st.integers(1, 8)), st.booleans())
def test_patches_are_the_unfolded_input(
    geometry: dict[str, tuple[int, int]], size: tuple[int, int], channels_last: bool
) -> None:
    assume(fits(geometry, size))
    settings = {key: list(value) for key, value in geometry.items()}
    x = torch.randn(3, 2, *size, dtype=torch.float64)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    layer = LAYERS["conv2d"]
    unfolded = F.unfold(x, **geometry).transpose(1, 2)
    count = layer.positions(settings, x)
    assert count == unfolded.shape[1]
    positions = torch.randperm(count)[: max(1, count // 2)].sort().values
    rows = layer.rows(settings, x, positions)
    assert torch.equal(rows, unfolded[:, positions].flatten(0, 1))

    module = nn.Conv2d(2, 5, **geometry).double()  # type: ignore[arg-type]
    matrix = to_matrix(module.weight.detach(), module.bias.detach() if module.bias is not None else None)
    found = with_ones(rows, bias=True) @ matrix.T
    torch.testing.assert_close(found, layer.output_rows(module(x).detach(), positions))


def test_rows_of_a_view_come_from_the_view() -> None:
    whole = torch.randn(4, 3, 6, 6)
    settings = {"kernel_size": [2, 2], "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    positions = torch.arange(25)
    rows = LAYERS["conv2d"].rows(settings, whole[1:3, 1:], positions)
    assert torch.equal(rows, F.unfold(whole[1:3, 1:].contiguous(), 2).transpose(1, 2).flatten(0, 1))


@pytest.mark.parametrize("bias", [True, False])
def test_linear_rows_are_its_inputs(bias: bool) -> None:
    module = nn.Linear(4, 3, bias=bias)
    x, layer, positions = torch.randn(5, 4), LAYERS["linear"], torch.arange(1)
    matrix = to_matrix(module.weight.detach(), module.bias.detach() if bias else None)
    assert layer.positions({}, x) == 1
    rows = with_ones(layer.rows({}, x, positions), bias)
    torch.testing.assert_close(rows @ matrix.T, layer.output_rows(module(x).detach(), positions))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("module", [nn.Linear, nn.Conv2d])
def test_a_matrix_and_back_is_the_identity(module: Any, bias: bool) -> None:
    layer = module(4, 3, **({"kernel_size": (2, 3)} if module is nn.Conv2d else {}), bias=bias)
    kind = "conv2d" if module is nn.Conv2d else "linear"
    settings = {"kernel_size": [2, 3], "stride": [2, 1], "padding": [1, 0], "dilation": [1, 2]}
    matrix = to_matrix(layer.weight.detach(), layer.bias.detach() if bias else None)
    weight, again = from_matrix(matrix, bias)
    shape = LAYERS[kind].weight_shape(settings, weight.shape[1])
    assert torch.equal(weight.reshape(-1, *shape), layer.weight)
    assert (again is None) if not bias else torch.equal(again, layer.bias)  # type: ignore[arg-type]
    x = torch.randn(2, 4, 9, 9) if kind == "conv2d" else torch.randn(2, 4)
    rebuilt = LAYERS[kind].module(settings, weight.reshape(-1, *shape), again)
    assert torch.equal(rebuilt(x), LAYERS[kind].run(settings, x, weight.reshape(-1, *shape), again))


MODULES: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "leaky_relu": nn.LeakyReLU(0.3),
    "elu": nn.ELU(0.7),
    "celu": nn.CELU(0.6),
    "selu": nn.SELU(inplace=True),
    "gelu": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "sigmoid": nn.Sigmoid(),
    "tanh": nn.Tanh(),
    "softplus": nn.Softplus(beta=2, threshold=5),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardshrink": nn.Hardshrink(0.3),
    "softshrink": nn.Softshrink(0.2),
    "log_sigmoid": nn.LogSigmoid(),
    "relu6": nn.ReLU6(),
    "max_pool2d": nn.MaxPool2d((2, 3), stride=(1, 2), padding=1, dilation=(2, 1), ceil_mode=True),
    "avg_pool2d": nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=5),
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d((2, None)),
    "dropout": nn.Dropout(0.3),
    "feature_dropout": nn.Dropout2d(0.3),
    "alpha_dropout": nn.AlphaDropout(0.3),
    "flatten": nn.Flatten(),
    "softmax": nn.Softmax(dim=1),
    "log_softmax": nn.LogSoftmax(dim=1),
}


def test_every_known_operation_is_tried() -> None:
    assert MODULES.keys() == OPERATIONS.keys()


@pytest.mark.parametrize("kind", MODULES)
def test_a_traced_operation_does_what_its_module_does(kind: str) -> None:
    network = nn.Sequential(nn.Conv2d(2, 3, 2), MODULES[kind])
    x = 2 * torch.randn(4, 2, 8, 9)
    graph = trace(network, x).graph
    step = graph.nodes[1]
    value = network[0](x).detach()
    for training in (False, True):
        network.train(training)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            expected = MODULES[kind](value.clone())
            torch.manual_seed(3)
            assert torch.equal(OPERATIONS[step.kind].run(step.kind, step.settings, value.clone(), training), expected)


@given(st.lists(st.floats(-3, 3), min_size=1, max_size=8), st.integers(0, 99))
def test_the_nearest_target_is_the_nearest_value_that_the_operation_cannot_tell_apart(
    values: list[float], seed: int
) -> None:
    y = torch.tensor(values, dtype=torch.float64)
    present = 2 * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    target = OPERATIONS["relu"].nearest_target(y, present)
    assert torch.equal(target.relu(), y.relu())
    for t, p, value in zip(target.tolist(), present.tolist(), values, strict=True):
        assert t == (value if value > 0 else min(p, 0.0))


@pytest.mark.parametrize("kind", OPERATIONS)
def test_operations_clip_only_below_their_floor(kind: str) -> None:
    operation = OPERATIONS[kind]
    y, present = torch.randn(5, 4), torch.randn(5, 4)
    assert operation.clips == (kind == "relu")
    if not operation.clips:
        assert torch.equal(operation.nearest_target(y, present), y)
