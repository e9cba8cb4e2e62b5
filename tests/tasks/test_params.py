"""`params.yaml`: the shipped files are valid; whatever is wrong is named with its path and what is allowed."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.spec.overrides import merge
from mtz_core.evaluation import METRICS
from mtz_core.settings import Budget, Output, RetrainConfig, ZipConfig
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
    assert params.zip_config() == ZipConfig(share=1.0, outputs=dict.fromkeys(params.models, Output("logits")))
    assert params.retrain.config() == RetrainConfig()


def numbers(block: dict[str, Any], path: str = "") -> Iterator[tuple[str, type]]:
    """The paths and types of all numbers in a block of settings, and of those that it leaves open."""
    for key, value in block.items():
        if isinstance(value, dict):
            yield from numbers(value, f"{path}{key}.")
        elif isinstance(value, int | float):
            yield f"{path}{key}", type(value)
    if not path:
        yield from [("match.budget.size", float), ("match.budget.floor", float), ("match.balance.digits", float)]
        yield from [("match.budget.floor.digits", float), ("match.share.fc1", int), ("register.floors.digits", float)]
        yield from [("flow.workers", int), ("flow.heavy", int), ("flow.memory", float)]
        yield from [("models.digits.output.tolerance", float), ("models.digits.output.boxes.tolerance", float)]


def test_a_number_with_a_comma_is_told_with_its_key_and_how_to_write_it(content: dict[str, Any]) -> None:
    content["models"] = {"digits": next(iter(content["models"].values()))}
    content["pretrain"] = {}
    found = dict(numbers(validate(content, "p").model_dump()))
    assert len(found) > 25
    for path, kind in found.items():
        for given in ("0,5", "1,000"):
            wrong: Any = copy.deepcopy(content)
            changes: Any = given
            for key in reversed(path.split(".")):
                changes = {key: changes}
            if "output" in path:
                changes["models"]["digits"]["output"] = nested_kind(changes["models"]["digits"]["output"])
            with pytest.raises(InvalidParams) as told:
                validate(merge(wrong, changes), "p")
            remedy = f"the decimal sign is a point: {given.replace(',', '.')}"
            if kind is int:
                remedy = "write digits alone, as in 1000" if given == "1,000" else "whole numbers alone are allowed"
            number = "number" if kind is float else "whole number"
            assert str(told.value) == f"p: {path}: {given!r} is no {number}; {remedy}"


def nested_kind(output: dict[str, Any]) -> dict[str, Any]:
    """A declared output, or several, with a kind beside the tolerance."""
    if "tolerance" in output:
        return {"kind": "regression", **output}
    return {name: nested_kind(own) for name, own in output.items()}


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path: Path, content: dict[str, Any]) -> None:
    text = SHIPPED.read_text()
    assert "damping: 5e-3" in text or "damping: 0.005" in text
    file = tmp_path / "params.yaml"
    file.write_text(re.sub(r"damping: \S+", "damping: 5e-3", text))
    assert read_yaml(file)["match"]["damping"] == "5e-3"
    assert load_params(file) == load_params(SHIPPED)
    with pytest.raises(InvalidParams, match=r"retrain\.iterations: '1e2' is no whole number; .*, as in 100$"):
        validate(changed(content, "retrain.iterations", "1e2"), "p")


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
        ("match.share", None, "match.share: null leaves open what to share. Give a fraction, {layer: count}, or"),
        ("match.budget", {"size": 0.5}, "match.share: a budget decides what is shared. Leave out match.share, or"),
        ("retrain.balance", {"digits": 1.0}, "retrain.balance: names ['digits'], but models are"),
        ("models.digits.metric", "loss", "models.digits.metric: 'loss' is no metric. Allowed: error, top5_error"),
        (
            "models.digits.metric",
            {"x": "loss"},
            "models.digits.metric.x: 'loss' is no metric. Allowed: error, top5_error",
        ),
        ("models.digits.metric", {}, "models.digits.metric: dictionary should have at least 1 item"),
        ("models.digits.output", "scores", "models.digits.output: input should be 'logits', 'probabilities'"),
        ("models.digits.output", {"x": "scores"}, "models.digits.output.x: input should be 'logits', 'probabilities'"),
        ("models.digits.output", {"x": {"weight": 2}}, "models.digits.output.x.kind: is missing"),
        (
            "models.digits.output",
            {"x": {"kind": "logits", "tolerance": 1}},
            "models.digits.output.x.tolerance: logits has none. Leave it out, or declare regression.",
        ),
        (
            "models.digits.output",
            {"kind": "logits", "weight": 0},
            "models.digits.output.weight: 0.0 is impossible. Allowed: a positive number",
        ),
        (
            "models.digits.output",
            {"x": {"kind": "logits", "scale": 1}},
            "models.digits.output.x.scale: unknown key; allowed here: kind, tolerance, weight",
        ),
        ("models.digits.output", {}, "models.digits.output: dictionary should have at least 1 item"),
        ("register.floors", {"shoes.x": 1}, "register.floors.shoes.x: there is no such model; models: digits, fashion"),
        ("match.shair", 1.0, "match.shair: unknown key; allowed here: method, share, budget, damping"),
        ("colect", {}, "colect: unknown key; allowed here: group, models"),
        ("models.digits.weight", "x", "models.digits.weight: unknown key; allowed here: keep_separate, "),
        ("models.digits.network", "lenet5", "models.digits.network: name a factory as 'package.module:function'"),
        ("models.digits.weights", "/tmp/x.safetensors", "not a path below networks/"),
        ("models.digits.weights", "networks/other.safetensors", "pretrain writes them to networks/digits.safetensors"),
        ("models.digits.data", "../elsewhere", "not a path below data/"),
        ("models", {}, "models: dictionary should have at least 1 item"),
        ("pretrain.shoes", {"data": "data/mnist"}, "pretrain.shoes: there is no such model"),
        ("runtime.threads", 0, "runtime.threads: input should be greater than or equal to 1, not 0"),
        ("runtime.threads", "two", "runtime.threads: input should be a valid integer, not 'two'"),
        ("models.digits.arguments", [1], "models.digits.arguments: input should be a mapping, {key: value}, not [1]"),
        ("register.name", 1.1, "register.name: YAML takes the value for 1.1, which is no text; put it in quotes"),
        ("group", date(2026, 11, 28), "group: YAML takes the value for 2026-11-28, which is no text; put it in"),
        ("models", {False: {}}, "models: YAML takes a name for False, which is no text; put it in quotes"),
        ("collect.images", 0, "collect.images: input should be greater than or equal to 1"),
        ("storage.endpoint", "somewhere", "storage.endpoint: 'somewhere' is impossible. Allowed: embedded, aws, and"),
        ("tracking.uri", "https://me:secret@mlflow.example.org", "tracking.uri: holds a password"),
        ("storage.endpoint", "https://me:secret@s3.example.org", "storage.endpoint: holds a password"),
        ("group", "a b", "group: 'a b' is impossible. Allowed: letters, digits, '_' and '-', with a letter"),
        ("register.name", "", "register.name: '' is impossible. Allowed: letters"),
    ],
)
def test_what_is_wrong_is_named(content: dict[str, Any], path: str, value: object, says: str) -> None:
    with pytest.raises(InvalidParams) as caught:
        validate(changed(content, path, value), "params.yaml")
    assert str(caught.value).startswith("params.yaml: ")
    assert says in str(caught.value)
    assert "me:secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (None, None),
        ("regression", Output("regression")),
        ({"kind": "regression", "tolerance": 2}, Output("regression", 2.0)),
        (
            {"logits": "logits", "found.0": {"kind": "heatmap", "weight": 3}},
            {"logits": Output("logits"), "found.0": Output("heatmap", weight=3.0)},
        ),
        ({"kind": "logits", "where": "regression"}, {"kind": Output("logits"), "where": Output("regression")}),
    ],
)
def test_outputs_are_declared_in_every_form(content: dict[str, Any], output: object, expected: object) -> None:
    content["models"]["fashion"].pop("output", None)
    params = validate(changed(content, "models.digits.output", output), "params.yaml")
    assert params.models["digits"].declared_output == expected
    assert params.zip_config().output_of("digits") == expected
    assert validate(yaml.safe_load(yaml.safe_dump(params.model_dump())), "again") == params


def test_floors_of_outputs_belong_to_their_models(content: dict[str, Any]) -> None:
    floors = {"digits.logits": 1.0, "digits.found.0": 2.0, "fashion": 3.0}
    content["match"] = {"budget": {"floor": floors, "retrain": {}}}
    content["register"]["floors"] = floors
    budget = validate(content, "params.yaml").zip_config().budget
    assert budget is not None
    assert budget.floors(["digits.logits", "digits.found.0", "digits.more", "fashion"]) == floors


@pytest.mark.parametrize(
    ("budget", "expected"),
    [
        ({"size": 0.6}, Budget(size=0.6, moves=["share", "drop", "round"])),
        ({"size": 1, "moves": ["drop"]}, Budget(size=1.0, moves=["drop"])),
        ({"floor": 0.5, "retrain": {}}, Budget(floor=0.5, moves=["share", "drop", "round"])),
        (
            {"floor": {"digits": 0, "fashion": 2}, "moves": ["share"], "retrain": {"images": 8000}},
            Budget(floor={"digits": 0.0, "fashion": 2.0}, moves=["share"]),
        ),
    ],
)
def test_a_budget_takes_the_place_of_share(content: dict[str, Any], budget: object, expected: Budget) -> None:
    content["match"] = {"budget": budget}
    params = validate(content, "without share")
    assert params.zip_config().budget == expected
    assert validate(changed(content, "match.share", None), "share is null") == params
    assert validate(yaml.safe_load(yaml.safe_dump(params.model_dump())), "again") == params


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ({}, "match.budget: give either size (of the originals' bytes) or floor"),
        ({"size": 0.5, "floor": 1, "retrain": {}}, "match.budget: give either size"),
        ({"size": 2}, "match.budget.size: 2.0 is impossible. Allowed: above 0, at most 1"),
        ({"size": float("nan")}, "match.budget.size: nan is impossible"),
        ({"size": "half"}, "match.budget.size: input should be a valid number"),
        ({"floor": float("nan"), "retrain": {}}, "match.budget.floor: nan is impossible"),
        ({"floor": {"digits": -1, "fashion": 1}, "retrain": {}}, "match.budget.floor: -1.0 is impossible"),
        ({"floor": {"digits": 1}, "retrain": {}}, "match.budget.floor: names ['digits'], but models are ['digits', "),
        ({"size": 0.5, "moves": []}, "match.budget.moves: [] is impossible"),
        ({"size": 0.5, "moves": ["merge"]}, "match.budget.moves.0: input should be 'share', 'drop' or 'round', not"),
        ({"sise": 0.5}, "match.budget.sise: unknown key; allowed here: size, floor, moves, retrain"),
        ({"floor": 1}, "match.budget.retrain: is missing"),
        ({"floor": 1}, "Write it once: `retrain: &retrain {…}` in match.budget, and below, on its own, `retrain: *r"),
        ({"floor": 1, "retrain": {"seed": 7, "images": 9}}, "match.budget.retrain: differs from retrain in images, se"),
        ({"floor": 1, "retrain": {"iteration": 7}}, "match.budget.retrain.iteration: unknown key; allowed here: image"),
        ({"floor": 1, "retrain": {"iterations": -7}}, "match.budget.retrain.iterations: -7 is impossible"),
        ({"floor": 1, "retrain": {"labels": 0.5}}, "match.budget.retrain.labels: 0.5 is impossible"),
        ({"size": 0.5, "retrain": {}}, "match.budget.retrain: only the search for a floor retrains. Leave it out"),
    ],
)
def test_impossible_budgets(content: dict[str, Any], budget: object, says: str) -> None:
    content["match"] = {"budget": budget}
    with pytest.raises(InvalidParams) as caught:
        validate(content, "params.yaml")
    assert says in str(caught.value)
    assert "; " not in str(caught.value).replace("key; allowed", "")


def test_the_published_method_drops_nothing(content: dict[str, Any]) -> None:
    content["match"] = {"method": "paper", "budget": {"size": 0.7}}
    with pytest.raises(InvalidParams, match=r"match\.budget\.moves: method 'paper' neither drops neurons nor rounds"):
        validate(content, "params.yaml")


def test_one_anchor_says_how_a_floor_is_retrained(tmp_path: Path) -> None:
    text = SHIPPED.read_text()
    budget = "  budget: {floor: 0.5, retrain: &retrain {iterations: 40}}\n"
    text = text.replace("  share: 1.0 ", "  share: null ").replace("  budget: null ", budget + "  #")
    before, _, rest = text.partition("\nretrain:")
    (tmp_path / "params.yaml").write_text(f"{before}\nretrain: *retrain\n{rest[rest.index('evaluate:') :]}")
    params = load_params(tmp_path / "params.yaml")
    assert params.match.budget is not None
    assert params.match.budget.retrain == params.retrain
    assert params.retrain.iterations == 40


def test_metrics_are_those_of_the_core(content: dict[str, Any]) -> None:
    for metric in METRICS:
        params = validate(changed(content, "models.digits.metric", metric), "params.yaml")
        assert params.models["digits"].metric == metric
    assert validate(content, "params.yaml").models["fashion"].metric is None
    with pytest.raises(InvalidParams) as caught:
        validate(changed(content, "models.digits.metric", "loss"), "params.yaml")
    assert all(metric in str(caught.value) for metric in METRICS)


def test_missing_keys_are_named(content: dict[str, Any]) -> None:
    del content["group"], content["models"]["fashion"]["data"]
    with pytest.raises(InvalidParams, match=r"models\.fashion\.data: is missing.*|group: is missing.*"):
        validate(content, "params.yaml")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n- b\n", "a mapping of blocks"),
        ("", "is empty, and should"),
        ("a: {b: 1, damping: 0,001}", "line 1, column 20: damping: 0,001 is no number; .* a point: 0.001"),
        ("a: {b: 0,5, c: 0,5}", "b: 0,5 is no number"),
        ("a: [", "not valid YAML: line 1, column 5: "),
        ("a: 1\n\tb: 2\n", r"line 2, column 1: .* character '\\t' .*; indent with spaces\.$"),
        ("a: 1\n  b: 2\n", r"line 2, column 4: mapping values are not allowed here\.$"),
        ("a: \xff", "not valid YAML"),
    ],
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


def test_former_names_of_settings_are_read(content: dict[str, Any]) -> None:
    former = changed(changed(content, "match.descents", 2), "merge.sweeps", 1)
    for block, key in (("match", "matching_rounds"), ("merge", "refit_rounds")):
        former[block].pop(key, None)
    config = validate(former, "former").zip_config()
    assert (config.matching_rounds, config.refit_rounds) == (2, 1)
    with pytest.raises(InvalidParams, match=r"both: match\.descents is the former name of match\.matching_rounds"):
        validate(changed(former, "match.matching_rounds", 3), "both")
