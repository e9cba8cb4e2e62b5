"""The loss of every kind of output: its scale, its curvature, what agrees, and which kind is guessed."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.functional import hessian

from mtz_core.batches import NamedTensors
from mtz_core.errors import InvalidCalibration, InvalidConfig
from mtz_core.settings import Kind, Output, ZipConfig
from mtz_core.task_loss import TEMPERATURE, JointLoss, TaskLoss, make_loss
from tests.support.distillation import distillation_loss


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


OUTPUTS: dict[str, tuple[Kind, Tensor]] = {
    "logits": ("logits", 3 * draw(40, 5)),
    "logits of positions": ("logits", 3 * draw(20, 4, 3, 2)),
    "probabilities": ("probabilities", torch.softmax(3 * draw(40, 5), dim=1)),
    "labels": ("multi-label", 3 * draw(40, 4)),
    "labels behind a sigmoid": ("multi-label", torch.sigmoid(3 * draw(40, 4))),
    "one label": ("multi-label", torch.sigmoid(3 * draw(40, 1))),
    "numbers": ("regression", 100 + draw(40, 3) * torch.tensor([1.0, 10.0, 0.1])),
    "one number": ("regression", draw(40, 1)),
    "a number without an axis": ("regression", draw(40)),
    "a heatmap": ("heatmap", draw(20, 2, 4, 4) * torch.tensor([1.0, 9.0])[:, None, None]),
    "a direction": ("embedding", draw(40, 6)),
}
each = pytest.mark.parametrize(("kind", "targets"), OUTPUTS.values(), ids=OUTPUTS.keys())


def loss_of(kind: Kind, targets: Tensor) -> TaskLoss:
    return TaskLoss.of(targets, Output(kind))


@each
def test_the_original_loses_nothing_and_another_something(kind: Kind, targets: Tensor) -> None:
    loss = loss_of(kind, targets)
    assert float(loss(targets, targets)) == pytest.approx(0, abs=1e-6)
    assert loss.agreement(targets, targets) == pytest.approx(100)
    other = targets.roll(1, dims=0)
    assert float(loss(other, targets)) > 0.1
    assert loss.agreement(other, targets) < 90
    assert loss.relative_error(targets, targets) == 0 < loss.relative_error(other, targets)


def constant(kind: Kind, targets: Tensor) -> Tensor:
    """The constant answer of least loss, found by its formula for each kind, in the form of the outputs."""
    if kind == "logits":
        best = TEMPERATURE * torch.softmax(targets / TEMPERATURE, dim=1).mean(dim=0).log()
    elif kind == "probabilities":
        best = torch.softmax(TEMPERATURE * torch.softmax(targets.log() / TEMPERATURE, dim=1).mean(dim=0).log(), dim=0)
    elif kind == "multi-label" and bool((targets >= 0).all()):
        best = torch.sigmoid(TEMPERATURE * torch.logit(torch.sigmoid(torch.logit(targets) / TEMPERATURE).mean(dim=0)))
    elif kind == "multi-label":
        best = TEMPERATURE * torch.logit(torch.sigmoid(targets / TEMPERATURE).mean(dim=0))
    else:
        best = targets.mean(dim=0)
    return best.expand_as(targets)


@each
def test_the_best_constant_answer_loses_everything(kind: Kind, targets: Tensor) -> None:
    if kind == "embedding":
        pytest.skip("the mean of directions is no direction")
    loss = loss_of(kind, targets)
    best = constant(kind, targets)
    assert float(loss(best, targets)) == pytest.approx(1, rel=1e-3)
    for seed in range(5 if targets.ndim > 1 else 0):
        other = best + 0.01 * best.abs().mean() * draw(*targets.shape[1:], seed=seed)
        if kind in ("logits", "regression", "heatmap"):
            assert float(loss(other.expand_as(targets), targets)) >= 1 - 1e-4


@pytest.mark.slow
@each
def test_drawn_gradients_have_the_curvature_of_the_loss(kind: Kind, targets: Tensor) -> None:
    loss, one = loss_of(kind, targets), targets[:1].double()
    natural = loss.natural(one)
    if kind == "embedding":
        curvature = torch.eye(natural.numel(), dtype=torch.float64) / loss.information
    else:
        # As a function of the natural parameters, which the outputs of these kinds are, or are turned into.
        plain: Kind = "logits" if kind == "probabilities" else kind
        behind = TaskLoss(Output(plain), "", False, None, loss.information)
        curvature = hessian(lambda found: behind(found.reshape(one.shape), natural), natural.flatten())
    generator = torch.Generator().manual_seed(3)
    scores = torch.cat([loss.score(natural, generator).flatten()[None] for _ in range(4000)])
    found = scores.T @ scores / len(scores)
    assert float((found - curvature).norm()) < 0.15 * float(curvature.norm())


def test_logits_lose_what_distillation_counts() -> None:
    targets, outputs = 3 * draw(30, 6), 3 * draw(30, 6, seed=1)
    loss = loss_of("logits", targets)
    for temperature in (1.0, 2.0, 4.0):
        found = loss.divergences(outputs, targets, temperature).mean()
        torch.testing.assert_close(found, distillation_loss(outputs, targets, temperature))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("logits", lambda y: y + 7),
        ("regression", lambda y: 112 * y + 5),
        ("heatmap", lambda y: 112 * y + 5),
        ("embedding", lambda y: 9 * y),
    ],
)
def test_units_make_no_difference(kind: Kind, change: Callable[[Tensor], Tensor]) -> None:
    shape = (30, 4, 3, 3) if kind == "heatmap" else (30, 4)
    targets, outputs = draw(*shape), draw(*shape, seed=1)
    before = float(loss_of(kind, targets)(outputs, targets))
    assert float(loss_of(kind, change(targets))(change(outputs), change(targets))) == pytest.approx(before, rel=1e-3)


def test_an_output_that_hardly_varies_is_not_all() -> None:
    targets = draw(50, 2) * torch.tensor([1.0, 1e-8])
    loss = loss_of("regression", targets)
    assert float(loss(targets + torch.tensor([0.0, 1e-4]), targets)) < 0.01


def test_numbers_agree_within_the_tolerance() -> None:
    targets = 10 * draw(200, 1)
    shifted = targets + torch.where(torch.arange(200)[:, None] < 50, 0.4, 0.6)
    assert TaskLoss.of(targets, Output("regression", tolerance=0.5)).agreement(shifted, targets) == 25
    spread = float(targets.std())
    assert loss_of("regression", targets).agreement(targets + 0.09 * spread, targets) == 100
    assert loss_of("regression", targets).agreement(targets + 0.11 * spread, targets) == 0


def test_labels_agree_by_intersection_over_union() -> None:
    targets = torch.tensor([[1.0, 1.0, -1.0], [-1.0, -1.0, -1.0], [1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]])
    outputs = torch.tensor([[1.0, -1.0, -1.0], [-1.0, -1.0, -1.0], [-1.0, 1.0, -1.0], [1.0, 1.0, 1.0]])
    loss = loss_of("multi-label", targets)
    assert loss.agreements(outputs, targets).tolist() == pytest.approx([1 / 2, 1.0, 0.0, 2 / 3])


@pytest.mark.parametrize(
    ("targets", "ending", "kind"),
    [
        (3 * draw(40, 5), "linear", "logits"),
        (torch.log_softmax(3 * draw(40, 5), dim=1), "log_softmax.int", "logits"),
        (3 * draw(9, 5, 4, 4), "conv2d", "logits"),
        (torch.softmax(3 * draw(40, 5), dim=1), "softmax.int", "probabilities"),
        (torch.softmax(3 * draw(40, 5), dim=1), "", "probabilities"),
        (torch.sigmoid(draw(40, 1)), "sigmoid", "multi-label"),
        (torch.sigmoid(draw(40, 5)), "sigmoid", "multi-label"),
        (draw(40, 1), "linear", "regression"),
        (draw(40), "squeeze.dim", "regression"),
        (0.5 + 0.1 * draw(40, 136), "linear", "regression"),  # landmarks between 0 and 1
        (112 * torch.linspace(0, 1, 136) + draw(40, 136), "linear", "regression"),  # the same in pixels
        (torch.nn.functional.normalize(draw(40, 6)), "div.Tensor", "embedding"),
        (0.01 * draw(40, 5), "linear", "regression"),  # of a network that cannot tell its inputs apart
        (1e5 * draw(40, 5), "linear", "regression"),  # prices
    ],
)
def test_kinds_are_guessed_and_the_reason_is_told(targets: Tensor, ending: str, kind: Kind) -> None:
    loss = TaskLoss.of(targets, None, ending)
    assert loss.kind == kind and loss.guessed
    assert TaskLoss.of(targets, Output(kind), ending).guessed == ""


@pytest.mark.parametrize(
    ("kind", "targets", "reason"),
    [
        ("probabilities", draw(9, 3), "they are negative or do not sum to 1"),
        ("probabilities", torch.rand(9, 3), "they are negative or do not sum to 1"),
        ("logits", torch.softmax(draw(9, 3), dim=1), "as probabilities do"),
        ("logits", draw(9, 1), "there is one only"),
        ("embedding", draw(9), "there is one only"),
    ],
)
def test_a_kind_that_does_not_fit_is_refused(kind: Kind, targets: Tensor, reason: str) -> None:
    with pytest.raises(InvalidCalibration, match=f"its outputs are declared as {kind}, but .*{reason}"):
        TaskLoss.of(targets, Output(kind))


def test_impossible_declarations_are_refused() -> None:
    for given in ("logit", {"tolerance": 1.0}, {"kind": "regression", "unit": "px"}, 3):
        with pytest.raises(InvalidConfig, match="output"):
            Output.declared(given)  # type: ignore[arg-type]
    for tolerance in (0, -1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(InvalidConfig, match="tolerance"):
            Output("regression", tolerance)  # type: ignore[arg-type]
    with pytest.raises(InvalidConfig, match=r"output\.tolerance: logits has none"):
        Output("logits", 1.0)
    assert Output.declared({"kind": "regression", "tolerance": 2}) == Output("regression", 2)
    for weight in (0, -1.0, float("inf"), "1"):
        with pytest.raises(InvalidConfig, match=r"output\.weight: .* a positive number"):
            Output("logits", weight=weight)  # type: ignore[arg-type]
    assert Output.declared("logits") == Output("logits") and Output.declared(None) is None


def test_an_output_may_have_the_name_of_a_field() -> None:
    logits, numbers = Output("logits"), Output("regression", weight=2.0)
    for given, expected in (
        ({"kind": "logits", "where": {"kind": "regression", "weight": 2.0}}, {"kind": logits, "where": numbers}),
        ({"weight": numbers, "kind": logits}, {"weight": numbers, "kind": logits}),
        ({"kind": {"kind": "logits"}}, {"kind": logits}),
        ({"tolerance": "logits", "other": None}, {"tolerance": logits}),
        ({"kind": "regression", "tolerance": None, "weight": 2.0}, numbers),
    ):
        assert ZipConfig(outputs={"a": given}).outputs == {"a": expected}
    with pytest.raises(InvalidConfig, match=r"is no declaration\. Allowed: \{kind: …"):
        ZipConfig(outputs={"a": {"kind": "regression", "tolerence": 0.5}})


@each
def test_constant_outputs_tell_nothing(kind: Kind, targets: Tensor) -> None:
    same = targets[:1].expand_as(targets)
    assert not loss_of(kind, same).tells
    assert loss_of(kind, targets).tells


def several(seed: int, constant: bool = False) -> NamedTensors:
    """Logits, and numbers that may be the same for all examples."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.ones(40, 3) if constant else torch.randn(40, 3, generator=generator)
    return NamedTensors({"logits": 4 * torch.randn(40, 5, generator=generator), "numbers": numbers})


