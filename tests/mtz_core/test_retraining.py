"""Light retraining keeps the best network that it saw, and is the same every time."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.errors import InvalidCalibration, InvalidConfig
from mtz_core.retraining import (
    AVERAGED,
    SMALLER,
    Retraining,
    RetrainState,
    RetrainStep,
    Targets,
    original_outputs,
    retrain_steps,
)
from mtz_core.settings import RetrainConfig
from mtz_core.zipped.report import TaskReport
from mtz_core.zipped.structure import own_name
from tests.support.distillation import distillation_loss
from tests.support.networks import TASKS, Case, Residual, dropout, mlp, traced_pair, zip_traced

pytestmark = pytest.mark.slow

MLP = Case("mlp", mlp, (12,), (16, 12), other_classes=5)
RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6))
DROPOUT = Case("dropout", dropout, (12,), (9, 7))
CONFIG = RetrainConfig(iterations=40, batch_size=32, learning_rate=5e-3, validate_every=10, patience=10)


Setting = tuple[ZippedNetwork, dict[str, nn.Module], dict[str, Tensor], dict[str, Tensor]]


def setting(case: Case = MLP) -> Setting:
    networks = case.pair()
    zipped = zip_traced(traced_pair(case), case.calibration(30), ZipConfig(method="paper"))
    zipped.judged(dict.fromkeys(TASKS, TaskReport("logits", None, "", 0.0, 100.0, 1)))
    training = {task: case.examples(200, seed=30 + i) for i, task in enumerate(TASKS)}
    validation = {task: case.examples(60, seed=40 + i) for i, task in enumerate(TASKS)}
    return zipped, networks, training, validation


def labels_for(networks: dict[str, nn.Module], data: dict[str, Tensor]) -> dict[str, Tensor]:
    """The originals' own predictions."""
    return {task: network.eval()(data[task]).argmax(dim=1) for task, network in networks.items()}


def labelled(case: Case = MLP) -> tuple[Setting, Targets]:
    """A setting, and labels for it."""
    zipped, networks, training, validation = setting(case)
    given = Targets(labels_for(networks, training), labels_for(networks, validation))
    return (zipped, networks, training, validation), given


def copy_of(zipped: ZippedNetwork) -> ZippedNetwork:
    return ZippedNetwork(zipped.structure, {name: tensor.clone() for name, tensor in zipped.tensors().items()})


def most(case: Case = MLP, temperature: float = CONFIG.temperature) -> dict[str, float]:
    """What the best constant answer loses on each task's training data, by the definition of distillation."""
    _, networks, training, _ = setting(case)
    found = {}
    for task, network in networks.items():
        targets = network(training[task]).detach().double()
        best = temperature * torch.softmax(targets / temperature, dim=1).mean(dim=0).log()
        found[task] = float(distillation_loss(best.expand_as(targets), targets, temperature))
    return found


