"""The façade as a user of PyTorch expects it: names, data, progress, warnings, tables, retraining, evaluation."""

from __future__ import annotations

import copy
import json
import logging
import pickle
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import mtz_core as mtz
from mtz_core.facade import Labelled
from mtz_core.zipped.report import ROWS, TaskReport
from tests.support.networks import lenet5

TASKS = ("a", "b")
ROOT = Path(__file__).parents[2]
FORMER = Path(__file__).parent / "zipped" / "version-0.1"
"""A network that version 0.1 zipped and saved, and outputs that it had."""
QUIET = pytest.mark.filterwarnings("ignore::mtz_core.ZipWarning")


def networks(widths: dict[str, int] | None = None) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {}
    for seed, task in enumerate(TASKS):
        torch.manual_seed(seed)
        width = (widths or {}).get(task, 12)
        found[task] = nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Linear(width, 9), nn.ReLU(), nn.Linear(9, 3))
    return found


@pytest.fixture
def calibration() -> dict[str, Tensor]:
    return {task: torch.rand(60, 6) for task in TASKS}


@pytest.fixture(scope="module")
def zipped_once() -> mtz.ZippedNetwork:
    generator = torch.Generator().manual_seed(0)
    data = {task: torch.rand(60, 6, generator=generator) for task in TASKS}
    return mtz.zip_networks(networks(), data, mtz.ZipConfig(outputs=dict.fromkeys(TASKS, mtz.Output("logits"))))


@pytest.fixture
def zipped(zipped_once: mtz.ZippedNetwork) -> mtz.ZippedNetwork:
    return copy.deepcopy(zipped_once)


def test_it_lists_its_public_names_and_nothing_else() -> None:
    assert dir(mtz) == sorted([*mtz.__all__, "__version__"])
    assert {"retrain", "evaluate", "InvalidConfig", "Operation", "pointwise"} <= set(dir(mtz))
    for name in dir(mtz):
        assert getattr(mtz, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'zip_network'"):
        _ = mtz.zip_network


def test_its_functions_keep_their_names_when_modules_are_imported() -> None:

    assert callable(mtz.retrain)
    assert callable(mtz.evaluate)
    assert callable(mtz.trace)


@pytest.mark.parametrize(
    "kind",
    [
        mtz.IncompatibleNetworks,
        mtz.InvalidCalibration,
        mtz.InvalidConfig,
        mtz.InvalidWeights,
        mtz.InvalidZippedFile,
    ],
)
def test_errors_for_bad_values_are_value_errors(kind: type[Exception]) -> None:
    assert issubclass(kind, ValueError)
    assert issubclass(kind, mtz.MtzError)


# Settings


def test_share_and_budget_are_two_fields() -> None:
    budget = mtz.Budget(size=0.5)
    assert mtz.ZipConfig().counts({"a": (3, 4)}) == {"a": 3}, "without either, everything"
    assert (mtz.ZipConfig(budget=budget).share, mtz.ZipConfig(budget=budget).budget) == (None, budget)
    assert replace(mtz.ZipConfig(), budget=budget) == mtz.ZipConfig(budget=budget)
    assert mtz.ZipConfig("refit", 0.5, 0.1).damping == 0.1, "the order of the fields before it has not changed"
    with pytest.raises(mtz.InvalidConfig, match="two budgets are given"), pytest.warns(FutureWarning):
        mtz.ZipConfig(share=budget, budget=budget)  # type: ignore[arg-type]
    with pytest.raises(mtz.InvalidConfig, match="share: a budget decides what is shared"):
        mtz.ZipConfig(share=0.5, budget=budget)
    with pytest.raises(mtz.InvalidConfig, match=r"budget: 0\.5 is not a Budget"):
        mtz.ZipConfig(budget=0.5)  # type: ignore[arg-type]


def test_the_former_place_of_a_budget_works_and_warns_of_its_end() -> None:
    budget = mtz.Budget(size=0.5)
    with pytest.warns(FutureWarning, match=r"share=Budget.*is deprecated.*Write ZipConfig\(budget=Budget"):
        config = mtz.ZipConfig(share=budget)  # type: ignore[arg-type]
    assert config == mtz.ZipConfig(budget=budget)
    with pytest.warns(FutureWarning), pytest.raises(mtz.InvalidConfig, match="'paper' neither drops"):
        mtz.ZipConfig(method="paper", share=budget)  # type: ignore[arg-type]


def test_the_warning_points_to_whoever_writes_it() -> None:
    program = "import mtz_core as mtz\nmtz.ZipConfig(share=mtz.Budget(size=0.5))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stderr.startswith("<string>:2: FutureWarning: ZipConfig(share=Budget")


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"seed": "x"}, "seed"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**70}, "seed"),
        ({"seed": True}, "seed"),
        ({"keep_separate": None}, "keep_separate"),
        ({"keep_separate": 5}, "keep_separate"),
    ],
)
def test_values_of_no_use_are_refused_at_once(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(mtz.InvalidConfig, match=name):
        mtz.ZipConfig(**settings)
    if name == "seed":
        with pytest.raises(mtz.InvalidConfig, match=name):
            mtz.RetrainConfig(**settings)
    for moves in (5, [["share"]], [], "share"):
        with pytest.raises(mtz.InvalidConfig, match="moves"):
            mtz.Budget(size=0.5, moves=moves)  # type: ignore[arg-type]


# Data


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["pairs", "tensors", "batches"])
def test_every_form_of_calibration_gives_the_same_network(shape: str, calibration: dict[str, Tensor]) -> None:
    forms: dict[str, Any] = {
        "pairs": {t: DataLoader(TensorDataset(x, torch.arange(60)), batch_size=25) for t, x in calibration.items()},
        "tensors": {t: DataLoader(TensorDataset(x, x[:, 0]), batch_size=25) for t, x in calibration.items()},
        "batches": {t: list(torch.split(x, 25)) for t, x in calibration.items()},
    }
    expected = mtz.zip_networks(networks(), {t: torch.split(x, 25) for t, x in calibration.items()})
    found = mtz.zip_networks(networks(), forms[shape])
    assert all(torch.equal(tensor, found.tensors()[name]) for name, tensor in expected.tensors().items())


