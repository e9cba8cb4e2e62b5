"""Networks that fit together, and those that do not."""

import re

import pytest
import torch
from torch import Tensor, nn

from mtz_core.errors import IncompatibleNetworks
from mtz_core.merging.compatibility import check_compatible
from mtz_core.network.tracing import trace
from tests.support.networks import (
    mlp,
)

# Networks that fit together, and those that do not


def traced(*networks: nn.Module, shape: tuple[int, ...] = (12,), dtype: torch.dtype = torch.float32) -> dict:
    return {
        task: trace(network, torch.randn(2, *shape, dtype=dtype))
        for task, network in zip("abc", networks, strict=False)
    }


@pytest.mark.slow
def test_networks_of_other_widths_and_classes_fit_together() -> None:
    graph = check_compatible(traced(mlp((9, 7), 3), mlp((5, 8), 4), mlp((7, 7), 2)))
    assert [layer.name for layer in graph.layers] == ["0", "2", "4"]


@pytest.mark.slow
def test_networks_of_other_input_sizes_fit_together() -> None:
    check_compatible(traced(mlp((9,), 3)) | {"b": trace(mlp((9,), 3, inputs=5), torch.randn(2, 5))})


class Wired(nn.Module):
    """The sum of what two layers put out, the second of which reads the first or the input."""

    def __init__(self, chained: bool) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)
        self.chained = chained

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        out: Tensor = self.last(first + self.second(first if self.chained else x))
        return out


@pytest.mark.parametrize(
    ("networks", "message"),
    [
        (
            (mlp((9,), 3), mlp((9,), 3, activation=nn.Tanh)),
            "a has relu reading step 0 where b has tanh reading step 0, in '1'. To zip what they have in common, set "
            "keep_separate: ['1'].",
        ),
        (
            (mlp((9,), 3), mlp((9, 9), 3)),
            "a has nothing more where b has relu reading step 2, in '3'. To zip what they have in common, set "
            "keep_separate: ['3', '4']; a has [].",
        ),
        (
            (mlp((9,), 3), mlp((9,), 3, bias=False)),
            "a has linear '0' reading input where b has linear '0' without bias reading input, in '0'. They have "
            "nothing in common that could be shared: zip networks of the same topology.",
        ),
        (
            (mlp((9,), 3), nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Identity(), nn.Linear(9, 3))),
            "a has linear '2' reading step 1 where b has linear '3' reading step 1, in '2' and '3'. To zip what they "
            "have in common, set keep_separate: ['2', '3']; a has ['2']; b has ['3'].",
        ),
        (
            (Wired(True), Wired(False)),
            "a has linear 'second' reading step 0 where b has linear 'second' reading input, in 'second'.",
        ),
        (
            (mlp((9,), 3), mlp((9,), 3), mlp((9,), 3, activation=nn.Tanh)),
            "a has relu reading step 0 where c has tanh reading step 0, in '1'.",
        ),
    ],
    ids=["activation", "depth", "bias", "name", "wiring", "the third"],
)
def test_networks_of_other_topology_are_refused_with_the_first_difference(
    networks: tuple[nn.Module, ...], message: str
) -> None:
    with pytest.raises(IncompatibleNetworks, match="differ in structure: " + re.escape(message)):
        check_compatible(traced(*networks))


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Conv2d(1, 2, 3, stride=2), "stride=[2, 2]"),
        (nn.Conv2d(1, 2, 3, padding=1), "padding=[1, 1]"),
        (nn.Conv2d(1, 2, 3, dilation=2), "dilation=[2, 2]"),
    ],
    ids=["stride", "padding", "dilation"],
)
def test_kernels_that_move_otherwise_are_refused(other: nn.Module, words: str) -> None:
    networks = [nn.Sequential(layer, nn.ReLU()) for layer in (nn.Conv2d(1, 2, 3), other)]
    with pytest.raises(
        IncompatibleNetworks, match=re.escape(f"a has conv2d '0' reading input where b has conv2d '0' ({words})")
    ):
        check_compatible(traced(*networks, shape=(1, 9, 9)))


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_networks_are_refused(count: int) -> None:
    with pytest.raises(
        IncompatibleNetworks, match=rf"two or more networks, not {count} \({'a' if count else 'none'}\)"
    ):
        check_compatible(traced(*[mlp((9,), 3)] * count))


def test_networks_of_mixed_precision_are_refused() -> None:
    networks = traced(mlp((9,), 3)) | {"b": trace(mlp((9,), 3).double(), torch.randn(2, 12).double())}
    with pytest.raises(IncompatibleNetworks, match="mix float32 and float64"):
        check_compatible(networks)
