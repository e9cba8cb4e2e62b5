"""What a zipped network's report says of its layers."""

from mtz_core.zipped.report import LayerReport


def test_a_layer_report_of_the_tasks_that_are_left() -> None:
    whole = LayerReport(
        "fc", "linear", {"a": 3, "b": 4, "c": 5}, 2, 0.5, {"a": 1, "b": 2, "c": 3}, 90, {"a": 9, "b": 8, "c": 7}
    )
    left = whole.of(("a", "c"), 1, 18)
    assert (left.neurons, left.error, left.original_parameters) == (
        {"a": 3, "c": 5},
        {"a": 1, "c": 3},
        {"a": 9, "c": 7},
    )
    assert (left.shared, left.parameters, left.cost, left.layer) == (1, 18, 0.5, "fc")
