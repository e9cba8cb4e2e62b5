"""What all tasks share from the input on is computed once, and nothing changes by that."""

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mtz_core import ZipConfig, ZippedNetwork, zip_networks
from mtz_core.errors import InvalidConfig
from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from mtz_core.zipped.prefix import common_prefix
from tests.support.networks import CASES, TASKS, Case, Residual, lenet5, mlp, traced_pair, zip_traced

pytestmark = pytest.mark.slow

LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), other_classes=5)
DOUBLE = Case("lenet-5, float64", lenet5, (1, 20, 20), (4, 6, 10), dtype=torch.float64)
RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6))


class Skips(nn.Module):
    """Sums and concatenation without normalisation."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        first, second = widths
        self.stem = nn.Conv2d(1, first, 3, padding=1)
        self.branch = nn.Conv2d(first, first, 3, padding=1)
        self.beside = nn.Conv2d(1, second, 3, padding=1)
        self.mix = nn.Conv2d(first + second, second, 1)
        self.head = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        stream = self.stem(x).relu()
        stream = stream + self.branch(stream)
        both = torch.cat([stream, torch.tanh(self.beside(x))], dim=1)
        out: Tensor = self.head(F.gelu(self.mix(both)).amax((2, 3)))
        return out


class Positions(nn.Module):
    """A linear layer at every position, so that the neurons lie on the last axis."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        first, second = widths
        self.embed, self.hidden, self.head = (
            nn.Linear(4, first),
            nn.Linear(3 * first, second),
            nn.Linear(second, classes),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(F.silu(self.embed(x)).flatten(1)).relu())
        return out


class Averaged(nn.Module):
    """Linear layers at every position, with means of neighbouring neurons between them."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        first, second = widths
        self.embed, self.hidden, self.head = nn.Linear(4, first), nn.Linear(first, second), nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.hidden(F.avg_pool1d(F.silu(self.embed(x)), 3, 1, 1)).relu().mean(1))
        return out


AVERAGED = Case("averaged", Averaged, (3, 4), (5, 6))
SKIPS = Case("skips", Skips, (1, 6, 5), (5, 4))
POSITIONS = Case("positions", Positions, (3, 4), (5, 6))


class Calls(TorchDispatchMode):
    """Counts the operators that run on values, not on shapes alone."""

    def __init__(self, counts: Counter[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.counts[func.overloadpacket.__name__] += isinstance(found, Tensor) and not found.is_meta
        return found


def counted(zipped: ZippedNetwork, x: Tensor) -> tuple[dict[str, Tensor], Counter[str]]:
    counts: Counter[str] = Counter()
    with torch.no_grad(), Calls(counts):
        outputs = zipped.run_all(x)
    return outputs, counts


@cache
def traced(case: Case, index: int) -> Network:
    return trace(case.network(index + 1, classes=case.classes + index), case.examples(2))


def zipped_of(case: Case, share: float | Mapping[str, int], count: int = 3) -> ZippedNetwork:
    """Different networks of one width."""
    networks = {"abcde"[i]: traced(case, i) for i in range(count)}
    calibration = {task: case.examples(20, seed=i) for i, task in enumerate(networks)}
    return zip_traced(networks, calibration, ZipConfig(share=share, patches=4))


def assert_equal_to_single_calls(zipped: ZippedNetwork, outputs: Mapping[str, Tensor], x: Tensor) -> None:
    assert tuple(outputs) == zipped.tasks
    for task, output in outputs.items():
        torch.testing.assert_close(output, zipped(x, task), rtol=1e-5, atol=1e-5)


def test_what_all_tasks_share_is_computed_once() -> None:
    zipped, x = zipped_of(LENET5, 1.0), LENET5.examples(6)
    outputs, calls = counted(zipped, x)
    assert_equal_to_single_calls(zipped, outputs, x)
    assert calls["convolution"] == 2
    assert calls["addmm"] == 1 + 3  # the hidden layer, and the heads of three tasks


def test_what_no_task_shares_is_computed_for_each() -> None:
    zipped, x = zipped_of(LENET5, 0.0), LENET5.examples(6)
    outputs, calls = counted(zipped, x)
    assert_equal_to_single_calls(zipped, outputs, x)
    assert calls["convolution"] == 3 * 2
    assert calls["addmm"] == 3 * 2


@pytest.mark.parametrize(
    ("share", "convolutions", "products"),
    [({"0": 4}, 1 + 3, 6), ({"0": 4, "3": 6}, 2, 6), ({"0": 4, "3": 5, "7": 10}, 1 + 3, 6), ({"3": 6}, 6, 6)],
    ids=["the first layer", "two layers", "a gap", "not the first layer"],
)
def test_the_prefix_ends_at_the_first_layer_that_is_not_wholly_shared(
    share: dict[str, int], convolutions: int, products: int
) -> None:
    zipped, x = zipped_of(LENET5, share), LENET5.examples(6)
    outputs, calls = counted(zipped, x)
    assert_equal_to_single_calls(zipped, outputs, x)
    assert (calls["convolution"], calls["addmm"]) == (convolutions, products)


def test_two_of_three_tasks_are_no_prefix() -> None:
    networks = {
        task: trace(LENET5.network(i + 1, (width, 6, 10)), LENET5.examples(2))
        for i, (task, width) in enumerate({"a": 4, "b": 3, "c": 4}.items())
    }
    zipped = zip_traced(
        networks, {t: LENET5.examples(20, seed=i) for i, t in enumerate(networks)}, ZipConfig(patches=4)
    )
    assert [run.owners for run in zipped.structure.rows["0"].segments] == [("a", "b", "c"), ("a", "c")]
    x = LENET5.examples(6)
    outputs, calls = counted(zipped, x)
    assert_equal_to_single_calls(zipped, outputs, x)
    assert calls["convolution"] == 6
    left = zipped.without("b")
    outputs, calls = counted(left, x)
    assert_equal_to_single_calls(left, outputs, x)
    assert calls["convolution"] == 2


def test_a_network_with_itself_runs_once_but_for_its_head() -> None:
    """Sums and concatenations included: its neurons are in one order."""
    network, x = traced(SKIPS, 0), SKIPS.examples(5)
    data = {"a": SKIPS.examples(20, seed=1), "b": SKIPS.examples(20, seed=2)}
    zipped = zip_traced({"a": network, "b": network}, data, ZipConfig(patches=8))
    outputs, calls = counted(zipped, x)
    assert_equal_to_single_calls(zipped, outputs, x)
    assert calls["convolution"] == 4
    assert calls["addmm"] == 2


def test_neurons_on_the_last_axis() -> None:
    zipped, x = zipped_of(POSITIONS, 1.0, count=2), POSITIONS.examples(5)
    outputs, calls = counted(zipped, x)
    assert_equal_to_single_calls(zipped, outputs, x)
    assert calls["addmm"] == 2 + 2


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize("case", [*CASES, SKIPS, POSITIONS, AVERAGED, RESIDUAL, DOUBLE], ids=lambda case: case.name)
def test_all_at_once_is_each_alone(case: Case, share: float) -> None:
    zipped, x = zip_traced(traced_pair(case), case.calibration(12), ZipConfig(share=share, patches=4)), case.examples(5)
    with torch.no_grad():
        for task, output in zipped.run_all(x).items():
            torch.testing.assert_close(output, zipped(x, task), rtol=1e-5, atol=1e-5)


def test_normalisation_ends_the_prefix() -> None:
    """Its parameters are each task's own."""
    zipped, x = zipped_of(RESIDUAL, 1.0), RESIDUAL.examples(5)
    assert common_prefix(zipped.structure).nodes == {"stem.0"}
    outputs, calls = counted(zipped, x)
    assert_equal_to_single_calls(zipped, outputs, x)
    assert calls["convolution"] == 1 + 3 * 4


