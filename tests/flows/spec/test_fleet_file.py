"""What a fleet file may say, what becomes of it, and how it is told that something is wrong."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.spec.fleet_file import check_names, read_fleet, select, upgrade_file
from flows.spec.overrides import InvalidFleet
from mtz_core.errors import MtzError
from tasks.params import InvalidParams

PARAMS = """
group: example
models:
  digits: {network: "tasks.models.example_networks:lenet5", weights: networks/digits.safetensors, data: data/mnist}
  fashion:
    network: tasks.models.example_networks:lenet5
    weights: networks/fashion.safetensors
    data: data/fashion-mnist
pretrain:
  digits: {data: data/mnist}
register: {name: example}
retrain: {iterations: 100}
storage: {bucket: kept}
"""

MODELS = """
models:
  a: {source: a.safetensors, network: "tasks.models.example_networks:lenet5", data: data/a, floor: 0.5, tags: [eu]}
  b: {source: "s3://bucket/b.safetensors", program: b.pt2, data: {calibration: c, validation: v, test: t}, tags: [us]}
  c: {source: "models:/c@champion", network: "my.nets:build", arguments: {width: 3}, data: {factory: "my.data:read"}}
  d: {program: d.pt2, data: data/d, metric: top5_error}
"""


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    (tmp_path / "params.yaml").write_text(PARAMS)
    return tmp_path / "params.yaml", tmp_path / "fleet.yaml"


def test_a_group_of_declared_models(files: tuple[Path, Path]) -> None:
    files[1].write_text(
        f"version: 2\n{MODELS}\ndefaults: {{retrain: {{iterations: 50}}, collect: {{images: 9}}}}\n"
        "groups: {pair: {models: [a, b], params: {retrain: {iterations: 7}}}, other: {models: [c, d]}}\n"
    )
    pair, other = read_fleet(*files, ["collect.images=11"]).explicit_groups()
    assert (pair.params.retrain.iterations, other.params.retrain.iterations) == (7, 50)
    assert pair.params.collect.images == 11, "settings come last"
    assert pair.params.group == pair.params.register.name == "pair"
    assert pair.params.register.floors == {"a": 0.5}
    assert pair.params.pretrain == {} and pair.params.storage.bucket == "kept"
    a, b = pair.params.models["a"], pair.params.models["b"]
    assert (a.network, a.weights, a.data) == (
        "tasks.models.example_networks:lenet5",
        "networks/a.safetensors",
        "data/a",
    )
    assert (b.network, b.arguments) == ("tasks.models.programs:exported", {"program": "networks/b.pt2"})
    assert other.params.models["c"].arguments == {"width": 3}
    assert other.params.models["d"].metric == "top5_error"


def test_groups_of_the_models_in_params(files: tuple[Path, Path]) -> None:
    files[1].write_text("version: 2\ngroups: {x: {}, y: {params: {register: {name: y}, pretrain: null}}}\n")
    x, y = read_fleet(*files).explicit_groups()
    assert set(x.params.models) == {"digits", "fashion"} and not x.models
    assert list(x.params.pretrain) == ["digits"] and y.params.pretrain == {}
    check_names([x, y])


def test_without_a_file_there_is_the_group_of_params(files: tuple[Path, Path]) -> None:
    (only,) = read_fleet(*files).explicit_groups()
    assert only.name == "example"


def test_blocks_that_params_leave_out_are_there_for_dvc(files: tuple[Path, Path]) -> None:
    (group,) = read_fleet(*files).explicit_groups()
    named = {name.partition(".")[0] for stage in stages() for name in stage["params"]}
    assert named <= group.content.keys()
    assert group.content["retrain"] == {"iterations": 100} and group.content["collect"] == {}
    assert list(group.content)[:6] == list(yaml.safe_load(PARAMS))[:6], "what is there keeps its place"


def stages() -> list[dict[str, Any]]:
    """The pipeline's stages, as dvc.yaml describes them."""
    pipeline = yaml.safe_load(Path("dvc.yaml").read_text())["stages"]
    return [entry.get("do", entry) for entry in pipeline.values()]


def test_models_in_no_group_are_the_planners(files: tuple[Path, Path]) -> None:
    files[1].write_text(
        f"version: 2\n{MODELS}\ngroups: {{pair: {{models: [a, d]}}}}\nauto: {{size: 3, apart: [eu, us]}}\n"
    )
    fleet = read_fleet(*files)
    assert fleet.file.free_models() == ("b", "c")
    assert fleet.model("c").params.models.keys() == {"c"}
    files[1].write_text(f"version: 2\n{MODELS}\ngroups: auto\n")
    assert read_fleet(*files).file.free_models() == ("a", "b", "c", "d")


