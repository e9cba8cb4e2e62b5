"""Operators between layers: each runs as its module does, ties the neurons that it must, and no others."""

from collections.abc import Callable
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import Budget, ZipConfig, load, register_operation, zip_networks
from mtz_core.errors import InvalidZippedFile, UnsupportedModule, ZipWarning
from mtz_core.network.graph import FIXED, GETITEM, Node, operator, run, run_node
from mtz_core.network.narrowing import Dropper
from mtz_core.network.operations import (
    OPERATIONS,
    NotUnderstood,
    Operation,
    Value,
    movement,
    operation_of,
    pointwise,
    reduction,
    window,
)
from mtz_core.network.ties import Ties
from mtz_core.network.tracing import trace
from tests.support.written import Apply

Function = Callable[[Tensor], Tensor]


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
    "hardtanh": nn.ReLU6(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardshrink": nn.Hardshrink(0.3),
    "softshrink": nn.Softshrink(0.2),
    "log_sigmoid": nn.LogSigmoid(),
    "threshold": nn.Threshold(0.1, -2.0),
    "max_pool2d": nn.MaxPool2d((2, 3), stride=(1, 2), padding=1, dilation=(2, 1), ceil_mode=True),
    "avg_pool2d": nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False, divisor_override=5),
    "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d((2, None)),
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d(3),
    "dropout": nn.Dropout(0.3),
    "feature_dropout": nn.Dropout2d(0.3),
    "alpha_dropout": nn.AlphaDropout(0.3),
    "feature_alpha_dropout": nn.FeatureAlphaDropout(0.3),
    "flatten": nn.Flatten(),
    "softmax": nn.Softmax(dim=1),
    "log_softmax": nn.LogSoftmax(dim=1),
    "pixel_shuffle": nn.PixelShuffle(2),
    "pixel_unshuffle": nn.PixelUnshuffle(2),
    "channel_shuffle": nn.ChannelShuffle(2),
}