def test_batches_of_anything_else_are_refused(calibration: dict[str, Tensor]) -> None:
    for bad in ([{"x": calibration["a"]}], [(calibration["a"],) * 3], ["text"], 5):
        with pytest.raises(mtz.InvalidCalibration, match="calibration data of 'a'"):
            mtz.zip_networks(networks(), {**calibration, "a": bad})  # type: ignore[dict-item]


# Progress


def test_what_is_no_dict_by_task_is_named(calibration: dict[str, Tensor]) -> None:
    wrong: list[Any] = [(list(networks().values()), calibration), (networks(), next(iter(calibration.values())))]
    for given in wrong:
        with pytest.raises(
            mtz.InvalidConfig, match=r"^(networks is a list|calibration is a Tensor)\. Give a dict by task"
        ):
            mtz.zip_networks(*given)
    zipped = mtz.zip_networks(networks(), calibration)
    with pytest.raises(mtz.InvalidConfig, match=r"^validation is a RetrainConfig\. Give a dict by task"):
        mtz.retrain(zipped, networks(), calibration, mtz.RetrainConfig())  # type: ignore[arg-type]
    with pytest.raises(mtz.InvalidConfig, match=r"^test is a Tensor\. Give a dict by task"):
        mtz.evaluate(zipped, calibration["a"])  # type: ignore[arg-type]
    with pytest.raises(mtz.InvalidConfig, match=r"the metric of .a. names no output\. Give one metric"):
        mtz.evaluate(zipped, calibration, metric={})


def test_settings_of_another_type_are_refused(calibration: dict[str, Tensor]) -> None:
    wrong: Any = {"share": 1.0}
    with pytest.raises(mtz.InvalidConfig, match=r"^config is a dict\. Give a ZipConfig"):
        mtz.zip_networks(networks(), calibration, wrong)
    with pytest.raises(mtz.InvalidConfig, match=r"^retraining is a dict\. Give a RetrainConfig"):
        mtz.zip_networks(networks(), calibration, retraining=wrong)
    zipped = mtz.zip_networks(networks(), calibration)
    with pytest.raises(mtz.InvalidConfig, match=r"^config is a dict\. Give a RetrainConfig"):
        mtz.retrain(zipped, networks(), calibration, calibration, wrong)
    plain: Any = networks()["a"]
    with pytest.raises(mtz.InvalidConfig, match=r"^zipped is a \w+\. Give a ZippedNetwork"):
        mtz.evaluate(plain, calibration)
    with pytest.raises(mtz.InvalidConfig, match=r"^zipped is a \w+\. Give a ZippedNetwork"):
        mtz.retrain(plain, networks(), calibration, calibration)


