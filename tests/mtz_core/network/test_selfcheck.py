"""The self-check catches rules that are wrong, by permuting what they say can be permuted."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import register_operation
from mtz_core.errors import UnsupportedModule
from mtz_core.network.graph import Network
from mtz_core.network.groups import Analysis, analyse
from mtz_core.network.operations import OPERATIONS, Operation, pointwise
from mtz_core.network.selfcheck import TOLERANCE, Reference, check
from mtz_core.network.ties import Ties, compress
from mtz_core.network.tracing import trace
from tests.support.written import Apply


@pytest.fixture(autouse=True)
def operations(monkeypatch: pytest.MonkeyPatch) -> None:
    """A table of operations that is put back afterwards."""
    monkeypatch.setattr("mtz_core.network.operations.OPERATIONS", dict(OPERATIONS))


def untouched(ties: Ties, node: Any, arguments: Mapping[str, Any], out: Tensor) -> Tensor:
    """The first operand's labels, whatever else there is: a rule that forgets."""
    return compress(ties.resolve(next(iter(arguments.values())).labels))


def first_of(ties: Ties, node: Any, arguments: Mapping[str, Any], out: list[Tensor]) -> list[Tensor]:
    """All parts are said to be the first: a rule that does not look."""
    return [untouched(ties, node, arguments, part)[:, : part.shape[1]] for part in out]


WRONG: dict[str, tuple[str, Any, nn.Module]] = {
    # an operator, a wrong rule for it, and what stands between two linear layers
    "moved, said to stay": ("roll", pointwise, Apply(lambda x: x.roll(1, 1))),
    "turned, said to stay": ("flip", pointwise, Apply(lambda x: x.flip(1))),
    "mixed, said to be alone": ("cumsum", pointwise, Apply(lambda x: x.cumsum(1))),
    "normalised, parameters forgotten": ("layer_norm", untouched, nn.LayerNorm(6)),
    "statistics forgotten": ("batch_norm", untouched, nn.BatchNorm1d(6)),
    "groups forgotten": ("group_norm", untouched, nn.GroupNorm(2, 6)),
    "a sum not tied": ("add", untouched, Apply(lambda x: x + x.flip(1))),
    "parts mistaken": ("chunk", first_of, Apply(lambda x: torch.cat(x.chunk(2, 1), 1))),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_rule_is_caught(name: str) -> None:
    kind, rule, between = WRONG[name]
    for parameter in between.parameters():
        nn.init.normal_(parameter)
    if isinstance(between, nn.BatchNorm1d):
        assert between.running_mean is not None
        nn.init.normal_(between.running_mean)
    module = nn.Sequential(nn.Linear(4, 6), between, nn.Linear(6, 3))
    register_operation(kind, Operation(rule))
    with pytest.raises(
        UnsupportedModule, match=r"group '0' are not interchangeable.*list the modules.*keep_separate|'1'"
    ):
        trace(module, torch.randn(3, 4))


@pytest.mark.parametrize("example", [torch.zeros(3, 4), torch.ones(3, 4)], ids=["zero", "alike"])
def test_a_wrong_rule_is_caught_on_examples_that_prove_little(example: Tensor) -> None:
    register_operation("roll", Operation(pointwise))
    between = Apply(lambda x: (x - x.mean(0)).roll(1, 1))
    with pytest.raises(UnsupportedModule, match="are not interchangeable"):
        trace(nn.Sequential(nn.Linear(4, 6, bias=False), between, nn.Linear(6, 3)), example)


def test_the_group_whose_neurons_are_mistaken_is_named() -> None:
    register_operation("cumsum", Operation(pointwise))
    parts = [nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), Apply(lambda x: x.cumsum(1)), nn.Linear(6, 7), nn.ReLU()]
    with pytest.raises(UnsupportedModule, match="the neurons of group '2' are not interchangeable"):
        trace(nn.Sequential(*parts, nn.Linear(7, 3)), torch.randn(3, 4))


def test_a_right_rule_passes() -> None:
    register_operation("cumsum", Operation(pointwise))
    module = nn.Sequential(nn.Linear(4, 6), Apply(lambda x: x.cumsum(0)), nn.Linear(6, 3))
    assert trace(module, torch.randn(3, 4)).graph.widths["0"] == 6


def test_a_rule_that_ties_too_much_passes() -> None:
    def everything(ties: Ties, node: Any, arguments: Mapping[str, Any], out: Tensor) -> Tensor:
        return ties.uniform(untouched(ties, node, arguments, out), ())

    register_operation("cumsum", Operation(everything))
    module = nn.Sequential(nn.Linear(4, 6), Apply(lambda x: x.cumsum(1)), nn.Linear(6, 3))
    assert trace(module, torch.randn(3, 4)).graph.widths["0"] == 1


