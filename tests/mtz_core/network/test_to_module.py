"""Plain modules: the original again, in names, shapes, values, and in how it trains."""

import copy
import itertools
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import ZipConfig, load, zip_networks
from mtz_core.network.graph import Network
from mtz_core.network.to_module import build_module
from mtz_core.network.tracing import trace
from tests.support.networks import CASES, Case


def plain(module: nn.Module, x: Tensor) -> nn.Module:
    """The module traced and built again, with values of its own."""
    return build_module(separate(trace(module, x)))


def separate(network: Network) -> Network:
    state = {name: tensor.clone() for name, tensor in network.state.items()}
    return Network(network.graph, state, network.trainable, network.inputs)


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    assert shapes(first) == shapes(second)
    expected = second.state_dict()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(value, expected[name], msg=f"{name} differs")


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES[4:], ids=lambda case: case.name)
def test_a_plain_module_is_built_again(case: Case) -> None:
    module, x = case.network(1), case.examples(5)
    again = plain(module, x)
    assert_same_state(again, module)
    for training in (True, False):
        torch.manual_seed(4)
        expected = module.train(training)(x.clone())
        torch.manual_seed(4)
        assert torch.equal(again.train(training)(x.clone()), expected)


class Written(nn.Module):
    """Modules by name, and how they are run."""

    def __init__(self, run: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class Residual(nn.Module):
    """Normalisation of two kinds, dropout of two kinds, a residual sum and a parameter of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6, momentum=0.3), nn.ReLU())
        self.block = nn.ModuleDict(
            {
                "conv": nn.Conv2d(6, 6, 3, padding=1, groups=2),
                "norm": nn.BatchNorm2d(6, eps=1e-3),
                "drop": nn.Dropout2d(0.4),
                "last": nn.GroupNorm(2, 6),
            }
        )
        self.scale = nn.Parameter(torch.full((6, 1, 1), 0.7))
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.head = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Dropout(0.3), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.scale * self.block["last"](self.block["drop"](self.block["norm"](self.block["conv"](x))))
        out: Tensor = self.head(self.up(x).mean((2, 3)))
        return out


class Tokens(nn.Module):
    """Tokens, their places, attention, layer normalisation, a number that is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(9, 8)
        self.places = nn.Embedding(6, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)
        self.register_buffer("temperature", torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.tokens(x) + self.places(torch.arange(x.shape[1]).expand_as(x))
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        out: Tensor = self.head(h.mean(1)) * self.temperature
        return out


NETWORKS: dict[str, tuple[nn.Module, Callable[[int], Tensor]]] = {
    "residual": (Residual(), lambda n: torch.randn(n, 2, 6, 6)),
    "tokens": (Tokens(), lambda n: torch.randint(0, 9, (n, 6))),
    "one dimension": (
        nn.Sequential(nn.Conv1d(2, 4, 3), nn.BatchNorm1d(4), nn.ConvTranspose1d(4, 3, 3, dilation=2), nn.Flatten(2)),
        lambda n: torch.randn(n, 2, 8),
    ),
    "three dimensions": (
        nn.Sequential(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.ConvTranspose3d(4, 2, 2, bias=False)),
        lambda n: torch.randn(n, 1, 3, 4, 3),
    ),
    "embedding with padding": (
        nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(8, 3)),
        lambda n: torch.randint(0, 5, (n, 2)),
    ),
    "normalisation without parameters": (
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, affine=False), nn.Linear(5, 3)),
        lambda n: torch.randn(n, 4),
    ),
    "neurons in another order": (
        Written(lambda m, x: m.last(m.first(x)[:, [2, 0, 1]]), first=nn.Linear(4, 3), last=nn.Linear(3, 3)),
        lambda n: torch.randn(n, 4),
    ),
    "prelu": (nn.Sequential(nn.Linear(4, 5), nn.PReLU(5), nn.Linear(5, 3)), lambda n: torch.randn(n, 4)),
    "a bare layer": (nn.Linear(4, 3), lambda n: torch.randn(n, 4)),
    "a bare convolution": (nn.Conv2d(2, 3, 3, stride=2, dilation=2), lambda n: torch.randn(n, 2, 7, 7)),
    "the size of the batch": (
        Written(
            lambda m, x: m.last(m.first(x).view(2 * len(x), 3)).view(len(x), -1),
            first=nn.Linear(4, 6),
            last=nn.Linear(3, 3),
        ),
        lambda n: torch.randn(n, 4),
    ),
}


@cache
def traced(name: str) -> Network:
    """A network of the table in evaluation mode, traced once for all tests."""
    module, draw = NETWORKS[name]
    return trace(copy.deepcopy(module).eval(), draw(3))


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_names_shapes_and_outputs_are_the_originals(name: str) -> None:
    module, draw = NETWORKS[name]
    module.eval()
    again = build_module(separate(traced(name))).eval()
    assert_same_state(again, module)
    assert {n for n, _ in again.named_parameters()} == {n for n, _ in module.named_parameters()}
    for count in (1, 2, 5):
        x = draw(count)
        assert torch.equal(again(x.clone()), module(x.clone()))


@pytest.mark.parametrize(
    "name", ["residual", "tokens", "three dimensions", "embedding with padding", "normalisation without parameters"]
)
def test_training_is_the_originals(name: str) -> None:
    module, draw = copy.deepcopy(NETWORKS[name][0]), NETWORKS[name][1]
    again = build_module(separate(traced(name)))
    torch.manual_seed(1)
    batches = [draw(6) for _ in range(3)]
    for network in (module, again):
        torch.manual_seed(2)
        network.train()
        optimiser = torch.optim.SGD(network.parameters(), lr=0.05)
        for x in batches:
            optimiser.zero_grad()
            network(x.clone()).square().mean().backward()
            optimiser.step()
    assert_same_state(again, module)


