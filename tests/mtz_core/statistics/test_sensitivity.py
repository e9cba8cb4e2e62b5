"""Sensitivities, against per-example gradients with every class enumerated."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from mtz_core.errors import InvalidCalibration
from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from mtz_core.settings import Kind, Output
from mtz_core.statistics.sensitivity import loss_of, sensitivities
from mtz_core.task_loss import TEMPERATURE, TaskLoss
from tests.support.distillation import distillation_loss
from tests.support.networks import CASES, Case, Residual, lenet5, mlp, traced_pair
from tests.support.zoo.laws import traced as traced_zoo
from tests.support.zoo.table import OWN

pytestmark = pytest.mark.slow


def dense(widths: tuple[int, ...], classes: int) -> nn.Module:
    """A class for every pixel."""
    return nn.Sequential(nn.Conv2d(2, widths[0], 3), nn.Tanh(), nn.Conv2d(widths[0], classes, 2))


def tokens(widths: tuple[int, ...], classes: int) -> nn.Module:
    """A linear layer whose outputs lie at many places, on the last axis."""
    places = nn.Sequential(nn.Linear(4, widths[0]), nn.Tanh(), nn.Flatten())
    return nn.Sequential(*places, nn.Linear(5 * widths[0], widths[1]), nn.ReLU(), nn.Linear(widths[1], classes))


@dataclass(frozen=True)
class Shape:
    """A topology and the shape of its inputs."""

    make: Callable[[], nn.Module]
    input_shape: tuple[int, ...]

    def examples(self, count: int) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(count, *self.input_shape, generator=generator, dtype=torch.float64)


SHAPES = {
    "mlp": Shape(partial(mlp, (5, 4), 3), (12,)),
    "lenet-5": Shape(partial(lenet5, (2, 3, 4), 3), (1, 20, 20)),
    "residual": Shape(partial(Residual, (3, 2, 2), 4), (1, 5, 4)),
    "a class for every pixel": Shape(partial(dense, (3,), 3), (2, 5, 5)),
    "tokens": Shape(partial(tokens, (3, 4), 3), (5, 4)),
}
on_all_shapes = pytest.mark.parametrize("name", SHAPES)


@cache
def given_network(name: str) -> tuple[nn.Module, Network]:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        network = SHAPES[name].make().double().eval()
    return network, trace(network, SHAPES[name].examples(2))


def outputs_of(network: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits, and the outputs of all layers by name."""
    seen: dict[str, Tensor] = {}
    handles = [
        part.register_forward_hook(lambda _, inputs, y, name=name: seen.update({name: y}))
        for name, part in network.named_modules()
        if isinstance(part, (nn.Linear, nn.Conv2d))
    ]
    logits: Tensor = network(x)
    for handle in handles:
        handle.remove()
    return logits, seen