def traced(module: nn.Module, x: Tensor) -> tuple[Network, Analysis]:
    network = trace(module, x)
    graph = network.graph
    return network, analyse(graph.nodes, graph.output, network.state, network.trainable, network.inputs)


def residual() -> nn.Module:
    class Residual(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            x = self[0](x)
            out: Tensor = self[2](F.relu(x + self[1](x)))
            return out

    return Residual(nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3))


def test_the_check_compares_with_the_module() -> None:
    module, x = residual(), torch.randn(5, 4)
    network, analysis = traced(module, x)
    y = module(x).detach()
    state, before = copy.deepcopy(dict(network.state)), x.clone()
    check(network, analysis, Reference(x, y))
    check(network, analysis, Reference(x, y * (1 + TOLERANCE / 10)))
    for wrong in (y + 0.1, y[:, :2], torch.full_like(y, torch.nan), -y):
        with pytest.raises(UnsupportedModule, match="does not compute what the module does"):
            check(network, analysis, Reference(x, wrong))
    assert torch.equal(x, before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state.items())


class Amplifying(nn.Module):
    """Logistic maps behind two layers: each step doubles what rounding has done.

    Outside of tracing the first layer adds in another order, as kernels of other devices do, and may do something else.
    """

    def __init__(self, steps: int, aside: Callable[[Tensor], Tensor] = torch.clone) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 3)
        self.steps, self.aside = steps, aside

    def forward(self, x: Tensor) -> Tensor:
        weight = self.first.weight
        if not torch.compiler.is_exporting():
            x, weight = self.aside(x.flip(1)), weight.flip(1)
        x = self.second(F.linear(x, weight, self.first.bias)).sigmoid()
        for _ in range(self.steps):
            x = 4 * x * (1 - x)
        return x


def in_single(x: Tensor) -> Tensor:
    if x.dtype != torch.float32:
        raise TypeError
    return x


@pytest.mark.parametrize(("steps", "aside"), [(0, in_single), (8, in_single), (12, torch.clone), (20, torch.clone)])
def test_what_rounding_alone_changes_is_accepted(steps: int, aside: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    module, x = Amplifying(steps, aside), torch.randn(5, 64)
    state = copy.deepcopy(module.state_dict())
    network = trace(module, x)
    assert network.graph.hidden_widths == {"first": 64}
    assert (network.input_dtype, module.training) == (torch.float32, True)
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("steps", [0, 12, 20])
def test_other_effects_are_told_from_rounding(steps: int) -> None:
    torch.manual_seed(0)
    for aside in (lambda x: x + 0.1, lambda x: x + torch.rand_like(x)):
        with pytest.raises(UnsupportedModule, match=r"effects that torch\.export does not see"):
            trace(Amplifying(steps, aside), torch.randn(5, 64))


def test_what_cannot_be_compared_is_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModule, match=r"rounding alone changes the outputs of this network by \d+ %"):
        trace(Amplifying(20, in_single), torch.randn(5, 64))


def test_neurons_that_are_mistaken_are_found_in_spite_of_rounding() -> None:
    register_operation("cumsum", Operation(pointwise))
    torch.manual_seed(0)
    with pytest.raises(UnsupportedModule, match="'0' are not interchangeable"):
        trace(nn.Sequential(nn.Linear(64, 64), Apply(lambda x: x.cumsum(1)), Amplifying(20)), torch.randn(5, 64))


def test_a_network_that_passes_at_once_is_not_run_in_double_precision() -> None:
    network, analysis = traced(residual(), torch.randn(5, 4))
    x = torch.randn(5, 4)
    check(network, analysis, Reference(x, residual_of(network, x), lambda: pytest.fail("the module is run again")))


def test_neurons_of_different_classes_are_left_in_their_places() -> None:
    register_operation("cumsum", Operation(pointwise))
    network, analysis = traced(residual(), torch.randn(5, 4))
    separate = {name: np.arange(len(classes)) for name, classes in analysis.classes.items()}
    unpermuted = replace(analysis, rows={}, columns={}, constants={}, classes=separate)
    x = torch.randn(5, 4)
    with torch.no_grad():
        y = residual_of(network, x)
    check(network, unpermuted, Reference(x, y))


def residual_of(network: Network, x: Tensor) -> Tensor:
    w = network.state
    h = F.linear(x, w["0.weight"], w["0.bias"])
    return F.linear(F.relu(h + F.linear(h, w["1.weight"], w["1.bias"])), w["2.weight"], w["2.bias"])


def test_infinite_outputs_are_compared_by_their_place() -> None:
    module = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3), Apply(masked))
    x = torch.randn(5, 4)
    network, analysis = traced(module, x)
    y = module(x).detach()
    check(network, analysis, Reference(x, y))
    with pytest.raises(UnsupportedModule, match="does not compute"):
        check(network, analysis, Reference(x, y.flip(1)))


def masked(x: Tensor) -> Tensor:
    return x.masked_fill(torch.tensor([False, False, True]), -torch.inf)