class Abreast(nn.Module):
    """All of `MODULES` on copies of the same channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, (1, 2))
        self.parts = nn.ModuleDict({f"its {kind}": part for kind, part in MODULES.items()})

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return torch.cat([part(x.clone()).flatten(1) for part in self.parts.values()], dim=1)


@cache
def steps() -> dict[str, Node]:
    """The operator of each of `MODULES`, all traced at once."""
    nodes = trace(Abreast(), torch.randn(4, 2, 8, 9)).graph.nodes
    parts = {node.module: node for node in nodes if node.kind != GETITEM}
    return {kind: parts[f"parts.its {kind}"] for kind in MODULES}


@pytest.mark.parametrize("kind", MODULES)
def test_a_traced_operator_does_what_its_module_does(kind: str) -> None:
    step, module = steps()[kind], MODULES[kind]
    assert step.kind.partition(".")[0] == kind
    value = 2 * torch.randn(4, 4, 8, 8)
    for training in (False, True):
        module.train(training)
        with torch.random.fork_rng():
            torch.manual_seed(3)
            expected = module(value.clone())
            torch.manual_seed(3)
            found = run_node(step, {step.sources[0]: value.clone()}, {}, 4, training)
            assert torch.equal(found[0] if isinstance(found, tuple) else found, expected)


VECTORS: dict[str, tuple[Function, int]] = {
    # between six neurons and their reader, and how many neurons are left to be permuted as one
    "pointwise": (lambda x: F.tanhshrink(F.softsign((2 ** (x**2 / 9)).clamp(min=0.1))).double().float(), 6),
    "chosen": (lambda x: torch.where(x > 0, x, -x / 2).masked_fill(x < -1, 0.5), 6),
    "arithmetic": (lambda x: torch.addcmul(torch.lerp(x, x.relu(), 0.3), x, 1 / (x.abs() + 1), value=0.5), 6),
    "normalised": (lambda x: F.normalize(x, dim=1), 6),
    "standardised": (lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True), 6),
    "without the mean of the batch": (lambda x: x - x.mean(0), 6),
    "soft maximum": (lambda x: x - x.logsumexp(1, keepdim=True), 6),
    "times the sum of all": (lambda x: x * x.sum(), 6),
    "softmax": (lambda x: x.softmax(1), 6),
    "layer norm": (nn.LayerNorm(6), 6),
    "layer norm without parameters": (nn.LayerNorm(6, elementwise_affine=False), 6),
    "root mean square": (nn.RMSNorm(6), 6),
    "batch norm": (nn.BatchNorm1d(6), 6),
    "batch norm without parameters": (nn.BatchNorm1d(6, affine=False), 6),
    "group norm": (nn.GroupNorm(3, 6), 6),
    "prelu": (nn.PReLU(6), 6),
    "turned": (lambda x: x.flip(1).roll(2, 1), 6),
    "picked": (lambda x: x[:, [5, 4, 3, 2, 1, 0]], 6),
    "selected": (lambda x: x.index_select(1, torch.arange(6)), 6),
    "gathered": (lambda x: x.gather(1, torch.arange(6).expand(len(x), -1)), 6),
    "stacked": (lambda x: torch.stack([x, x.relu()], 2).mean(2), 6),
    "squared length": (lambda x: (x[:, None, :] @ x[:, :, None])[:, :, 0] * x, 6),
    "outer and back": (lambda x: (x[:, :, None] * torch.ones(3)).mean(2), 6),
    "maximum": (lambda x: x - x.max(1, keepdim=True).values, 6),
    "larger of two, rounded down": (lambda x: torch.max(x, 0.5 * x) // 0.5, 6),
    "gated linear unit": (lambda x: torch.cat([F.glu(x, 1)] * 2, 1), 3),
    "gated": (lambda x: torch.cat([F.silu(x[:, :3]) * x[:, 3:]] * 2, 1), 3),
    "largest of two": (lambda x: x.unflatten(1, (3, 2)).amax(2).repeat(1, 2), 3),
    "one of all": (lambda x: x.mean(1, keepdim=True).expand(-1, 6), 6),
    "pairs of one another": (lambda x: x + x.roll(3, 1), 3),
    "neighbours": (lambda x: x + x.roll(1, 1), 1),
}


def padded(x: Tensor) -> Tensor:
    for mode in ("reflect", "replicate", "circular", "constant"):
        x = F.pad(x, (1, 0, 2, 1), mode=mode)
    return x


def turned() -> nn.Module:
    """Exchanges channels and rows."""
    return Apply(lambda x: x.transpose(1, 2))


IMAGES: dict[str, tuple[Function, int]] = {
    "nearest": (lambda x: F.interpolate(x, scale_factor=2.0), 6),
    "bilinear": (lambda x: F.interpolate(x, size=(9, 5), mode="bilinear"), 6),
    "bicubic": (lambda x: F.interpolate(x, size=(9, 5), mode="bicubic"), 6),
    "bilinear, antialiased": (lambda x: F.interpolate(x, size=(3, 5), mode="bilinear", antialias=True), 6),
    "bicubic, antialiased": (lambda x: F.interpolate(x, size=(3, 5), mode="bicubic", antialias=True), 6),
    "windows in space": (lambda x: x.unfold(2, 3, 1).unfold(3, 2, 2).mean(dim=(4, 5)), 6),
    "windows over channels": (lambda x: x.unfold(1, 3, 3).movedim(4, 2).flatten(1, 2), 6),
    "patches": (lambda x: F.unfold(x, 3, padding=1, stride=2).unflatten(1, (6, 9)).amax(2)[..., None], 6),
    "patches added up": (lambda x: F.fold(F.unfold(x, 3, padding=1).relu(), (4, 4), 3, padding=1), 6),
    "weighed patches": (lambda x: F.fold(F.unfold(x, 2) * torch.arange(24)[:, None], (4, 4), 2), 6),
    "area": (lambda x: F.interpolate(x, size=(2, 2), mode="area"), 6),
    "nearest in three dimensions": (lambda x: F.interpolate(x[:, :, None], scale_factor=2.0).mean(2), 6),
    "padded": (padded, 6),
    "zero channels": (lambda x: F.pad(x, (0, 0, 0, 0, 2, 1))[:, 2:8], 6),
    "cut": (lambda x: x[..., ::2, 1:], 6),
    "tiled": (lambda x: x.tile(1, 1, 2, 1), 6),
    "power pooling": (lambda x: F.lp_pool2d(x, 2, 2), 6),
    "pooled in three dimensions": (lambda x: F.avg_pool3d(x[:, :, None], (1, 2, 2))[:, :, 0], 6),
    "squeezed and excited": (lambda x: x * x.mean((2, 3)).sigmoid()[:, :, None, None], 6),
    "attended in space": (lambda x: x * x.mean(1, keepdim=True).sigmoid(), 6),
    "softmax in space": (lambda x: x.flatten(2).softmax(2).view_as(x), 6),
    "instance norm": (nn.InstanceNorm2d(6, affine=True), 6),
    "instance norm without parameters": (nn.InstanceNorm2d(6), 6),
    "group norm": (nn.GroupNorm(2, 6), 6),
    "layer norm in space": (nn.LayerNorm((4, 4)), 6),
    "layer norm of columns": (nn.LayerNorm(4), 6),
    "batch norm of rows": (nn.Sequential(turned(), nn.BatchNorm2d(4), turned()), 6),
    "instance norm of rows": (nn.Sequential(turned(), nn.InstanceNorm2d(4, affine=True), turned()), 6),
    "group norm of rows": (nn.Sequential(turned(), nn.GroupNorm(2, 4), turned()), 6),
    "channels last": (lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2), 6),
    "shuffled": (lambda x: F.channel_shuffle(x, 3), 6),
    "pixels": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(torch.cat([x, x], 1), 2), 2)[:, :6], 6),
}


class Positioned(nn.Module):
    """Adds a table of positions, resampled to the size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 3, 1)
        self.table = nn.Parameter(torch.randn(1, 9, 9, 6))

    def forward(self, x: Tensor) -> Tensor:
        table = F.interpolate(self.table.permute(0, 3, 1, 2), size=x.shape[2:], mode="bicubic", antialias=True)
        outputs: Tensor = self.second(torch.relu(self.first(x) + table)).mean((2, 3))
        return outputs


