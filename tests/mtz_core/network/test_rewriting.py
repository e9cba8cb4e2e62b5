"""Exported programs are rewritten into operators that zipping knows, and compute the same."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from mtz_core.errors import UnsupportedModule
from mtz_core.network.tracing import trace
from tests.support.written import Written, assert_runs_as


def without_autocast(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)  # type: ignore[operator]
    with torch.autocast("cpu", enabled=False):
        a = x.float().relu()
        b = m.between(a)  # type: ignore[operator]
    out: Tensor = m.second(a + b)  # type: ignore[operator]
    return out


def elsewhere(m: nn.Module, x: Tensor) -> Tensor:
    with torch.autocast("cuda", dtype=torch.float16):
        x = m.between(m.first(x))  # type: ignore[operator]
    out: Tensor = m.second(x)  # type: ignore[operator]
    return out


def nested(m: nn.Module, x: Tensor) -> Tensor:
    x = m.first(x)  # type: ignore[operator]
    with torch.enable_grad():
        x = m.between(x)  # type: ignore[operator]
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            x = x.relu()
        x = x + 1
    out: Tensor = m.second(x)  # type: ignore[operator]
    return out


def checkpointed(m: nn.Module, x: Tensor) -> Tensor:
    x = torch.utils.checkpoint.checkpoint(m.between, m.first(x), use_reentrant=False)  # type: ignore[operator]
    out: Tensor = m.second(x)  # type: ignore[operator]
    return out


REGIONS = {
    "autocast that is off": without_autocast,
    "autocast of another device": elsewhere,
    "regions in regions": nested,
    "checkpoints": checkpointed,
}


@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.filterwarnings("ignore:CUDA is not available")
def test_regions_with_a_mode_of_their_own_are_inlined(name: str) -> None:
    module = Written(REGIONS[name], between=nn.Linear(4, 4))
    network = trace(module, torch.randn(3, 4))
    assert [layer.name for layer in network.graph.layers] == ["first", "between", "second"]
    assert_runs_as(module, network, (4,))


class HalfPrecision(nn.Module):
    """A layer that runs in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out: Tensor = self.layer(x)
        return out.float()


def test_half_precision_can_be_kept_separate() -> None:
    module = nn.Sequential(nn.Linear(4, 4), HalfPrecision(), nn.Linear(4, 3))
    with pytest.raises(UnsupportedModule, match=r"'1': operator linear.*List the module.*keep_separate"):
        trace(module, torch.randn(3, 4))
    network = trace(module, torch.randn(3, 4), ["1"])
    assert [layer.name for layer in network.graph.layers] == ["0", "2"]
    assert_runs_as(module, network, (4,))


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def products(m: nn.Module, x: Tensor) -> Tensor:
    h = m.first(x)  # type: ignore[operator]
    queries, keys, values = (torch.einsum("bnd,dhe->bhne", h, w) for w in (m.query, m.key, m.value))
    weights = torch.einsum("bhid,bhjd->bhij", queries, keys).softmax(-1)
    mixed = torch.einsum("bhij,bhjd->bihd", weights, values)
    out: Tensor = m.second(torch.einsum("bnhe,hed->bnd", mixed, m.out))  # type: ignore[operator]
    return out


EINSUMS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "a layer": (
        lambda: Written(lambda m, x: m.second(torch.einsum("bnd,df->bnf", m.first(x), m.w)), w=parameter(4, 4)),
        ["first", "w", "second"],
    ),
    "a layer as torch stores it": (
        lambda: Written(lambda m, x: m.second(torch.einsum("b n d, f d -> b n f", m.first(x), m.w)), w=parameter(4, 4)),
        ["first", "w", "second"],
    ),
    "weights first": (
        lambda: Written(lambda m, x: m.second(torch.einsum("fd,bnd", m.w, m.first(x)).mT), w=parameter(4, 4)),
        ["first", "w", "second"],
    ),
    "any axes before": (
        lambda: Written(lambda m, x: m.second(torch.einsum("...d,df->...f", m.first(x), m.w)), w=parameter(4, 4)),
        ["first", "w", "second"],
    ),
    "several axes at once": (
        lambda: Written(lambda m, x: m.second(torch.einsum("bnd,ndf->bf", m.first(x), m.w)), w=parameter(3, 4, 4)),
        ["first", "w", "second"],
    ),
    "attention": (
        lambda: Written(
            products, query=parameter(4, 2, 3), key=parameter(4, 2, 3), value=parameter(4, 2, 3), out=parameter(2, 3, 4)
        ),
        ["first", "query", "key", "value", "out", "second"],
    ),
}


@pytest.mark.parametrize("name", EINSUMS)
def test_einsum_is_read_as_a_product_of_matrices(name: str) -> None:
    make, layers = EINSUMS[name]
    module = make()
    network = trace(module, torch.randn(2, 3, 4))
    assert [layer.name for layer in network.graph.layers] == layers
    assert "einsum" not in [node.kind for node in network.graph.nodes]
    assert network.trainable and network.parameters == sum(p.numel() for p in module.parameters())
    assert_runs_as(module, network, (3, 4))


@pytest.mark.parametrize("equation", ["bnd,bnd->bnd", "bnd,bne->bnde", "bnd,bnd->bn", "bii,bij->bj"])
def test_other_einsums_can_be_kept_separate(equation: str) -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.first(x)  # type: ignore[operator]
        out: Tensor = torch.einsum(equation, h, m.second(h))  # type: ignore[operator]
        return out

    module = Written(run)
    assert_runs_as(module, trace(module, torch.randn(2, 4, 4), [""]), (4, 4))
