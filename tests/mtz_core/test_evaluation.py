"""Error rates and agreement, counted by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mtz_core.errors import InvalidCalibration
from mtz_core.evaluation import agreement, error_rate, predict

classes = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=20)


@given(classes)
def test_rates_are_counts_in_percent(pairs: list[tuple[int, int]]) -> None:
    found, labels = (torch.tensor(values) for values in zip(*pairs, strict=True))
    wrong = sum(a != b for a, b in pairs)
    assert error_rate(found, labels) == pytest.approx(100 * wrong / len(pairs))
    assert agreement(found, labels) == pytest.approx(100 - 100 * wrong / len(pairs))
    assert error_rate(labels, labels) == 0
    assert agreement(labels, labels) == 100


def test_predictions_are_the_largest_outputs_in_order() -> None:
    network = torch.nn.Linear(3, 4)
    x = torch.randn(10, 3)
    found = predict(network, torch.split(x, 4))
    assert found.tolist() == [int(network(row[None]).argmax()) for row in x]
    assert not found.requires_grad


def test_no_examples_are_refused() -> None:
    with pytest.raises(InvalidCalibration, match="no test examples"):
        predict(torch.nn.Linear(3, 4), [])