ENDINGS = {"logits": "linear", "numbers": "linear"}


def test_the_loss_of_several_outputs_is_their_mean_by_weights() -> None:
    targets, outputs = several(1), several(2)
    declared = {"logits": Output("logits"), "numbers": Output("regression", weight=3.0)}
    loss = make_loss(targets, declared, ENDINGS)
    assert isinstance(loss, JointLoss)
    parts = {name: TaskLoss.of(targets.tensors[name], declared[name]) for name in declared}

    def mean(of: Callable[[TaskLoss, Tensor, Tensor], float]) -> float:
        each = {name: of(part, outputs.tensors[name], targets.tensors[name]) for name, part in parts.items()}
        return 0.25 * each["logits"] + 0.75 * each["numbers"]

    assert float(loss(outputs, targets)) == pytest.approx(mean(lambda part, a, b: float(part(a, b))))
    assert loss.agreement(outputs, targets) == pytest.approx(mean(lambda part, a, b: part.agreement(a, b)))
    assert loss.relative_error(outputs, targets) == pytest.approx(mean(lambda part, a, b: part.relative_error(a, b)))
    assert {name: weight for name, (weight, _) in loss.parts.items()} == {"logits": 0.25, "numbers": 0.75}
    assert float(loss(targets, targets)) == pytest.approx(0, abs=1e-6)
    assert loss.kind == "logits: logits, numbers: regression"


