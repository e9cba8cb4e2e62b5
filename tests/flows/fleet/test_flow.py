"""A fleet's flow with real S3: which groups are run, what is reported of each, and what is kept of the whole."""

from __future__ import annotations

import io
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from rich.console import Console

from flows.fleet import choose, flow
from flows.fleet.flow import FleetBusy, FleetRun, zip_fleet
from flows.jobs.executor import Done
from flows.processes import servers
from flows.results import progress, webhook
from flows.results.fleet_result import FleetFailed, last_run
from flows.results.group_report import GroupReport
from flows.spec.fleet_file import read_fleet
from flows.spec.job import Job
from flows.spec.overrides import InvalidFleet
from flows.spec.snapshot import Project
from tasks.params import Params, StorageParams
from tasks.registry import mlflow_client, upload
from tasks.sources import Access
from tasks.storage import outcomes
from tasks.storage.contents import Contents, stored_key
from tasks.storage.outcomes import Outcome
from tasks.storage.s3 import Storage
from tests.support.groupings import choice
from tests.support.small_project import GROUP_PARAMS, make_project

FLEET = """
    version: 2
    name: nightly
    groups:
      first: {params: {register: {name: first}}}
      second: {params: {register: {name: second}, match: {share: 0.5}}}
      third: {params: {register: {name: third}, match: {share: 0.25}}}
"""
DECLARED = """
    version: 2
    name: chosen
    models:
      a: {source: a.safetensors, network: "x:y", data: data/a}
      b: {source: b.safetensors, network: "x:y", data: data/b}
      c: {source: c.safetensors, network: "x:y", data: data/c}
    groups: auto
"""


@dataclass
class Jobs:
    """An executor whose jobs come out as `ends` says, otherwise merged, the last one first."""

    ends: dict[str, dict[str, Any]] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    stored: set[str] = field(default_factory=set)
    check: Callable[[Job], None] = lambda job: None

    def run(self, jobs: Sequence[Job], done: Done) -> None:
        self.jobs.extend(jobs)
        for job in reversed(jobs):
            self.check(job)
            ends = self.ends.get(job["group"], {})
            done(job, GroupReport(job["group"], kind=job["kind"], fingerprint=job["fingerprint"], **ends).as_values())


