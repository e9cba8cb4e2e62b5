"""Networks with several outputs go through the whole pipeline: each output has its kind, metric, labels and floor."""

import csv
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

import mtz_core
from flows.commands.check import check_networks
from mtz_core.errors import InvalidCalibration, InvalidConfig, MtzError
from tasks.__main__ import main
from tasks.artifacts.paths import Workspace
from tasks.data.examples import InvalidData, read_labelled
from tasks.faults import EXIT_REFUSED
from tasks.params import InvalidParams, load_params
from tasks.studies.pareto import Asked, measure_rows
from tests.support.several import numbers, two_heads
from tests.support.stages import SIZES, refused

STAGES: list[tuple[str, ...]] = [("collect", "a"), ("collect", "b"), ("hessians", "a"), ("hessians", "b")]
STAGES += [("match",), ("merge",), ("retrain",), ("evaluate",)]
DECLARED = {"logits": "logits", "found.0": {"kind": "regression", "tolerance": 0.5, "weight": 2.0}}


def logits_off(outputs: dict[str, Tensor], originals: dict[str, Tensor]) -> float:
    """A metric of all outputs together."""
    return float((outputs["logits"] - originals["logits"]).abs().max() + outputs["found.0"].mean() * 0)


def write_data(folder: Path, seed: int) -> None:
    """Write all splits of inputs, with class numbers and boxes as labels of both outputs."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, count in SIZES.items():
        x, more = numbers(count, seed)
        columns = {"x": x, "more": more, "label.found.0": x[:, :2]}
        table = {name: pa.array(own.tolist()) for name, own in columns.items()}
        table["label.logits"] = pa.array((x[:, 0] > 0).long().numpy())
        pq.write_table(pa.table(table), folder / f"{split}.parquet", row_group_size=16)


def relabel(folder: Path, change: Any) -> None:
    """Write all splits again, with other columns of labels."""
    for file in folder.iterdir():
        pq.write_table(change(pq.read_table(file)), file)


def without_labels(table: pa.Table) -> pa.Table:
    return table.drop_columns([name for name in table.column_names if name.startswith("label.")])


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two networks of two outputs: one declares everything, one nothing and has no labels either."""
    root = tmp_path_factory.mktemp("template")
    (root / "networks").mkdir()
    for seed, name in enumerate("ab"):
        write_data(root / "data" / name, seed)
        save_file(two_heads(seed, hidden=16 + 4 * seed).state_dict(), root / "networks" / f"{name}.safetensors")
    relabel(root / "data" / "b", without_labels)
    model = {"network": "tests.support.several:TwoHeads"}
    models = {name: {**model, "weights": f"networks/{name}.safetensors", "data": f"data/{name}"} for name in "ab"}
    metrics = {"logits": "error", "found.0": "mean_absolute_error"}
    params = {
        "group": "several",
        "models": {
            "a": {**models["a"], "output": DECLARED, "metric": metrics},
            "b": {**models["b"], "arguments": {"hidden": 20}},
        },
        "collect": {"images": 50},
        "match": {"share": 0.8},
        "retrain": {"iterations": 4, "validate_every": 2, "batch_size": 16},
        "register": {"name": "several"},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def changed(change: Any) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    change(params)
    Path("params.yaml").write_text(yaml.safe_dump(params))


@pytest.fixture(scope="module")
def run(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The project after all stages."""
    root = tmp_path_factory.mktemp("run") / "project"
    shutil.copytree(template, root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        for stage in STAGES:
            assert main(list(stage)) == 0
        yield root


@pytest.fixture
def done(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it as the current folder."""
    shutil.copytree(run, tmp_path / "done")
    monkeypatch.chdir(tmp_path / "done")
    return tmp_path / "done"


@torch.no_grad()
def test_every_output_is_measured(run: Path) -> None:
    tasks = json.loads((run / "metrics.json").read_text())["tasks"]
    assert {name: (own["metric"], own["output"]) for name, own in tasks.items()} == {
        "a.logits": ("error", "logits"),
        "a.found.0": ("mean_absolute_error", "regression"),
        "b.logits": ("agreement", "logits"),
        "b.found.0": ("agreement", "regression"),
    }
    inputs, labels = read_labelled(run / "data" / "a", "test")
    outputs = mtz_core.load(run / "retrained")(inputs.tensors, task="a")
    wrong = 100 * float((outputs["logits"].argmax(dim=1) != labels.tensors["logits"]).double().mean())
    distance = float((outputs["found"][0] - labels.tensors["found.0"]).abs().double().mean())
    assert tasks["a.logits"]["error_retrained"] == pytest.approx(wrong)
    assert tasks["a.found.0"]["error_retrained"] == pytest.approx(distance)
    for own in tasks.values():
        assert own["examples"] == SIZES["test"]
        low, high = own["interval_retrained"]
        assert low <= own["error_retrained"] <= high
        assert 0 <= own["agreement_retrained"] <= 100
    with (run / "plots" / "errors.csv").open() as file:
        assert {row["task"] for row in csv.DictReader(file)} == tasks.keys()


def test_what_outputs_are_declared_as_is_kept(run: Path) -> None:
    judged = mtz_core.load(run / "merged").report.tasks
    assert judged["a"].declared == {
        "logits": mtz_core.Output("logits"),
        "found.0": mtz_core.Output("regression", 0.5, 2.0),
    }
    assert (judged["a"].guessed, judged["b"].kinds) == ("", "logits: logits, found.0: regression")
    assert "found.0: " in judged["b"].guessed


@pytest.mark.parametrize(
    ("register", "says"),
    [
        ({"floors": {"a.logits": 0.0}, "agreement": 0}, ["a.logits loses "]),
        ({"floors": {"b": 0.0}, "agreement": 0}, ["b.logits loses ", "b.found.0 loses "]),
        ({"agreement": 100}, ["a.found.0 agrees with its original in", "b.logits agrees"]),
    ],
    ids=["of an output", "of a task", "agreement"],
)
def test_floors_hold_for_every_output(
    done: Path, capsys: pytest.CaptureFixture[str], register: Any, says: list[str]
) -> None:
    metrics = json.loads(Path("metrics.json").read_text())
    for own in metrics["tasks"].values():
        own |= {"error_retrained": own["error_original"] + 1, "agreement_retrained": 99.0}
    Path("metrics.json").write_text(json.dumps(metrics))
    changed(lambda params: params["register"].update(register))
    message = refused(capsys, "register", status=EXIT_REFUSED)
    assert all(part in message for part in says)
    assert ("a.found.0 loses" in message) == ("b.found.0" in "".join(says) and "a" in register.get("floors", {}))


def test_labels_of_some_outputs_take_part_in_light_retraining(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("retrained/weights.safetensors").read_bytes()
    changed(lambda params: params["retrain"].update(labels=0.5))
    assert "data/b/train.parquet has no column 'label'" in refused(capsys, "retrain")
    write_data(Path("data/b"), 1)
    assert main(["retrain"]) == 0
    said = capsys.readouterr().out
    assert "a: distilled, as without class numbers: found.0" in said
    assert Path("retrained/weights.safetensors").read_bytes() != before


def test_a_metric_may_measure_all_outputs_together(done: Path) -> None:
    changed(lambda params: params["models"]["b"].update(metric=f"{__name__}:logits_off"))
    assert main(["evaluate"]) == 0
    tasks = json.loads(Path("metrics.json").read_text())["tasks"]
    assert list(tasks) == ["a.logits", "a.found.0", "b", "b.logits", "b.found.0"]
    assert tasks["b"]["output"] == "logits: logits, found.0: regression"
    assert tasks["b"]["error_original"] == 0 < tasks["b"]["error_zipped"]


def test_a_floor_for_an_output_is_searched_for(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def floor(params: Any) -> None:
        params["retrain"]["iterations"] = 1
        budget = {"floor": {"a.found.0": 0.05, "b": 10}, "moves": ["share"], "retrain": params["retrain"]}
        params["match"] = {"budget": budget}

    changed(floor)
    assert main(["match"]) == 0
    found = json.loads(Path("pairing/pairing.json").read_text())["search"]
    (chosen,) = (one for one in found["tried"] if one["verdict"] == "chosen")
    assert chosen["loss"]["a.found.0"] <= 0.05
    assert max(chosen["loss"]["b.logits"], chosen["loss"]["b.found.0"]) <= 10
    assert found["limit"].startswith("at ") and " loses " in found["limit"]


def test_curves_have_a_row_for_every_output(done: Path) -> None:
    params, asked = load_params(Path("params.yaml")), Asked((0.8,), ("share",), retraining=True)
    rows = measure_rows(params, Workspace(Path()), asked)
    assert [(row.task, row.metric) for row in rows if row.retrained] == [
        ("a.found.0", "mean_absolute_error"),
        ("a.logits", "error"),
        ("b.found.0", "agreement"),
        ("b.logits", "agreement"),
    ]
    assert [row.task for row in rows] == 2 * [row.task for row in rows if row.retrained]
    measured = json.loads(Path("metrics.json").read_text())["tasks"]
    for row in rows:
        assert row.error_original == pytest.approx(measured[row.task]["error_original"])


def output(**declared: Any) -> Any:
    return lambda params: params["models"]["a"].update(output=declared)


BAD: dict[str, tuple[Any, type[MtzError], str]] = {
    "an output that is not there": (
        output(boxes="regression"),
        InvalidCalibration,
        r"models\.a\.output: there is no output 'boxes'\. Outputs: logits, found\.0",
    ),
    "a kind that does not fit": (
        output(logits="probabilities"),
        InvalidCalibration,
        r"models\.a\.output: output 'logits': its outputs are declared as probabilities, but they are negative",
    ),
    "one kind for all": (
        lambda params: params["models"]["a"].update(output="regression"),
        InvalidCalibration,
        r"models\.a\.output: it has several outputs \(logits, found\.0\)\. Declare each by its name",
    ),
    "a metric of an output that is not there": (
        lambda params: params["models"]["a"].update(metric={"boxes": "error"}),
        InvalidParams,
        r"models\.a\.metric\.boxes: there is no such output\. Outputs: logits, found\.0",
    ),
    "a metric without labels": (
        lambda params: params["models"]["b"].update(metric={"logits": "error"}),
        InvalidData,
        r"models\.b\.metric: error needs labels.*column label\.logits.*such as agreement",
    ),
    "a floor of an output that is not there": (
        lambda params: params["register"].update(floors={"a.boxes": 1.0}),
        InvalidConfig,
        r"register\.floors: nothing is measured under 'a\.boxes'\. Measured: a\.logits, a\.found\.0",
    ),
    "a floor that is searched for": (
        lambda params: params.update(
            match={"budget": {"floor": {"a.boxes": 1.0, "b": 1.0}, "retrain": params["retrain"]}}
        ),
        InvalidConfig,
        r"match\.budget\.floor: nothing is measured under 'a\.boxes'\. Measured: a\.logits, a\.found\.0, b\.logits",
    ),
}


@pytest.mark.parametrize(("change", "kind", "message"), BAD.values(), ids=BAD.keys())
def test_what_does_not_fit_is_refused_before_work(
    project: Path, change: Any, kind: type[MtzError], message: str
) -> None:
    check_networks(project, load_params(project / "params.yaml"))
    changed(change)
    with pytest.raises(kind, match=message):
        check_networks(project, load_params(project / "params.yaml"))


@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            {"label.logits": "label.boxes"},
            r"models\.a\.data: column label\.boxes is for no output.*label\.logits, label",
        ),
        ({"label.logits": "label"}, r"both columns 'label' and 'label\.found\.0'"),
        (
            {"label.logits": "label", "label.found.0": "other"},
            r"column label is for no output.*label\.logits, label\.fo",
        ),
    ],
    ids=["name", "both", "one"],
)
def test_labels_of_other_outputs_are_refused_before_work(project: Path, rename: Any, message: str) -> None:
    relabel(Path("data/a"), lambda table: table.rename_columns([rename.get(own, own) for own in table.column_names]))
    if "other" in rename.values():
        relabel(Path("data/a"), lambda table: table.drop_columns(["other"]))
    with pytest.raises(InvalidData, match=message):
        check_networks(project, load_params(project / "params.yaml"))


def test_collect_refuses_a_kind_that_does_not_fit(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changed(output(logits="probabilities"))
    assert "models.a.output: output 'logits': its outputs are declared" in refused(capsys, "collect", "a")
    assert not Path("activations").exists()
