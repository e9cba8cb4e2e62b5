"""What the check before any work says of test data is what the stages would say after hours."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor, nn

from flows.commands.check import check_networks
from mtz_core.errors import MtzError
from tasks.artifacts.paths import Workspace
from tasks.data.examples import InvalidData
from tasks.models.factories import build_network
from tasks.models.load import trace_on_own_image
from tasks.params import load_params
from tasks.stages import collect
from tasks.stages.output_checks import check_outputs

CLASSES, EXAMPLES = 5, 12


class Shaped(nn.Module):
    """Five scores for each example, in a shape that is asked for."""

    def __init__(self, shape: str = "classes") -> None:
        super().__init__()
        self.hidden, self.last, self.shape = nn.Linear(6, 8), nn.Linear(8, CLASSES if shape != "number" else 1), shape

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        scores: Tensor = self.last(self.hidden(x).relu())
        if self.shape == "number":
            return scores.flatten()
        if self.shape == "dense":
            return scores[..., None].expand(-1, -1, 4)
        if self.shape == "steps":
            return scores.sign()
        if self.shape == "constant":
            return scores * 0
        return scores[..., None].squeeze() if self.shape == "squeezed" else scores


def project(root: Path, shape: str = "classes", labels: Any = None, **changes: Any) -> Path:
    """Write a project of one network, with these labels of each split; None for none."""
    for name in ("networks", "data/a"):
        (root / name).mkdir(parents=True)
    torch.manual_seed(0)
    for split in ("train", "validation", "test"):
        own = labels.get(split) if isinstance(labels, dict) else labels
        columns = {"input": pa.array(np.random.default_rng(0).standard_normal((EXAMPLES, 6)).astype("f").tolist())}
        table = columns if own is None else {**columns, "label": pa.array(np.asarray(own).tolist())}
        pq.write_table(pa.table(table), root / "data" / "a" / f"{split}.parquet")
    save_file(Shaped(shape).state_dict(), root / "networks" / "a.safetensors")
    model = {
        "network": f"{__name__}:Shaped",
        "arguments": {"shape": shape},
        "weights": "networks/a.safetensors",
        "data": "data/a",
        **changes.pop("model", {}),
    }
    models = dict.fromkeys("ab" if "match" in changes else "a", model)
    params = {"group": "g", "models": models, "register": {"name": "g"}, **changes}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


class Streamed(nn.Module):
    """Adds its input to what it has computed."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 8), nn.Linear(8, 6), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Return scores."""
        scores: Tensor = self.last(x + self.second(self.first(x).relu()))
        return scores


def check(root: Path) -> None:
    check_networks(root, load_params(root / "params.yaml"))


NUMBERS = np.arange(EXAMPLES) % CLASSES
WRONG: dict[str, tuple[str, Any, str | None, str]] = {
    "from one": (
        "classes",
        NUMBERS + 1,
        None,
        r"labels of test examples go from 1 to 5, .* 5 classes\. Allowed: .* 4",
    ),
    "fractions": ("classes", NUMBERS + 0.5, None, r"have shape \[2\], but its outputs \[2, 5\]"),
    "fractions as classes": ("classes", NUMBERS + 0.5, "error", "whole numbers from 0 to 4"),
    "classes as indicators": ("classes", NUMBERS, "average_precision", "Give a number for each"),
    "indicators as classes": ("classes", np.eye(CLASSES, dtype=int)[NUMBERS], None, "one number, its class"),
    "one number": ("number", NUMBERS % 2, None, r"its output is one number\. Take mean_absolute_error"),
    "dense": ("dense", NUMBERS, None, r"outputs have shape \[2, 5, 4\]\. Take agreement"),
}


@pytest.mark.parametrize(("shape", "labels", "metric", "told"), WRONG.values(), ids=WRONG)
def test_labels_that_evaluation_would_refuse_are_refused(
    tmp_path: Path, shape: str, labels: Sequence[int], metric: str | None, told: str
) -> None:
    with pytest.raises(MtzError, match=told):
        check(project(tmp_path, shape, labels, model={} if metric is None else {"metric": metric}))


def distance(outputs: Tensor, labels: Tensor) -> float:
    """A metric that reads labels as it likes."""
    return float((outputs.argmax(dim=1) - labels).abs().double().mean())


RIGHT: dict[str, tuple[str, Any, str | None]] = {
    "classes": ("classes", NUMBERS, None),
    "batches of one are squeezed": ("squeezed", NUMBERS, None),
    "no labels": ("classes", None, None),
    "agreement reads none": ("dense", NUMBERS + 90, "agreement"),
    "own function": ("classes", NUMBERS + 90, f"{__name__}:distance"),
    "whole numbers": ("number", NUMBERS + 90, "mean_absolute_error"),
    "indicators": ("classes", np.eye(CLASSES, dtype=int)[NUMBERS], "average_precision"),
}


@pytest.mark.parametrize(("shape", "labels", "metric"), RIGHT.values(), ids=RIGHT)
def test_labels_that_evaluation_reads_otherwise_are_left_alone(
    tmp_path: Path, shape: str, labels: Any, metric: str | None
) -> None:
    check(project(tmp_path, shape, labels, model={} if metric is None else {"metric": metric}))


@pytest.mark.parametrize("split", ["train", "validation"])
def test_labels_that_light_retraining_would_refuse_are_refused(tmp_path: Path, split: str) -> None:
    project(tmp_path, labels={"train": NUMBERS, "validation": NUMBERS, split: NUMBERS + 1}, retrain={"labels": 0.5})
    with pytest.raises(MtzError, match=rf"labels of {split} examples go from 1 to 5.* Allowed: .* 4"):
        check(tmp_path)


