"""Weights that are computed from parameters alone are stored as what they are."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.prune as pruning
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from mtz_core import ZipConfig, zip_networks
from mtz_core.network.folding import fold_constants
from mtz_core.network.graph import INPUT, Node
from mtz_core.network.to_module import build_module
from mtz_core.network.tracing import trace
from tests.support.written import Written, assert_runs_as


def pruned(layer: nn.Linear) -> nn.Linear:
    pruning.random_unstructured(layer, "weight", 0.3)
    pruning.random_unstructured(layer, "bias", 0.3)
    return layer


def standardised(weight: Tensor) -> Tensor:
    return (weight - weight.mean(1, keepdim=True)) / (weight.std(1, keepdim=True) + 1e-5)


def between(change: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    return nn.Sequential(change(nn.Linear(4, 5)), nn.ReLU(), nn.Linear(5, 3))


def attended(m: nn.Module, x: Tensor) -> Tensor:
    read = m.first(x)  # type: ignore[operator]
    out: Tensor = m.second(m.attention(read[:, :2], read[:, 2:], read[:, 2:], need_weights=False)[0])  # type: ignore[operator]
    return out


COMPUTED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], list[str]]] = {
    # a network, the shape of its input, and the names of its layers
    "weight norm": (lambda: between(parametrizations.weight_norm), (4,), ["0", "2"]),
    "spectral norm": (lambda: between(parametrizations.spectral_norm), (4,), ["0", "2"]),
    "orthogonal": (lambda: between(parametrizations.orthogonal), (4,), ["0", "2"]),
    "weight norm, as it was": (lambda: between(nn.utils.weight_norm), (4,), ["0", "2"]),
    "spectral norm, as it was": (lambda: between(nn.utils.spectral_norm), (4,), ["0", "2"]),
    "pruned": (lambda: between(pruned), (4,), ["0", "2"]),
    "a bare layer": (lambda: parametrizations.weight_norm(nn.Linear(4, 5)), (4,), ["folded"]),
    "in two layers": (
        lambda: nn.Sequential(*(parametrizations.weight_norm(nn.Conv1d(c, 4, 2)) for c in (2, 4))),
        (2, 6),
        ["0", "1"],
    ),
    "weight standardisation": (
        lambda: Written(lambda m, x: m.second(F.linear(x, standardised(m.first.weight), m.first.bias))),
        (4,),
        ["first.folded", "second"],
    ),
    "a layer that is called twice": (
        lambda: Written(
            lambda m, x: m.second(m.twice(m.twice(m.first(x)).relu())),
            twice=parametrizations.weight_norm(nn.Linear(4, 4)),
        ),
        (4,),
        ["first", "second"],
    ),
    "a low-rank change": (
        lambda: Written(
            lambda m, x: m.second(F.linear(x, m.first.weight + m.up @ m.down, m.first.bias)),
            up=nn.Parameter(torch.randn(4, 1)),
            down=nn.Parameter(torch.randn(1, 4)),
        ),
        (4,),
        ["folded", "second"],
    ),
    "a bias in three parts, one of them a constant": (
        lambda: Written(
            lambda m, x: m.second(F.linear(m.first(x).relu(), m.qkv.weight, torch.cat([m.q, m.zero, m.v])).relu()),
            qkv=nn.Linear(4, 4, bias=False),
            q=nn.Parameter(torch.randn(1)),
            zero=torch.zeros(1),
            v=nn.Parameter(torch.randn(2)),
        ),
        (4,),
        ["first", "qkv", "second"],
    ),
    "parts of one parameter": (
        lambda: Written(attended, attention=nn.MultiheadAttention(4, 2, batch_first=True)),
        (5, 4),
        ["first", "attention.folded", "attention.folded2", "attention.folded3", "attention.out_proj", "second"],
    ),
}


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_computed_weights_are_folded(name: str) -> None:
    make, shape, layers = COMPUTED[name]
    module = make().eval()
    before = copy.deepcopy(module.state_dict())
    network = trace(module, torch.randn(3, *shape))
    assert [layer.name for layer in network.graph.layers] == layers
    assert network.parameters <= sum(p.numel() for p in (*module.parameters(), *module.buffers()))
    assert network.trainable == network.state.keys()
    assert_runs_as(module, network, shape)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    x = torch.randn(4, *shape)
    torch.testing.assert_close(build_module(network)(x), module(x))


def test_a_folded_network_is_of_one_topology_with_a_plain_one() -> None:
    plain, normed = between(lambda layer: layer), between(parametrizations.weight_norm)
    x = {"plain": torch.randn(30, 4), "normed": torch.randn(30, 4)}
    zipped = zip_networks({"plain": plain, "normed": normed}, x, ZipConfig(share=0.0))
    torch.testing.assert_close(zipped(x["normed"], "normed"), normed(x["normed"]))
    assert zipped.network("normed").state_dict().keys() == plain.state_dict().keys()


def test_what_depends_on_the_input_is_not_folded() -> None:
    module = Written(lambda m, x: m.second(F.linear(x, m.first.weight * x.mean(), m.first.bias)))
    network = trace(module, torch.randn(3, 4), ["linear:2"])
    assert [layer.name for layer in network.graph.layers] == ["second"]


def test_constants_are_stored_in_the_order_in_which_they_are_read() -> None:
    nodes = [Node(f"arange:{i}", "arange", {"end": 3 + i % 2}) for i in range(9)]
    order = (7, 2, 5, 0, 8, 1)
    for i in order:
        nodes.append(Node(f"mul:{i}", "mul.Tensor", {"self": {"value": INPUT}, "other": {"value": f"arange:{i}"}}))
    _, state = fold_constants(nodes, "mul:1", {}, frozenset())
    assert list(state) == [f"constant:arange:{i}" for i in order]
