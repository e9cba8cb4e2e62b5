"""Which stages of a workspace are run, restored or left, and when its data is stored. Objects stand for DVC and S3."""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from flows.group import refresh
from flows.group.dvc import Pipeline, Stage
from flows.group.refresh import PipelineRun, lock_key
from flows.group.stage import reproduce_stage
from flows.results import progress
from flows.results.stage_result import StageResult, StageStatus
from flows.spec.job import Job
from tasks.params import validate

NEEDS = {
    "collect@a": (),
    "collect@b": (),
    "match": ("collect@a", "collect@b"),
    "merge": ("match",),
    "evaluate": ("merge",),
}
STAGES = tuple(Stage(name, needs, (), ()) for name, needs in NEEDS.items())
MODEL = {"network": "a:b", "weights": "networks/a.safetensors", "data": "data/a"}
JOB = Job(
    fleet="f",
    kind="group",
    group="g",
    fingerprint="0" * 64,
    settings={
        "group": "g",
        "models": {"a": MODEL, "b": MODEL},
        "register": {"name": "g"},
        "flow": {"retries": 3, "retry_delay_seconds": 2, "heavy": 5},
    },
    run="r",
)


@dataclass
class Dvc:
    """A pipeline with this state, which notes what it is asked."""

    folder: Path
    altered: set[str] = field(default_factory=set)
    paths: frozenset[str] = frozenset()
    restorable: set[str] = field(default_factory=set)
    results: dict[str, StageStatus] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)

    def changes(self) -> dict[str, frozenset[str]]:
        self.asked.append("changed")
        return dict.fromkeys(self.altered, self.paths)

    def restore(self) -> frozenset[str]:
        self.asked.append("restore")
        return frozenset(self.restorable)

    def output_objects(self) -> frozenset[str]:
        return frozenset({"files/md5/01", "files/md5/02"})


class Objects(dict[str, bytes]):
    """Objects of a storage, by key."""

    def read_many(self, keys: Iterable[str]) -> dict[str, bytes | None]:
        return {key: self.get(key) for key in keys}

    def exists(self, key: str) -> bool:
        return key in self


class Run(PipelineRun):
    """A run whose stages are noted, not run: they come out as the pipeline's results say, or executed."""

    def run_stage(self, stage: str, force: bool = False) -> StageResult:
        dvc = cast(Dvc, self.pipeline)
        dvc.asked.append(stage)
        return StageResult(stage, dvc.results.get(stage, "executed"))


def prepared(dvc: Dvc, objects: Objects | None = None, kind: type[PipelineRun] = Run) -> Any:
    params = validate(JOB["settings"], "g")
    return kind(JOB, Path("home"), params, objects or Objects(), None, dvc, STAGES, "g")  # type: ignore[arg-type]


def lock(*stages: str, out: str = "x") -> bytes:
    return yaml.safe_dump({"schema": "2.0", "stages": {name: {"cmd": out} for name in stages}}).encode()


@pytest.fixture
def dvc(tmp_path: Path) -> Dvc:
    return Dvc(tmp_path)


def outcomes(results: Iterable[StageResult]) -> dict[str, str]:
    return {result.stage: result.outcome for result in results}


def test_a_new_workspace_runs_all_stages_in_order(dvc: Dvc) -> None:
    found = prepared(dvc).bring_up_to_date()
    assert outcomes(found) == dict.fromkeys(NEEDS, "executed")
    assert dvc.asked == list(NEEDS), "without a lock DVC need not be asked, and there is nothing to restore"


def test_what_did_not_change_is_left_without_a_process(dvc: Dvc) -> None:
    (dvc.folder / "dvc.lock").write_bytes(lock(*NEEDS))
    assert outcomes(prepared(dvc).bring_up_to_date()) == dict.fromkeys(NEEDS, "unchanged")
    assert dvc.asked == ["changed"]


def test_what_reads_a_stage_that_ran_runs_and_nothing_else(dvc: Dvc) -> None:
    (dvc.folder / "dvc.lock").write_bytes(lock(*NEEDS))
    dvc.altered = {"collect@b"}
    found = outcomes(prepared(dvc).bring_up_to_date())
    assert found == {**dict.fromkeys(NEEDS, "executed"), "collect@a": "unchanged"}
    dvc.asked.clear()
    dvc.results = {"match": "unchanged"}
    found = outcomes(prepared(dvc).bring_up_to_date())
    assert found == {
        "collect@a": "unchanged",
        "collect@b": "executed",
        **dict.fromkeys(("match", "merge", "evaluate"), "unchanged"),
    }
    assert dvc.asked == ["changed", "collect@b", "match"], "the same output stops the wave"


@pytest.mark.parametrize(
    ("paths", "note"),
    [
        ({"mtz_core/network", "data/a"}, ["[g] code has changed since the last run: 2 of 5 stages depend on it"]),
        ({"tasks/files.py"}, ["[g] code has changed since the last run: 2 of 5 stages depend on it"]),
        ({"data/a", "networks/tasks"}, []),
    ],
)
def test_a_change_of_code_is_said_once(dvc: Dvc, paths: set[str], note: list[str]) -> None:
    (dvc.folder / "dvc.lock").write_bytes(lock(*NEEDS))
    dvc.altered, dvc.paths = {"match", "evaluate"}, frozenset(paths)
    console = Console(file=io.StringIO(), record=True)
    token = progress.current.set(progress.Lines(console))
    prepared(dvc).bring_up_to_date()
    progress.current.reset(token)
    assert [line for line in console.export_text().splitlines() if "code" in line] == note