NO_MODULES: dict[str, tuple[Any, str]] = {
    "state_dict": (networks()["a"].state_dict(), r"of type OrderedDict, .*If it is a state_dict, build the module"),
    "class": (nn.Linear, r"the class Linear, .*Give an instance"),
    "function": (networks, r"of type function, .*Give the module"),
}


@pytest.mark.parametrize(("given", "told"), NO_MODULES.values(), ids=NO_MODULES)
def test_what_is_no_module_is_named_briefly(calibration: dict[str, Tensor], given: Any, told: str) -> None:
    with pytest.raises(mtz.UnsupportedModule, match=rf"^the network of 'a': it is {told}") as refused:
        mtz.zip_networks({**networks(), "a": given}, calibration)
    assert len(str(refused.value)) < 200
    with pytest.raises(mtz.UnsupportedModule, match=rf"^the network of 'c': it is {told}"):
        mtz.zip_networks(networks(), calibration).with_task("c", given, calibration["a"])


def test_data_of_another_kind_are_told_with_a_remedy(calibration: dict[str, Tensor]) -> None:
    x = calibration["a"]
    wrong: dict[str, Any] = {
        r"as a DataLoader of a data set yields them": TensorDataset(x, x),
        r"a batch of type list with 3 entries": DataLoader(TensorDataset(x, x, x), batch_size=25),
        r"Convert the calibration data to the dtype of the weights, as `\.float\(\)`": x.double(),
        r"Give a batch of examples, \[n, …\]": x[0],
    }
    for told, given in wrong.items():
        with pytest.raises(mtz.InvalidCalibration, match=told):
            mtz.zip_networks(networks(), {**calibration, "a": given})


def test_labels_that_are_no_classes_are_told_with_a_remedy(calibration: dict[str, Tensor]) -> None:
    zipped, x = mtz.zip_networks(networks(), calibration), calibration["a"]
    for labels, told in ((torch.rand(len(x)), r"are torch\.float32, and"), (torch.rand(len(x), 1), "have shape")):
        with pytest.raises(mtz.InvalidCalibration, match=rf"labels of 'a' {told}.*such as mean_absolute_error"):
            mtz.evaluate(zipped, {"a": (x, labels)})


def test_labels_beside_all_inputs_are_told_from_batches(calibration: dict[str, Tensor]) -> None:
    given: dict[str, Any] = {task: (x, torch.zeros(len(x), dtype=torch.long)) for task, x in calibration.items()}
    with pytest.raises(mtz.InvalidCalibration, match=r"a pair of tensors of 2 and 1 axes.*Give the inputs alone"):
        mtz.zip_networks(networks(), given)


def test_every_step_is_reported_in_order(calibration: dict[str, Tensor], caplog: pytest.LogCaptureFixture) -> None:
    steps: list[mtz.Progress] = []
    with caplog.at_level(logging.INFO, logger="mtz_core"):
        mtz.zip_networks(
            networks(),
            calibration,
            mtz.ZipConfig(share=0.5),
            retraining=mtz.RetrainConfig(iterations=4, validate_every=2),
            on_progress=steps.append,
        )
    assert [(s.stage, s.what, s.done, s.total) for s in steps if s.stage in ("trace", "merge")] == [
        *(("trace", task, done, 2) for done, task in enumerate(TASKS, start=1)),
        *(("merge", layer, done, 3) for done, layer in enumerate(("0", "2", "4"), start=1)),
    ]
    stages = [step.stage for step in steps]
    assert list(dict.fromkeys(stages)) == ["trace", "measure", "match", "merge", "retrain"]
    assert [record.message for record in caplog.records] == [str(step) for step in steps]
    assert "merge 2 of 3: 2" in caplog.messages


def test_plans_of_a_budget_are_reported(calibration: dict[str, Tensor]) -> None:
    steps: list[mtz.Progress] = []
    config = mtz.ZipConfig(budget=mtz.Budget(size=0.7, moves=("share", "drop")), refit_rounds=0)
    found = mtz.zip_networks(networks(), calibration, config, on_progress=steps.append)
    assert found.report.stored_bytes <= 0.7 * found.report.original_bytes
    assert {"drop only", "share only"} <= {step.what for step in steps if step.stage == "plan"}
    assert [step.what for step in steps if step.stage == "merge"] == ["0", "2", "4"]