def no_number(outputs: Tensor, labels: Tensor) -> str:
    """No metric."""
    return "0.5"


def not_finite(outputs: Tensor, labels: Tensor) -> float:
    """A metric that cannot be measured."""
    return float("nan")


def failing(outputs: Tensor, labels: Tensor) -> float:
    """A metric that fails."""
    return float(outputs[EXAMPLES])


def ranking(outputs: Tensor, labels: Tensor) -> float:
    """A metric that fails unless all classes are there."""
    if len(labels.unique()) < CLASSES:
        raise ValueError("only one class present")
    return 0.5


@pytest.mark.parametrize(
    ("metric", "told"),
    [
        ("no_number", "the metric of 'a' returns a str"),
        ("not_finite", "the metric of 'a' is nan"),
        ("failing", r"the metric failing fails \(IndexError: index 12 is out of bounds"),
    ],
)
def test_metrics_that_evaluation_would_refuse_are_refused(tmp_path: Path, metric: str, told: str) -> None:
    with pytest.raises(MtzError, match=told):
        check(project(tmp_path, labels=NUMBERS, model={"metric": f"{__name__}:{metric}"}))


def test_a_metric_may_fail_on_some_examples_if_it_does_not_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.stages.output_checks._TRIED", 2)
    check(project(tmp_path, labels=np.sort(NUMBERS), model={"metric": f"{__name__}:ranking"}))


@pytest.mark.parametrize(
    ("shape", "told"),
    [("constant", "'a' puts out the same for all"), ("steps", "small changes do not show in the outputs of 'a'")],
)
def test_outputs_that_tell_a_budget_nothing_are_refused(tmp_path: Path, shape: str, told: str) -> None:
    project(tmp_path, shape, match={"budget": {"size": 0.6}})
    with pytest.raises(MtzError, match=told):
        check(tmp_path)
    settings = yaml.safe_load((tmp_path / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**settings, "match": {"share": 1.0}}))
    check(tmp_path)


def test_outputs_may_tell_nothing_for_some_examples_if_they_do_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.stages.output_checks._TRIED", 1)
    check(project(tmp_path, match={"budget": {"size": 0.6}}))


FLOOR: dict[str, Any] = {
    "match": {"budget": {"floor": 1.0, "retrain": {"iterations": 4}}},
    "retrain": {"iterations": 4},
}


@pytest.mark.parametrize(
    ("shape", "labels", "told"),
    [
        ("classes", NUMBERS + 1, "whole numbers from 0 to 4"),
        ("classes", NUMBERS + 0.5, r"have shape \[12\], but its outputs \[12, 5\]"),
        ("number", NUMBERS % 2, r"its output is one number\. Take mean_absolute_error"),
    ],
    ids=["from one", "fractions", "one number"],
)
def test_labels_that_a_floor_cannot_be_measured_with_are_refused(
    tmp_path: Path, shape: str, labels: np.ndarray, told: str
) -> None:
    with pytest.raises(MtzError, match=told):
        check(project(tmp_path, shape, {"validation": labels}, **FLOOR))


def test_a_floor_of_a_network_that_squeezes_batches_of_one_is_possible(tmp_path: Path) -> None:
    check(project(tmp_path, "squeezed", NUMBERS, **FLOOR))


def test_light_retraining_with_labels_needs_some(tmp_path: Path) -> None:
    with pytest.raises(MtzError, match=r"train\.parquet has no column 'label'"):
        check(project(tmp_path, retrain={"labels": 0.5}))


@pytest.mark.parametrize("values", [np.ones((EXAMPLES, 7), "f"), np.ones((EXAMPLES, 6), int)], ids=["shape", "dtype"])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_examples_that_the_network_does_not_accept_are_refused_before_any_work(
    tmp_path: Path, values: np.ndarray, split: str
) -> None:
    params, workspace = load_params(project(tmp_path) / "params.yaml"), Workspace(tmp_path)
    pq.write_table(pa.table({"input": pa.array(values.tolist())}), tmp_path / "data" / "a" / f"{split}.parquet")
    told = rf"models\.a\.data: {split} examples have shape \[{values.shape[1]}\].* to one"
    with pytest.raises(MtzError, match=told):
        check(tmp_path)
    with pytest.raises(InvalidData, match=told):
        collect.run(params, workspace, "a")
    assert not workspace.activations("a").exists()


def test_examples_that_a_network_yet_to_be_trained_does_not_accept_are_refused(tmp_path: Path) -> None:
    params, workspace = load_params(project(tmp_path) / "params.yaml"), Workspace(tmp_path)
    network = trace_on_own_image(params, workspace, "a", build_network(params, "a"))
    pq.write_table(pa.table({"input": [[1.0] * 7] * EXAMPLES}), tmp_path / "data" / "a" / "test.parquet")
    with pytest.raises(MtzError, match=r"test examples have shape \[7\]"):
        check_outputs(params, workspace, "a", network, trained=False)


def test_layers_that_will_stay_separate_are_told(tmp_path: Path) -> None:
    root = project(tmp_path, match={"share": 1.0}, model={"network": f"{__name__}:Streamed", "arguments": {}})
    save_file(Streamed().state_dict(), root / "networks" / "a.safetensors")
    ((layer, why),) = check_networks(root, load_params(root / "params.yaml")).items()
    assert layer == "second"
    assert why.startswith("its neurons meet the input one by one, in 'add.Tensor:")
