"""Error against stored bytes: the table says what evaluating by hand says, files are the same again, limits told."""

from __future__ import annotations

import csv
import dataclasses
import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

from mtz_core.planning.search import BudgetSearch
from mtz_core.retraining import retrain_steps
from mtz_core.settings import Budget
from tasks.__main__ import main
from tasks.artifacts.paths import Workspace
from tasks.artifacts.statistics import read_traced
from tasks.data.examples import read_examples, read_images
from tasks.models.calibration import calibration
from tasks.models.load import load_network, load_traced
from tasks.params import load_params
from tasks.registry import mlflow_client
from tasks.storage.s3 import Storage
from tasks.studies import pareto
from tasks.studies.pareto import Asked, InvalidPareto, Row, limits, measure_rows, reached, read_rows, write
from tests.support.services import Place, Registry
from tests.support.stages import write_images

pytestmark = pytest.mark.slow

SPLITS = {"train": 60, "validation": 20, "test": 30}
CLASSES = 4

NETWORKS = """
from torch import nn


def tiny():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 4)
    )
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two small perceptrons on images of noise, all stages before `match` run."""
    root = tmp_path_factory.mktemp("pareto")
    (root / "pareto_networks.py").write_text(NETWORKS)
    (root / "networks").mkdir()
    model = {"network": "pareto_networks:tiny"}
    params = {
        "group": "tiny",
        "models": {name: model | {"weights": f"networks/{name}.safetensors", "data": f"data/{name}"} for name in "ab"},
        "retrain": {"iterations": 4, "validate_every": 2, "batch_size": 16, "learning_rate": 0.01},
        "register": {"name": "tiny"},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.syspath_prepend(str(root))
        for number, name in enumerate("ab"):
            draw = np.random.default_rng(number)
            for split, count in SPLITS.items():
                pixels = draw.integers(0, 256, (count, 4, 4), dtype=np.uint8)
                write_images(root / f"data/{name}/{split}.parquet", pixels, draw.integers(0, CLASSES, count))
            torch.manual_seed(number)
            save_file(__import__("pareto_networks").tiny().state_dict(), root / f"networks/{name}.safetensors")
            assert main(["collect", name]) == main(["hessians", name]) == 0
    return root


def change(block: str, **values: object) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text())
    content.setdefault(block, {}).update(values)
    Path("params.yaml").write_text(yaml.safe_dump(content))


def measured(sizes: str, methods: str, retraining: bool = False) -> list[Row]:
    asked = Asked.parse(sizes, methods, retraining)
    return measure_rows(load_params(Path("params.yaml")), Workspace(Path()), asked)


def search_by_hand(**config: Any) -> BudgetSearch:
    params, workspace = load_params(Path("params.yaml")), Workspace(Path())
    networks = {name: load_traced(params, workspace, name) for name in "ab"}
    traced = {
        name: dataclasses.replace(
            read_traced(workspace, name, network), batches=calibration(params, workspace, name, network)
        )
        for name, network in networks.items()
    }
    settings = dataclasses.replace(params.zip_config(), share=None, **config)
    assert settings.budget is not None
    return BudgetSearch(traced, settings, settings.budget)


def wrong(network: Any, name: str) -> float:
    """The error in percent, image by image."""
    images, labels = read_examples(Path("data") / name, "test")
    with torch.no_grad():
        found = [
            int(network(image[None])[0].argmax()) != int(label) for image, label in zip(images, labels, strict=True)
        ]
    return 100 * sum(found) / len(found)


@pytest.mark.parametrize(
    ("method", "config"),
    [
        ("mixture", {"budget": Budget(size=1.0)}),
        ("drop", {"budget": Budget(size=1.0, moves=("drop",))}),
        ("paper", {"budget": Budget(size=1.0, moves=("share",)), "method": "paper"}),
    ],
)
def test_the_table_says_what_evaluating_by_hand_says(project: Path, method: str, config: dict[str, Any]) -> None:
    rows = measured("0.7,0.85", method)
    budget_search = search_by_hand(**config)
    params, workspace = load_params(Path("params.yaml")), Workspace(Path())
    assert [row.task for row in rows] == ["a", "b", "a", "b"]
    assert rows[0].stored_fraction <= 0.7 < rows[2].stored_fraction <= 0.85
    for row in rows:
        plan = budget_search.best(0.85 if row.stored_fraction > 0.7 else 0.7)
        zipped = budget_search.zip(plan)
        assert row.stored_bytes == plan.bytes == zipped.report.stored_bytes
        assert row.error == pytest.approx(wrong(partial(zipped, task=row.task), row.task))
        assert row.error_original == pytest.approx(wrong(load_network(params, workspace, row.task), row.task))
        assert row.rise == row.error - row.error_original
        assert row.kept_neurons == sum(len(kept) for kept in plan.keep[row.task].values()) <= row.original_neurons == 22
        assert row.shared_neurons == sum(pairing.shared for pairing in plan.pairings.values())
        assert method != "drop" or row.shared_neurons == 0
        assert method != "paper" or row.shared_neurons > 0 == row.original_neurons - row.kept_neurons
        assert row.stored_fraction == row.stored_bytes / row.original_bytes
        assert row.original_bytes == sum(own.network.bytes for own in budget_search.traced.values())


