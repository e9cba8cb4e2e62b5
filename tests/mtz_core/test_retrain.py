"""Light retraining keeps the best network that it saw, and is the same every time."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.errors import InvalidCalibration, InvalidConfig
from mtz_core.retrain import RetrainStep, distillation_loss, retrain
from mtz_core.settings import RetrainConfig
from tests.mtz_core.networks import TASKS, Case, Residual, dropout, mlp, traced_pair, zip_traced

MLP = Case("mlp", mlp, (12,), (16, 12), other_classes=5)
RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6))
DROPOUT = Case("dropout", dropout, (12,), (9, 7))
CONFIG = RetrainConfig(iterations=40, batch_size=32, learning_rate=5e-3, validate_every=10, patience=10)


def setting(case: Case = MLP) -> tuple[ZippedNetwork, dict[str, nn.Module], dict[str, Tensor], dict[str, Tensor]]:
    networks = case.pair()
    zipped = zip_traced(traced_pair(case), case.calibration(30), ZipConfig(method="paper"))
    training = {task: case.examples(200, seed=30 + i) for i, task in enumerate(TASKS)}
    validation = {task: case.examples(60, seed=40 + i) for i, task in enumerate(TASKS)}
    return zipped, networks, training, validation


def loss(zipped: ZippedNetwork, networks: dict[str, nn.Module], data: dict[str, Tensor], temperature: float) -> float:
    zipped.eval()
    return sum(
        float(distillation_loss(zipped(data[t], t), networks[t](data[t]), temperature).detach()) for t in zipped.tasks
    )


def totals(steps: list[RetrainStep]) -> list[float]:
    return [sum(step.validation_loss.values()) for step in steps]


def test_distillation_loss_is_the_softened_divergence() -> None:
    outputs, targets = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, 4, dtype=torch.float64)
    for temperature in (1.0, 2.0, 5.0):
        total = 0.0
        for y, t in zip(outputs.tolist(), targets.tolist(), strict=True):
            p, q = ([math.exp(v / temperature) for v in values] for values in (t, y))
            p, q = ([v / sum(values) for v in values] for values in (p, q))
            total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        expected = temperature**2 * total / 6
        assert float(distillation_loss(outputs, targets, temperature)) == pytest.approx(expected)


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_distillation_loss_is_zero_for_equal_outputs(shift: float) -> None:
    outputs = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    found = distillation_loss(outputs, outputs.detach() + shift, 2.0)
    found.backward()
    assert float(found.detach()) == pytest.approx(0, abs=1e-12)
    assert outputs.grad is not None
    assert float(outputs.grad.abs().max()) < 1e-12


def test_the_loss_falls_and_the_best_network_is_kept() -> None:
    zipped, networks, training, validation = setting()
    steps = list(retrain(zipped, networks, training, validation, CONFIG))
    found = totals(steps)
    assert [step.iteration for step in steps] == [0, 10, 20, 30, 40]
    assert found[-1] < 0.5 * found[0]
    assert steps[0].training_loss == {}
    assert all(step.training_loss.keys() == set(TASKS) for step in steps[1:])
    assert [step.best for step in steps] == [value <= min(found[: i + 1]) for i, value in enumerate(found)]
    assert loss(zipped, networks, validation, CONFIG.temperature) == pytest.approx(min(found), rel=1e-5)
    assert not zipped.training


@pytest.mark.parametrize("rate", [1.0, 100.0])
def test_an_absurd_learning_rate_leaves_the_merged_network(rate: float) -> None:
    zipped, networks, training, validation = setting()
    before = zipped.tensors()
    before = {name: block.clone() for name, block in before.items()}
    steps = list(retrain(zipped, networks, training, validation, replace(CONFIG, learning_rate=rate)))
    assert [step.best for step in steps] == [True] + [False] * (len(steps) - 1)
    assert all(torch.equal(block, before[name]) for name, block in zipped.tensors().items())


def test_training_stops_when_nothing_improves() -> None:
    zipped, networks, training, validation = setting()
    config = RetrainConfig(iterations=1000, learning_rate=10.0, validate_every=3, patience=2)
    assert [step.iteration for step in retrain(zipped, networks, training, validation, config)] == [0, 3, 6]


def test_the_last_iteration_is_judged() -> None:
    steps = list(retrain(*setting(), replace(CONFIG, iterations=13)))
    assert [step.iteration for step in steps] == [0, 10, 13]
    assert [step.iteration for step in retrain(*setting(), replace(CONFIG, iterations=0))] == [0]


def test_training_losses_are_means_since_the_last_judgement() -> None:
    zipped, networks, training, validation = setting()
    config = replace(CONFIG, learning_rate=1e-12, batch_size=200, iterations=4, validate_every=2)
    _, *steps = retrain(zipped, networks, training, validation, config)
    for step in steps:
        expected = loss(zipped, networks, training, config.temperature)
        assert sum(step.training_loss.values()) == pytest.approx(expected, rel=1e-4)


def retrained(case: Case) -> tuple[list[RetrainStep], dict[str, Tensor]]:
    zipped, networks, training, validation = setting(case)
    steps = list(retrain(zipped, networks, training, validation, CONFIG))
    return steps, zipped.tensors()


def test_the_same_twice() -> None:
    (steps, blocks), (again, other) = retrained(MLP), retrained(MLP)
    assert steps == again
    assert all(torch.equal(block, other[name]) for name, block in blocks.items())


def test_the_same_twice_with_dropout() -> None:
    assert retrained(DROPOUT)[0] == retrained(DROPOUT)[0]


def test_another_seed_draws_other_batches() -> None:
    first = list(retrain(*setting(), CONFIG))
    assert first != list(retrain(*setting(), replace(CONFIG, seed=1)))


def test_statistics_of_normalisation_stay_and_its_parameters_learn() -> None:
    zipped, networks, training, validation = setting(RESIDUAL)
    before = {name: tensor.clone() for name, tensor in zipped.tensors().items()}
    steps = list(retrain(zipped, networks, training, validation, CONFIG))
    assert totals(steps)[-1] < 0.5 * totals(steps)[0]
    for name, tensor in zipped.tensors().items():
        assert torch.equal(tensor, before[name]) == ("running" in name), name


def test_shared_blocks_learn_from_both_tasks() -> None:
    zipped, networks, training, validation = setting()
    before = {name: block.clone() for name, block in zipped.tensors().items()}
    frozen = zipped(training["fashion"], "fashion").detach()
    perfect = {"digits": networks["digits"], "fashion": Perfect(lambda x: zipped_before(x, "fashion"))}
    zipped_before = copy.deepcopy(zipped)
    assert torch.equal(perfect["fashion"](training["fashion"]), frozen)
    list(retrain(zipped, perfect, training, validation, replace(CONFIG, iterations=10)))
    changed = {name for name, block in zipped.tensors().items() if not torch.equal(block, before[name])}
    assert {"0/weight/digits+fashion/digits+fashion", "4/weight/digits/digits+fashion"} <= changed
    assert not torch.equal(zipped(training["fashion"], "fashion"), frozen)


class Perfect(nn.Module):
    """An original that is a function."""

    def __init__(self, run: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x)


def test_originals_keep_their_weights() -> None:
    zipped, networks, training, validation = setting()
    states = {task: copy.deepcopy(network.state_dict()) for task, network in networks.items()}
    data = {task: x.clone() for task, x in training.items()}
    list(retrain(zipped, networks, training, validation, CONFIG))
    for task, network in networks.items():
        assert all(torch.equal(value, states[task][name]) for name, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())
        assert torch.equal(training[task], data[task])


def test_originals_keep_their_mode() -> None:
    zipped, networks, training, validation = setting()
    networks["digits"].train()
    list(retrain(zipped, networks, training, validation, replace(CONFIG, iterations=1)))
    assert networks["digits"].training


def test_fewer_examples_than_a_batch_are_enough() -> None:
    zipped, networks, training, validation = setting()
    training["digits"] = training["digits"][:3]
    steps = list(retrain(zipped, networks, training, validation, CONFIG))
    assert all(math.isfinite(value) for value in totals(steps))


@pytest.mark.parametrize("part", ["training", "validation"])
def test_no_examples_are_refused(part: str) -> None:
    zipped, networks, training, validation = setting()
    {"training": training, "validation": validation}[part]["fashion"] = torch.zeros(0, 12)
    with pytest.raises(InvalidCalibration, match=f"no {part} examples for 'fashion'"):
        next(retrain(zipped, networks, training, validation, CONFIG))


@pytest.mark.parametrize("part", ["originals", "training", "validation"])
def test_missing_tasks_are_refused(part: str) -> None:
    zipped, networks, training, validation = setting()
    data: dict[str, Any] = {"originals": networks, "training": training, "validation": validation}
    del data[part]["fashion"]
    with pytest.raises((InvalidCalibration, InvalidConfig), match="fashion"):
        next(retrain(zipped, networks, training, validation, CONFIG))


def test_a_loss_that_is_not_finite_is_refused_with_a_remedy() -> None:
    zipped, networks, training, validation = setting()
    with pytest.raises(InvalidCalibration, match=r"not finite after \d+ iterations.*learning_rate"):
        list(retrain(zipped, networks, training, validation, replace(CONFIG, learning_rate=1e30)))


def test_examples_that_are_not_finite_are_refused() -> None:
    zipped, networks, training, validation = setting()
    validation["fashion"][0, 0] = float("nan")
    with pytest.raises(InvalidCalibration, match="fashion"):
        next(retrain(zipped, networks, training, validation, CONFIG))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": -1}, r"iterations: -1.*0 or more"),
        ({"batch_size": 0}, r"batch_size: 0.*positive"),
        ({"learning_rate": -1e-3}, r"learning_rate: -0\.001.*positive"),
        ({"learning_rate": float("nan")}, r"learning_rate: nan"),
        ({"temperature": 0.0}, r"temperature: 0\.0"),
        ({"temperature": float("inf")}, r"temperature: inf"),
        ({"validate_every": 0}, r"validate_every: 0"),
        ({"patience": 0}, r"patience: 0"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        RetrainConfig(**settings)