def test_an_error_of_the_callback_ends_the_work(calibration: dict[str, Tensor]) -> None:
    def stop(step: mtz.Progress) -> None:
        raise KeyboardInterrupt(step.what)

    with pytest.raises(KeyboardInterrupt, match="a"):
        mtz.zip_networks(networks(), calibration, on_progress=stop)


# Warnings


def test_few_rows_are_warned_of_once(calibration: dict[str, Tensor]) -> None:
    few = {task: x[:4] for task, x in calibration.items()}
    with pytest.warns(mtz.ZipWarning, match=r"'0' and 2 more are fitted to few rows: .*report\.layers") as caught:
        mtz.zip_networks(networks(), few)
    assert len(caught) == 1
    assert caught[0].filename == __file__


def test_layers_that_stay_separate_are_warned_of_where_they_were_to_be_shared() -> None:
    kernels = {}
    for task, size in zip(TASKS, (3, 5), strict=True):
        torch.manual_seed(size)
        layers = nn.Conv2d(1, 4, size), nn.ReLU(), nn.Flatten(), nn.Linear(4 * (7 - size) ** 2, 3)
        kernels[task] = nn.Sequential(*layers)
    data = {task: torch.rand(200, 1, 6, 6) for task in TASKS}
    with pytest.warns(mtz.ZipWarning, match=r"'0' and 1 more stay separate: its kernels .* differ in size"):
        mtz.zip_networks(kernels, data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtz.zip_networks(kernels, data, mtz.ZipConfig(share=0.0))
        mtz.zip_networks(kernels, data, mtz.ZipConfig(keep_separate=["0", "3"]))


def test_all_is_quiet_where_all_is_well(calibration: dict[str, Tensor]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mtz.zip_networks(networks(), calibration, mtz.ZipConfig(budget=mtz.Budget(size=0.8)))


@pytest.mark.slow
def test_a_ruined_task_is_named_and_the_remedy_keeps_it(calibration: dict[str, Tensor]) -> None:
    with pytest.warns(mtz.ZipWarning, match=r"'a' has lost \d+ % of what it knew .*held-out examples") as told:
        zipped = mtz.zip_networks(networks(), calibration)
    assert zipped.report.tasks["a"].lost > 0.5 and zipped.report.tasks["a"].examples == 12
    (size,) = {float(found) for one in told for found in re.findall(r"Budget\(size=([\d.]+)\)", str(one.message))}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = mtz.zip_networks(networks(), calibration, mtz.ZipConfig(budget=mtz.Budget(size=size)))
    assert all(judged.lost < 0.25 for judged in kept.report.tasks.values())


def test_outputs_are_declared_or_guessed(calibration: dict[str, Tensor]) -> None:
    declared = mtz.ZipConfig(share=0.0, outputs={"a": "logits", "b": mtz.Output("regression", tolerance=0.1)})
    tasks = mtz.zip_networks(networks(), calibration, declared).report.tasks
    assert [(one.output, one.tolerance, one.guessed) for one in tasks.values()] == [
        ("logits", None, ""),
        ("regression", 0.1, ""),
    ]
    guessed = mtz.zip_networks(networks(), calibration, mtz.ZipConfig(share=0.0)).report.tasks
    assert all(one.guessed for one in guessed.values())
    with pytest.raises(mtz.InvalidCalibration, match="network of 'a': its outputs are declared as"):
        mtz.zip_networks(networks(), calibration, mtz.ZipConfig(outputs={"a": "probabilities"}))
    with pytest.raises(mtz.InvalidConfig, match="outputs: names 'c'"):
        mtz.zip_networks(networks(), calibration, mtz.ZipConfig(outputs={"c": "logits"}))


def test_a_budget_needs_outputs_that_depend_on_the_inputs(calibration: dict[str, Tensor]) -> None:
    pair = networks()
    torch.nn.init.zeros_(pair["b"][4].weight)  # type: ignore[index]
    with pytest.raises(mtz.InvalidCalibration, match="the network of 'b' puts out the same for all"):
        mtz.zip_networks(pair, calibration, mtz.ZipConfig(budget=mtz.Budget(size=0.5)))
    with pytest.warns(mtz.ZipWarning, match="'b' puts out the same for all .* nothing tells what it loses"):
        mtz.zip_networks(pair, calibration)


def test_a_function_compares_with_the_originals_where_there_are_no_labels(calibration: dict[str, Tensor]) -> None:
    originals = networks()
    zipped = mtz.zip_networks(originals, calibration, mtz.ZipConfig(share=0.0))

    def distance(outputs: Tensor, truth: Tensor) -> float:
        return float((outputs - truth).abs().max())

    assert mtz.evaluate(zipped, calibration, originals=originals, metric=distance)["a"].error == 0.0
    truth = zipped(calibration["a"], task="a").detach() + 1
    assert mtz.evaluate(zipped, {"a": (calibration["a"], truth)}, metric=distance)["a"].error == pytest.approx(1.0)
    with pytest.raises(mtz.InvalidConfig, match=r"compares with the original networks\. Give"):
        mtz.evaluate(zipped, calibration, metric=distance)


# Tables


@QUIET
def test_a_zipped_network_prints_a_table_that_fits_a_screen() -> None:
    torch.manual_seed(0)
    pair: dict[str, nn.Module] = {task: lenet5((6, 8, 30), 10) for task in TASKS}
    zipped = mtz.zip_networks(pair, {task: torch.rand(40, 1, 20, 20) for task in TASKS})
    lines = str(zipped).splitlines()
    assert lines[0] == "ZippedNetwork of a, b"
    assert "\n".join(lines[1:]) == str(zipped.report)
    assert max(map(len, lines)) <= 88
    for layer in zipped.report.layers:
        (line,) = [line for line in lines if line.startswith(f"{layer.layer} ")]
        assert f" {layer.shared} " in line
    assert f"stored: {zipped.report.stored_bytes:,} of {zipped.report.original_bytes:,} bytes" in str(zipped)


@pytest.mark.parametrize("count", [ROWS, ROWS + 1, 300])
def test_a_deep_network_prints_its_first_and_last_layers(count: int, zipped: mtz.ZippedNetwork) -> None:
    layer = zipped.report.layers[0]
    path = "backbone.stages.{}.blocks.0.attention.projection.dense"
    names = [path.format(number) for number in range(count)]
    report = replace(zipped.report, layers=tuple(replace(layer, layer=name, note="n") for name in names))
    lines = str(report).splitlines()
    assert len(lines) <= ROWS + 8
    assert max(map(len, lines)) <= 88
    assert lines[2].startswith("backbone.stages…projection.dense ")
    assert (f"… {count - ROWS + 1} more layers …" in str(report)) == (count > ROWS)


def test_a_report_of_many_tasks_gives_ranges(zipped: mtz.ZippedNetwork) -> None:
    tasks = [f"task{number}" for number in range(20)]
    layer = replace(
        zipped.report.layers[0],
        neurons={task: 100 + number for number, task in enumerate(tasks)},
        error={task: number / 1000 for number, task in enumerate(tasks)},
    )
    text = str(replace(zipped.report, layers=(layer,)))
    assert "100 … 119" in text
    assert "of 20 tasks" in text
    assert "tasks, in this order: a, b" in str(zipped.report)
    assert "0 … 0.019" in text


def test_a_report_is_plain_values(zipped: mtz.ZippedNetwork) -> None:
    values = json.loads(json.dumps(zipped.report.to_dict()))
    assert values["stored_bytes"] == zipped.report.stored_bytes
    assert [layer["layer"] for layer in values["layers"]] == [layer.layer for layer in zipped.report.layers]
    assert (
        mtz.ZipReport(
            **{
                **values,
                "layers": tuple(mtz.LayerReport(**layer) for layer in values["layers"]),
                "descent": tuple(values["descent"]),
                "tasks": {task: TaskReport(**judged) for task, judged in values["tasks"].items()},
            }
        )
        == zipped.report
    )


# The module


def test_state_dict_names_blocks_alone(zipped: mtz.ZippedNetwork) -> None:
    names = {name.replace("|", ".") for name in zipped.state_dict()}
    assert names == set(zipped.tensors())
    assert {name.replace("|", ".") for name, _ in zipped.named_parameters()} == names
    again = pickle.loads(pickle.dumps(zipped))
    assert torch.equal(again(torch.ones(1, 6), task="a"), zipped(torch.ones(1, 6), task="a"))


def test_with_task_is_the_other_side_of_without(zipped: mtz.ZippedNetwork, calibration: dict[str, Tensor]) -> None:
    torch.manual_seed(2)
    third = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4))
    loader = DataLoader(TensorDataset(calibration["a"], torch.zeros(60)), batch_size=30)
    three = zipped.with_task("c", third, loader)
    assert three.tasks == ("a", "b", "c")
    x = torch.rand(5, 6)
    for task in TASKS:
        assert torch.allclose(three(x, task=task), zipped(x, task=task), atol=1e-6)
        assert torch.equal(three.without("c")(x, task=task), three(x, task=task))
    apart = zipped.with_task("c", third, loader, mtz.ZipConfig(share=0.0))
    assert torch.allclose(apart(x, task="c"), third(x), atol=1e-6)
    with pytest.raises(mtz.InvalidConfig, match="'a' is in this zipped network already"):
        zipped.with_task("a", third, loader)
    for config in (mtz.ZipConfig(budget=mtz.Budget(size=0.5)), mtz.ZipConfig(balance={"c": 2.0})):
        with pytest.raises(mtz.InvalidConfig, match="a network is added by `share` alone"):
            zipped.with_task("c", third, loader, config)
    assert "c has 3 rows for" in zipped.with_task("c", third, calibration["a"][:3]).report.layers[0].few_rows