@pytest.fixture
def root(tmp_path: Path, place: StorageParams, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small project as a fleet of three groups."""
    monkeypatch.delenv("MTZ_HOME", raising=False)
    monkeypatch.delenv("MTZ_WEBHOOK_URL", raising=False)
    root = tmp_path / "project"
    make_project(root)
    params = {**yaml.safe_load(textwrap.dedent(GROUP_PARAMS)), "storage": place.model_dump()}
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    (root / "fleet.yaml").write_text(textwrap.dedent(FLEET))
    return root


@pytest.fixture
def jobs(store: Storage) -> Jobs:
    """An executor that sees that the storage has what a worker needs."""

    def check(job: Job) -> None:
        snapshot = json.loads(store.read(stored_key(job["fingerprint"])))
        assert store.exist(map(stored_key, snapshot["files"].values())) == {
            *map(stored_key, snapshot["files"].values())
        }

    return Jobs(check=check)


def opened(root: Path, store: Storage, jobs: Jobs) -> FleetRun:
    fleet = read_fleet(root / "params.yaml", root / "fleet.yaml")
    contents = Contents(root / ".mtz" / "contents", store)
    access = Access(root, root / ".mtz", contents, store, fleet.common().tracking)
    places = {"storage": {"endpoint": "http://reachable"}, "tracking": {"uri": "http://registry"}}
    return FleetRun(fleet, Project(root, contents), access, jobs, lambda: places, id="the-run")


def fingerprints(run: FleetRun) -> dict[str, str]:
    snapshots, failed = run.take(run.plan().groups, run.project.group)
    assert failed == {}
    return {name: snapshot.keep(run.access.contents) for name, snapshot in snapshots.items()}


def test_jobs_say_all_that_a_worker_needs_and_reports_keep_the_files_order(
    root: Path, store: Storage, jobs: Jobs
) -> None:
    run = opened(root, store, jobs)
    jobs.ends = {"second": {"status": "failed", "reason": "no memory"}}
    reports = run.bring_up_to_date((), verify=False)
    assert [(report.group, report.status) for report in reports] == [
        ("first", "merged"),
        ("second", "failed"),
        ("third", "merged"),
    ]
    assert [job["group"] for job in jobs.jobs] == ["first", "second", "third"]
    job = jobs.jobs[1]
    assert (job["fleet"], job["kind"], job["run"]) == ("nightly", "group", "the-run")
    assert job["settings"]["match"]["share"] == 0.5
    assert job["settings"]["storage"] == {"endpoint": "http://reachable"}, "as workers reach it"
    assert {job["group"]: job["fingerprint"] for job in jobs.jobs} == fingerprints(run)


def test_a_group_whose_end_is_known_is_not_run(root: Path, store: Storage, jobs: Jobs) -> None:
    run = opened(root, store, jobs)
    known = fingerprints(run)
    outcomes.record(store, known["first"], Outcome("refused", "first", reason="too small"))
    outcomes.record(store, known["third"], Outcome("merged", "third", metrics={"tasks": {}}))
    reports = {report.group: report for report in run.bring_up_to_date((), verify=False)}
    assert (reports["first"].status, reports["first"].reason) == ("refused", "too small")
    assert (reports["third"].status, reports["third"].metrics) == ("unchanged", {"tasks": {}})
    assert [job["group"] for job in jobs.jobs] == ["second"]
    jobs.jobs.clear()
    run.bring_up_to_date(("third",), verify=True)
    assert [job["group"] for job in jobs.jobs] == ["third"], "unless DVC is to be asked"


@pytest.mark.parametrize(("registered", "bundle"), [(True, True), (True, False), (False, True)])
def test_a_release_must_be_in_the_registry_and_in_the_storage_at_hand(
    registered: bool, bundle: bool, root: Path, store: Storage, jobs: Jobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = opened(root, store, jobs)
    outcome = Outcome("merged", "first", model="zip", content_digest="c", release="releases/zip/c")
    outcomes.record(store, fingerprints(run)["first"], outcome)
    monkeypatch.setattr(mlflow_client, "find_versions", lambda *_: {("zip", "c"): 4} if registered else {})
    if bundle:
        store.put(upload.manifest_key(outcome.release), b"{}")
    (report,) = run.bring_up_to_date(("first",), verify=False)
    assert [job["group"] for job in jobs.jobs] == ([] if registered and bundle else ["first"])
    if registered and bundle:
        assert (report.status, report.model, report.version) == ("unchanged", "zip", 4)
        assert report.release == store.url("releases/zip/c")


def test_a_group_whose_files_are_gone_stops_no_other(root: Path, store: Storage, jobs: Jobs) -> None:
    changed = textwrap.dedent(FLEET).replace("match: {share: 0.5}", "models: {digits: {data: data/none}}")
    (root / "fleet.yaml").write_text(changed)
    reports = {report.group: report for report in opened(root, store, jobs).bring_up_to_date((), verify=False)}
    assert reports["second"].status == "failed" and "data/none does not exist" in reports["second"].reason
    assert [job["group"] for job in jobs.jobs] == ["first", "third"]


def test_an_unknown_group_is_told_before_anything_is_done(root: Path, store: Storage, jobs: Jobs) -> None:
    with pytest.raises(InvalidFleet, match="there is no group 'frist'; did you mean 'first'"):
        opened(root, store, jobs).bring_up_to_date(("frist",), verify=False)
    assert jobs.jobs == []


class TestPlanner:
    """A fleet whose groups the planner chooses; what it compares is made up."""

    @pytest.fixture
    def run(self, root: Path, store: Storage, jobs: Jobs) -> FleetRun:
        (root / "fleet.yaml").write_text(textwrap.dedent(DECLARED))
        pipeline = yaml.safe_load((root / "dvc.yaml").read_text())
        (root / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"collect": pipeline["stages"]["collect"]}}))
        for name in "abc":
            (root / f"{name}.safetensors").write_text(name)
            (root / "data" / name).mkdir()
            for split in ("train", "validation", "test"):
                (root / "data" / name / f"{split}.parquet").write_text(name)
        jobs.ends = {name: {"status": "measured", "statistics": name * 64} for name in "abc"}
        return opened(root, store, jobs)

    @pytest.fixture
    def compared(self, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
        """The statistics that were compared, by model; the first two models go together."""
        found: list[dict[str, str]] = []

        def chosen(_: Any, measured: Mapping[str, Any], *__: Any) -> Any:
            found.append({name: one.statistics for name, one in measured.items()})
            names = sorted(measured)
            return choice("".join(names[:2]), loners=tuple(names[2:]))

        monkeypatch.setattr(choose, "choose", chosen)
        return found

    def test_models_are_measured_once_and_the_chosen_groups_are_run(
        self, run: FleetRun, jobs: Jobs, store: Storage, compared: list[dict[str, str]]
    ) -> None:
        reports = run.bring_up_to_date((), verify=False)
        assert [(job["kind"], job["group"]) for job in jobs.jobs] == [
            ("model", "a"),
            ("model", "b"),
            ("model", "c"),
            ("group", "auto-a"),
        ]
        assert compared == [{name: name * 64 for name in "abc"}]
        assert [(report.group, report.status) for report in reports] == [("auto-a", "merged")]
        outcomes.record(store, jobs.jobs[1]["fingerprint"], Outcome("measured", "b", statistics="9" * 64))
        jobs.jobs.clear()
        run.plan()
        assert [job["group"] for job in jobs.jobs] == ["a", "c"]
        assert compared[1]["b"] == "9" * 64

    def test_a_model_that_cannot_be_measured_is_left_out_and_reported(
        self, run: FleetRun, root: Path, jobs: Jobs, compared: list[dict[str, str]]
    ) -> None:
        (root / "a.safetensors").unlink()
        jobs.ends["b"] = {"status": "refused", "reason": "no layers"}
        plan = run.plan()
        assert compared == [{"c": "c" * 64}]
        assert [(report.group, report.kind, report.status) for report in plan.failed] == [
            ("a", "model", "failed"),
            ("b", "model", "refused"),
        ]
        assert "a.safetensors" in plan.failed[0].reason

    def test_a_model_that_there_is_no_other_for_is_not_measured_but_told(
        self, run: FleetRun, root: Path, store: Storage, jobs: Jobs, compared: list[Any]
    ) -> None:
        listed = textwrap.dedent(DECLARED).replace("groups: auto", "groups: {pair: {models: [a, b]}}\nauto: {size: 2}")
        (root / "fleet.yaml").write_text(listed)
        told = io.StringIO()
        with progress.shown(Console(file=told, width=100)):
            plan = opened(root, store, jobs).plan()
        assert ([group.name for group in plan.groups], plan.choice, compared, jobs.jobs) == (["pair"], None, [], [])
        assert told.getvalue() == "[planner] c stays alone: no other model is to be grouped\n"

    def test_groups_that_the_file_lists_need_no_planner(
        self, run: FleetRun, root: Path, store: Storage, jobs: Jobs, compared: list[Any]
    ) -> None:
        listed = textwrap.dedent(DECLARED).replace("groups: auto", "groups: {pair: {models: [a, b]}}\nauto: {size: 2}")
        (root / "fleet.yaml").write_text(listed)
        plan = opened(root, store, jobs).plan(("pair",))
        assert ([group.name for group in plan.groups], plan.choice, compared, jobs.jobs) == (["pair"], None, [], [])


@pytest.fixture
def shown(root: Path, store: Storage, jobs: Jobs, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What Prefect's pages show of runs that are opened without Prefect and MLflow."""
    found: dict[str, Any] = {}
    monkeypatch.setattr(flow, "create_table_artifact", lambda rows, key: found.update({key: rows}))
    monkeypatch.setattr(flow, "deployment", SimpleNamespace(id=None))

    @contextmanager
    def open_fleet(*_: Any) -> Iterator[FleetRun]:
        yield opened(root, store, jobs)

    monkeypatch.setattr(flow, "open_fleet", open_fleet)
    return found


def test_a_run_is_kept_here_and_in_the_storage(root: Path, store: Storage, shown: dict[str, Any]) -> None:
    result = zip_fleet.fn(str(root), groups=["first"])
    assert [report.group for report in result.reports] == ["first"]
    assert result.peak_bytes > 0 and result.warning == ""
    kept = json.loads(last_run(root / ".mtz", "nightly").read_text())
    assert kept == result.as_values()
    assert (
        json.loads(store.read("runs/nightly/the-run.json")) == json.loads(store.read("runs/nightly/last.json")) == kept
    )
    assert shown == {"fleet-nightly": kept["groups"]}


def test_a_failed_group_fails_the_run_which_is_kept_all_the_same(
    root: Path,
    store: Storage,
    jobs: Jobs,
    shown: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    jobs.ends = {
        "third": {"status": "failed", "reason": "no memory"},
        "first": {"status": "refused", "reason": "small"},
    }
    monkeypatch.setattr(flow, "deployment", SimpleNamespace(id="by the clock"))
    monkeypatch.setattr(webhook, "notify", lambda values: f"warning: {values['counts']['failed']} unheard")
    with pytest.raises(FleetFailed, match=r"^group 'third': no memory$") as failure:
        zip_fleet.fn(str(root))
    assert failure.value.result.warning == "warning: 1 unheard"
    assert json.loads(store.read("runs/nightly/last.json"))["counts"] == {"refused": 1, "merged": 1, "failed": 1}
    assert "Try the failed groups again" in capsys.readouterr().out, "nobody else shows what came out"


def test_one_run_of_a_fleet_at_a_time(tmp_path: Path) -> None:
    with flow._alone(tmp_path, "nightly"):
        with flow._alone(tmp_path, "weekly"):
            pass
        with (
            pytest.raises(
                FleetBusy, match=r"a run of fleet 'nightly' is under way in .*Wait for it to end, or stop it"
            ),
            flow._alone(tmp_path, "nightly"),
        ):
            pass
    with flow._alone(tmp_path, "nightly"):
        pass


def test_workers_elsewhere_are_told_addresses_that_they_can_reach(
    root: Path, store: Storage, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []

    @contextmanager
    def server(*_: Any) -> Iterator[SimpleNamespace]:
        served.append("starts")
        yield SimpleNamespace(url="http://127.0.0.1:5", wait=lambda: served.append("answers"))

    monkeypatch.setattr(servers, "mlflow_server", server)

    def places(*settings: str) -> dict[str, Any]:
        common: Params = read_fleet(root / "params.yaml", root / "fleet.yaml", settings).common()
        with ExitStack() as stack:
            return flow._places(common, store, root / ".mtz", stack)

    here = places()
    assert (here["storage"]["endpoint"], here["tracking"]["uri"], served) == ("embedded", "embedded", [])
    pool = places("flow.executor=pool")
    assert (pool["storage"]["endpoint"], pool["tracking"]["uri"]) == (store.endpoint, "http://127.0.0.1:5")
    assert served == ["starts", "answers"]
    own = places("flow.executor=dask", "tracking.uri=http://mlflow")
    assert own["tracking"]["uri"] == "http://mlflow" and len(served) == 2
