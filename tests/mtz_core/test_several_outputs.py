"""Networks with several outputs: each has its kind, what holds them stays, and the loss is their weighted mean."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mtz_core as mtz
from mtz_core.batches import flattened
from mtz_core.errors import InvalidCalibration, InvalidConfig, InvalidZippedFile
from mtz_core.network.graph import OUTPUTS
from mtz_core.network.tracing import trace
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.format import MANIFEST, _digest
from tests.support.several import EXTRA, FEATURES, numbers, read_again, two_heads

pytestmark = pytest.mark.filterwarnings("ignore::mtz_core.ZipWarning")

Data = tuple[Tensor, Tensor]
DECLARED = {"logits": "logits", "found.0": mtz.Output("regression", weight=2.0)}


def originals() -> dict[str, nn.Module]:
    return {"narrow": two_heads(1), "wide": two_heads(2, hidden=20)}


def calibration() -> dict[str, Data]:
    return {"narrow": numbers(80, 1), "wide": numbers(80, 2)}


def config(**settings: Any) -> mtz.ZipConfig:
    return mtz.ZipConfig(outputs={"narrow": DECLARED, "wide": DECLARED}, **settings)


@cache
def zipped(share: float) -> mtz.ZippedNetwork:
    return mtz.zip_networks(originals(), calibration(), config(share=share))


def assert_same(found: Any, expected: Any, close: bool = False) -> None:
    """The same tensors, held alike."""
    assert (type(found), found.keys()) == (dict, expected.keys())
    assert [type(part) for part in found["found"]] == [type(part) for part in expected["found"]]
    assert isinstance(found["found"], list)
    for a, b in ((found["logits"], expected["logits"]), (found["found"][0], expected["found"][0])):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5 if close else 0)


@torch.no_grad()
def test_sharing_nothing_gives_back_the_originals_bit_by_bit_and_what_holds_them() -> None:
    x = numbers(9, seed=7)
    for task, network in originals().items():
        assert_same(zipped(0.0)(x, task), network(*x))
        assert_same(zipped(0.0).network(task)(*x), network(*x))
    assert zipped(0.0).report.stored_bytes == zipped(0.0).report.original_bytes


@torch.no_grad()
def test_a_network_zipped_with_itself_keeps_its_outputs() -> None:
    network, x = two_heads(1), numbers(9, seed=7)
    found = mtz.zip_networks({"a": network, "b": network}, {"a": numbers(80, 1), "b": numbers(80, 2)})
    for task in found.tasks:
        assert_same(found(x, task), network(*x), close=True)
    assert found.report.stored_fraction < 0.6


def test_heads_are_outputs_and_share_nothing() -> None:
    shared = {layer.layer: layer.shared for layer in zipped(1.0).report.layers}
    assert shared == {"first": 16, "more": 16, "second": 16, "classes": 0, "boxes": 0}


@torch.no_grad()
def test_stored_and_read_again_it_is_the_same(tmp_path: Path) -> None:
    again = read_again(zipped(0.6), tmp_path)
    for task in again.tasks:
        assert_same(again(numbers(5), task), zipped(0.6)(numbers(5), task))


@torch.no_grad()
def test_one_pass_for_all_tasks_and_a_task_for_each_example() -> None:
    x = numbers(6, seed=3)
    outputs = zipped(1.0).run_all(x)
    for task in zipped(1.0).tasks:
        assert_same(outputs[task], zipped(1.0)(x, task), close=True)
    tasks = ["wide", "narrow", "narrow", "wide", "wide", "narrow"]
    mixed = zipped(1.0)(x, tasks)
    for number, task in enumerate(tasks):
        torch.testing.assert_close(mixed["logits"][number], outputs[task]["logits"][number])
        torch.testing.assert_close(mixed["found"][0][number], outputs[task]["found"][0][number])


@torch.no_grad()
def test_tasks_come_and_go() -> None:
    x = numbers(6, seed=3)
    alone = zipped(1.0).without("wide")
    assert_same(alone(x, "narrow"), zipped(1.0)(x, "narrow"))
    more = alone.with_task("third", two_heads(3), numbers(80, 3))
    assert_same(more(x, "narrow"), zipped(1.0)(x, "narrow"))
    assert list(more(x, "third")) == ["logits", "found"]


def test_a_report_names_the_kind_of_every_output() -> None:
    judged = zipped(1.0).report.tasks["narrow"]
    assert judged.kinds == "logits: logits, found.0: regression"
    assert judged.guessed == ""
    assert judged.declared == {"logits": mtz.Output("logits"), "found.0": mtz.Output("regression", weight=2.0)}
    guessed = mtz.zip_networks(originals(), calibration()).report.tasks["narrow"]
    assert guessed.kinds == "logits: logits, found.0: regression"
    assert "logits: their softmax tells inputs apart; found.0: " in str(guessed)


@pytest.mark.slow
def test_a_report_says_how_every_output_came_through(tmp_path: Path) -> None:
    """As a file has it, too, with a warning for one that is lost while the others, which count more, are not."""
    heavy = {"logits": mtz.Output("logits", weight=100.0), "found.0": "regression"}
    budget = mtz.Budget(size=0.4, moves=("share", "drop"))
    settings = mtz.ZipConfig(budget=budget, outputs=dict.fromkeys(("a", "b"), heavy))
    message = r"'a' has lost \d+ % of what it knew of 'found\.0'.*Let 'found\.0' count more: declare .* greater weight"
    with pytest.warns(mtz.ZipWarning, match=message):
        found = mtz.zip_networks({"a": apart(1), "b": apart(2)}, dict.fromkeys("ab", numbers(80, 1)), settings)
    again = read_again(found, tmp_path).report.tasks["a"]
    assert again.declared == {"logits": mtz.Output("logits", weight=100.0), "found.0": mtz.Output("regression")}
    output, lost = again.worst
    assert output == "found.0" and lost > 0.5 > again.lost
    assert isinstance(again.output, dict)
    shares = [(own["weight"] / 101, own["lost"], own["agreement"]) for own in again.output.values()]
    assert again.lost == pytest.approx(sum(weight * own for weight, own, _ in shares), rel=1e-4)
    assert again.agreement == pytest.approx(sum(weight * own for weight, _, own in shares))
    even = mtz.ZipConfig(budget=budget, outputs={task: {"logits": "logits"} for task in "ab"})
    mended = mtz.zip_networks({"a": apart(1), "b": apart(2)}, dict.fromkeys("ab", numbers(80, 1)), even)
    assert mended.report.tasks["a"].worst[1] < 0.5
    assert f"agreement (logits {shares[0][2]:.1f} %, found.0 {shares[1][2]:.1f} %), " in str(again)


def test_some_outputs_may_be_declared_and_others_guessed() -> None:
    some = mtz.ZipConfig(outputs={"narrow": {"found.0": "embedding"}}, share=0.0)
    judged = mtz.zip_networks(originals(), calibration(), some).report.tasks
    assert judged["narrow"].kinds == "logits: logits, found.0: embedding"
    assert judged["narrow"].guessed == "logits: their softmax tells inputs apart"
    assert judged["wide"].kinds == "logits: logits, found.0: regression"


def loss_of(outputs: dict[str, Any]) -> Any:
    network = trace(two_heads(1), numbers(4))
    batches = as_batches([dict(zip(("x", "more"), numbers(60, 1), strict=True))], "a")
    declared = mtz.ZipConfig(outputs={"a": outputs}).output_of("a")
    return Traced.measured(network, batches, mtz.ZipConfig(), declared)


def test_what_an_output_weighs_is_its_share_of_the_damage() -> None:
    """With all weight on one output, only layers behind it are felt; the sensitivity of both is the weighted mean."""
    heads = ("classes", "boxes")
    found = {}
    for name, (logits, boxes) in {"even": (1.0, 1.0), "logits": (1.0, 1e-9), "boxes": (1e-9, 1.0)}.items():
        declared = {"logits": mtz.Output("logits", weight=logits), "found.0": mtz.Output("regression", weight=boxes)}
        measured = loss_of(declared)
        assert measured.sensitivity is not None
        found[name] = {head: float(measured.sensitivity[head].sum()) for head in heads}
    assert found["logits"]["boxes"] < 1e-6 * found["logits"]["classes"]
    assert found["boxes"]["classes"] < 1e-6 * found["boxes"]["boxes"]
    assert found["even"]["classes"] == pytest.approx(found["logits"]["classes"] / 2, rel=1e-4)
    assert found["even"]["boxes"] == pytest.approx(found["boxes"]["boxes"] / 2, rel=1e-4)


@pytest.mark.slow
@torch.no_grad()
def test_a_budget_is_kept_and_light_retraining_helps() -> None:
    small = config(budget=mtz.Budget(size=0.4, moves=("share", "drop")))
    validation = {"narrow": numbers(40, 5), "wide": numbers(40, 6)}
    before = mtz.zip_networks(originals(), calibration(), small, validation=validation)
    light = mtz.RetrainConfig(iterations=60, learning_rate=3e-3)
    after = mtz.zip_networks(originals(), calibration(), small, validation=validation, retraining=light)
    assert before.report.stored_fraction <= 0.4
    assert sum(own.lost for own in after.report.tasks.values()) < sum(own.lost for own in before.report.tasks.values())


def apart(seed: int) -> nn.Module:
    """A network half of whose neurons matter to one output, and half to the other."""
    network = two_heads(seed)
    with torch.no_grad():
        network.classes.weight[:, 8:] = 0
        network.boxes.weight[:, :8] = 0
    return network


@pytest.mark.slow
@torch.no_grad()
def test_weights_move_a_budget_s_damage_from_one_output_to_the_other() -> None:
    networks, x, lost = {"a": apart(1), "b": apart(2)}, numbers(200, seed=8), {}
    for name, weight in {"boxes": 30.0, "logits": 1 / 30}.items():
        declared = {"logits": "logits", "found.0": mtz.Output("regression", weight=weight)}
        settings = mtz.ZipConfig(budget=mtz.Budget(size=0.4), outputs=dict.fromkeys(networks, declared))
        found = mtz.zip_networks(networks, dict.fromkeys(networks, numbers(80, 1)), settings)
        errors = [found(x, task)["found"][0] - network(*x)["found"][0] for task, network in networks.items()]
        lost[name] = float(torch.cat(errors).square().mean())
    assert lost["boxes"] < 0.5 * lost["logits"]


def test_metrics_of_several_outputs() -> None:
    x = numbers(30, seed=4)
    exact = {"narrow": x}
    for metric in ("agreement", "output_error"):
        found = mtz.evaluate(zipped(0.0), exact, originals=originals(), metric=metric)["narrow"]
        assert (found.error, found.agreement) == (0, 100)

    labelled: Any = {"narrow": (x, torch.zeros(30))}
    with pytest.raises(InvalidConfig, match=r"measures one output.*logits, found\.0.*agreement or output_error"):
        mtz.evaluate(zipped(0.0), labelled, originals=originals())
    own = mtz.evaluate(zipped(0.0), labelled, metric=lambda y, labels: float((y["logits"][:, 0] * labels).sum()))
    assert own["narrow"].error == 0


def test_every_output_may_have_its_metric_and_labels() -> None:
    x = numbers(30, seed=4)
    with torch.no_grad():
        y = originals()["narrow"](*x)
    labels = {"logits": y["logits"].argmax(dim=1), "found.0": y["found"][0] + 0.5}
    metrics: Any = {"logits": "error", "found.0": "mean_absolute_error"}
    batches = [((x[0][i], x[1][i]), {name: own[i] for name, own in labels.items()}) for i in torch.arange(30).split(12)]
    for data in ((x, labels), batches):
        found = mtz.evaluate(zipped(0.0), {"narrow": data}, originals=originals(), metric=metrics)
        assert list(found) == ["narrow.logits", "narrow.found.0"]
        assert (found["narrow.logits"].error, found["narrow.logits"].agreement) == (0, 100)
        assert found["narrow.found.0"].error == pytest.approx(0.5)
    own = mtz.evaluate(zipped(0.0), {"narrow": (x, labels)}, metric={"found.0": lambda y, z: float((z - y).mean())})
    assert own["narrow.found.0"].error == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("metric", "labels", "message"),
    [
        (
            {"boxes": "error"},
            {"logits": torch.zeros(30)},
            r"for an output 'boxes', but its outputs are logits, found\.0",
        ),
        ({"logits": "error"}, torch.zeros(30), r"are one tensor, but.*by their names: logits, found\.0"),
        ({"logits": "error"}, {"boxes": torch.zeros(30)}, r"labels of 'narrow' are for an output 'boxes'"),
        ({"logits": "error"}, {"found.0": torch.zeros(30)}, r"metric of 'narrow\.logits' needs labels"),
        ({"logits": "error"}, {"logits": torch.full((30,), 4)}, r"labels of 'narrow\.logits' go from 4 to 4"),
        (
            {"found.0": "correlation"},
            {"found.0": torch.zeros(30)},
            r"labels of 'narrow\.found\.0' have shape \[30\].*\[30, 2\]",
        ),
        ({"logits": "error"}, {"logits": torch.zeros(29)}, r"'narrow' has 29 labels for 30 examples"),
        (
            {"logits": "error"},
            {"logits": torch.zeros(30), "found.0": torch.zeros(29)},
            r"unequal lengths \(logits has 30",
        ),
    ],
    ids=["output", "one tensor", "labels of none", "no labels", "class", "shape", "length", "lengths"],
)
def test_metrics_and_labels_that_do_not_fit_are_refused(metric: Any, labels: Any, message: str) -> None:
    with pytest.raises((InvalidConfig, InvalidCalibration), match=message):
        mtz.evaluate(zipped(0.0), {"narrow": (numbers(30), labels)}, originals=originals(), metric=metric)


def test_batches_have_labels_of_the_same_outputs() -> None:
    x, classes = numbers(10), torch.zeros(10)
    batches: Any = [(x, {"logits": classes}), (x, {"found.0": classes})]
    with pytest.raises(InvalidCalibration, match="batches of 'narrow' have labels of different outputs"):
        mtz.evaluate(zipped(0.0), {"narrow": batches}, metric={"logits": "error"})


def labelled(count: int, seed: int) -> tuple[dict[str, Data], dict[str, dict[str, Tensor]]]:
    """Examples, and classes for their logits that the originals do not know."""
    x = numbers(count, seed)
    return dict.fromkeys(originals(), x), {task: {"logits": (x[0][:, 0] > 0).long()} for task in originals()}


@pytest.mark.slow
@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_outputs_with_labels_learn_from_them_and_the_others_are_distilled(weight: float) -> None:
    (training, classes), (validation, held_out) = labelled(200, 4), labelled(80, 5)
    network = mtz.zip_networks(originals(), calibration(), config(share=1.0))
    before = mtz.evaluate(network, {"narrow": validation["narrow"]}, originals=originals(), metric="output_error")
    light = mtz.RetrainConfig(iterations=80, labels=weight, learning_rate=5e-3)
    mtz.retrain(network, originals(), training, validation, light, labels=mtz.Targets(classes, held_out))
    metrics: Any = {"logits": "error", "found.0": "output_error"}
    test: Any = {"narrow": (validation["narrow"], held_out["narrow"])}
    found = mtz.evaluate(network, test, originals=originals(), metric=metrics)
    original = found["narrow.logits"].original_error
    assert original is not None and found["narrow.logits"].error < 0.7 * original
    assert found["narrow.found.0"].error < before["narrow"].error


@torch.no_grad()
def test_labels_and_distillation_are_mixed_output_by_output() -> None:
    """By hand: the logits' mix and the boxes' distillation, by their weights."""
    data, classes = labelled(40, 4)
    light = mtz.RetrainConfig(iterations=0, labels=0.25)
    network = zipped(0.6)
    step, *_ = mtz.retrain(network, originals(), data, data, light, labels=mtz.Targets(classes, classes))
    for task, original in originals().items():
        x = data[task]
        y, aims = flattened(network(x, task)), flattened(original(*x))
        loss = network.loss_of(task, aims)
        (w, logits), (v, boxes) = loss.parts.values()
        assert (w, v) == pytest.approx((1 / 3, 2 / 3))
        distil = {n: own.distillation(aims.tensors[n], 4.0) for n, own in (("logits", logits), ("found.0", boxes))}
        each = {n: float(own(y.tensors[n], aims.tensors[n])) for n, own in distil.items()}
        entropy = float(nn.functional.cross_entropy(y.tensors["logits"], classes[task]["logits"]))
        expected = w * (0.75 * each["logits"] + 0.25 * entropy) + v * each["found.0"]
        assert step.validation_loss[task] == pytest.approx(expected, rel=1e-5)


LABELS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "one tensor": (
        lambda y: y,
        r"training labels for 'narrow' are one tensor.*logits, found\.0.*left out are distilled",
    ),
    "output": (lambda y: {"boxes": y}, r"are for an output 'boxes', but its outputs are logits, found\.0"),
    "kind": (
        lambda y: {"found.0": y},
        r"compared with logits.*puts out regression as 'found\.0'\. Leave its labels out",
    ),
    "class": (lambda y: {"logits": y + 4}, r"training labels for 'narrow' \(logits\) go from 4 to 5\. Allowed: 0 to 3"),
    "number": (lambda y: {"logits": y / 2}, r"training labels for 'narrow' \(logits\) are torch\.float32"),
    "length": (lambda y: {"logits": y[1:]}, r"training labels for 'narrow' \(logits\) have shape \[39\], not \[40\]"),
    "only here": (lambda y: {}, r"training labels for 'narrow' are for outputs none, the validation labels for logits"),
}


@pytest.mark.parametrize(("change", "message"), LABELS.values(), ids=LABELS.keys())
def test_labels_that_do_not_fit_are_refused(change: Callable[[Tensor], Any], message: str) -> None:
    data, classes = labelled(40, 4)
    labels: Any = mtz.Targets({**classes, "narrow": change(classes["narrow"]["logits"])}, classes)
    with pytest.raises((InvalidConfig, InvalidCalibration), match=message):
        mtz.retrain(zipped(0.6), originals(), data, data, mtz.RetrainConfig(labels=0.5), labels=labels)


@pytest.mark.slow
def test_a_floor_holds_for_every_output_that_is_measured() -> None:
    """A floor for a task holds for its outputs; one may have another."""
    x, sizes = numbers(60, seed=9), []
    metrics: Any = {"logits": "agreement", "found.0": "mean_absolute_error"}
    validation = {task: mtz.Validation(x, None, metrics) for task in originals()}
    light = mtz.RetrainConfig(iterations=1)
    for loose in (0.05, 100.0):
        floors = {"narrow": 0.05, "narrow.logits": loose, "wide.found.0": 0.05}
        settings = config(budget=mtz.Budget(floor=floors, moves=("share",)))
        network = mtz.zip_networks(originals(), calibration(), settings, validation=validation, retraining=light)
        found = mtz.evaluate(network, dict.fromkeys(originals(), x), originals=originals(), metric=metrics)
        assert all(found[name].error <= floors.get(name, 0.05) for name in ("narrow.logits", "narrow.found.0"))
        assert found["wide.found.0"].error <= 0.05
        sizes.append(network.report.stored_fraction)
    assert sizes[1] < sizes[0]
    wrong = config(budget=mtz.Budget(floor={"narrow.boxes": 1.0, "wide": 1.0}))
    with pytest.raises(InvalidConfig, match=r"nothing is measured under 'narrow\.boxes'\. Measured: narrow\.logits"):
        mtz.zip_networks(originals(), calibration(), wrong, validation=validation, retraining=light)


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ("logits", r"'narrow': it has several outputs \(logits, found\.0\)\. Declare each by its name"),
        ({"boxes": "regression"}, r"there is no output 'boxes'\. Outputs: logits, found\.0"),
        ({"logits": "probabilities"}, r"output 'logits': its outputs are declared as probabilities, but"),
    ],
)
def test_declarations_that_do_not_fit_are_refused(outputs: Any, message: str) -> None:
    with pytest.raises(InvalidCalibration, match=message):
        mtz.zip_networks(originals(), calibration(), mtz.ZipConfig(outputs={"narrow": outputs}))


class Held(nn.Module):
    """Returns its logits in something."""

    def __init__(self, hold: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.hold = hold
        self.first, self.second = nn.Linear(FEATURES, 9), nn.Linear(9, EXTRA)

    def forward(self, x: Tensor) -> Any:
        return self.hold(self.second(self.first(x).relu()))


HOLDS: dict[str, Callable[[Tensor], Any]] = {
    "dict": lambda y: {"logits": y, "loss": None},
    "tuple": lambda y: (y,),
    "list": lambda y: [None, y],
    "nested": lambda y: {"all": [(y, None)]},
}


@pytest.mark.parametrize("hold", HOLDS.values(), ids=HOLDS.keys())
def test_the_only_tensor_is_one_output_whatever_holds_it(hold: Callable[[Tensor], Any]) -> None:
    torch.manual_seed(1)
    networks = {task: Held(hold) for task in "ab"}
    x = torch.randn(40, FEATURES)
    found = mtz.zip_networks(networks, dict.fromkeys("ab", x), mtz.ZipConfig(share=0.0, outputs={"a": "regression"}))
    with torch.no_grad():
        assert str(found(x, "a")) == str(networks["a"](x))
        assert str(found.network("a")(x)) == str(networks["a"](x))
        labels = Held.forward(networks["b"], x)
    assert found.report.tasks["a"].output == "regression"
    (tensor,) = [part for part in _leaves(labels) if isinstance(part, Tensor)]
    assert mtz.evaluate(found, {"b": (x, tensor.argmax(dim=1))})["b"].error == 0


def _leaves(output: Any) -> list[Any]:
    if isinstance(output, dict):
        output = list(output.values())
    return [leaf for part in output for leaf in _leaves(part)] if isinstance(output, (list, tuple)) else [output]


def test_networks_may_hold_the_same_outputs_differently() -> None:
    networks = {"a": Held(HOLDS["dict"]), "b": Held(lambda y: y)}
    x = torch.randn(40, FEATURES)
    found = mtz.zip_networks(networks, dict.fromkeys("ab", x))
    assert isinstance(found(x, "a"), dict)
    assert isinstance(found(x, "b"), Tensor)
    with pytest.raises(InvalidConfig, match=r"cannot mix a, b"):
        found(x[:2], ["a", "b"])


@pytest.mark.parametrize(
    "change",
    [
        lambda node: node["arguments"].update(form=["dict", ["logits", 7]]),
        lambda node: node["arguments"].update(form=["set", 0, 1]),
        lambda node: node["arguments"].update(names=["logits"]),
        lambda node: node["arguments"].pop("form"),
        lambda node: node["arguments"].update(values=[{"value": "nowhere"}, {"value": "boxes"}]),
    ],
    ids=["number", "container", "names", "no form", "value"],
)
def test_a_file_whose_outputs_make_no_sense_is_refused(change: Callable[[Any], object], tmp_path: Path) -> None:
    zipped(0.6).save(tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (node,) = (node for node in manifest["networks"]["narrow"]["nodes"] if node["kind"] == OUTPUTS)
    change(node)
    manifest["manifest_sha256"] = _digest(manifest)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(InvalidZippedFile, match="malformed"):
        mtz.load(tmp_path)