def test_the_format_before_version_2_is_read_and_can_be_rewritten(files: tuple[Path, Path]) -> None:
    old = "groups:\n  x: {}\n  y:\n    models: {digits: {network: 'my.nets:build'}}\n    register: {name: y}\n"
    files[1].write_text(old)
    before = read_fleet(*files)
    assert before.upgraded
    assert "is of version 2 now" in upgrade_file(files[1])
    assert files[1].with_name("fleet.yaml.old").read_text() == old
    after = read_fleet(*files)
    assert not after.upgraded
    assert after.explicit_groups() == before.explicit_groups()
    assert "already" in upgrade_file(files[1])


def test_a_fleet_file_of_a_name_of_its_own_must_exist(files: tuple[Path, Path]) -> None:
    assert read_fleet(files[0], files[1].with_name("fleet.yaml")).absent
    with pytest.raises(InvalidFleet, match=r"nightly\.yaml: there is no such file\."):
        read_fleet(files[0], files[1].with_name("nightly.yaml"))


def test_a_group_that_yaml_takes_for_something_else_is_refused(files: tuple[Path, Path]) -> None:
    files[0].write_text(files[0].read_text().replace("group: example", "group: on"))
    with pytest.raises(MtzError, match=r"group: YAML takes the value for True, which is no text; put it in quotes"):
        read_fleet(files[0], files[1].with_name("fleet.yaml"))


