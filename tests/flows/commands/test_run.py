"""`mtz run` on the small project: real Prefect, DVC and S3 servers, groups that succeed and fail."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.commands import run, schedule
from flows.commands.run import deploy_fleet, retry_failed, run_fleet
from flows.processes.servers import ServiceFailed
from flows.results.fleet_result import FleetResult, last_run
from flows.results.group_report import GroupReport, Status
from flows.spec.request import Request, Timetable
from tasks.files import write_json
from tests.support import prefect_server
from tests.support.command_line import ROOT, mtz, start
from tests.support.processes import descendants, is_alive
from tests.support.small_project import GROUP_PARAMS, make_project
from tests.support.waiting import PATIENCE_SECONDS, until

pytestmark = pytest.mark.e2e

PARAMS = f"{GROUP_PARAMS}    flow: {{workers: 2, retries: 1, retry_delay_seconds: 0}}\n"

FLEET = """
    version: 2
    name: nightly
    groups:
      good: {}
      slow: {params: {models: {digits: {data: data/wait}}, register: {name: slow}}}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("fleet") / "project"
    make_project(root)
    (root / "params.yaml").write_text(textwrap.dedent(PARAMS))
    (root / "fleet.yaml").write_text(textwrap.dedent(FLEET))
    (root / "networks").mkdir()
    (root / "networks" / "any").touch()
    (root / "data" / "wait").write_text("please wait\n")
    return root


@pytest.fixture
def prefect_url() -> str:
    """A server as a team has it, so that not every run has to start one."""
    return prefect_server.running()[0]


@pytest.mark.long
def test_interrupting_stops_everything(project: Path, prefect_url: str) -> None:
    process = start(project, "run", "--group", "slow", "--debug", MTZ_WARM="")
    log = project / ".mtz" / "logs" / "slow" / "collect@digits.log"

    def at_work() -> bool:
        assert process.poll() is None
        return log.exists() and "reading" in log.read_text()

    until(at_work)
    members = descendants(process.pid)
    status, _, err = mtz(project, "run", "--group", "good", PREFECT_API_URL=prefect_url)
    assert status == 1
    assert "error: a run of fleet 'nightly' is under way" in err
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == 130
    assert "finished stages are kept" in err
    assert len(members) >= 4, "server, dvc, shell or stage"
    until(lambda: not any(map(is_alive, members)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "god"], "there is no group 'god'; did you mean 'good'?"),
        (["--set", "retrain.iteration=3"], "retrain.iteration: unknown key"),
        (["--set", "retrain"], "--set retrain: write it as key.path=value"),
        (["--params", "none.yaml"], "none.yaml: No such file"),
        (["--group", "good", "--set", "models.digits.data=data/none"], "models.digits.data: there is no data/none"),
        (["--fleet", "other.yaml"], "other.yaml: version: 7 is not known here"),
    ],
)
def test_wrong_settings_are_told_in_one_line(project: Path, arguments: list[str], message: str) -> None:
    (project / "other.yaml").write_text("version: 7\n")
    status, _, err = mtz(project, "run", *arguments)
    assert status == 1
    assert err.startswith("error: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_help_teaches_and_is_quick(project: Path) -> None:
    for command in ("run", "check", "pareto", "ui", "s3", "dvc"):
        status, out, _ = mtz(project, command, "--help")
        assert status == 0
        assert "Example: mtz " in out
        assert out.count("<bool>") <= 1, "only the library's own --help shows the type of a flag"
    assert loaded_by("flows.cli", "torch", "prefect", "mlflow", "boto3") == set()


def test_the_flows_do_without_torch_and_mlflow_until_they_need_them() -> None:
    assert loaded_by(
        "flows.fleet.flow, flows.group.flow, flows.commands.run, flows.jobs.pool", "torch", "mlflow", "scipy", "prefect"
    ) == {"prefect"}


def loaded_by(modules: str, *libraries: str) -> set[str]:
    program = f"import sys, {modules}; print(*({{*sys.argv[1:]}} & sys.modules.keys()))"
    command = [sys.executable, "-c", program, *libraries]
    return {*subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()}


def test_a_group_runs_and_dvc_by_hand_reaches_its_data(project: Path, prefect_url: str) -> None:
    status, out, err = mtz(project, "run", "--group", "good", PREFECT_API_URL=prefect_url)
    assert status == 0, err
    assert "[good] evaluate: executed" in out and "[good] merged" in out
    status, out, err = mtz(project, "dvc", "--group", "good", "--", "status", "--cloud")
    assert status == 0, err
    assert "are in sync" in out + err


def ended(project: Path, **groups: Status) -> None:
    """Write down a last run whose groups ended so."""
    reports = [GroupReport(group, status) for group, status in groups.items()]
    values = FleetResult("nightly", "run", "now", reports, 1.0, 1).as_values()
    write_json(last_run(project / ".mtz", "nightly"), values)


def test_only_what_failed_is_retried(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("MTZ_HOME", raising=False)
    runs: list[tuple[str, ...]] = []
    monkeypatch.setattr(run, "run_fleet", lambda request, debug: runs.append(request.groups))
    ended(project, good="merged", slow="failed")
    retry_failed(Request(project))
    ended(project, good="merged", slow="refused")
    retry_failed(Request(project))
    assert runs == [("slow",)]
    assert capsys.readouterr().out == "Nothing to retry: no group failed in the last run.\n"


def test_a_server_that_does_not_answer_is_told_and_nothing_runs(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"})
    with pytest.raises(ServiceFailed, match=r"no Prefect server answers at PREFECT_API_URL"):
        run_fleet(Request(project))
    assert capsys.readouterr().out == "Fleet 'nightly': groups good, slow\n"


def test_a_large_fleet_is_named_by_some_of_its_groups(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    groups = {f"g{number}": {"register": {"name": f"g{number}"}} for number in range(10)}
    (project / "old.yaml").write_text(yaml.safe_dump({"groups": groups}))
    monkeypatch.setattr(os, "environ", {**os.environ, "PREFECT_API_URL": "http://127.0.0.1:9/api"})
    with pytest.raises(ServiceFailed):
        run_fleet(Request(project, fleet=Path("old.yaml")))
    told = capsys.readouterr().out
    assert "groups g0, g1, g2, g3, g4, g5, g6, g7 and 2 more\n" in told
    assert "old.yaml is in the format before version 2, and read as such: " in told
    assert "`mtz fleet upgrade --fleet old.yaml` rewrites it.\n" in told


@pytest.mark.parametrize(("executor", "pool"), [("local", None), ("pool", "jobs")])
def test_a_fleet_is_deployed_under_its_name_with_the_pool_of_its_groups(
    project: Path, executor: str, pool: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []

    def deploy(*given: Any) -> str:
        calls.append(given)
        return f"zip-fleet/{given[1]}"

    monkeypatch.setattr(os, "environ", dict(os.environ))
    monkeypatch.setattr(schedule, "deploy", deploy)
    monkeypatch.setattr(schedule, "status", lambda *given: calls.append(given))
    told: list[str] = []
    request = Request(project, settings=(f"flow.executor={executor}", "flow.pool=jobs"))
    deploy_fleet(request, None, Timetable("0 2 * * *"), "fleets", told.append)
    deploy_fleet(request, "other", Timetable("0 2 * * *"), "fleets", told.append)
    assert [call[1] for call in calls[::2]] == ["nightly", "other"]
    assert calls[0][2:] == (Timetable("0 2 * * *"), "fleets", pool)
    assert told[0] == "deployed: zip-fleet/nightly, 0 2 * * * (UTC)"
    assert calls[1][0] == "zip-fleet/nightly"