def test_gradients_are_those_of_single_calls() -> None:
    zipped, x = zipped_of(LENET5, 1.0), LENET5.examples(6)
    sum(output.square().sum() for output in zipped.run_all(x).values()).backward()
    found = {name: p.grad.clone() for name, p in zipped.named_parameters() if p.grad is not None}
    zipped.zero_grad()
    for task in zipped.tasks:
        zipped(x, task).square().sum().backward()
    for name, parameter in zipped.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_in_training_mode_each_task_normalises_with_its_own_statistics() -> None:
    zipped, x = zipped_of(RESIDUAL, 1.0), RESIDUAL.examples(8)
    zipped.train()
    twin = copy.deepcopy(zipped)
    outputs = zipped.run_all(x)
    for task in twin.tasks:
        torch.testing.assert_close(outputs[task], twin(x, task), rtol=1e-5, atol=1e-5)
    for name, buffer in twin.named_buffers():
        torch.testing.assert_close(dict(zipped.named_buffers())[name], buffer)


def test_one_task_alone() -> None:
    zipped, x = zipped_of(LENET5, 1.0, count=2).without("b"), LENET5.examples(4)
    assert_equal_to_single_calls(zipped, zipped.run_all(x), x)


def test_tasks_that_read_other_inputs_are_refused() -> None:
    networks = {task: mlp((9, 7), 3, inputs=size) for task, size in zip(TASKS, (12, 8), strict=True)}
    zipped = zip_networks(networks, {task: torch.randn(9, n) for task, n in zip(TASKS, (12, 8), strict=True)})
    with pytest.raises(InvalidConfig, match=r"read different inputs\. Call the network once per task"):
        zipped.run_all(torch.randn(3, 12))
