"""Calibration data and the rows that layers are fed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import ZipConfig
from mtz_core.batches import concatenated, tensors_of
from mtz_core.errors import InvalidCalibration
from mtz_core.network.graph import INPUT, Network, Node, run_node
from mtz_core.network.tracing import trace
from mtz_core.statistics import calibration
from mtz_core.statistics.calibration import (
    BATCH,
    FEWEST,
    as_batches,
    cut,
    layer_rows,
    original_moments,
    sample_positions,
    sampled_outputs,
    stream_rows,
)
from tests.support.networks import CASES, Case, lenet5, mlp

LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10))


CONV, KERNEL = Node("conv", "conv2d", {"stride": [1, 1]}), (5, 1, 3, 3)


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
        (torch.zeros(4, 3, dtype=torch.bool), r"'digits' have dtype torch\.bool"),
        (torch.zeros(4, 3, dtype=torch.complex64), r"'digits' have dtype torch\.complex64"),
        (
            [torch.zeros(4, 3), torch.zeros(4, 2)],
            r"'digits' mix examples of shape \[3\] and \[2\].*a dict by",
        ),
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
        [(torch.zeros(4, 3), torch.zeros(4), torch.zeros(4))],
        [torch.zeros(4, 3).numpy()],
        torch.zeros(4, 3).numpy(),
        torch.tensor(1.0),
        5,
    ],
    ids=["triples", "batches of numpy", "numpy", "scalar", "number"],
)
def test_data_that_are_not_tensors_are_refused(data: list[Tensor]) -> None:
    with pytest.raises(InvalidCalibration, match="'digits'"):
        as_batches(data, "digits")


@pytest.mark.parametrize("other", [torch.float64, torch.int64])
def test_data_of_two_dtypes_are_refused(other: torch.dtype) -> None:
    with pytest.raises(InvalidCalibration, match=r"'digits'.*one dtype"):
        as_batches([torch.zeros(4, 3), torch.zeros(4, 3, dtype=other)], "digits")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_are_data(dtype: torch.dtype) -> None:
    (batch,) = as_batches(torch.ones(4, 3, dtype=dtype), "digits")
    assert batch.dtype == dtype


def test_positions_are_a_seeded_sample() -> None:
    x = torch.randn(2, 1, 12, 12)
    sample = sample_positions(CONV, KERNEL, x, ZipConfig(patches=30))
    assert len(set(sample.tolist())) == 30
    assert sample.tolist() == sorted(sample.tolist())
    assert int(sample.min()) >= 0
    assert int(sample.max()) < 100
    assert torch.equal(sample, sample_positions(CONV, KERNEL, x, ZipConfig(patches=30)))
    assert not torch.equal(sample, sample_positions(CONV, KERNEL, x, ZipConfig(patches=30, seed=1)))
    assert sample_positions(CONV, KERNEL, x, ZipConfig(patches=100)).tolist() == list(range(100))
    assert sample_positions(CONV, KERNEL, x, ZipConfig(patches=1000)).tolist() == list(range(100))


def test_a_neuron_of_few_inputs_takes_few_positions() -> None:
    x, grouped = torch.randn(2, 6, 12, 12), Node("conv", "conv2d", {"stride": [1, 1], "groups": 6})
    assert len(sample_positions(grouped, (6, 1, 3, 3), x, ZipConfig(patches=64))) == 9
    assert len(sample_positions(grouped, (6, 1, 1, 1), x, ZipConfig(patches=64))) == FEWEST
    assert len(sample_positions(grouped, (6, 1, 3, 3), x, ZipConfig(patches=4))) == 4


def test_batches_with_large_values_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    data = LENET5.examples(7)
    network = trace(LENET5.network(1), data)
    assert [len(batch) for batch in cut(network, [data[:5], data[5:]])] == [5, 2]
    largest = 4 * 16 * 16 * 4  # four channels of 16 × 16 in float32
    for room, sizes in ((2 * largest, [2, 2, 1, 2]), (1, [1] * 7)):
        monkeypatch.setattr(calibration, "IN_CACHE", room)
        batches = cut(network, [data[:5], data[5:]])
        assert [len(batch) for batch in batches] == sizes
        assert torch.equal(tensors_of(concatenated(batches))[""], data)


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


class Sizes(nn.Module):
    """A grouped convolution, a transposed one, tokens of positions: every way in which rows come about."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, stride=2)
        self.wider = nn.ConvTranspose2d(6, 3, 2, stride=2, bias=False)
        self.tokens = nn.Linear(3, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.wider(self.grouped(self.first(x)).relu()).flatten(2).transpose(1, 2)
        out: Tensor = self.head(self.tokens(x).mean(1))
        return out


def outputs_of_rows(network: Network, node: Node, rows: Tensor) -> Tensor:
    """Every group's rows times its part of the layer's matrix."""
    groups = node.layer.conv_groups(node.arguments)
    parts = zip(rows.chunk(groups, 1), network.matrix(node).chunk(groups), strict=True)
    return torch.cat([x @ m.T for x, m in parts], 1)


def test_rows_meet_the_matrix_of_every_kind_of_layer() -> None:
    module, data = Sizes(), torch.randn(4, 2, 9, 9)
    network = trace(module, data)
    outputs: dict[str, Tensor] = {}
    for name, part in module.named_children():
        part.register_forward_hook(lambda part, x, y, name=name: outputs.update({name: y.detach()}))
    module(data)
    (rows,) = stream_rows(network, [data], ZipConfig(patches=10_000))
    for node in network.graph.layers:
        y = outputs[node.name]
        count = y.flatten(2).shape[2] if "conv" in node.kind else y[0].numel() // y.shape[-1]
        found = outputs_of_rows(network, node, rows[node.name])
        torch.testing.assert_close(found, node.layer.output_rows(y, torch.arange(count)))
    sampled = {name: len(part) for name, part in next(stream_rows(network, [data], ZipConfig(patches=7))).items()}
    assert sampled == {"first": 28, "grouped": 28, "wider": 28, "tokens": 28, "head": 4}
    moments = original_moments(network, [data], ZipConfig(patches=10_000))
    assert [(m.inputs, m.conv_groups) for m in moments.values()] == [(19, 1), (19, 2), (24, 1), (4, 1), (6, 1)]
    gram = moments["grouped"].gram
    assert gram is not None
    for group, mine in zip(gram, rows["grouped"].chunk(2, 1), strict=True):
        torch.testing.assert_close(group, (mine.T @ mine).double(), rtol=1e-5, atol=1e-3)


def test_tokens_are_one_hot_rows() -> None:
    module = nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    tokens = torch.tensor([[0, 6, 2], [3, 3, 3]])
    network = trace(module, tokens)
    (rows,) = stream_rows(network, [tokens], ZipConfig())
    assert torch.equal(rows["0"], torch.eye(7, dtype=torch.float64)[tokens.flatten()])
    assert rows["2"].dtype == torch.float64
    embedding, _ = network.graph.layers
    assert torch.equal(layer_rows(embedding, (7, 4), tokens, torch.tensor([1])).argmax(1), tokens[:, 1])


def test_activations_that_are_not_finite_name_the_layer() -> None:
    module = mlp((9, 7), 3)
    with torch.no_grad():
        module.get_parameter("2.weight").mul_(1e38)
    network = trace(module, torch.randn(2, 12))
    with pytest.raises(InvalidCalibration, match="layer '2' puts out NaN or infinite"):
        original_moments(network, [1e3 * torch.randn(5, 12)], ZipConfig())


def test_values_whose_squares_are_not_finite_name_the_layer() -> None:
    network = trace(mlp((9, 7), 3), torch.randn(2, 12))
    with pytest.raises(InvalidCalibration, match="layer '0' reads values that are too large to be squared"):
        original_moments(network, [1e20 * torch.randn(20, 12)], ZipConfig())


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


def test_sampled_outputs_are_what_layers_put_out_at_the_sampled_positions() -> None:
    module, data, config = LENET5.network(1), LENET5.examples(7), ZipConfig(patches=9)
    network = trace(module, data)
    put_out: dict[str, Tensor] = {}
    for name, part in module.named_modules():
        if isinstance(part, (nn.Conv2d, nn.Linear)):
            part.register_forward_hook(lambda part, x, y, name=name: put_out.update({name: y}))
    module(data)
    found = sampled_outputs(network, [data[:4], data[4:]], config)
    assert found.keys() == put_out.keys()
    values: dict[str, Tensor] = {INPUT: data}
    for node in network.graph.nodes:
        if node.is_layer:
            sample = sample_positions(node, tuple(network.state[node.weight].shape), values[node.source], config)
            expected = node.layer.output_rows(put_out[node.name], sample)
            torch.testing.assert_close(torch.cat(found[node.name]), expected)
        values[node.name] = run_node(node, values, network.state, len(data))


def test_finite_outputs_whose_sum_is_not_are_taken() -> None:
    network = trace(nn.Linear(1, 2, bias=False).requires_grad_(False).double(), torch.ones(2, 1, dtype=torch.float64))
    network.state["weight"].fill_(1.7e308)
    (moments,) = original_moments(network, [torch.ones(2, 1, dtype=torch.float64)], ZipConfig()).values()
    assert moments.count == 2