def test_a_table_of_positions_may_be_resampled() -> None:
    module = Positioned()
    network = trace(module, torch.randn(3, 2, 6, 6))
    assert network.graph.hidden_widths == {"first": 6}
    x = torch.randn(5, 2, 6, 6)
    torch.testing.assert_close(run(network.graph, network.state, x), module(x))
    assert Dropper(network).droppable(x) == ("first",)


@pytest.mark.slow
@pytest.mark.parametrize("name", VECTORS)
def test_neurons_behind_an_operator(name: str) -> None:
    function, width = VECTORS[name]
    between = function if isinstance(function, nn.Module) else Apply(function)
    follow(nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3)), (4,), width)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGES)
def test_channels_behind_an_operator(name: str) -> None:
    function, width = IMAGES[name]
    between = function if isinstance(function, nn.Module) else Apply(function)
    follow(nn.Sequential(nn.Conv2d(2, 6, 3), between, nn.Conv2d(6, 3, 1)), (2, 6, 6), width)


def follow(module: nn.Module, shape: tuple[int, ...], width: int) -> None:
    """The operator is run as it is, and the first layer's neurons form groups of this many units."""
    network = trace(module, torch.randn(3, *shape))
    x = torch.randn(5, *shape)
    module.eval()
    torch.testing.assert_close(run(network.graph, network.state, x), module(x))
    assert sum(network.graph.widths[name] for name in network.graph.rows["0"].groups) == width


NOT_UNDERSTOOD: dict[str, tuple[Function, str]] = {
    "by a vector": (lambda x: x.unflatten(1, (2, 3)).matmul(torch.ones(3)).repeat(1, 3), "multiplies by a vector"),
}


@pytest.mark.parametrize("name", NOT_UNDERSTOOD)
def test_what_no_rule_covers_is_refused(name: str) -> None:
    function, reason = NOT_UNDERSTOOD[name]
    with pytest.raises(UnsupportedModule, match=rf"'1'.*{reason}.*register_operation.*keep_separate"):
        trace(nn.Sequential(nn.Linear(4, 6), Apply(function), nn.Linear(6, 3)), torch.randn(3, 4))


def test_products_of_every_neuron_with_every_other_stay_separate_by_themselves() -> None:
    products = Apply(lambda x: (x[:, :, None] @ x[:, None, :]).flatten(1))
    module = nn.Sequential(nn.Linear(4, 6), products, nn.Linear(36, 5), nn.ReLU(), nn.Linear(5, 3))
    network = trace(module, torch.randn(3, 4))
    assert [layer.name for layer in network.graph.layers] == ["0", "2", "4"]
    assert set(network.graph.columns["2"].group) == {FIXED}
    x = torch.randn(5, 4)
    torch.testing.assert_close(run(network.graph, network.state, x), module(x))
    assert Dropper(network).droppable(x) == ("2",)