def expected(network: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """``E[Σ_positions E_c[g²]]``, example by example and class by class, with ``g`` that of ``T log softmax(z/T)_c``.

    Classes of different pixels are drawn apart, so that what they give adds up.
    """
    found: dict[str, Tensor] = {}
    for example in x:
        logits, seen = outputs_of(network, example[None])
        scores = TEMPERATURE * torch.log_softmax(logits / TEMPERATURE, dim=1)
        for score in scores.flatten():
            probability = float((score.detach() / TEMPERATURE).exp())
            gradients = torch.autograd.grad(score, list(seen.values()), retain_graph=True)
            for (name, y), gradient in zip(seen.items(), gradients, strict=True):
                axis = 1 if isinstance(network.get_submodule(name), nn.Conv2d) else y.ndim - 1
                squares = gradient.square().movedim(axis, -1).flatten(0, -2).sum(dim=0)
                found[name] = found.get(name, 0) + probability * squares / len(x)
    return found


@on_all_shapes
def test_the_mean_over_many_drawn_classes_approaches_the_expectation(name: str) -> None:
    network, traced = given_network(name)
    x = SHAPES[name].examples(5)
    loss = loss_of(traced, [x], Output("logits"))
    assert isinstance(loss, TaskLoss)
    found = sensitivities(traced, [x.repeat(800, *(1 for _ in x.shape[1:]))], seed=2, loss=loss)
    exact = expected(network, x)
    assert found.keys() == exact.keys()
    for layer, rows in exact.items():
        rows = rows / loss.information
        torch.testing.assert_close(found[layer], rows, rtol=0.08, atol=1e-3 * float(rows.max()))


def test_it_is_the_curvature_of_the_distillation_loss() -> None:
    """A small change of the logits costs ½ E[(g δ)²]; for the last layer that is seen without any network."""
    network, traced = given_network("mlp")
    x = SHAPES["mlp"].examples(6)
    logits = network(x).detach()
    loss = loss_of(traced, [x], Output("logits"))
    assert isinstance(loss, TaskLoss)
    found = sensitivities(traced, [x.repeat(800, 1)], loss=loss)["4"]
    for row in range(3):
        change = torch.zeros(3, dtype=torch.float64)
        change[row] = 1e-3
        lost = distillation_loss(logits + change, logits, TEMPERATURE) / loss.information
        assert float(lost) == pytest.approx(0.5e-6 * float(found[row]), rel=0.05)


@pytest.mark.parametrize("kind", ["regression", "multi-label", "embedding"])
def test_other_outputs_have_the_curvature_of_their_loss(kind: Kind) -> None:
    network, traced = given_network("mlp")
    x = SHAPES["mlp"].examples(6)
    outputs = network(x).detach()
    loss = loss_of(traced, [x], Output(kind))
    found = sensitivities(traced, [x.repeat(800, 1)], loss=loss)["4"]
    for row in range(3):
        change = torch.zeros(3, dtype=torch.float64)
        change[row] = 1e-4
        assert float(loss(outputs + change, outputs)) == pytest.approx(0.5e-8 * float(found[row]), rel=0.05)


# Laws


def rescaled(network: nn.Module, factor: float) -> nn.Module:
    """The same function: the first layer puts out so much less, the second reads so much more."""
    with torch.random.fork_rng():
        changed = mlp((5, 4), 3).double()
    changed.load_state_dict(network.state_dict())
    with torch.no_grad():
        changed.get_parameter("0.weight").div_(factor)
        changed.get_parameter("0.bias").div_(factor)
        changed.get_parameter("2.weight").mul_(factor)
    return changed


@pytest.mark.parametrize("factor", [2.0, 0.5, 8.0])
def test_doubling_what_the_next_layer_reads_with_quadruples_sensitivity(factor: float) -> None:
    network, traced = given_network("mlp")
    x = SHAPES["mlp"].examples(20)
    before = sensitivities(traced, [x])
    after = sensitivities(trace(rescaled(network, factor), x[:2]), [x])
    torch.testing.assert_close(after["0"], factor**2 * before["0"])
    for layer in ("2", "4"):
        torch.testing.assert_close(after[layer], before[layer])


def test_a_neuron_that_nobody_reads_has_none() -> None:
    network, traced = given_network("mlp")
    changed = mlp((5, 4), 3).double()
    changed.load_state_dict(network.state_dict())
    with torch.no_grad():
        changed.get_parameter("2.weight")[:, 1] = 0
    x = SHAPES["mlp"].examples(20)
    found = sensitivities(trace(changed, x[:2]), [x])["0"]
    assert float(found[1]) == 0
    assert bool((found[[0, 2, 3, 4]] > 0).all())
    assert float(sensitivities(traced, [x])["0"][1]) > 0


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_row_of_every_layer_has_a_number_that_is_not_negative(case: Case) -> None:
    for network in traced_pair(case).values():
        found = sensitivities(network, [case.examples(6)])
        assert found.keys() == {node.name for node in network.graph.layers}
        for node in network.graph.layers:
            rows = found[node.name]
            assert rows.shape == (len(network.matrix(node)),)
            assert rows.dtype == torch.float64
            assert bool(torch.isfinite(rows).all() and (rows >= 0).all())


@pytest.mark.parametrize("name", ["u-net", "vit", "language model", "mobilenet-v2"])
def test_families_of_networks_are_sensitive_to_all_their_layers(name: str) -> None:
    (case,) = (case for case in OWN if case.name == name)
    found = sensitivities(traced_zoo(case, "narrow"), [case.examples(8)])
    assert all(float(rows.sum()) > 0 for rows in found.values())


@on_all_shapes
def test_the_same_seed_draws_the_same_classes_whatever_else_is_drawn(name: str) -> None:
    traced, x = given_network(name)[1], SHAPES[name].examples(9)
    first = sensitivities(traced, [x], seed=5)
    torch.manual_seed(77)
    before = torch.get_rng_state()
    again = sensitivities(traced, [x], seed=5)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(rows, again[layer]) for layer, rows in first.items())
    other = sensitivities(traced, [x], seed=6)
    assert any(not torch.equal(rows, other[layer]) for layer, rows in first.items())


@on_all_shapes
@given(count=st.integers(2, 40), size=st.integers(1, 39))
def test_how_the_examples_are_split_makes_no_difference(name: str, count: int, size: int) -> None:
    traced, x = given_network(name)[1], SHAPES[name].examples(count)
    whole, split = sensitivities(traced, [x]), sensitivities(traced, torch.split(x, size))
    for layer, rows in whole.items():
        torch.testing.assert_close(split[layer], rows)


def test_nothing_that_is_given_changes() -> None:
    traced, x = given_network("residual")[1], SHAPES["residual"].examples(9)
    state, data = {name: tensor.clone() for name, tensor in traced.state.items()}, x.clone()
    with torch.no_grad():
        sensitivities(traced, [x])
    assert torch.equal(x, data)
    assert not x.requires_grad
    assert all(torch.equal(tensor, state[name]) for name, tensor in traced.state.items())
    assert not any(tensor.requires_grad or tensor.grad is not None for tensor in traced.state.values())


@pytest.mark.parametrize("batches", [[], [torch.zeros(0, 12, dtype=torch.float64)]], ids=["none", "an empty batch"])
def test_no_examples_are_refused(batches: list[Tensor]) -> None:
    with pytest.raises(InvalidCalibration, match="no calibration examples"):
        sensitivities(given_network("mlp")[1], batches)
