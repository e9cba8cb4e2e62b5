"""Laws of merging changes (RFC 7396), and settings of the command line."""

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.spec.overrides import InvalidFleet, merge, parse_setting, suggest

KEYS = st.sampled_from("abc")
LEAVES = st.integers(0, 3) | st.lists(st.integers(0, 3), max_size=2)
VALUES: st.SearchStrategy[Any] = st.recursive(
    LEAVES, lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)
BLOCKS = st.dictionaries(KEYS, VALUES, max_size=3)
CHANGES: st.SearchStrategy[dict[str, Any]] = st.dictionaries(
    KEYS,
    st.recursive(LEAVES | st.none(), lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=6),
    max_size=3,
)


@settings(derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow])
@given(BLOCKS, CHANGES)
def test_merging_changes_what_is_named_and_nothing_else(base: dict[str, Any], changes: dict[str, Any]) -> None:
    before = repr(base), repr(changes)
    merged = merge(base, changes)
    assert (repr(base), repr(changes)) == before
    assert merge(base, {}) == base
    assert merge(merged, changes) == merged, "twice is once"
    assert {key: merged[key] for key in merged if key not in changes} == {
        key: base[key] for key in base if key not in changes
    }
    for key, value in changes.items():
        if value is None:
            assert key not in merged
        elif isinstance(value, dict):
            inner = base.get(key)
            assert merged[key] == merge(inner if isinstance(inner, dict) else {}, value)
        else:
            assert merged[key] == value


def test_the_examples_of_the_standard() -> None:
    assert merge({"a": "b"}, {"a": "c"}) == {"a": "c"}
    assert merge({"a": "b", "b": "c"}, {"a": None}) == {"b": "c"}
    assert merge({"a": ["b"]}, {"a": "c"}) == {"a": "c"}
    assert merge({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}) == {"a": {"b": "d"}}
    assert merge({"a": {"b": "c"}}, {"a": [1]}) == {"a": [1]}
    assert merge({}, {"a": {"bb": {"ccc": None}}}) == {"a": {"bb": {}}}
    assert list(merge({"x": 1, "y": 2}, {"z": 3, "x": 4})) == ["x", "y", "z"]


@pytest.mark.parametrize(
    ("setting", "found"),
    [
        ("retrain.iterations=50", {"retrain": {"iterations": 50}}),
        ("match.share={conv1: 7}", {"match": {"share": {"conv1": 7}}}),
        ("match.budget=null", {"match": {"budget": None}}),
        ("storage.endpoint=http://h:1/?a=b", {"storage": {"endpoint": "http://h:1/?a=b"}}),
        (" group =x", {"group": "x"}),
        ("group=", {"group": None}),
    ],
)
def test_a_setting_is_a_path_and_a_value_in_yaml(setting: str, found: dict[str, Any]) -> None:
    assert parse_setting(setting) == found


@pytest.mark.parametrize("setting", ["retrain.iterations", "=3", "retrain.=3", ".iterations=3", "a..b=3"])
def test_a_setting_without_path_or_value_is_shown_an_example(setting: str) -> None:
    with pytest.raises(InvalidFleet, match=r"write it as key\.path=value, for example --set retrain.iterations=50"):
        parse_setting(setting)


def test_a_value_that_is_no_yaml_is_told() -> None:
    with pytest.raises(InvalidFleet, match=r"^--set a=\[: the value is not valid YAML: .*\.$"):
        parse_setting("a=[")


def test_a_number_with_a_comma_is_told() -> None:
    with pytest.raises(InvalidFleet, match=r"damping: 0,001 is no number; the decimal sign is a point: 0\.001"):
        parse_setting("match={damping: 0,001}")


def test_a_likely_name_is_suggested() -> None:
    assert suggest("lenet", ["vgg", "lenet5"]) == "; did you mean 'lenet5'?"
    assert suggest("zzz", ["vgg", "lenet5"]) == suggest("zzz", []) == "."