class Sliding(nn.Module):
    """Runs a convolution whose spatial axes are not only those of an image but that of the channels, too."""

    def __init__(self, convolution: nn.Module, padding: int = 0) -> None:
        super().__init__()
        self.convolution, self.padding = convolution, padding

    def forward(self, x: Tensor) -> Tensor:
        """Gate every channel by what its neighbours' means are, as efficient channel attention does."""
        means = F.pad(x.mean((2, 3))[:, None], (self.padding, self.padding), mode="circular")
        return x * self.convolution(means)[:, 0, :, None, None].sigmoid()


class Convolved(Sliding):
    """Convolves images over rows and channels alike."""

    def forward(self, x: Tensor) -> Tensor:
        convolved: Tensor = self.convolution(x.permute(0, 3, 2, 1).flatten(1, 2)[:, None])[:, 0]
        return convolved.unflatten(1, (4, 4)).permute(0, 3, 2, 1)


BY_PLACE: dict[str, nn.Module] = {
    "efficient channel attention": Sliding(nn.Conv1d(1, 1, 3, padding=1, bias=False)),
    "channels in a circle": Sliding(nn.Conv1d(1, 1, 5), padding=2),
    "a kernel with gaps": Sliding(nn.Conv1d(1, 1, 3, padding="same", dilation=2)),
    "a transposed kernel": Sliding(nn.ConvTranspose1d(1, 1, 3, padding=1)),
    "shifted by padding": Sliding(nn.Conv1d(1, 1, 1, padding=1), padding=-1),
    "rows and channels": Convolved(nn.Conv2d(1, 1, (1, 3), padding=(0, 1))),
    "local response norm": nn.LocalResponseNorm(3),
    "neighbours' mean": Apply(lambda x: F.avg_pool1d(x.mean((2, 3))[:, None], 3, 1, 1)[:, 0, :, None, None] * x),
}


@pytest.mark.parametrize("name", BY_PLACE)
def test_what_mixes_neurons_by_their_places_stays_separate_by_itself(name: str) -> None:
    module = nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), BY_PLACE[name], nn.Conv2d(6, 3, 1)).eval()
    network = trace(module, torch.randn(3, 2, 6, 6))
    assert network.graph.hidden_widths["0"] == 6
    x = torch.randn(5, 2, 6, 6)
    torch.testing.assert_close(run(network.graph, network.state, x), module(x))
    assert "0" not in Dropper(network).droppable(x)


def test_a_kernel_that_leaves_neurons_where_they_are_mixes_none() -> None:
    module = nn.Sequential(nn.Conv2d(2, 6, 3), Convolved(nn.Conv2d(1, 1, (3, 1), padding=(1, 0))), nn.Conv2d(6, 3, 1))
    x = torch.randn(5, 2, 6, 6)
    network = trace(module, x)
    assert Dropper(network).droppable(x) == ("0",)


def test_the_report_says_which_layers_mix_neurons_or_positions() -> None:
    def network() -> nn.Module:
        attention = Sliding(nn.Conv1d(1, 1, 3, padding=1))
        positions = Apply(lambda x: x.flatten(2)), nn.Linear(16, 16), nn.ReLU(), Apply(lambda x: x.mean(2))
        return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), attention, *positions, nn.Linear(6, 3)).eval()

    networks = {"a": network(), "b": network()}
    data = {task: torch.randn(40, 2, 6, 6, generator=torch.Generator().manual_seed(i)) for i, task in enumerate("ab")}
    with pytest.warns(ZipWarning, match=r"'2\.convolution' and 1 more stay separate: its kernel runs over neurons"):
        zipped = zip_networks(networks, data)
    assert {layer.layer: (layer.shared, layer.note) for layer in zipped.report.layers} == {
        "0": (6, ""),
        "2.convolution": (0, "its kernel runs over neurons, which stay in their places"),
        "4": (0, "it mixes positions, alike for every neuron"),
        "7": (0, ""),
    }
    separate = zip_networks(networks, data, ZipConfig(share=0.0))
    for task, module in networks.items():
        assert torch.equal(separate(data[task], task=task), module(data[task]))
        torch.testing.assert_close(zipped.network(task)(data[task]), zipped(data[task], task=task))


