"""What is checked before a run: what is missing is told with its place, and nothing is started for it."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from safetensors.torch import save_file

from flows.commands import check
from flows.commands.check import NotReady, check_all, check_project
from flows.spec.fleet_file import Fleet, GroupPlan
from flows.spec.overrides import InvalidFleet
from flows.spec.request import Request
from mtz_core.errors import MtzError
from tasks.models.example_networks import lenet_300_100
from tasks.params import InvalidParams, StorageParams
from tasks.registry import mlflow_client
from tests.support.stages import make_lenets

FILE = """
    version: 2
    name: nightly
    groups:
      good: {params: {register: {name: good}}}
      gone: {params: {register: {name: gone}, models: {a: {data: data/none}}}}
"""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("template")
    make_lenets(root)
    (root / "dvc.yaml").write_text("stages: {}\n")
    (root / "fleet.yaml").write_text(textwrap.dedent(FILE))
    return root


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two networks, and a fleet of the group that params.yaml describes and of one whose data is gone."""
    monkeypatch.delenv("MTZ_HOME", raising=False)
    shutil.copytree(template, tmp_path / "project")
    return tmp_path / "project"


def checked(
    project: Path, groups: Sequence[str] = (), settings: Sequence[str] = ()
) -> tuple[Fleet, tuple[GroupPlan, ...]]:
    return check_project(Request(project, groups=tuple(groups), settings=tuple(settings)))


def declare(project: Path, auto: bool, **changes: object) -> None:
    """Let fleet.yaml declare the two networks, with changes to model b, in a group or for the planner."""
    network = {"network": "tasks.models.example_networks:lenet_300_100"}
    models: dict[str, dict[str, object]] = {
        n: {**network, "source": f"networks/{n}.safetensors", "data": f"data/{n}"} for n in "ab"
    }
    models["b"].update(changes)
    groups = {"groups": "auto"} if auto else {"groups": {"pair": {"models": ["a", "b"]}}}
    (project / "fleet.yaml").write_text(yaml.safe_dump({"version": 2, "models": models, **groups}))


def test_a_missing_file_of_one_group_stops_no_other(project: Path) -> None:
    fleet, plans = checked(project)
    assert (fleet.name, [plan.name for plan in plans]) == ("nightly", ["good", "gone"])
    assert [plan.name for plan in checked(project, ["good"])[1]] == ["good"]


def test_where_no_group_could_begin_nothing_is_started(project: Path) -> None:
    with pytest.raises(
        NotReady, match=r"^group 'gone', models\.a\.data: there is no data/none in .* Put the data there"
    ):
        checked(project, ["gone"])
    (project / "networks" / "b.safetensors").unlink()
    with pytest.raises(
        NotReady, match=r"models\.b\.weights: there is no networks/b\.safetensors.*or let pretrain\.b make"
    ):
        checked(project, ["good"])
    checked(project, ["good"], ["pretrain={b: {data: data/b}}"])


def test_a_folder_that_is_no_project_is_named(tmp_path: Path) -> None:
    with pytest.raises(NotReady, match=r"there is no dvc\.yaml in .*\. Run mtz in the folder of the project\."):
        checked(tmp_path)


def test_names_and_settings_are_checked_before_files(project: Path) -> None:
    with pytest.raises(InvalidFleet, match="there is no group 'gode'; did you mean 'good'"):
        checked(project, ["gode"])
    with pytest.raises(InvalidParams, match=r"flow\.workers"):
        checked(project, settings=["flow.workers=0"])
    with pytest.raises(InvalidFleet, match="would register under one name, 'x'"):
        checked(project, settings=["register.name=x"])


def test_a_group_that_the_planner_will_choose_needs_no_name_yet(project: Path) -> None:
    declare(project, auto=True)
    fleet, plans = checked(project, ["auto-a"])
    assert (fleet.file.free_models(), plans) == (("a", "b"), ())