def test_a_former_state_dict_is_read(zipped: mtz.ZippedNetwork) -> None:
    former = {f"_parameters_by_name.{name}": torch.ones_like(value) for name, value in zipped.state_dict().items()}
    nn.ModuleDict({"inner": zipped}).load_state_dict({f"inner.{name}": value for name, value in former.items()})
    assert all(bool((value == 1).all()) for value in zipped.state_dict().values())


def test_a_task_that_is_none_is_refused(zipped: mtz.ZippedNetwork) -> None:
    for task in (3, None, "c"):
        with pytest.raises(mtz.InvalidConfig, match="is not in this zipped network"):
            zipped(torch.ones(1, 6), task=task)


# Retraining


def test_retraining_without_a_floor_retrains(calibration: dict[str, Tensor]) -> None:
    steps: list[mtz.Progress] = []
    plain = mtz.zip_networks(networks(), calibration)
    config = mtz.RetrainConfig(iterations=40, validate_every=20, learning_rate=0.01)
    found = mtz.zip_networks(networks(), calibration, retraining=config, on_progress=steps.append)
    assert [s.what.partition(",")[0] for s in steps if s.stage == "retrain"] == [f"iteration {n}" for n in (0, 20, 40)]
    x = torch.rand(400, 6)
    with torch.no_grad():
        errors = [
            sum(float((one(x, task=task) - original(x)).square().mean()) for task, original in networks().items())
            for one in (plain, found)
        ]
    assert errors[1] < errors[0]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["pair", "tensor", "loader", "validation"])
