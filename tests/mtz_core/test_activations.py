"""Calibration data and the rows that layers are fed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import ZipConfig
from mtz_core.activations import BATCH, as_batches, original_moments, sample_positions, stream_rows
from mtz_core.errors import InvalidCalibration
from mtz_core.graph import Node, trace
from tests.mtz_core.networks import CASES, Case, lenet5, mlp

LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10))


def conv(kernel: int = 3) -> Node:
    settings = {"kernel_size": [kernel] * 2, "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1]}
    return Node("conv", "conv2d", "input", settings)


def test_a_tensor_is_cut_into_batches_and_batches_are_kept() -> None:
    data = torch.randn(2 * BATCH + 1, 3)
    assert [len(batch) for batch in as_batches(data, "a")] == [BATCH, BATCH, 1]
    assert torch.equal(torch.cat(as_batches(data, "a")), data)
    parts = as_batches(iter([data[:3], data[3:3], data[3:8]]), "a")
    assert [len(part) for part in parts] == [3, 5]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.zeros(0, 3), "'digits' are empty.*at least one"),
        ([], "'digits' are empty"),
        ([torch.zeros(0, 3)], "'digits' are empty"),
        (torch.zeros(4, 3, dtype=torch.uint8), r"'digits' have dtype torch\.uint8.*floating-point"),
        (torch.zeros(4, 3, dtype=torch.int64), r"'digits' have dtype torch\.int64"),
        ([torch.zeros(4, 3), torch.zeros(4, 2)], r"'digits' mix examples of shape \[3\] and \[2\]"),
        (torch.tensor([[1.0, float("nan")]]), "'digits' have NaN or infinite"),
        ([torch.zeros(4, 3), torch.full((4, 3), float("inf"))], "'digits' have NaN or infinite"),
    ],
)
def test_data_that_cannot_calibrate_are_refused(data: Tensor | list[Tensor], message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        as_batches(data, "digits")


@pytest.mark.parametrize(
    "data",
    [
        [(torch.zeros(4, 3), torch.zeros(4))],
        [torch.zeros(4, 3).numpy()],
        torch.zeros(4, 3).numpy(),
        torch.tensor(1.0),
        5,
    ],
    ids=["images and labels", "batches of numpy", "numpy", "scalar", "number"],
)
def test_data_that_are_not_tensors_are_refused(data: list[Tensor]) -> None:
    with pytest.raises(InvalidCalibration, match="'digits'"):
        as_batches(data, "digits")


def test_data_of_two_dtypes_are_refused() -> None:
    with pytest.raises(InvalidCalibration, match=r"'digits'.*float"):
        as_batches([torch.zeros(4, 3), torch.zeros(4, 3, dtype=torch.float64)], "digits")


def test_positions_are_a_seeded_sample() -> None:
    x = torch.randn(2, 1, 12, 12)
    sample = sample_positions(conv(), x, ZipConfig(patches=30))
    assert len(set(sample.tolist())) == 30
    assert sample.tolist() == sorted(sample.tolist())
    assert int(sample.min()) >= 0
    assert int(sample.max()) < 100
    assert torch.equal(sample, sample_positions(conv(), x, ZipConfig(patches=30)))
    assert not torch.equal(sample, sample_positions(conv(), x, ZipConfig(patches=30, seed=1)))
    assert sample_positions(conv(), x, ZipConfig(patches=100)).tolist() == list(range(100))
    assert sample_positions(conv(), x, ZipConfig(patches=1000)).tolist() == list(range(100))


def test_streamed_rows_are_what_every_layer_reads() -> None:
    module, data = LENET5.network(1), LENET5.examples(7)
    network = trace(module, data)
    read: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.register_forward_hook(lambda part, x, y, name=name: read.update({name: x[0]}))
    module(data)
    batches = list(stream_rows(network, [data[:4], data[4:]], ZipConfig(patches=10_000)))
    for name, x in read.items():
        rows = torch.cat([batch[name] for batch in batches])
        expected = F.unfold(x, 5).transpose(1, 2).flatten(0, 1) if x.dim() == 4 else x
        torch.testing.assert_close(rows[:, :-1], expected)
        assert bool((rows[:, -1] == 1).all())


def test_a_convolution_contributes_the_sampled_patches_of_every_example() -> None:
    network = trace(LENET5.network(1), LENET5.examples(1))
    (rows,) = stream_rows(network, [LENET5.examples(7)], ZipConfig(patches=9))
    assert {name: len(values) for name, values in rows.items()} == {"0": 63, "3": 63, "7": 7, "9": 7}


def test_activations_that_are_not_finite_name_the_layer() -> None:
    module = mlp((9, 7), 3)
    with torch.no_grad():
        module.get_parameter("2.weight").mul_(1e38)
    network = trace(module, torch.randn(2, 12))
    with pytest.raises(InvalidCalibration, match="layer '2' puts out NaN or infinite"):
        original_moments(network, [1e3 * torch.randn(5, 12)], ZipConfig())


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_moments_ignore_how_calibration_data_are_split(case: Case) -> None:
    module = case.network(1).double()
    data = case.examples(30).double()
    network = trace(module, data)
    whole = original_moments(network, [data], ZipConfig(patches=5))
    split = original_moments(network, list(torch.split(data, 7)), ZipConfig(patches=5))
    for name, moments in whole.items():
        torch.testing.assert_close(moments.hessian(0.01).dense(), split[name].hessian(0.01).dense())


def test_collecting_changes_neither_network_nor_data() -> None:
    module = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 2))
    data = torch.randn(5, 4)
    state, before = copy.deepcopy(module.state_dict()), data.clone()
    network = trace(module, data)
    original_moments(network, [data], ZipConfig())
    assert torch.equal(data, before)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