@settings(derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.sets(st.sampled_from(list(NEEDS))), st.dictionaries(st.sampled_from(list(NEEDS)), st.just("unchanged")))
def test_a_stage_runs_if_it_or_what_it_needs_changed(dvc: Dvc, altered: set[str], same: dict[str, StageStatus]) -> None:
    (dvc.folder / "dvc.lock").write_bytes(lock(*NEEDS))
    dvc.altered, dvc.results, dvc.asked = altered, same, []
    found = outcomes(prepared(dvc).bring_up_to_date())
    for name, needs in NEEDS.items():
        asked = name in altered or any(found[need] != "unchanged" for need in needs)
        assert (name in dvc.asked) == asked
        assert found[name] == (same.get(name, "executed") if asked else "unchanged")


def test_a_group_that_ran_elsewhere_is_restored(dvc: Dvc) -> None:
    dvc.altered = {*NEEDS}
    dvc.restorable = {*NEEDS} - {"evaluate"}
    found = prepared(dvc, Objects({"locks/groups/g.lock": lock(*NEEDS)})).bring_up_to_date()
    assert outcomes(found) == {**dict.fromkeys(NEEDS, "restored"), "evaluate": "executed"}
    assert dvc.asked == ["changed", "restore", "evaluate"]
    assert (dvc.folder / "dvc.lock").read_bytes() == lock(*NEEDS)


def test_models_that_were_measured_elsewhere_are_not_measured_again(dvc: Dvc) -> None:
    """Their locks begin the group's; what the group's pipeline does not have is left out."""
    dvc.altered, dvc.restorable = {*NEEDS}, {"collect@a", "collect@b"}
    own = {"locks/models/a.lock": lock("collect@a", "pretrain@a"), "locks/models/b.lock": lock("collect@b")}
    found = outcomes(prepared(dvc, Objects(own)).bring_up_to_date())
    assert [name for name in NEEDS if found[name] == "restored"] == ["collect@a", "collect@b"]
    assert yaml.safe_load((dvc.folder / "dvc.lock").read_text())["stages"].keys() == {"collect@a", "collect@b"}


def test_the_groups_own_lock_comes_before_its_models(dvc: Dvc) -> None:
    objects = Objects({"locks/groups/g.lock": lock(*NEEDS), "locks/models/a.lock": lock("collect@a", out="other")})
    prepared(dvc, objects).bring_up_to_date()
    assert (dvc.folder / "dvc.lock").read_bytes() == lock(*NEEDS)


def test_a_workspace_with_a_lock_of_its_own_restores_nothing(dvc: Dvc) -> None:
    (dvc.folder / "dvc.lock").write_bytes(lock(*NEEDS))
    dvc.altered = {"evaluate"}
    prepared(dvc, Objects({"locks/groups/g.lock": lock(*NEEDS, out="other")})).bring_up_to_date()
    assert dvc.asked == ["changed", "evaluate"]
    assert (dvc.folder / "dvc.lock").read_bytes() == lock(*NEEDS)


def test_data_is_stored_unless_nothing_changed_and_all_of_it_is_there(
    dvc: Dvc, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed: list[tuple[Any, ...]] = []
    monkeypatch.setattr(
        refresh.push_data, "with_options", lambda **options: lambda *given: pushed.append((options, *given))
    )
    whole = Objects({"dvc/files/md5/01": b"", "dvc/files/md5/02": b""})
    same = [StageResult(name, "unchanged") for name in NEEDS]
    prepared(dvc, whole).store_data(same)
    assert pushed == []
    prepared(dvc, whole).store_data([*same[:-1], StageResult("evaluate", "restored")])
    prepared(dvc, Objects({"dvc/files/md5/01": b""})).store_data(same)
    assert len(pushed) == 2
    options, *given = pushed[0]
    assert (given[0], given[1], given[-1]) == ("g", dvc, "locks/groups/g.lock")
    assert (options["retries"], options["retry_delay_seconds"](3)) == (3, [2, 4, 8])


def test_locks_of_groups_and_models_have_places_of_their_own() -> None:
    assert (lock_key("group", "a"), lock_key("model", "a")) == ("locks/groups/a.lock", "locks/models/a.lock")


@pytest.mark.usefixtures("without_server")
def test_a_stage_is_given_what_the_parameters_say(dvc: Dvc, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def task(*given: Any) -> dict[str, Any]:
        calls.append(given)
        return {"stage": "match", "outcome": "executed"}

    def with_options(**options: Any) -> Any:
        calls.append((options["retries"], options["retry_jitter_factor"] > 0))
        return task

    monkeypatch.setattr(reproduce_stage, "with_options", with_options)
    assert prepared(dvc, kind=PipelineRun).run_stage("match", force=True) == StageResult("match", "executed")
    assert calls == [(3, True), ("g", "match", cast(Pipeline, dvc), Path("home"), True, 5)]
