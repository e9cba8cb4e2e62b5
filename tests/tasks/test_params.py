"""`params.yaml`: the shipped files are valid; whatever is wrong is named with its path and what is allowed."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from mtz_core.settings import RetrainConfig, ZipConfig
from tasks.params import InvalidParams, load_params, read_yaml, validate

SHIPPED = Path("params.yaml")


@pytest.fixture
def content() -> dict[str, Any]:
    return copy.deepcopy(read_yaml(SHIPPED))


def changed(content: dict[str, Any], path: str, value: object) -> dict[str, Any]:
    *blocks, key = path.split(".")
    target = content
    for block in blocks:
        target = target[block]
    target[key] = value
    return content


def test_shipped_file_is_valid_and_says_every_setting(content: dict[str, Any]) -> None:
    params = load_params(SHIPPED)
    dumped = params.model_dump()
    for block, values in content.items():
        if isinstance(values, dict) and block not in ("models", "pretrain"):
            assert values.keys() == dumped[block].keys(), block
    assert content.keys() == dumped.keys()


def test_shipped_values_are_the_defaults(content: dict[str, Any]) -> None:
    bare = {key: content[key] for key in ("group", "models", "pretrain", "register")}
    assert validate(bare, "bare").model_dump() == validate(content, "shipped").model_dump()


def test_defaults_are_those_of_the_core(content: dict[str, Any]) -> None:
    params = validate(content, "shipped")
    assert params.zip_config() == ZipConfig()
    assert params.retrain.config() == RetrainConfig()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("retrain.iterations", -1, "retrain.iterations: -1 is impossible. Allowed: 0 or more"),
        ("retrain.learning_rate", float("nan"), "retrain.learning_rate: nan is impossible"),
        ("retrain.batch_size", 0, "retrain.batch_size: 0 is impossible"),
        ("match.share", 2, "match.share: 2.0 is not a fraction. Allowed: 0 to 1"),
        ("match.share", {"0": "many"}, "match.share.0: input should be a valid integer"),
        ("match.method", "magic", "match.method: input should be 'refit' or 'paper', not 'magic'"),
        ("match.damping", 0, "match.damping: 0.0 is impossible"),
        ("match.balance", {"digits": 1.0}, "match.balance: names ['digits']"),
        ("match.shair", 1.0, "match.shair: unknown key; allowed here: method, share, damping, balance"),
        ("colect", {}, "colect: unknown key; allowed here: group, models"),
        ("models.digits.weight", "x", "models.digits.weight: unknown key; allowed here: network, arguments"),
        ("models.digits.network", "lenet5", "models.digits.network: name a factory as 'package.module:function'"),
        ("models.digits.weights", "/tmp/x.safetensors", "not a path below networks/"),
        ("models.digits.weights", "networks/other.safetensors", "pretrain writes them to networks/digits.safetensors"),
        ("models.digits.data", "../elsewhere", "not a path below data/"),
        ("models", {}, "models: dictionary should have at least 2 items"),
        ("pretrain.shoes", {"data": "data/mnist"}, "pretrain.shoes: there is no such model"),
        ("runtime.threads", 0, "runtime.threads: input should be greater than or equal to 1, not 0"),
        ("runtime.threads", "two", "runtime.threads: input should be a valid integer"),
        ("collect.images", 0, "collect.images: input should be greater than or equal to 1"),
        ("storage.endpoint", "somewhere", "storage.endpoint"),
        ("tracking.uri", "https://me:secret@mlflow.example.org", "tracking.uri: holds a password"),
        ("storage.endpoint", "https://me:secret@s3.example.org", "storage.endpoint: holds a password"),
        ("group", "a b", "group: string should match pattern"),
        ("register.name", "", "register.name"),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, Any], path: str, value: object, says: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        validate(changed(content, path, value), "params.yaml")
    assert str(caught.value).startswith("params.yaml: ")
    assert says in str(caught.value)
    assert "me:secret" not in str(caught.value)


def test_missing_keys_are_named(content: dict[str, Any]) -> None:
    del content["group"], content["models"]["fashion"]["data"]
    with pytest.raises(InvalidParams, match=r"models\.fashion\.data: is missing.*|group: is missing.*"):
        validate(content, "params.yaml")


@pytest.mark.parametrize(
    ("text", "says"), [("- a\n- b\n", "a mapping of blocks"), ("a: [", "not valid YAML"), ("a: \xff", "not valid YAML")]
)
def test_unreadable_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(InvalidParams, match=says):
        load_params(path)


def test_absent_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidParams, match="No such file"):
        load_params(tmp_path / "params.yaml")


def test_dumped_settings_validate_again(content: dict[str, Any]) -> None:
    params = validate(content, "shipped")
    assert validate(yaml.safe_load(yaml.safe_dump(params.model_dump())), "again") == params