def test_retraining_validates_on_what_it_is_given(calibration: dict[str, Tensor], form: str) -> None:
    x, y = torch.rand(9, 6), torch.zeros(9, dtype=torch.long)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    forms: dict[str, Any] = {"pair": (x, y), "tensor": x, "validation": mtz.Validation(x, y), "loader": loader}
    validation = dict.fromkeys(TASKS, forms[form])
    few = {task: x[:4] for task, x in calibration.items()}
    config = mtz.RetrainConfig(iterations=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mtz.ZipWarning)
        mtz.zip_networks(networks(), few, validation=validation, retraining=config)
        with pytest.raises(mtz.InvalidCalibration, match="'a' has 4 calibration examples; light retraining holds"):
            mtz.zip_networks(networks(), few, retraining=config)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"retraining": mtz.RetrainConfig(labels=0.5)}, r"retraining\.labels: zipping retrains by distillation"),
        ({"validation": {}}, r"validation data is given for \[\]"),
        ({"validation": {"a": torch.rand(9, 6)}, "retraining": mtz.RetrainConfig()}, "validation data is given for"),
        (
            {"validation": dict.fromkeys(TASKS, torch.rand(9, 5)), "retraining": mtz.RetrainConfig()},
            r"validation examples of 'a' have shape \[5\], calibration examples \[6\]",
        ),
        ({"retraining": mtz.RetrainConfig(balance={"a": 1.0})}, "balance: names"),
        ({"config": mtz.ZipConfig(budget=mtz.Budget(floor=1.0))}, "a floor needs validation data"),
    ],
)
def test_contradictions_are_refused_before_work(arguments: dict[str, Any], message: str) -> None:
    steps: list[mtz.Progress] = []
    with pytest.raises(ValueError, match=message):
        mtz.zip_networks(networks(), dict.fromkeys(TASKS, torch.rand(9, 6)), on_progress=steps.append, **arguments)
    assert steps == []


