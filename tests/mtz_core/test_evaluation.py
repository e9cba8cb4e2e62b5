"""Error rates, agreement and other metrics, counted by hand, with intervals."""

from math import log
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from mtz_core.errors import InvalidCalibration, InvalidConfig
from mtz_core.evaluation import METRICS, Case, Measured, error_rate, measure, metric_of, metrics_by_task, predict
from mtz_core.settings import METRIC_NAMES, Kind, Output
from mtz_core.task_loss import TaskLoss

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


@given(classes)
def test_rates_are_counts_in_percent(pairs: list[tuple[int, int]]) -> None:
    found, labels = (torch.tensor(values) for values in zip(*pairs, strict=True))
    wrong = sum(a != b for a, b in pairs)
    assert error_rate(found, labels) == pytest.approx(100 * wrong / len(pairs))
    assert error_rate(labels, labels) == 0
    outputs = 2.0 * torch.nn.functional.one_hot(found, 4)
    assert measured("error", outputs, labels).value == pytest.approx(100 * wrong / len(pairs))


def measured(
    metric: str, outputs: Tensor, labels: Tensor | None = None, targets: Tensor | None = None, kind: Kind = "logits"
) -> Measured:
    targets = outputs if targets is None else targets
    return measure(metric_of(metric), Case(outputs, labels, targets, TaskLoss.of(targets, Output(kind))), "a")


def test_predictions_are_the_largest_outputs_in_order() -> None:
    network = torch.nn.Linear(3, 4)
    x = torch.randn(10, 3)
    found = predict(network, torch.split(x, 4))
    assert found.tolist() == [int(network(row[None]).argmax()) for row in x]
    assert not found.requires_grad


def test_no_examples_are_refused() -> None:
    with pytest.raises(InvalidCalibration, match="no test examples"):
        predict(torch.nn.Linear(3, 4), [])


def test_settings_know_the_names() -> None:
    assert tuple(METRICS) == METRIC_NAMES


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_metrics_without_labels_compare_with_the_original() -> None:
    targets = draw(60, 3)
    outputs = targets + 0.5 * draw(60, 3, seed=1)
    same = float((outputs.argmax(1) == targets.argmax(1)).double().mean())
    assert measured("agreement", outputs, targets=targets).value == pytest.approx(100 * (1 - same))
    distance = float((outputs - targets).abs().double().mean())
    assert measured("mean_absolute_error", outputs, targets=targets, kind="regression").value == pytest.approx(distance)
    expected = sum(1 - stats.pearsonr(outputs[:, i], targets[:, i]).statistic for i in range(3)) / 3
    assert measured("correlation", outputs, targets=targets, kind="regression").value == pytest.approx(100 * expected)
    spread = (targets - targets.mean(0)) / targets.std(0, unbiased=False)
    moved = (outputs - targets.mean(0)) / targets.std(0, unbiased=False)
    expected = float((moved - spread).square().sum() / spread.square().sum())
    found = measured("output_error", outputs, targets=targets, kind="regression").value
    assert found == pytest.approx(100 * expected, rel=1e-4)
    for metric in ("agreement", "mean_absolute_error", "correlation", "output_error"):
        assert measured(metric, targets, targets=targets, kind="regression").value == pytest.approx(0, abs=1e-9)


def test_labels_are_the_truth_where_there_are_some() -> None:
    outputs, truth = draw(60, 2), draw(60, 2, seed=1)
    found = measured("mean_absolute_error", outputs, truth, kind="regression").value
    assert found == pytest.approx(float((outputs - truth).abs().double().mean()))


def test_average_precision_by_hand() -> None:
    outputs = torch.tensor([[3.0], [2.0], [1.0], [0.0]])
    labels = torch.tensor([1, 0, 1, 0])
    assert measured("average_precision", outputs, labels, kind="multi-label").value == pytest.approx(
        100 * (1 - (1 + 2 / 3) / 2)
    )
    assert measured("average_precision", outputs, kind="multi-label").value == 0


@pytest.mark.parametrize("metric", METRICS)
def test_intervals_hold_the_value_and_shrink_with_examples(metric: str) -> None:
    def width(count: int) -> float:
        targets = 2 * draw(count, 3)
        outputs = targets + draw(count, 3, seed=1)
        kind: Kind = "multi-label" if metric == "average_precision" else "logits"
        labels = targets.argmax(dim=1) if METRICS[metric].reads == "labels" else None
        found = measured(metric, outputs, labels, targets, kind)
        assert found.low <= found.value <= found.high
        return found.high - found.low

    if metric == "top5_error":
        pytest.skip("five of three classes are never wrong")
    assert 0 < width(1000) < width(60)


