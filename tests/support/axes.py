"""Axes and members of zipped networks, drawn at random and by hand."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from hypothesis import strategies as st

from mtz_core.network.graph import FIXED, Axis
from mtz_core.zipped.ownership import NOT_A_MEMBER

NO = NOT_A_MEMBER


def axis(*places: tuple[str, int] | None) -> Axis:
    """An axis whose positions belong to these neurons, given as (group, neuron); None: to none."""
    names = tuple(dict.fromkeys(place[0] for place in places if place))
    return Axis(
        names,
        np.array([names.index(place[0]) if place else FIXED for place in places]),
        np.array([place[1] if place else FIXED for place in places]),
    )


def members(*rows: Sequence[int]) -> np.ndarray:
    return np.array(rows, dtype=np.int64).reshape(len(rows), -1)


@st.composite
def zipped_axes(draw: Any) -> tuple[tuple[str, ...], dict[str, Axis], dict[str, np.ndarray]]:
    """Axes of some tasks over two groups (several positions per neuron), some positions of no neuron, and members."""
    tasks = ("a", "b", "c")[: draw(st.integers(1, 3))]
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    slots = {"g": int(generator.integers(1, 3)), "h": int(generator.integers(1, 4))}
    widths = {name: {task: int(generator.integers(1, 5)) for task in tasks} for name in slots}
    table = {}
    for name, of in widths.items():
        count = int(generator.integers(max(of.values()), sum(of.values()) + 1))
        rows = np.full((count, len(tasks)), NO)
        for column, task in enumerate(tasks):
            rows[generator.permutation(count)[: of[task]], column] = generator.permutation(of[task])
        table[name] = rows[(rows >= 0).any(axis=1)]
    axes = {}
    for task in tasks:
        places = [(name, i) for name, of in widths.items() for i in range(of[task]) for _ in range(slots[name])]
        some = [*places, *[None] * int(generator.integers(0, 3))]
        axes[task] = axis(*(some[i] for i in generator.permutation(len(some))))
    return tasks, axes, table
