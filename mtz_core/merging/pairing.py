"""Pairings: which neurons of a neuron group are one, and the assignment of least cost that finds them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int64
from scipy.optimize import linear_sum_assignment

from mtz_core.zipped.ownership import NOT_A_MEMBER


@dataclass(frozen=True, eq=False)
class Pairing:
    """Which neurons of one group are one neuron of the zipped network.

    Attributes:
        tasks: The tasks, in the order of the columns of `members`.
        members: ``members[u, t]`` is the neuron of task t that is (a part of) the zipped network's neuron u, or
            `NOT_A_MEMBER`. Rows are in canonical order: neurons of more tasks first, then by the tasks and their
            neurons.
    """

    tasks: tuple[str, ...]
    members: Int64[np.ndarray, "neurons tasks"]

    @classmethod
    def from_tuples(
        cls, tasks: tuple[str, ...], widths: Sequence[int], tuples: Int64[np.ndarray, "k tasks"]
    ) -> Pairing:
        """Make the pairing in which the given tuples are shared and every other neuron stays separate.

        Args:
            tasks: The tasks.
            widths: The number of neurons of every task.
            tuples: The neuron of every task in each tuple, or `NOT_A_MEMBER`.

        Returns:
            The pairing.
        """
        rows = [tuples[(tuples >= 0).any(axis=1)]]
        for t, width in enumerate(widths):
            rest = np.setdiff1d(np.arange(width), tuples[:, t])
            own = np.full((len(rest), len(tasks)), NOT_A_MEMBER, dtype=np.int64)
            own[:, t] = rest
            rows.append(own)
        members = np.concatenate(rows).astype(np.int64)
        absent = (members < 0).astype(np.int64)
        keys = np.concatenate([absent.sum(axis=1)[:, None], absent, members], axis=1)
        return cls(tasks, members[np.lexsort(keys.T[::-1])])

    @property
    def shared(self) -> int:
        """The number of neurons that belong to more than one task."""
        return int(((self.members >= 0).sum(axis=1) > 1).sum())


@dataclass(frozen=True)
class GroupMatch:
    """The pairing of one neuron group, and its predicted cost.

    Attributes:
        group: The group.
        pairing: The pairing.
        cost: The total functional difference of the shared neurons.
        curve: ``curve[k - 1]`` is the cost of the cheapest k tuples if as many as possible were matched: it shows what
            sharing less or more would cost.
        sweep: The sweep of coordinate descent in which the pairing was taken; 0 before the first.
        total: The predicted cost of all groups with this pairing; NaN where there is no descent, or while groups are
            missing.
    """

    group: str
    pairing: Pairing
    cost: float
    curve: tuple[float, ...]
    sweep: int = 0
    total: float = math.nan


def assign(cost: Float[np.ndarray, "a b"], count: int) -> Int64[np.ndarray, "count 2"]:
    """Find disjoint pairs of least total cost.

    The answer is exact. Rows and columns that stay unpaired are assigned to ``a − count`` and ``b − count`` free
    dummies, which must not meet each other, so exactly `count` real pairs remain.

    Args:
        cost: The cost of every pair.
        count: The number of pairs.

    Returns:
        The row and the column of every pair.
    """
    a, b = cost.shape
    padded = np.zeros((a + b - count, a + b - count))
    padded[:a, :b] = cost
    padded[a:, b:] = np.inf
    rows, columns = linear_sum_assignment(padded)
    real = (rows < a) & (columns < b)
    return np.stack([rows[real], columns[real]], axis=1)


def assign_greedily(cost: Float[np.ndarray, "a b"], count: int) -> Int64[np.ndarray, "count 2"]:
    """Find disjoint pairs by always taking the cheapest that is left, as the paper does.

    Pairs are taken in rounds. Two neurons that are each other's cheapest partner would be taken before anything that
    could come between them, so all such pairs are taken at once. The cheapest `count` of all pairs are the greedy
    answer.

    Args:
        cost: The cost of every pair.
        count: The number of pairs.

    Returns:
        The row and the column of every pair.
    """
    rows, columns = np.arange(cost.shape[0]), np.arange(cost.shape[1])
    found: list[np.ndarray] = []
    while len(rows) and len(columns):
        left = cost[np.ix_(rows, columns)]
        best_column, best_row = left.argmin(axis=1), left.argmin(axis=0)
        mutual = np.flatnonzero(best_row[best_column] == np.arange(len(rows)))
        found.append(np.stack([rows[mutual], columns[best_column[mutual]]], axis=1))
        rows, columns = np.delete(rows, mutual), np.delete(columns, best_column[mutual])
    pairs = np.concatenate(found) if found else np.zeros((0, 2), dtype=np.int64)
    order = np.argsort(cost[pairs[:, 0], pairs[:, 1]], kind="stable")
    return pairs[order[:count]]