def test_a_full_disk_is_told_before_it_is_full(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checked(project)
    assert (project / ".mtz").is_dir()
    monkeypatch.setattr(check, "LEAST_FREE_BYTES", 1 << 60)
    with pytest.raises(
        NotReady, match=r"only \d+ MiB are free on the disk of .*\.mtz, and a run needs at least \d+\. Free"
    ):
        checked(project)


@pytest.fixture
def registries(monkeypatch: pytest.MonkeyPatch, home: Path, place: StorageParams) -> list[str]:
    """The registries that were asked; state is kept in the session's home, and storage on its server."""
    asked: list[str] = []
    monkeypatch.setattr(mlflow_client, "prepare", lambda settings, _: asked.append(settings.uri))
    monkeypatch.setenv("MTZ_HOME", str(home))
    return asked


def everything(project: Path, groups: Sequence[str], *settings: str) -> list[str]:
    told: list[str] = []
    check_all(Request(project, groups=tuple(groups), settings=settings), told.append)
    return told


def test_everything_is_told_as_it_is_found_right(project: Path, registries: list[str]) -> None:
    told = everything(project, ["good"])
    assert told[:2] == ["fleet 'nightly': 1 group (good)", "networks of good: a, b"]
    assert told[2].startswith("storage: s3://mtz at http://127.0.0.1:") and told[2].endswith(" is writable")
    assert told[3].startswith("registry: sqlite:") and told[3].endswith(" answers") and len(told) == 4
    assert registries == ["embedded"]


def test_layers_that_will_stay_separate_are_told(
    project: Path, registries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check, "check_networks", lambda *_: {"0": "only a has it", "2": "only b has it"})
    assert everything(project, ["good"])[2] == "  '0' and 1 more stay separate: only a has it"


def test_weights_may_be_a_folder(project: Path, registries: list[str]) -> None:
    (project / "networks" / "many").mkdir()
    (project / "networks" / "b.safetensors").rename(project / "networks" / "many" / "model-1-of-1.safetensors")
    assert "networks of good: a, b" in everything(project, ["good"], "models.b.weights=networks/many")
    declare(project, auto=False, source="networks/many")
    assert "networks of pair: a, b" in everything(project, ["pair"])


def test_everything_that_is_wrong_is_told_at_once(project: Path, registries: list[str]) -> None:
    save_file(lenet_300_100(classes=7).state_dict(), project / "networks" / "a.safetensors")
    (project / "networks" / "b.safetensors").write_bytes(b"nothing that can be read")
    with pytest.raises(NotReady) as raised:
        everything(project, [])
    assert len(raised.value.problems) == 3 and registries == ["embedded"]
    fits, read, gone = raised.value.problems
    assert fits.startswith("good: ") and "networks/a.safetensors does not fit" in fits
    assert read.startswith("good: ") and "networks/b.safetensors" in read
    assert gone.startswith("group 'gone', models.a.data: there is no data/none")
    assert str(raised.value).splitlines() == ["3 problems:", *(f"  - {problem}" for problem in raised.value.problems)]


def test_of_many_problems_the_first_are_listed() -> None:
    lines = str(NotReady(*map(str, range(25)))).splitlines()
    assert lines[:2] == ["25 problems:", "  - 0"] and lines[-2:] == ["  - 19", "  and 5 more"]


def test_counts_that_cannot_be_shared_are_told(project: Path, registries: list[str]) -> None:
    with pytest.raises(NotReady, match=r"^good: .*share\.1: 301 is impossible"):
        everything(project, ["good"], "match.share={'1': 301}")


def test_both_files_that_a_model_lacks_are_told(project: Path, registries: list[str]) -> None:
    shutil.rmtree(project / "data" / "b")
    (project / "networks" / "b.safetensors").unlink()
    with pytest.raises(NotReady, match=r"^2 problems:\n  - .*models\.b\.data: .*\n  - .*models\.b\.weights: "):
        everything(project, ["good"])


def test_parameters_without_a_fleet_are_told_as_such(project: Path, registries: list[str]) -> None:
    (project / "fleet.yaml").unlink()
    told = everything(project, [])
    assert told[0].startswith("params.yaml alone, as there is no fleet.yaml: 1 group (")


def test_labels_that_are_counted_from_one_are_told(project: Path, registries: list[str]) -> None:
    table = pq.read_table(project / "data" / "b" / "test.parquet")
    labels = pa.array([1 + label % 10 for label in range(len(table))], table.schema.field("label").type)
    place = table.schema.get_field_index("label")
    pq.write_table(table.set_column(place, "label", labels), project / "data" / "b" / "test.parquet")
    with pytest.raises(
        MtzError, match=r"models\.b\.data: labels of test .* from 1 to 10, .* 10 classes\. Allowed: .* 9"
    ):
        everything(project, ["good"])
    assert everything(project, ["good"], "models.b.metric=agreement")


def test_networks_that_are_still_to_be_trained_are_traced_untrained(project: Path, registries: list[str]) -> None:
    (project / "networks" / "a.safetensors").unlink()
    told = everything(project, ["good"], "pretrain={a: {data: data/a}}")
    assert "networks of good: a, b" in told


@pytest.mark.parametrize("auto", [False, True])
def test_declared_models_are_fetched_and_traced(project: Path, registries: list[str], auto: bool) -> None:
    declare(project, auto)
    told = everything(project, [])
    if auto:
        assert told[:2] == ["fleet 'fleet': no groups listed", "to be grouped: a, b"]
        assert told[3:5] == ["networks of a: a", "networks of b: b"]
    else:
        assert told[2] == "networks of pair: a, b"
    declare(project, auto, source="networks/none.safetensors")
    with pytest.raises(MtzError, match=r"models\.b\.source: .*none\.safetensors"):
        everything(project, [])