def loss(zipped: ZippedNetwork, networks: dict[str, nn.Module], data: dict[str, Tensor], temperature: float) -> float:
    zipped.eval()
    all_of = most(MLP, temperature)
    return sum(
        float(distillation_loss(zipped(data[t], t), networks[t](data[t]), temperature).detach()) / all_of[t]
        for t in zipped.tasks
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
    steps = list(retrain_steps(zipped, networks, training, validation, CONFIG))
    found = totals(steps)
    assert [step.iteration for step in steps] == [0, 10, 20, 30, 40]
    assert found[-1] < 0.5 * found[0]
    assert steps[0].training_loss == {}
    assert all(step.training_loss.keys() == set(TASKS) for step in steps[1:])
    assert [step.best for step in steps] == [value <= min(found[: i + 1]) for i, value in enumerate(found)]
    assert loss(zipped, networks, validation, CONFIG.temperature) == pytest.approx(min(found), rel=1e-5)
    assert not zipped.training


@pytest.mark.parametrize("rate", [100.0, 1e6])
def test_an_absurd_learning_rate_leaves_the_merged_network(rate: float) -> None:
    zipped, networks, training, validation = setting()
    before = zipped.tensors()
    before = {name: block.clone() for name, block in before.items()}
    steps = list(retrain_steps(zipped, networks, training, validation, replace(CONFIG, learning_rate=rate)))
    assert [step.best for step in steps] == [True] + [False] * (len(steps) - 1)
    assert all(torch.equal(block, before[name]) for name, block in zipped.tensors().items())


def test_after_a_setback_training_goes_on_from_the_best_network_at_a_lower_rate() -> None:
    zipped, networks, training, validation = setting()
    config = replace(CONFIG, learning_rate=1.0, batch_size=200, iterations=50)  # a batch has all examples
    run = Retraining(copy_of(zipped), networks, training, validation, config)
    curve = list(run.steps())
    assert [step.best for step in curve] == [True, False, False, True, True, True]
    lower = replace(config, learning_rate=SMALLER**2, iterations=30)
    from_the_best = list(retrain_steps(zipped, networks, training, validation, lower))
    for found, expected in zip(curve[3:], from_the_best[1:], strict=True):
        assert found.validation_loss == pytest.approx(expected.validation_loss, rel=1e-3)


def test_training_stops_when_nothing_improves() -> None:
    zipped, networks, training, validation = setting()
    config = RetrainConfig(iterations=1000, learning_rate=10.0, validate_every=3, patience=2)
    assert [step.iteration for step in retrain_steps(zipped, networks, training, validation, config)] == [0, 3, 6]


def test_the_last_iteration_is_validated() -> None:
    steps = list(retrain_steps(*setting(), replace(CONFIG, iterations=13)))
    assert [step.iteration for step in steps] == [0, 10, 13]
    assert [step.iteration for step in retrain_steps(*setting(), replace(CONFIG, iterations=0))] == [0]


def test_training_losses_are_means_since_the_last_validation() -> None:
    zipped, networks, training, validation = setting()
    config = replace(CONFIG, learning_rate=1e-12, batch_size=200, iterations=4, validate_every=2)
    _, *steps = retrain_steps(zipped, networks, training, validation, config)
    for step in steps:
        expected = loss(zipped, networks, training, config.temperature)
        assert sum(step.training_loss.values()) == pytest.approx(expected, rel=1e-4)


def retrained(case: Case) -> tuple[list[RetrainStep], dict[str, Tensor]]:
    zipped, networks, training, validation = setting(case)
    steps = list(retrain_steps(zipped, networks, training, validation, CONFIG))
    return steps, zipped.tensors()


def test_the_same_twice() -> None:
    (steps, blocks), (again, other) = retrained(MLP), retrained(MLP)
    assert steps == again
    assert all(torch.equal(block, other[name]) for name, block in blocks.items())


def test_the_same_twice_with_dropout() -> None:
    assert retrained(DROPOUT)[0] == retrained(DROPOUT)[0]


def test_another_seed_draws_other_batches() -> None:
    first = list(retrain_steps(*setting(), CONFIG))
    assert first != list(retrain_steps(*setting(), replace(CONFIG, seed=1)))


def test_kept_statistics_stay_and_the_parameters_of_normalisation_learn() -> None:
    zipped, networks, training, validation = setting(RESIDUAL)
    before = {name: tensor.clone() for name, tensor in zipped.tensors().items()}
    steps = list(retrain_steps(zipped, networks, training, validation, replace(CONFIG, statistics="kept")))
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
    list(retrain_steps(zipped, perfect, training, validation, replace(CONFIG, iterations=10)))
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
    list(retrain_steps(zipped, networks, training, validation, CONFIG))
    for task, network in networks.items():
        assert all(torch.equal(value, states[task][name]) for name, value in network.state_dict().items())
        assert all(p.grad is None for p in network.parameters())
        assert torch.equal(training[task], data[task])


def test_originals_keep_their_mode() -> None:
    zipped, networks, training, validation = setting()
    networks["digits"].train()
    list(retrain_steps(zipped, networks, training, validation, replace(CONFIG, iterations=1)))
    assert networks["digits"].training


def test_fewer_examples_than_a_batch_are_enough() -> None:
    zipped, networks, training, validation = setting()
    training["digits"] = training["digits"][:3]
    steps = list(retrain_steps(zipped, networks, training, validation, CONFIG))
    assert all(math.isfinite(value) for value in totals(steps))


@pytest.mark.parametrize("part", ["training", "validation"])
def test_no_examples_are_refused(part: str) -> None:
    zipped, networks, training, validation = setting()
    {"training": training, "validation": validation}[part]["fashion"] = torch.zeros(0, 12)
    with pytest.raises(InvalidCalibration, match=f"no {part} examples for 'fashion'"):
        next(retrain_steps(zipped, networks, training, validation, CONFIG))


@pytest.mark.parametrize("part", ["originals", "training", "validation"])
def test_missing_tasks_are_refused(part: str) -> None:
    zipped, networks, training, validation = setting()
    data: dict[str, Any] = {"originals": networks, "training": training, "validation": validation}
    del data[part]["fashion"]
    with pytest.raises((InvalidCalibration, InvalidConfig), match="fashion"):
        next(retrain_steps(zipped, networks, training, validation, CONFIG))


def test_a_loss_that_is_not_finite_is_refused_with_a_remedy_and_leaves_the_best_network() -> None:
    zipped, networks, training, validation = setting()
    before = {name: block.clone() for name, block in zipped.tensors().items()}
    with pytest.raises(InvalidCalibration, match=r"not finite after \d+ iterations.*learning_rate"):
        list(retrain_steps(zipped, networks, training, validation, replace(CONFIG, learning_rate=1e30)))
    assert all(torch.equal(block, before[name]) for name, block in zipped.tensors().items())


def test_batches_of_one_value_for_each_channel_have_no_statistics() -> None:
    def make(*_: object) -> nn.Module:
        return nn.Sequential(nn.Linear(12, 9), nn.BatchNorm1d(9), nn.Linear(9, 4))

    zipped, networks, training, validation = setting(Case("normalised", make, (12,), (9,)))
    alone = replace(CONFIG, batch_size=1, iterations=2)
    with pytest.raises(InvalidConfig, match=r"one value for each channel of '1'.* two examples .*statistics to kept"):
        list(retrain_steps(zipped, networks, training, validation, alone))
    remedies: tuple[dict[str, Any], ...] = ({"batch_size": 2}, {"statistics": "kept"})
    for remedy in remedies:
        assert len(list(retrain_steps(zipped, networks, training, validation, replace(alone, **remedy)))) == 2


def test_examples_that_are_not_finite_are_refused() -> None:
    zipped, networks, training, validation = setting()
    validation["fashion"][0, 0] = float("nan")
    with pytest.raises(InvalidCalibration, match="fashion"):
        next(retrain_steps(zipped, networks, training, validation, CONFIG))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"iterations": -1}, r"iterations: -1.*0 or more"),
        ({"batch_size": 0}, r"batch_size: 0.*1 or more"),
        ({"batch_size": 2.5}, r"batch_size: 2\.5.*whole"),
        ({"iterations": 1.5}, r"iterations: 1\.5.*whole"),
        ({"labels": -0.1}, r"labels: -0\.1.*0 .* to 1"),
        ({"labels": float("nan")}, r"labels: nan"),
        ({"labels": True}, r"labels: True"),
        ({"statistics": "learned"}, r"statistics: 'learned'.*'updated', 'kept'"),
        ({"balance": {"digits": 0}}, r"balance: .*positive"),
        ({"balance": 1.0}, r"balance: 1\.0"),
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


