"""What a configuration allows, and how it refuses the rest."""

from typing import Any

import pytest

from mtz_core.errors import InvalidConfig
from mtz_core.settings import ZipConfig

WIDTHS = {"conv1": (20, 16), "conv2": (50, 50), "fc1": (500, 300)}


@pytest.mark.parametrize(
    ("share", "counts"),
    [
        (1.0, {"conv1": 16, "conv2": 50, "fc1": 300}),
        (1, {"conv1": 16, "conv2": 50, "fc1": 300}),
        (0.75, {"conv1": 12, "conv2": 38, "fc1": 225}),
        (0.0, {"conv1": 0, "conv2": 0, "fc1": 0}),
        ({"conv1": 16, "fc1": 7}, {"conv1": 16, "conv2": 0, "fc1": 7}),
        ({}, {"conv1": 0, "conv2": 0, "fc1": 0}),
    ],
)
def test_counts_are_of_the_narrower_network(share: Any, counts: dict[str, int]) -> None:
    assert ZipConfig(share=share).counts(WIDTHS) == counts


@pytest.mark.parametrize(
    ("share", "message"),
    [
        ({"conv3": 1}, r"share\.conv3: there is no such hidden layer\. Hidden layers: conv1, conv2, fc1"),
        ({"conv1": 17}, r"share\.conv1: 17 is impossible\. Allowed: 0 to 16"),
        ({"fc1": 301}, r"share\.fc1: 301 is impossible\. Allowed: 0 to 300"),
    ],
)
def test_counts_that_do_not_fit_are_refused(share: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        ZipConfig(share=share).counts(WIDTHS)


def test_names_of_layers_are_strings() -> None:
    wrong: Any = {0: 3}
    with pytest.raises(InvalidConfig, match=r"^share: 0 is no name of a layer\. Names are strings: '0'\."):
        ZipConfig(share=wrong)


def test_counts_are_of_the_narrowest_of_many() -> None:
    widths = {"conv1": (20, 16, 18), "fc1": (500, 300, 7)}
    assert ZipConfig(share=0.5).counts(widths) == {"conv1": 8, "fc1": 4}
    with pytest.raises(InvalidConfig, match=r"share\.fc1: 8 is impossible\. Allowed: 0 to 7"):
        ZipConfig(share={"fc1": 8}).counts(widths)


def test_networks_without_hidden_layers_have_nothing_to_name() -> None:
    assert ZipConfig().counts({}) == {}
    with pytest.raises(InvalidConfig, match="Hidden layers: none"):
        ZipConfig(share={"fc": 1}).counts({})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "best"}, r"method: 'best'.*'refit', 'paper'"),
        ({"share": 1.01}, r"share: 1\.01.*0 to 1"),
        ({"share": -0.1}, r"share: -0\.1.*0 to 1"),
        ({"share": float("nan")}, r"share: nan"),
        ({"damping": 0.0}, r"damping: 0\.0.*positive"),
        ({"damping": -1.0}, r"damping: -1"),
        ({"damping": float("inf")}, r"damping: inf"),
        ({"damping": float("nan")}, r"damping: nan"),
        ({"patches": 0}, r"patches: 0.*1 or more"),
        ({"refit_rounds": -1}, r"refit_rounds: -1.*0 or more"),
        ({"matching_rounds": -1}, r"matching_rounds: -1.*0 or more"),
        ({"keep_separate": "layer1"}, r"keep_separate: 'layer1' is no list"),
        ({"keep_separate": ["layer1", 2]}, r"keep_separate: .*path of a submodule"),
        ({"balance": {"a": 1.0, "b": 0.0}}, r"balance: .*positive"),
        ({"balance": {"a": float("nan"), "b": 1.0}}, r"balance: .*positive"),
        ({"balance": {"a": float("inf"), "b": 1.0}}, r"balance: .*positive"),
    ],
)
def test_impossible_values_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        ZipConfig(**settings)


@pytest.mark.parametrize(
    "settings",
    [{"share": "all"}, {"damping": "small"}, {"patches": 1.5}, {"balance": [1, 2]}, {"matching_rounds": 0.5}],
)
def test_values_of_another_type_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidConfig, match=next(iter(settings))):
        ZipConfig(**settings).counts(WIDTHS)


@pytest.mark.parametrize("count", [2.5, "2"])
def test_counts_are_whole_numbers(count: Any) -> None:
    with pytest.raises(InvalidConfig, match=r"share\.conv1"):
        ZipConfig(share={"conv1": count}).counts(WIDTHS)


def test_balance_sums_to_one() -> None:
    assert ZipConfig().balance_of(["a", "b"]) == [0.5, 0.5]
    assert ZipConfig().balance_of(list("abcde")) == [0.2] * 5
    assert ZipConfig(balance={"b": 3, "a": 1}).balance_of(["a", "b"]) == [0.25, 0.75]
    assert ZipConfig(balance={"b": 2, "a": 1, "c": 5}).balance_of(["a", "b", "c"]) == [0.125, 0.25, 0.625]


@pytest.mark.parametrize("names", [["a"], ["a", "c"], ["a", "b", "c"]])
def test_balance_names_exactly_the_tasks(names: list[str]) -> None:
    with pytest.raises(InvalidConfig, match=r"balance: names .*the tasks are \['a', 'b'\]"):
        ZipConfig(balance=dict.fromkeys(names, 1.0)).balance_of(["a", "b"])
