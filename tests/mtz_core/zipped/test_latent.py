"""Rounded weights in training: every pass sees what will be stored, and gradients reach what lies behind it."""

import copy
from functools import cache

import pytest
import torch
from torch import Tensor

from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.zipped.latent import LatentNetwork
from mtz_core.zipped.module import attribute
from tests.support.networks import TASKS, Case, Residual, traced_pair, zip_traced

RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6))
BITS_OF = {
    "stem.0/scale/digits+fashion": 4,
    "stem.0/scale/digits": 3,
    "branches.0.0/scale/digits+fashion": 2,
    "branches.0.3/scale/fashion": 8,
    "branches.1.3/scale/digits+fashion": 5,
    "head/scale/digits": 6,
}


@cache
def zipped_once() -> ZippedNetwork:
    return zip_traced(traced_pair(RESIDUAL), RESIDUAL.calibration(20), ZipConfig(share=0.5, patches=8), BITS_OF)


@pytest.fixture
def zipped() -> ZippedNetwork:
    found = copy.deepcopy(zipped_once())
    assert found.structure.bits
    return found


def read(latent: LatentNetwork, zipped: ZippedNetwork) -> ZippedNetwork:
    """A copy of the zipped network with the weights that have been trained."""
    found = copy.deepcopy(zipped)
    found.load_state_dict(latent.rounded(latent.state_dict()))
    return found


def codes(zipped: ZippedNetwork) -> dict[str, Tensor]:
    return {name: zipped.tensors()[name] for name in zipped.structure.bits}


def step(latent: LatentNetwork, rate: float) -> None:
    x = RESIDUAL.examples(8)
    optimiser = torch.optim.SGD(latent.parameters(), lr=rate)
    for task in TASKS:
        latent(x, task).square().sum().backward()
    optimiser.step()
    optimiser.zero_grad()


def test_before_any_step_it_is_the_same_network(zipped: ZippedNetwork) -> None:
    latent, x = LatentNetwork(zipped), RESIDUAL.examples(5)
    for task in TASKS:
        assert torch.equal(latent(x, task), zipped(x, task))
    again = read(latent, zipped)
    for name, tensor in zipped.tensors().items():
        assert torch.equal(again.tensors()[name], tensor)


def test_after_steps_it_computes_what_will_be_stored(zipped: ZippedNetwork) -> None:
    latent, x = LatentNetwork(zipped), RESIDUAL.examples(5)
    for _ in range(3):
        step(latent, 0.01)
    again = read(latent, zipped)
    changed = {name for name, own in codes(again).items() if not torch.equal(own, codes(zipped)[name])}
    assert changed
    for task in TASKS:
        torch.testing.assert_close(latent(x, task), again(x, task), rtol=1e-4, atol=1e-5)
    for name in zipped.structure.scale_shapes():
        assert torch.equal(again.tensors()[name], zipped.tensors()[name])


def test_all_weights_learn_and_scales_do_not(zipped: ZippedNetwork) -> None:
    latent = LatentNetwork(zipped)
    names = {name for name, _ in latent.named_parameters()}
    assert {attribute(name) for name in zipped.structure.bits} <= names
    assert not {attribute(name) for name in zipped.structure.scale_shapes()} & names
    assert latent.tasks == zipped.tasks


def test_gradients_go_straight_through_to_the_weights_behind(zipped: ZippedNetwork) -> None:
    """They are those of a plain network with the rounded values."""
    latent, x = LatentNetwork(zipped), RESIDUAL.examples(8)
    plain = {task: zipped.network(task) for task in TASKS}
    for task in TASKS:
        latent(x, task).square().sum().backward()
        plain[task](x).square().sum().backward()
    gradients = {name: parameter.grad for name, parameter in latent.named_parameters()}
    found = gradients[attribute("stem.0/weight/digits+fashion/digits+fashion")]
    expected = []
    (rows,) = (one for one in zipped.structure.rows["stem.0"].segments if len(one.owners) == 2)
    for task, network in plain.items():
        gradient = network.get_parameter("stem.0.weight").grad
        assert gradient is not None
        expected.append(gradient.flatten(1)[rows.places[task]])
    torch.testing.assert_close(found, expected[0] + expected[1], rtol=1e-3, atol=1e-4)


def test_what_it_is_made_of_stays_as_it_is(zipped: ZippedNetwork) -> None:
    latent = LatentNetwork(zipped)
    step(latent, 0.1)
    for name, tensor in zipped_once().tensors().items():
        assert torch.equal(zipped.tensors()[name], tensor)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_in_the_mode_of_what_it_is_made_of(zipped: ZippedNetwork, training: bool) -> None:
    assert LatentNetwork(zipped.train(training)).training == training


def test_a_network_that_is_not_rounded_is_trained_as_it_is() -> None:
    zipped = zip_traced(traced_pair(RESIDUAL), RESIDUAL.calibration(20), ZipConfig(share=0.5, patches=8))
    latent, plain, x = LatentNetwork(zipped), copy.deepcopy(zipped), RESIDUAL.examples(8)
    for network in (latent, plain):
        optimiser = torch.optim.SGD(network.parameters(), lr=0.01)
        network(x, TASKS[0]).square().sum().backward()
        optimiser.step()
    assert latent.rounded(latent.state_dict()).keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(latent.rounded(latent.state_dict())[name], tensor)