def test_an_output_that_does_not_depend_on_the_input_has_no_weight() -> None:
    targets, outputs = several(1, constant=True), several(2)
    loss = make_loss(targets, {"numbers": Output("regression")}, ENDINGS)
    assert isinstance(loss, JointLoss)
    assert loss.weights == {"logits": 1, "numbers": 0}
    alone = loss.losses["logits"](outputs.tensors["logits"], targets.tensors["logits"])
    assert float(loss(outputs, targets)) == pytest.approx(float(alone))
    constant = NamedTensors({name: torch.ones(4, 3) for name in ENDINGS})
    silent = make_loss(constant, dict.fromkeys(ENDINGS, Output("regression")), ENDINGS)
    assert isinstance(silent, JointLoss)
    assert not silent.tells
    assert float(silent(constant, constant)) == 0


def test_outputs_are_declared_by_their_names() -> None:
    one, both = torch.randn(9, 4), several(1)
    assert isinstance(make_loss(one, {"logits": Output("regression")}, {"logits": "linear"}), TaskLoss)
    assert make_loss(one, Output("regression"), {"logits": "linear"}).kind == "regression"
    with pytest.raises(InvalidCalibration, match=r"there is no output 'boxes'\. Outputs: one without a name"):
        make_loss(one, {"boxes": Output("regression")}, {"": "linear"})
    with pytest.raises(InvalidCalibration, match=r"there is no output 'boxes'\. Outputs: logits, numbers"):
        make_loss(both, {"boxes": Output("regression")}, ENDINGS)
    with pytest.raises(InvalidCalibration, match=r"several outputs \(logits, numbers\)\. Declare each"):
        make_loss(both, Output("regression"), ENDINGS)