def test_retrain_returns_the_learning_curve(zipped: mtz.ZippedNetwork, calibration: dict[str, Tensor]) -> None:
    steps: list[mtz.Progress] = []
    loaders = {task: DataLoader(TensorDataset(x, x[:, 0]), batch_size=20) for task, x in calibration.items()}
    held_out = {task: torch.rand(30, 6) for task in TASKS}
    config = mtz.RetrainConfig(iterations=6, validate_every=3)
    with torch.no_grad():
        curve = mtz.retrain(zipped, networks(), loaders, held_out, config, on_progress=steps.append)
    assert [step.iteration for step in curve] == [0, 3, 6]
    assert [step.done for step in steps] == [1, 2, 3]


# Evaluation


def test_evaluate_compares_with_the_originals(zipped: mtz.ZippedNetwork) -> None:
    originals = networks()
    x = torch.rand(300, 6)
    with torch.no_grad():
        truth = {task: network(x).argmax(dim=1) for task, network in originals.items()}
    test: dict[str, Labelled] = {
        "a": (x, truth["a"]),
        "b": DataLoader(TensorDataset(x, truth["b"].to(torch.uint8)), batch_size=70),
    }
    found = mtz.evaluate(zipped, test, originals=originals)
    for task in TASKS:
        assert found[task].original_error == 0.0
        assert found[task].agreement == pytest.approx(100 - found[task].error)
        assert found[task].interval[0] <= found[task].error + 1e-9 < found[task].interval[1]
    assert mtz.evaluate(zipped, {"a": test["a"]}) == {"a": mtz.Evaluation(found["a"].error, found["a"].interval)}
    assert mtz.evaluate(zipped, test, metric="top5_error")["a"].error == 0.0
    mixed = mtz.evaluate(zipped, test, originals=originals, metric={"a": "error", "b": "output_error"})
    assert mixed["a"] == found["a"]
    assert mixed["b"] == mtz.evaluate(zipped, {"b": x}, originals=originals, metric="output_error")["b"]


