"""How good a network is at its task, and how much it agrees with another."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from mtz_core.errors import InvalidCalibration

Classifier = Callable[[Float[Tensor, "batch ..."]], Float[Tensor, "batch classes"]]


@torch.no_grad()
def predict(network: Classifier, batches: Iterable[Tensor]) -> Int64[Tensor, " examples"]:
    """The most likely class of every example. Raises `InvalidCalibration` without examples."""
    parts = [network(batch).argmax(dim=1) for batch in batches]
    if not parts:
        raise InvalidCalibration("there are no test examples. Give at least one.")
    return torch.cat(parts)


def error_rate(predicted: Int64[Tensor, " n"], labels: Int64[Tensor, " n"]) -> float:
    """Share of wrong predictions, in percent."""
    return 100 * float((predicted != labels).double().mean())


def agreement(predicted: Int64[Tensor, " n"], original: Int64[Tensor, " n"]) -> float:
    """Share of predictions equal to the original network's, in percent."""
    return 100 - error_rate(predicted, original)
