"""fleet.yaml: the groups to zip, each as changes to params.yaml."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mtz_core.errors import MtzError
from tasks.params import Params, read_yaml, validate

FLEET_WIDE = ("storage", "tracking", "flow")
"""Blocks that say where and how, the same for all groups of a run."""


class InvalidFleet(MtzError):
    """fleet.yaml, or a setting given on the command line, is not usable."""


@dataclass(frozen=True)
class GroupPlan:
    """One group with all its settings."""

    name: str
    content: dict[str, Any]
    """What its params.yaml will say."""
    params: Params
    """The same, validated."""


def read_fleet(
    params_file: Path, fleet_file: Path, groups: Sequence[str] = (), settings: Sequence[str] = ()
) -> tuple[GroupPlan, ...]:
    """Read the groups, each merged onto the parameters.

    A group's mapping is merged key by key, anything else replaces; null removes a key. Settings `key.path=value`
    (the value in YAML) come last and hold for all groups. Without a fleet file there is one group, that of params.yaml.

    Args:
        groups: names of those to return; all by default.

    Raises:
        InvalidFleet: unreadable, unknown groups, or settings that are not `key.path=value`.
        InvalidParams: a group's merged parameters are not valid.
    """
    base = read_yaml(params_file)
    overrides = _groups(fleet_file) if fleet_file.exists() else {str(base.get("group", "group")): {}}
    for name in groups:
        if name not in overrides:
            raise InvalidFleet(
                f"there is no group '{name}'{_suggestion(name, overrides)} Groups: {', '.join(overrides)}."
            )
    changes = [parse_setting(setting) for setting in settings]
    plans = []
    for name in dict.fromkeys(groups or overrides):
        content = {**merge(base, overrides[name]), "group": name}
        for change in changes:
            content = merge(content, change)
        plans.append(GroupPlan(name, content, validate(content, f"{params_file.name}, group '{name}'")))
    return tuple(plans)


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
    """Return `key.path=value` as nested mappings. Raises `InvalidFleet`."""
    path, equals, text = setting.partition("=")
    keys = path.strip().split(".")
    if not equals or not all(keys):
        raise InvalidFleet(f"--set {setting}: write it as key.path=value, for example --set retrain.iterations=50")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidFleet(f"--set {setting}: the value is not valid YAML: {' '.join(str(error).split())}.") from error
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _groups(fleet_file: Path) -> dict[str, dict[str, Any]]:
    content = read_yaml(fleet_file)
    for key in content:
        if key != "groups":
            raise InvalidFleet(f"{fleet_file}: {key}: unknown key; allowed here: groups")
    groups = content.get("groups")
    if not isinstance(groups, dict) or not groups:
        raise InvalidFleet(f"{fleet_file}: groups: list at least one group, such as 'lenet5: {{}}'")
    for name, changes in groups.items():
        if not isinstance(changes, dict | None):
            raise InvalidFleet(f"{fleet_file}: groups.{name}: give the blocks to change, or {{}}, not {changes!r}")
        for block in FLEET_WIDE:
            if block in (changes or {}):
                raise InvalidFleet(
                    f"{fleet_file}: groups.{name}.{block}: is the same for all groups; put it into params.yaml"
                )
    return {str(name): changes or {} for name, changes in groups.items()}


def _suggestion(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean '{close[0]}'?" if close else "."