class ChannelAttention(nn.Module):
    """El-Nouby et al., XCiT: channels attend to the channels of their head, over normalised positions."""

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(size, 3 * size)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.out = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, size = x.shape
        packed = self.qkv(x).reshape(batch, length, 3, self.heads, size // self.heads).permute(2, 0, 3, 4, 1)
        queries, keys, values = F.normalize(packed[0], dim=-1), F.normalize(packed[1], dim=-1), packed[2]
        weights = (queries @ keys.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        out: Tensor = self.out((weights @ values).permute(0, 3, 1, 2).reshape(batch, length, size))
        return out


class ChannelMixer(nn.Module):
    """Channel attention and a perceptron in a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Linear(4, 8), ChannelAttention(8, 2), nn.Linear(8, 3)
        self.mlp = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.attention(x)
        out: Tensor = self.head((x + self.mlp(x)).mean(1))
        return out


@pytest.mark.slow
def test_channel_attention_is_kept_separate_by_itself() -> None:
    networks, x = {"a": ChannelMixer(), "b": ChannelMixer()}, torch.randn(60, 5, 4)
    for config in (ZipConfig(share=0.0), ZipConfig(share=1.0), ZipConfig(budget=Budget(size=0.7))):
        zipped = zip_networks(networks, dict.fromkeys(networks, x), config)
        for task, module in networks.items():
            torch.testing.assert_close(zipped.network(task)(x), zipped(x, task))
            if config.share == 0.0:
                torch.testing.assert_close(zipped(x, task), module(x))
    assert zipped.report.stored_fraction <= 0.7


def test_operators_are_those_of_aten() -> None:
    known = {name for name in OPERATIONS if hasattr(torch.ops.aten, name.partition(".")[0])}
    assert OPERATIONS.keys() - known <= {"float"}


def test_only_a_relu_clips() -> None:
    clipping = {kind: operation.floor for kind, operation in OPERATIONS.items() if operation.clips}
    assert clipping == {"relu": 0.0}
    below = -torch.rand(5, 4)
    assert torch.equal(operator("relu")(below), torch.zeros(5, 4))


KEEPING = ("relu", "gelu", "tanh", "sigmoid", "exp", "neg", "abs", "clone")
KEEPING_IMAGES: dict[str, dict[str, object]] = {
    "max_pool2d": {"kernel_size": [2, 2]},
    "avg_pool2d": {"kernel_size": [2, 2]},
    "adaptive_avg_pool2d": {"output_size": [1, 1]},
    "reflection_pad2d": {"padding": [1, 1, 0, 1]},
    "upsample_nearest2d": {"output_size": [5, 5]},
}


@pytest.mark.parametrize("kind", [*KEEPING, *KEEPING_IMAGES])
def test_an_operator_that_keeps_channels_acts_on_each_alone(kind: str) -> None:
    assert OPERATIONS[kind].keeps
    name = operator(kind)._schema.arguments[0].name
    node = Node("n", kind, {name: {"value": "x"}, **KEEPING_IMAGES.get(kind, {})})
    x, order = torch.randn(2, 5, 4, 4), torch.randperm(5)
    whole = run_node(node, {"x": x}, {}, 2)
    assert torch.equal(run_node(node, {"x": x[:, order]}, {}, 2), whole[:, order])


@pytest.mark.parametrize("kind", ["softmax", "sum", "cat", "layer_norm", "matmul", "flatten", "batch_norm"])
def test_an_operator_that_mixes_or_moves_channels_keeps_none(kind: str) -> None:
    assert not OPERATIONS[kind].keeps


def test_rules_on_labels() -> None:
    ties = Ties()
    first, second = ties.fresh(3)[None], ties.fresh(3)[None]
    meta = torch.empty(1, 3, device="meta")
    a, b = Value(meta, first), Value(meta, second)
    node = Node("n", "add.Tensor")
    assert pointwise(ties, node, {"self": a, "other": b}, meta).tolist() == [[2, 3, 4]]
    assert ties.resolve(second).tolist() == [[2, 3, 4]]
    joined = movement(ties, Node("n", "cat"), {"tensors": [a, a], "dim": 1}, meta)
    assert joined.tolist() == [[2, 3, 4, 2, 3, 4]]
    padded = movement(ties, Node("n", "pad"), {"self": a, "pad": [1, 0]}, meta)
    assert padded.tolist() == [[FIXED, 2, 3, 4]]
    total = reduction(ties, Node("n", "sum.dim_IntList"), {"self": a, "dim": [1]}, meta.sum(1))
    assert total.tolist() == [FIXED]
    with pytest.raises(NotUnderstood, match="window runs over neurons"):
        window(1)(ties, Node("n", "avg_pool1d"), {"self": a}, meta)
    assert Value(meta, torch.tensor([[7]])).everywhere.tolist() == [[7, 7, 7]]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: torch.concatenate([x[:, 4:], x[:, :4]], 1),
        lambda x: torch.dstack([x[:, :4], x[:, 4:]]),
        lambda x: torch.column_stack([x[:, 4:], x[:, :4]]),
        lambda x: x.view(-1, 2, 4).moveaxis(1, 2),
        lambda x: x.view(-1, 2, 4).swapdims(1, 2),
        lambda x: x.view(-1, 2, 4).adjoint(),
        lambda x: x.view(-1, 2, 4).ravel().view(-1, 8),
        lambda x: x[:, None].broadcast_to(x.shape[0], 2, 8)[:, 1],
        lambda x: x[:, None, None].expand(-1, 2, 2, 8).diagonal(0, 1, 2)[..., 1],
        lambda x: x.fliplr(),
        lambda x: x.t().flipud().t(),
        lambda x: x.take_along_dim(torch.arange(7, -1, -1)[None], 1),
    ],
    ids=[
        *("concatenate", "dstack", "column_stack", "moveaxis", "swapdims", "adjoint", "ravel", "broadcast_to"),
        *("diagonal", "fliplr", "flipud", "take_along_dim"),
    ],
)
def test_what_only_moves_neurons_is_followed_by_any_name(move: Callable[[Tensor], Tensor]) -> None:
    module = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), Apply(move), nn.Flatten(), nn.Linear(8, 3))
    network = trace(module, torch.randn(3, 4))
    assert [network.graph.widths[group.name] for group in network.graph.hidden_groups] == [8]


class Cumulative(nn.Module):
    """A cumulative sum over time, between two convolutions."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(2, width, 3)
        self.second = nn.Conv1d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.second(self.first(x).relu().cumsum(-1)).mean(2)
        return out


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> dict[str, Operation]:
    """A table of operations that is put back afterwards."""
    table = dict(OPERATIONS)
    monkeypatch.setattr("mtz_core.network.operations.OPERATIONS", table)
    return table


def test_a_registered_operator_can_be_zipped(
    operations: dict[str, Operation], tmp_path_factory: pytest.TempPathFactory
) -> None:
    networks = {"a": Cumulative(5), "b": Cumulative(6)}
    data = {task: torch.randn(30, 2, 8, generator=torch.Generator().manual_seed(i)) for i, task in enumerate(networks)}
    with pytest.raises(UnsupportedModule, match=r"the network of 'a'.*operator cumsum"):
        zip_networks(networks, data)
    register_operation("cumsum", Operation(window(1), keeps=True))
    assert operations["cumsum"].keeps
    for task, module in networks.items():
        separate = zip_networks(networks, data, ZipConfig(share=0.0))
        assert torch.equal(separate(data[task], task=task), module(data[task]))
    zipped = zip_networks(networks, data)
    assert [layer.shared for layer in zipped.report.layers] == [5, 0]
    folder = tmp_path_factory.mktemp("zipped")
    zipped.save(folder)
    assert torch.equal(load(folder)(data["a"], task="a"), zipped(data["a"], task="a"))
    del operations["cumsum"]
    with pytest.raises((InvalidZippedFile, UnsupportedModule), match="cumsum"):
        load(folder)


def test_one_overload_alone_can_be_registered(operations: dict[str, Operation]) -> None:
    module = nn.Sequential(nn.Linear(4, 6), Apply(lambda x: x - x.median(1, keepdim=True).values), nn.Linear(6, 3))
    with pytest.raises(UnsupportedModule, match=r"median\.dim"):
        trace(module, torch.randn(3, 4))
    register_operation("median.dim", Operation(reduction))
    assert operation_of("median.dim") is operations["median.dim"]
    assert operation_of("median") is None
    assert trace(module, torch.randn(3, 4)).graph.widths["0"] == 6


def test_an_overload_goes_before_its_operator(operations: dict[str, Operation]) -> None:
    special = Operation(movement)
    register_operation("add.Scalar", special)
    assert operation_of("add.Scalar") is special
    assert operation_of("add.Tensor") is OPERATIONS["add"]


def test_a_registered_layer_is_no_layer_any_more(operations: dict[str, Operation]) -> None:
    module = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    register_operation("conv2d", Operation(lambda ties, node, arguments, out: torch.full([1] * out.ndim, FIXED)))
    network = trace(module, torch.randn(2, 2, 6, 6))
    assert [layer.name for layer in network.graph.layers] == ["3"]