def test_the_average_of_the_weights_is_validated() -> None:
    zipped, networks, training, validation = setting()
    config = replace(CONFIG, iterations=15, validate_every=1)
    run = Retraining(zipped, networks, training, validation, config)
    weights: list[dict[str, Tensor]] = []
    for step in run.steps():
        parts = {part: pick(run.state(), part) for part in ("network", "average", "best")}
        weights.append(parts["network"])
        expected = {name: tensor.double() for name, tensor in weights[0].items()}
        for t, later in enumerate(weights[1:], 1):
            share = AVERAGED / (t + AVERAGED - 1)
            expected = {name: (1 - share) * tensor + share * later[name] for name, tensor in expected.items()}
        for name, tensor in expected.items():
            torch.testing.assert_close(parts["average"][name].double(), tensor, atol=1e-6, rtol=1e-5)
        held_out = copy_of(zipped)
        held_out.load_state_dict(parts["average"])
        assert sum(step.validation_loss.values()) == pytest.approx(
            loss(held_out, networks, validation, config.temperature), rel=1e-4
        )
        assert step.best == all(torch.equal(parts["best"][name], parts["average"][name]) for name in expected)


def pick(state: RetrainState, part: str) -> dict[str, Tensor]:
    return {name.partition("/")[2]: tensor for name, tensor in state.tensors.items() if name.startswith(f"{part}/")}


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distillation_and_labels_are_mixed(weight: float) -> None:
    (zipped, networks, training, validation), labels = labelled()
    config = replace(CONFIG, labels=weight)
    first = next(retrain_steps(zipped, networks, training, validation, config, labels=labels if weight else None))
    for task in TASKS:
        outputs = zipped(validation[task], task)
        distilled = distillation_loss(outputs, networks[task](validation[task]), config.temperature) / most()[task]
        truth = labels.validation[task]
        assert isinstance(truth, Tensor)
        expected = (1 - weight) * distilled + weight * F.cross_entropy(outputs, truth)
        assert first.validation_loss[task] == pytest.approx(float(expected.detach()), rel=1e-5)