@pytest.mark.parametrize(
    ("test", "message"),
    [
        ({"c": (torch.rand(2, 6), torch.zeros(2))}, "task 'c' is not in this zipped network"),
        ({"a": (torch.rand(2, 6), torch.zeros(3, dtype=torch.long))}, "'a' has 3 labels for 2 examples"),
        ({"a": (torch.rand(2, 6), torch.tensor([0, 3]))}, "labels of 'a' go from 0 to 3"),
        ({"a": []}, "no examples with labels for 'a'"),
        ({"a": None}, "data of 'a' are not examples with labels"),
        ({"a": (torch.rand(2, 6), torch.zeros(2, 1, dtype=torch.long))}, r"labels of 'a' have shape \[2, 1\]"),
        ({"a": (torch.rand(2, 6), torch.eye(2, 3).long())}, r"labels of 'a' have shape \[2, 3\]"),
        ({"a": [(torch.rand(2, 6), torch.zeros(3)), (torch.rand(2, 6), torch.zeros(1))]}, "'a' has 3 labels for 2"),
        ({"a": (torch.rand(2, 5), torch.zeros(2, dtype=torch.long))}, "network of 'a' cannot run on the test data"),
        ({"a": (torch.full((2, 6), float("nan")), torch.zeros(2).long())}, "network of 'a' has outputs that are not"),
        ({"a": [torch.rand(2, 6)]}, "data of 'a' are not examples with labels"),
    ],
)
def test_data_that_do_not_fit_are_refused(zipped: mtz.ZippedNetwork, test: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mtz.evaluate(zipped, test)
    with pytest.raises(mtz.InvalidConfig, match="metric 'accuracy' is unknown"):
        mtz.evaluate(zipped, test, metric="accuracy")


def test_an_original_is_needed_for_every_task_that_is_compared(zipped: mtz.ZippedNetwork) -> None:
    data = (torch.rand(2, 6), torch.zeros(2, dtype=torch.long))
    with pytest.raises(mtz.InvalidConfig, match="no original network for 'b'"):
        mtz.evaluate(zipped, {"a": data, "b": data}, originals={"a": networks()["a"]})


def test_what_version_0_1_wrote_is_read() -> None:
    zipped = mtz.load(FORMER / "zipped")
    expected = load_file(FORMER / "outputs.safetensors")
    for task in zipped.tasks:
        assert torch.allclose(zipped(expected["inputs"], task=task), expected[task], atol=1e-6)


class Auxiliary(nn.Module):
    """Has a second head for training alone, as Inception does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.aside, self.head = nn.Linear(6, 12), nn.Linear(12, 3), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Any:
        hidden = torch.relu(self.body(x))
        return (self.head(hidden), self.aside(hidden)) if self.training else self.head(hidden)


def test_parameters_that_no_output_depends_on_are_left_out_with_a_warning(calibration: dict[str, Tensor]) -> None:
    originals = {task: Auxiliary() for task in TASKS}
    plain = {task: nn.Sequential(own.body, nn.ReLU(), own.head) for task, own in originals.items()}
    config = mtz.ZipConfig(outputs=dict.fromkeys(TASKS, mtz.Output("regression")))
    with pytest.warns(mtz.ZipWarning) as caught:
        zipped = mtz.zip_networks(originals, calibration, config)
    told = [warning for warning in caught if "no output depends" in str(warning.message)]
    assert [str(warning.message) for warning in told] == [
        f"the network of {task!r}: parameters are left out, as no output depends on them: aside.weight, aside.bias "
        "(156 bytes, counted neither before nor after zipping)."
        for task in TASKS
    ]
    assert {warning.filename for warning in told} == {__file__}
    report, expected = zipped.report, mtz.zip_networks(plain, calibration, config).report
    assert (report.stored_bytes, report.original_bytes) == (expected.stored_bytes, expected.original_bytes)
    for task, original in originals.items():
        state = zipped.network(task).state_dict()
        with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "aside.weight", "aside.bias"'):
            original.load_state_dict(state)
        original.load_state_dict(state, strict=False)
        torch.testing.assert_close(original.eval()(calibration[task]), zipped(calibration[task], task))
    with pytest.warns(mtz.ZipWarning, match=r"the network of 'c': parameters are left out.*: aside\.weight") as caught:
        zipped.with_task("c", Auxiliary(), calibration["a"])
    assert {warning.filename for warning in caught} == {__file__}


def test_numbers_are_compared_with_labels_where_there_are_some(zipped: mtz.ZippedNetwork) -> None:
    x, originals = torch.rand(30, 6), networks()
    with torch.no_grad():
        y = zipped(x, "a")
    pairs = list(zip(x.split(12), (y + 0.25).split(12), strict=True))
    for data in ((x, y + 0.25), pairs, iter(pairs), DataLoader(TensorDataset(x, y + 0.25), batch_size=7)):
        found = mtz.evaluate(zipped, {"a": data}, originals=originals, metric="mean_absolute_error")["a"]
        assert found.error == pytest.approx(0.25, abs=1e-5)
    alone = mtz.evaluate(zipped, {"a": x}, originals=originals, metric="mean_absolute_error")["a"]
    assert alone.original_error == 0 < alone.error


@pytest.mark.slow
@QUIET
def test_wrappers_that_compute_the_same_are_taken_off(calibration: dict[str, Tensor]) -> None:
    plain = networks()
    wrapped: dict[str, Any] = {"a": torch.compile(plain["a"]), "b": nn.DataParallel(nn.DataParallel(plain["b"]))}
    found, expected = mtz.zip_networks(wrapped, calibration), mtz.zip_networks(plain, calibration)
    assert found.report == expected.report
    assert all(torch.equal(own, found.tensors()[name]) for name, own in expected.tensors().items())
    more = expected.with_task("c", wrapped["a"], calibration["a"], mtz.ZipConfig(share=0.0))
    assert more.network("c").state_dict().keys() == plain["a"].state_dict().keys()