def test_the_interval_of_a_rate_is_wilsons() -> None:
    outputs = 2.0 * torch.nn.functional.one_hot(torch.zeros(50, dtype=torch.long), 2)
    labels = (torch.arange(50) < 7).long()
    found = measured("error", outputs, labels)
    expected = stats.binomtest(7, 50).proportion_ci(method="wilson")
    assert (found.low, found.high) == pytest.approx((100 * expected.low, 100 * expected.high), rel=1e-5)
    assert measured("error", outputs, labels * 0).high > 1, "no error in fifty examples proves little"
    assert measured("error", outputs, labels * 0).low == 0 and measured("error", outputs, labels * 0 + 1).high == 100


BY_OUTPUT = {"logits": "error", "boxes": "correlation"}


@pytest.mark.parametrize("metric", ["error", BY_OUTPUT, float])
def test_metrics_hold_for_all_tasks(metric: Any) -> None:
    assert metrics_by_task(metric, "ab", "abc") == {"a": metric, "b": metric}


@pytest.mark.parametrize("metrics", [{"a": "error", "b": BY_OUTPUT}, {"b": "error", "a": float}])
def test_metrics_may_be_given_for_each_task(metrics: Any) -> None:
    assert metrics_by_task(metrics, "ab", "abc") == metrics


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ({"a": "error"}, r"^metric: names \['a'\], but the tasks that are measured are \['a', 'b'\]\.$"),
        ({"a": "error", "b": "error", "c": "error"}, r"names \['a', 'b', 'c'\]"),
        ({"a": "error", "x": "error"}, r"names \['a', 'x'\]"),
        ({"x": BY_OUTPUT}, r"names \['x'\]"),
        ({}, "the metric of 'a' names no output"),
        ({"a": "error", "b": {}}, "the metric of 'b' names no output"),
    ],
)
def test_metrics_of_other_tasks_or_of_none_are_refused(metrics: Any, message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        metrics_by_task(metrics, "ab", "abc")


def test_a_function_of_ones_own() -> None:
    outputs, truth = draw(20, 2), draw(20, 2, seed=1)
    case = Case(outputs, truth, outputs, TaskLoss.of(outputs, Output("regression")))
    found = measure(metric_of(lambda found, given: float((found - given).abs().max())), case, "a")
    assert found.value == pytest.approx(float((outputs - truth).abs().max()))


def test_a_function_may_write_into_what_it_is_given() -> None:
    outputs, truth = draw(20, 2), draw(20, 2, seed=1)
    case = Case(outputs.clone(), truth.clone(), outputs.clone(), TaskLoss.of(outputs, Output("regression")))
    measure(metric_of(lambda found, given: float(found.sub_(given.zero_()).norm())), case, "a")
    assert torch.equal(case.outputs, outputs) and torch.equal(case.labels, truth)


def test_a_function_may_return_numbers_of_numpy() -> None:
    outputs = draw(20, 2)
    case = Case(outputs, None, outputs, TaskLoss.of(outputs, Output("regression")))
    assert measure(metric_of(lambda found, _: found.numpy().max()), case, "a").value == float(outputs.max())


def roc(found: Tensor, given: Tensor) -> float:
    """A metric that needs both classes."""
    if len(given.unique()) < 2:
        raise ValueError("there is\none class")
    return 0.25


def test_a_function_that_fails_is_named_but_some_resamples_may() -> None:
    outputs, truth = draw(20, 2), torch.zeros(20, dtype=torch.long)
    case = Case(outputs, truth, outputs, TaskLoss.of(outputs, Output("regression")))
    with pytest.raises(InvalidConfig, match=r"the metric roc fails \(ValueError: there is\)\. It is called with"):
        measure(metric_of(roc), case, "a")
    truth[0] = 1
    found = measure(metric_of(roc), case, "a")
    assert (found.low, found.value, found.high) == (0.25, 0.25, 0.25)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (float("nan"), "the metric of 'a' is nan"),
        (log(0.5) * float("inf"), "the metric of 'a' is -inf"),
        ("0.5", "returns a str"),
        (None, "returns a NoneType"),
        (True, "returns a bool"),
        (torch.zeros(3), "returns a Tensor"),
    ],
)
def test_what_is_no_number_is_refused(returned: object, message: str) -> None:
    outputs = draw(20, 2)
    case = Case(outputs, None, outputs, TaskLoss.of(outputs, Output("regression")))
    with pytest.raises(InvalidConfig, match=message):
        measure(metric_of(lambda *_: returned), case, "a")  # type: ignore[arg-type]


def test_a_metric_that_needs_labels_says_so_and_its_remedy_works() -> None:
    outputs = draw(20, 2)
    with pytest.raises(InvalidConfig, match=r"the metric of 'a' needs labels, and its data have none\..*agreement"):
        measured("error", outputs)
    assert measured("agreement", outputs).value == 0
    with pytest.raises(InvalidConfig, match="'eror' is unknown"):
        metric_of("eror")
    with pytest.raises(InvalidConfig, match=r"\['error'\] is unknown"):
        metric_of(["error"])  # type: ignore[arg-type]