def test_labels_alone_need_no_originals() -> None:
    (zipped, _, training, validation), labels = labelled()
    found = totals(list(retrain_steps(zipped, {}, training, validation, replace(CONFIG, labels=1.0), labels=labels)))
    assert min(found) < 0.7 * found[0]


def test_outputs_computed_once_give_the_same() -> None:
    zipped, networks, training, validation = setting()
    outputs = original_outputs(networks, training, validation)
    spared = copy_of(zipped)
    steps = list(retrain_steps(zipped, networks, training, validation, CONFIG))
    assert list(retrain_steps(spared, {}, training, validation, CONFIG, outputs=outputs)) == steps
    assert all(torch.equal(tensor, zipped.tensors()[name]) for name, tensor in spared.tensors().items())


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (MLP, replace(CONFIG, balance={"digits": 2.0, "fashion": 1.0})),
        (MLP, replace(CONFIG, labels=0.5, seed=3)),
        (RESIDUAL, replace(CONFIG, iterations=25)),
        (MLP, replace(CONFIG, learning_rate=1.0, patience=2)),
    ],
)
def test_a_run_that_is_taken_down_at_any_judgement_goes_on_to_the_same_bytes(case: Case, config: RetrainConfig) -> None:
    (zipped, networks, training, validation), labels = labelled(case)
    given = labels if config.labels else None
    whole = Retraining(copied := copy_of(zipped), networks, training, validation, config, labels=given)
    states = [whole.state() for _ in whole.steps()]
    for count, state in enumerate(states, 1):
        other = copy_of(zipped)
        resumed = Retraining(other, networks, training, validation, config, labels=given)
        resumed.resume(state)
        assert len(list(resumed.steps())) == len(states) - count
        assert resumed.curve == whole.curve
        assert all(torch.equal(tensor, copied.tensors()[name]) for name, tensor in other.tensors().items())


def test_a_state_is_a_copy() -> None:
    zipped, networks, training, validation = setting()
    run = Retraining(zipped, networks, training, validation, CONFIG)
    steps = run.steps()
    next(steps), next(steps)
    state = run.state()
    before = copy.deepcopy(state.tensors)
    list(steps)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors.items())


def test_a_state_of_another_network_is_refused() -> None:
    zipped, networks, training, validation = setting()
    run = Retraining(*setting(DROPOUT), CONFIG)
    next(run.steps())
    with pytest.raises(InvalidConfig, match="another network"):
        Retraining(zipped, networks, training, validation, CONFIG).resume(run.state())


def test_a_task_with_more_weight_gets_closer_to_its_original() -> None:
    def final(weight: float) -> RetrainStep:
        config = replace(CONFIG, balance={"digits": weight, "fashion": 1.0})
        steps = list(retrain_steps(*setting(), config))
        return next(step for step in reversed(steps) if step.best)

    light, heavy = final(0.02), final(50.0)
    assert heavy.validation_loss["digits"] < light.validation_loss["digits"]
    assert heavy.validation_loss["fashion"] > light.validation_loss["fashion"]


def test_weights_of_tasks_count_in_proportion() -> None:
    two = replace(CONFIG, balance={"digits": 2.0, "fashion": 2.0})
    assert list(retrain_steps(*setting(), two)) == list(retrain_steps(*setting(), CONFIG))


def test_updated_statistics_follow_the_batches_of_each_task() -> None:
    zipped, networks, training, validation = setting(RESIDUAL)
    alone = {task: zipped.network(task).train() for task in TASKS}
    config = replace(CONFIG, iterations=3, validate_every=3, batch_size=200, learning_rate=1e-12)
    run = Retraining(zipped, networks, training, validation, config)
    for step in run.steps():
        if step.iteration == 3:
            found = {name: tensor.clone() for name, tensor in zipped.tensors().items()}
    followed = 0
    for task, network in alone.items():
        for _ in range(3):
            network(training[task])
        for name, tensor in network.state_dict().items():
            if "running" in name:
                torch.testing.assert_close(found[own_name(name, task)], tensor, atol=1e-5, rtol=1e-4)
                followed += 1
    assert followed > 0


