"""Who owns which row and column: axes of several tasks put side by side."""

from collections.abc import Mapping

import numpy as np
from hypothesis import given

from mtz_core.network.graph import INPUT, KERNEL, Axis
from mtz_core.zipped.ownership import Arrangement, arrange, positions_of
from tests.support.axes import NO, axis, members, zipped_axes


def described(arrangement: Arrangement) -> list[tuple[str, Mapping[str, list[int]]]]:
    return [("+".join(r.owners), {task: p.tolist() for task, p in r.places.items()}) for r in arrangement.segments]


def test_positions_of_every_neuron_in_order() -> None:
    one = axis(("h", 1), None, ("g", 0), ("h", 0), ("h", 1), ("h", 0))
    assert positions_of(one, "h").tolist() == [[3, 5], [0, 4]]
    assert positions_of(one, "g").tolist() == [[2]]
    assert positions_of(one, "other").shape == (0, 0)


def test_paired_neurons_lie_together_each_task_in_its_own_order() -> None:
    axes = {"a": axis(("g", 0), ("g", 1), ("g", 2)), "b": axis(("g", 0), ("g", 1), ("g", 2), ("g", 3))}
    found = arrange(("a", "b"), axes, {"g": members([0, 3], [2, 0], [1, NO], [NO, 1], [NO, 2])})
    assert described(found) == [("a+b", {"a": [0, 2], "b": [3, 0]}), ("a", {"a": [1]}), ("b", {"b": [1, 2]})]
    assert found.shared() == 2
    assert found.order("b").tolist() == [3, 0, 1, 2]
    assert [segment.owners for segment in found.of("a")] == [("a", "b"), ("a",)]


def test_neurons_of_some_tasks_among_many() -> None:
    three = {task: axis(("g", 0), ("g", 1)) for task in "abc"}
    found = arrange(("a", "b", "c"), three, {"g": members([0, 0, 1], [NO, 1, 0], [1, NO, NO])})
    assert described(found) == [
        ("a+b+c", {"a": [0], "b": [0], "c": [1]}),
        ("b+c", {"b": [1], "c": [0]}),
        ("a", {"a": [1]}),
    ]
    assert found.shared() == 2


def test_what_corresponds_by_itself_and_what_never_does() -> None:
    axes = {
        "a": axis((INPUT, 0), (INPUT, 0), ("unpaired", 0), None),
        "b": axis((INPUT, 0), (INPUT, 0), None, ("unpaired", 0)),
    }
    found = arrange(("a", "b"), axes, {})
    assert described(found) == [
        ("a+b", {"a": [0, 1], "b": [0, 1]}),
        ("a", {"a": [2, 3]}),
        ("b", {"b": [2, 3]}),
    ]
    kernel = {"a": axis((KERNEL, 0), (KERNEL, 0)), "b": axis((KERNEL, 0), (KERNEL, 0))}
    assert arrange(("a", "b"), kernel, {}).shared() == 2


def test_inputs_of_other_sizes_do_not_correspond() -> None:
    axes = {"a": axis((INPUT, 0)), "b": axis((INPUT, 0), (INPUT, 0))}
    assert described(arrange(("a", "b"), axes, {})) == [("a", {"a": [0]}), ("b", {"b": [0, 1]})]


def test_neurons_of_other_sizes_do_not_correspond() -> None:
    axes = {"a": axis(("g", 0), ("g", 1)), "b": axis(("g", 0), ("g", 0), ("g", 1), ("g", 1))}
    assert arrange(("a", "b"), axes, {"g": members([0, 0], [1, 1])}).shared() == 0


def test_heads_correspond_as_a_whole() -> None:
    axes = {task: axis(("h", 1), ("h", 0), ("h", 1), ("h", 0)) for task in "ab"}
    found = arrange(("a", "b"), axes, {"h": members([0, 1], [1, NO], [NO, 0])})
    assert described(found)[0] == ("a+b", {"a": [1, 3], "b": [0, 2]})


def test_separate_layers_have_nothing_in_common() -> None:
    axes = {task: axis(("g", 0), ("g", 1), (INPUT, 0)) for task in "ab"}
    found = arrange(("a", "b"), axes, {"g": members([0, 0], [1, 1])}, all_separate=True)
    assert found.shared() == 0
    assert sorted(found.order("a").tolist()) == [0, 1, 2]


@given(zipped_axes())
def test_every_position_lies_in_one_run(drawn: tuple[tuple[str, ...], dict[str, Axis], dict[str, np.ndarray]]) -> None:
    tasks, axes, table = drawn
    found = arrange(tasks, axes, table)
    for task in tasks:
        assert sorted(found.order(task).tolist()) == list(range(len(axes[task].group)))
        assert len(found.order(task)) == sum(segment.size for segment in found.of(task))
    for segment in found.segments:
        for position in range(segment.size) if len(segment.owners) > 1 else ():
            where = {task: int(segment.places[task][position]) for task in segment.owners}
            names = {axes[task].groups[axes[task].group[place]] for task, place in where.items()}
            assert len(names) == 1
            rows = table[names.pop()]
            neurons = [int(axes[task].neuron[where[task]]) if task in where else NO for task in tasks]
            assert neurons in rows.tolist()