@pytest.mark.parametrize("name", ["", "my group", "a/b", "-x"])
def test_a_group_that_cannot_have_its_name_is_refused(files: tuple[Path, Path], name: str) -> None:
    files[0].write_text(files[0].read_text().replace("group: example", f"group: '{name}'"))
    with pytest.raises(InvalidParams, match=rf"group: '{name}' is impossible\. Allowed: letters, digits"):
        read_fleet(files[0], files[1].with_name("fleet.yaml"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("version: 3\ngroups: {x: {}}", "version: 3 is not known here. Allowed: 2; a newer mtz has written it"),
        ("models: {}\ngroups: {x: {models: [a, b]}}", "version: is missing. Write 'version: 2' above all else."),
        ("version: 2\ngroups: {}", "groups: list at least one group"),
        ("version: 2\ngroups: auto", "models: are missing, and groups are to be found among them. Declare models"),
        ("version: 2\ngroups: {x: {}}\ngruops: {}", "gruops: unknown key; allowed here: version, name, models"),
        ("version: 2\ngroups: {x: {retrain: {}}}", "groups.x.retrain: unknown key; allowed here: models, params"),
        (
            f"version: 2\n{MODELS}\ngroups: {{x: {{models: [a, bb]}}}}",
            "groups.x.models: there is no model 'bb'; did you mean 'b'?",
        ),
        (f"version: 2\n{MODELS}\ngroups: {{x: {{models: [a, a]}}}}", "groups.x.models: 'a' is listed twice"),
        (
            f"version: 2\n{MODELS}\ngroups: {{x: {{models: [a, b]}}, y: {{models: [a, c]}}}}",
            "the model 'a' is in 'x' and 'y'",
        ),
        (f"version: 2\n{MODELS}\ngroups: {{x: {{models: [a]}}}}", "groups.x.models: list should have at least 2 items"),
        (f"version: 2\n{MODELS}{MODELS}\ngroups: auto", "'models' is given twice"),
        ("version: 2\ngroups: {x: {}, x: {}}", "'x' is given twice"),
        ("version: 2\ndefaults: &d {collect: *d}\ngroups: {x: {}}", "'*d' stands within '&d'"),
        ("version: 2\ndefaults: {storage: {}}\ngroups: {x: {}}", "defaults.storage: is the same for all groups"),
        (
            f"version: 2\n{MODELS}\ngroups: auto\nauto: {{separate: [eu, asia]}}",
            "auto.separate: no model has the tag 'asia'",
        ),
        (
            f"version: 2\n{MODELS}\ngroups: auto\nauto: {{size: 1}}",
            "auto.size: input should be greater than or equal to 2, not 1",
        ),
        (
            "version: 2\nmodels: {a: {source: a, data: d}}\ngroups: auto",
            "models.a: give network, a factory, or program",
        ),
        ("version: 2\nmodels: {a: {network: 'x:y', data: d}}\ngroups: auto", "models.a: source: is missing"),
        ("version: 2\nmodels: {a: {source: a, network: x, data: d}}\ngroups: auto", "name a factory as"),
        ("version: 2\nmodels: {a: {source: a, network: 'x:y'}}\ngroups: auto", "models.a.data: is missing"),
        (
            f"version: 2\n{MODELS.replace('metric: top5_error', 'output: {y: {kind: logits, s: 1}}')}\ngroups: auto",
            "models.d.output.y.s: unknown key; allowed here: kind, tolerance, weight",
        ),
        (
            f"version: 2\n{MODELS}\ngroups: {{on: {{models: [a, b]}}}}",
            "groups: YAML takes a name for True, which is no",
        ),
        (f"version: 2\nname: 1.10\n{MODELS}\ngroups: auto", "name: YAML takes the value for 1.1, which is no text"),
        (f"version: 2\n{MODELS}\ngroups: {{x: {{models: [a]}}}}", "list should have at least 2 items, not ['a']"),
        (
            f"version: 2\n{MODELS}\ngroups: auto\nauto:\n  similarity: 0,5",
            "auto.similarity: '0,5' is no number; the decimal",
        ),
        (f"version: 2\n{MODELS}\ngroups: auto\nauto: {{similarity: 0,5}}", "similarity: 0,5 is no number; the decimal"),
        ("- x", "should hold a mapping"),
        (": [", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(files: tuple[Path, Path], text: str, message: str) -> None:
    files[1].write_text(text)
    with pytest.raises(MtzError) as error:
        read_fleet(*files)
    assert message.lower() in str(error.value).lower()
    assert "fleet.yaml" in str(error.value)


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("{x: {}, y: {}}", "the groups 'x' and 'y' would register under one name, 'example'"),
        (
            "{x: {models: [a, c], params: {register: {name: c}}}}",
            "models.c.source: models:/c@champion is what this fleet",
        ),
        ("{x: {models: [a, b], params: {retrain: {iteration: 1}}}}", "group 'x': retrain.iteration: unknown key"),
        ("{x: {models: [a, b], params: {match: {balance: {a: 1}}}}}", "match.balance: names ['a'], but models are"),
    ],
)
def test_groups_that_cannot_be(files: tuple[Path, Path], groups: str, message: str) -> None:
    files[1].write_text(f"version: 2\n{MODELS}\ngroups: {groups}\n")
    with pytest.raises(MtzError) as error:
        check_names(read_fleet(*files).explicit_groups())
    assert message in str(error.value)


def test_a_fleet_file_for_other_parameters_is_told(files: tuple[Path, Path]) -> None:
    change = {"params": {"models": {"letters": {"network": "their:net"}}}}
    files[1].write_text(yaml.safe_dump({"version": 2, "groups": {"theirs": change}}))
    with pytest.raises(
        MtzError, match=r"group 'theirs': .*The fleet file changes letters, but .* or remove the fleet file"
    ):
        read_fleet(*files).explicit_groups()


def test_unknown_groups_are_told(files: tuple[Path, Path]) -> None:
    files[1].write_text(yaml.safe_dump({"version": 2, "groups": {"first": {}}}))
    plans = read_fleet(*files).explicit_groups()
    with pytest.raises(InvalidFleet, match="there is no group 'frist'; did you mean 'first'"):
        select(plans, ["frist"])
    assert select(plans, []) == plans


@pytest.mark.parametrize("base", ["descents", "matching_rounds"])
@pytest.mark.parametrize("change", ["descents", "matching_rounds"])
@pytest.mark.parametrize("setting", ["descents", "matching_rounds", None])
def test_former_names_of_settings_mix_with_present_ones(
    files: tuple[Path, Path], base: str, change: str, setting: str | None
) -> None:
    params, fleet = files
    params.write_text(f"{PARAMS}match: {{{base}: 1}}\n")
    fleet.write_text(f"version: 2\ngroups: {{a: {{params: {{match: {{{change}: 2}}}}}}}}\n")
    (group,) = read_fleet(params, fleet, () if setting is None else (f"match.{setting}=3",)).explicit_groups()
    assert group.params.zip_config().matching_rounds == (2 if setting is None else 3)
    assert group.content["match"] == {"matching_rounds": 2 if setting is None else 3}