def test_batches_are_counted_as_in_the_original() -> None:
    again = build_module(separate(traced("residual"))).train()
    again(torch.randn(4, 2, 6, 6))
    counts = {name: int(value) for name, value in again.state_dict().items() if name.endswith("num_batches_tracked")}
    assert counts == {f"{path}.num_batches_tracked": 1 for path in ("stem.1", "block.norm", "head.1")}


def test_standard_parts_are_torchs_own_modules_at_their_paths() -> None:
    module = NETWORKS["residual"][0]
    again = build_module(separate(traced("residual")))
    for name, part in module.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d, nn.BatchNorm1d, nn.BatchNorm2d)):
            assert repr(again.get_submodule(name)) == repr(part)
    drops = sorted(repr(part) for part in again.modules() if isinstance(part, nn.modules.dropout._DropoutNd))
    assert drops == ["Dropout(p=0.3, inplace=False)", "Dropout2d(p=0.4, inplace=False)"]
    tokens = build_module(separate(traced("tokens")))
    assert repr(tokens.get_submodule("tokens")) == "Embedding(9, 8)"


@pytest.mark.parametrize("name", NETWORKS)
def test_a_plain_module_needs_nothing_of_ours(name: str) -> None:
    draw = NETWORKS[name][1]
    again = build_module(separate(traced(name))).eval()
    assert all(type(part).__module__.startswith("torch.") for part in again.modules())
    stored = pickle.dumps(again)
    assert b"mtz" not in stored
    x = draw(4)
    assert torch.equal(pickle.loads(stored)(x), again(x))
    assert torch.equal(copy.deepcopy(again)(x), again(x))


class Passing(nn.Module):
    """Buffers that a state has, and others, and tensors that it has not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)
        self.register_buffer("kept", torch.rand(5))
        self.register_buffer("mask", torch.rand(5), persistent=False)
        self.drop = nn.Dropout(0.0)
        self.drop.register_buffer("scale", torch.rand(5), persistent=False)
        self.slope = torch.rand(5)
        self.late: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.late is None:
            self.late = self.get_buffer("mask") + 1
        out: Tensor = self.last((self.first(x) * self.kept + self.late).relu() * self.drop.scale * self.slope)
        return out


def test_states_of_originals_and_extracted_networks_fit_each_other(tmp_path: Path) -> None:
    networks, x = {"a": Passing(), "b": Passing()}, torch.randn(20, 4)
    zipped = zip_networks(networks, dict.fromkeys(networks, x), ZipConfig(share=0.0))
    zipped.save(tmp_path)
    for whole, (task, module) in itertools.product((zipped, load(tmp_path)), networks.items()):
        alone = whole.network(task)
        assert torch.equal(alone(x), module(x))
        module.load_state_dict(alone.state_dict())
        alone.load_state_dict(module.state_dict())


def test_extracted_networks_share_no_storage() -> None:
    networks = {"a": Residual(), "b": Residual()}
    data = {task: torch.randn(20, 2, 6, 6) for task in networks}
    zipped = zip_networks(networks, data, ZipConfig(share=0.5))
    tensors = [*zipped.state_dict().values()]
    for module in networks.values():
        tensors += module.state_dict().values()
    for task in networks:
        tensors += zipped.network(task).state_dict().values()
        tensors += zipped.network(task).state_dict().values()
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors]
    assert len(set(places)) == len(places)


def test_extracted_networks_are_in_the_mode_of_the_zipped_one() -> None:
    networks = {"a": Residual(), "b": Residual()}
    data = {task: torch.randn(20, 2, 6, 6) for task in networks}
    zipped = zip_networks(networks, data, ZipConfig(share=1.0))
    for training, (task, module) in itertools.product((True, False), networks.items()):
        alone = zipped.train(training).network(task)
        assert all(part.training == training for part in alone.modules())
        assert shapes(alone) == shapes(module)
        x = torch.randn(5, 2, 6, 6)
        torch.manual_seed(3)
        expected = copy.deepcopy(zipped)(x, task=task)
        torch.manual_seed(3)
        torch.testing.assert_close(alone(x), expected)


def test_normalisation_without_parameters_can_be_zipped() -> None:
    module, draw = NETWORKS["normalisation without parameters"]
    networks, data = {"a": module, "b": copy.deepcopy(module)}, {"a": draw(40), "b": draw(40)}
    zipped = zip_networks(networks, data)
    for task, x in data.items():
        torch.testing.assert_close(zipped.network(task)(x), zipped(x, task=task))


def test_names_of_layers_may_be_anything_that_torch_has_not_taken() -> None:
    module = nn.Sequential()
    for name in ("x", "input", "relu", "weight", "0"):
        module.add_module(name, nn.Linear(4, 4))
    x = torch.randn(3, 4)
    again = plain(module, x)
    assert_same_state(again, module)
    assert torch.equal(again(x), module(x))


def test_functions_stay_functions() -> None:
    module = Written(
        lambda m, x: F.log_softmax(F.dropout(m.last(F.gelu(m.first(x), approximate="tanh")), 0.5, m.training), 1),
        first=nn.Linear(4, 5),
        last=nn.Linear(5, 3),
    )
    again, x = plain(module, torch.randn(3, 4)), torch.randn(50, 4)
    assert_same_state(again, module)
    torch.manual_seed(1)
    expected = module.train()(x)
    torch.manual_seed(1)
    assert torch.equal(again.train()(x), expected)
    assert torch.equal(again.eval()(x), module.eval()(x))