def test_retrained_rows_are_those_of_the_retrained_network(project: Path) -> None:
    plain, retrained = measured("0.5", "drop"), measured("0.5", "drop", retraining=True)
    assert retrained[:2] == plain
    assert [row.retrained for row in retrained] == [False, False, True, True]
    params, workspace = load_params(Path("params.yaml")), Workspace(Path())
    budget_search = search_by_hand(budget=Budget(size=1.0, moves=("drop",)))
    zipped = budget_search.zip(budget_search.best(0.5))
    originals = {name: load_network(params, workspace, name) for name in "ab"}
    data = [{name: read_images(Path("data") / name, split) for name in "ab"} for split in ("train", "validation")]
    assert len(list(retrain_steps(zipped, originals, data[0], data[1], params.retrain.config()))) == 3
    assert [row.error for row in retrained[2:]] == [pytest.approx(wrong(partial(zipped, task=t), t)) for t in "ab"]


def test_the_models_own_metric_counts(project: Path) -> None:
    content = yaml.safe_load(Path("params.yaml").read_text())
    content["models"]["b"]["metric"] = "balanced_error"
    Path("params.yaml").write_text(yaml.safe_dump(content))
    first, second = measured("0.9", "share")
    assert (first.metric, second.metric) == ("error", "balanced_error")
    zipped = (budget_search := search_by_hand(budget=Budget(size=1.0, moves=("share",)))).zip(budget_search.best(0.9))
    images, labels = read_examples(Path("data/b"), "test")
    with torch.no_grad():
        correct = zipped(images, "b").argmax(dim=1) == labels
    by_class = [100 * float((~correct[labels == label]).double().mean()) for label in labels.unique()]
    assert second.error == pytest.approx(sum(by_class) / len(by_class))


