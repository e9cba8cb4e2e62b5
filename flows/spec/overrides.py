"""Values that override others: the changes of a group, settings on the command line."""

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import yaml

from mtz_core.errors import MtzError
from tasks.params import parse_yaml, yaml_problem


class InvalidFleet(MtzError):
    """The file fleet.yaml, or a setting on the command line, cannot be used."""


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return `base` with `changes` merged in, as JSON merge patch (RFC 7396) does; keys keep their order."""
    merged = dict(base)
    for key, value in changes.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, Mapping):
            inner = merged.get(key)
            merged[key] = merge(inner if isinstance(inner, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def parse_setting(setting: str) -> dict[str, Any]:
    """Parse a setting of the command line.

    Args:
        setting: The text `key.path=value`; the value is YAML.

    Returns:
        The value in nested mappings.

    Raises:
        InvalidFleet: The text has no key, or its value is not YAML.
    """
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InvalidFleet(f"--set {setting}: write it as key.path=value, for example --set retrain.iterations=50")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise InvalidFleet(f"--set {setting}: the value is not valid YAML: {yaml_problem(error)}.") from error
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of a sentence on an unknown name, with the similar name that may be meant."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else "."