def test_dropout_stays_off_when_statistics_are_updated() -> None:
    kept, updated = (
        list(retrain_steps(*setting(DROPOUT), replace(CONFIG, statistics=treatment)))
        for treatment in ("kept", "updated")
    )
    assert kept == updated


Change = Callable[[dict[str, Tensor]], object]


@pytest.mark.parametrize("split", ["training", "validation"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda labels: labels.pop("fashion"), "there are no {} labels for 'fashion'"),
        (lambda labels: labels["fashion"].fill_(5), "{} labels for 'fashion' go from 5 to 5. Allowed: 0 to 4"),
        (lambda labels: labels["digits"].fill_(-1), "{} labels for 'digits' go from -1 to -1"),
        (lambda labels: labels.update(digits=labels["digits"][:-1]), "{} labels for 'digits' have shape"),
        (lambda labels: labels.update(digits=labels["digits"] / 0), "{} labels for 'digits' are torch.float32"),
        (lambda labels: labels.update(shoes=labels["digits"]), "{} labels: 'shoes' is no task"),
    ],
)
def test_impossible_labels_are_refused(split: str, change: Change, message: str) -> None:
    (zipped, networks, training, validation), labels = labelled()
    change(getattr(labels, split))
    with pytest.raises((InvalidCalibration, InvalidConfig), match=message.format(split)):
        Retraining(zipped, networks, training, validation, replace(CONFIG, labels=0.5), labels=labels)


def test_labels_and_their_weight_must_agree() -> None:
    (zipped, networks, training, validation), labels = labelled()
    with pytest.raises(InvalidCalibration, match="there are no labels"):
        Retraining(zipped, networks, training, validation, replace(CONFIG, labels=0.5))
    with pytest.raises(InvalidConfig, match="their weight is 0"):
        Retraining(zipped, networks, training, validation, CONFIG, labels=labels)


@pytest.mark.parametrize("part", ["originals", "training", "validation"])
def test_unknown_tasks_are_refused(part: str) -> None:
    zipped, networks, training, validation = setting()
    data: dict[str, Any] = {"originals": networks, "training": training, "validation": validation}
    data[part]["shoes"] = data[part]["digits"]
    with pytest.raises(InvalidConfig, match=r"'shoes' is no task of the zipped network\. Tasks: digits, fashion"):
        Retraining(zipped, networks, training, validation, CONFIG)


def test_weights_of_unknown_tasks_are_refused() -> None:
    with pytest.raises(InvalidConfig, match="shoes"):
        Retraining(*setting(), replace(CONFIG, balance={"digits": 1.0, "shoes": 1.0}))


def test_original_outputs_that_are_not_finite_are_refused() -> None:
    zipped, networks, training, validation = setting()
    broken = Perfect(lambda x: networks["digits"](x) / 0)
    with pytest.raises(InvalidCalibration, match="original network of 'digits' puts out NaN or infinite values"):
        Retraining(zipped, networks | {"digits": broken}, training, validation, CONFIG)


def test_outputs_of_other_examples_are_refused() -> None:
    zipped, networks, training, validation = setting()
    outputs = original_outputs(networks, validation, validation)
    with pytest.raises(InvalidCalibration, match=r"training examples of 'digits' should have shape \[200, .*\[60, "):
        Retraining(zipped, networks, training, validation, CONFIG, outputs=outputs)


def test_outputs_that_are_not_finite_are_refused() -> None:
    zipped, networks, training, validation = setting()
    outputs = original_outputs(networks, training, validation)
    found = outputs.validation["digits"]
    assert isinstance(found, Tensor)
    found[3, 1] = float("inf")
    with pytest.raises(InvalidCalibration, match="puts out NaN or infinite values for its validation examples"):
        Retraining(zipped, networks, training, validation, CONFIG, outputs=outputs)


def test_examples_of_another_shape_are_refused() -> None:
    zipped, networks, training, validation = setting()
    training["digits"] = training["digits"][:, :7]
    with pytest.raises(InvalidCalibration, match=r"training examples for 'digits' have shape \[7\].*shape \[12\]"):
        Retraining(zipped, networks, training, validation, CONFIG)


def test_a_network_that_is_broken_from_the_start_is_refused() -> None:
    zipped, networks, training, validation = setting()
    with torch.no_grad():
        next(zipped.parameters()).fill_(float("nan"))
    with pytest.raises(InvalidCalibration, match=r"after 0 iterations.*zip again"):
        next(retrain_steps(zipped, networks, training, validation, CONFIG))