def test_sizes_that_a_method_does_not_reach_end_at_its_least(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = measured("0.2,0.3,0.8", "mixture,share,paper")
    stored = {
        method: sorted({row.stored_fraction for row in rows if row.method == method}) for method in pareto.METHODS
    }
    assert len(stored["mixture"]) == 3 and len(stored["share"]) == len(stored["paper"]) == 2 and not stored["drop"]
    (least,) = {row.least_fraction for row in rows if row.method == "share"}
    assert stored["share"][0] == pytest.approx(least, abs=1e-3) and least > 0.5
    assert limits(rows, 0.2) == f"share only and paper cannot store less than {pareto.as_percent(least)} %"
    assert limits(rows, 0.8) == ""
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [f"{number} of 7" for number in range(1, 8)]


def test_reached() -> None:
    assert reached((0.2, 0.5, 0.8), 0.1) == [0.8, 0.5, 0.2]
    assert reached((0.2, 0.5, 0.8), 0.5) == [0.8, 0.5, 0.5]
    assert reached((0.2, 0.5, 0.8), 0.6) == [0.8, 0.6]


def test_the_same_again_gives_the_same_bytes(project: Path, tmp_path: Path) -> None:
    written = [write(tmp_path / name, measured("0.4,0.8", "drop,share")) for name in ("first", "second")]
    first, second = ({name: path.read_bytes() for name, path in files.items()} for files in written)
    assert first == second
    assert sorted(first) == ["pareto.csv", "pareto.parquet", "pareto.png", "pareto.svg"]


def test_files_hold_the_rows(project: Path, tmp_path: Path) -> None:
    rows = measured("0.6", "mixture,drop", retraining=True)
    files = write(tmp_path / "pareto", rows)
    read = read_rows(files["pareto.parquet"])
    assert read == rows
    assert [row.retrained for row in read] == [False] * 4 + [True] * 4
    assert pq.read_schema(files["pareto.parquet"]).names == [field.name for field in dataclasses.fields(Row)]
    with files["pareto.csv"].open(newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["method"] for line in table[::2]] == [
        "mixture",
        "drop only",
        "mixture, retrained",
        "drop only, retrained",
    ]
    assert float(table[0]["rise"]) == read[0].rise and float(table[0]["stored"]) == 100 * read[0].stored_fraction


def test_dvc_plots_what_is_written(project: Path, tmp_path: Path) -> None:
    """The entry in `dvc.yaml` and its template name the file and columns that are written."""
    root = Path(__file__).parents[3]
    (plots,) = yaml.safe_load((root / "dvc.yaml").read_text())["plots"]
    ((name, settings),) = plots.items()
    assert Path(name) == Workspace(Path()).pareto / "pareto.csv"
    header = write(tmp_path, measured("0.9", "drop"))["pareto.csv"].read_text().splitlines()[0].split(",")
    assert {settings["x"], settings["y"]} <= set(header)
    template = json.loads((root / settings["template"]).read_text())
    assert {column["field"] for column in template["spec"]["layer"][0]["encoding"]["tooltip"]} <= set(header)


def test_mlflow_has_one_run_for_one_content(
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    registry: Registry,
    home: Path,
    store: Storage,
    place: Place,
) -> None:
    monkeypatch.setenv("MTZ_HOME", str(home))
    change("storage", **dataclasses.asdict(place))
    change("tracking", experiment="pareto-tests")
    client = mlflow_client.connect(registry, home)

    def runs() -> list[Any]:
        experiments = [e.experiment_id for e in client.search_experiments() if e.name.startswith("pareto-tests")]
        return client.search_runs(experiments) if experiments else []

    for told in ("recorded", "there already"):
        assert main(["pareto", "--sizes", "0.8,0.9", "--methods", "drop"]) == 0, capsys.readouterr().err
        assert capsys.readouterr().out.splitlines()[-1] == f"MLflow run pareto-tiny: {told}"
        assert len(runs()) == 1
    (run,) = runs()
    rows = read_rows(Path("pareto/pareto.parquet"))
    assert run.info.run_name == "pareto-tiny" and run.info.status == "FINISHED"
    assert run.data.params["sizes"] == "[0.8, 0.9]" and run.data.params["match.method"] == "refit"
    history = client.get_metric_history(run.info.run_id, "drop-only/a/error")
    assert [(point.step, point.value) for point in history] == [
        (round(100 * row.stored_fraction), row.error) for row in rows if row.task == "a"
    ]
    artifacts = store.names(run.info.artifact_uri.removeprefix(store.url() + "/"))
    assert artifacts == ["pareto.csv", "pareto.parquet", "pareto.png", "pareto.svg", "table.json"]
    assert main(["pareto", "--sizes", "0.8", "--methods", "drop"]) == 0
    assert len(runs()) == 2


@pytest.mark.parametrize(
    ("sizes", "methods", "message"),
    [
        ("0", None, r"--sizes 0: is no list of sizes\. Allowed: numbers above 0, at most 1"),
        ("0.5,1.2", None, "--sizes 0.5,1.2"),
        ("nan", None, "--sizes nan"),
        ("half", None, "--sizes half"),
        ("", None, "--sizes "),
        (None, "mixture,prune", "there is no method 'prune'. Methods: mixture, round, drop, share, paper"),
    ],
)
def test_impossible_questions(sizes: str | None, methods: str | None, message: str) -> None:
    with pytest.raises(InvalidPareto, match=message):
        Asked.parse(sizes, methods)


def test_questions_are_put_in_order() -> None:
    assert Asked.parse("0.5, 0.25,0.5", "paper, mixture") == Asked((0.25, 0.5), ("mixture", "paper"))
    assert Asked.parse() == Asked()


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one error line, with nothing written."""
    capsys.readouterr()
    assert main(["pareto", *arguments]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert not Path("pareto").exists()
    return line


def test_no_size_can_be_reached(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "--sizes", "0.2,0.3", "--methods", "share,paper")
    assert line.startswith("error: no method stores as little as 30 %. Least: share only ")


def test_test_labels_are_needed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("data/b/test.parquet")
    whole = pq.read_table(path)
    pq.write_table(whole.drop_columns("label"), path)
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["models"]["b"]["metric"] = "error"
    Path("params.yaml").write_text(yaml.safe_dump(params))
    assert "models.b.metric: error needs labels" in refused(capsys)
    write_images(path, np.zeros((2, 4, 4), np.uint8), np.array([0, CLASSES]))
    assert "the labels of 'b' go from 0 to 4, but the network has 4 classes" in refused(capsys)


def test_earlier_stages_are_needed(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("hessians/a.safetensors").unlink()
    assert "hessians/a.safetensors" in refused(capsys)


def test_options_of_pareto_are_no_stages(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["match", "--retrain"])
    assert "stage match takes no --sizes, --methods or --retrain" in capsys.readouterr().err
