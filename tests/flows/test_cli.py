"""The command line: which command is run with what, how errors are told, and the status of the process."""

import gc
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from typer.testing import CliRunner, Result

from flows import cli
from flows.spec.request import Request, Timetable
from mtz_core import __version__
from mtz_core.errors import MtzError
from tasks.studies.pareto import Asked

PARAMS, FLEET = Path("params.yaml"), Path("fleet.yaml")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to be in; nothing that a command sets in the environment stays."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    os.environ.pop("MTZ_DEBUG", None)
    return tmp_path


def mtz(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, arguments)


def commands(group: Any, name: str = "mtz") -> list[tuple[str, Any]]:
    """All commands of a group and of the groups in it, by their full names."""
    found = [(f"{name} {own}", command) for own, command in group.commands.items()]
    return [
        inner
        for full, command in found
        for inner in (commands(command, full) if hasattr(command, "commands") else [(full, command)])
    ]


COMMANDS = dict(commands(typer.main.get_command(cli.app)))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_teaches_by_an_example(name: str) -> None:
    _, example, text = COMMANDS[name].help.partition("Example: `")
    assert example and name.rpartition(" ")[2] in text
    assert all(option.help for option in COMMANDS[name].params if option.name != "help")


def test_the_version_is_the_cores() -> None:
    result = mtz("--version")
    assert (result.exit_code, result.output) == (0, f"mtz {__version__}\n")


def test_an_unknown_option_is_wrong_usage() -> None:
    assert mtz("run", "--grup", "a").exit_code == 2


HERE = Path("here")
ASKED = Request(HERE, PARAMS, FLEET)

CALLS: list[tuple[str, str, tuple[Any, ...]]] = [
    ("run", "run.run_fleet", (ASKED, False, False)),
    (
        "run -g a --group b --params p.yaml --fleet f.yaml -s x.y=1 --set z=2 --verify --debug",
        "run.run_fleet",
        (Request(HERE, Path("p.yaml"), Path("f.yaml"), ("a", "b"), ("x.y=1", "z=2")), True, True),
    ),
    ("fleet retry -s x=1", "run.retry_failed", (replace(ASKED, settings=("x=1",)), False)),
    ("fleet plan --params p.yaml --debug", "run.show_plan", (replace(ASKED, params=Path("p.yaml")), True)),
    ("check -g a", "check.check_all", (replace(ASKED, groups=("a",)),)),
    ("fleet check -s x=1", "check.check_all", (replace(ASKED, settings=("x=1",)),)),
    ("ui --params p.yaml", "serve.serve_pages", (HERE, Path("p.yaml"))),
    ("s3", "serve.serve_storage", (HERE, PARAMS, typer.echo)),
    ("s3 --export", "serve.export_storage", (HERE, PARAMS, typer.echo)),
    (
        "pareto -g a --sizes 0.5,0.2 --methods share --retrain",
        "pareto.draw_pareto",
        (ASKED, "a", Asked.parse("0.5,0.2", "share", True)),
    ),
    (
        "fleet deploy --cron x",
        "run.deploy_fleet",
        (ASKED, None, Timetable("x"), "mtz-fleets", typer.echo),
    ),
    (
        "fleet deploy --cron x --timezone Z -n N --pool P --overlap queue -s a=1",
        "run.deploy_fleet",
        (replace(ASKED, settings=("a=1",)), "N", Timetable("x", "Z", "queue"), "P", typer.echo),
    ),
]


@pytest.mark.parametrize(("line", "function", "expected"), CALLS, ids=[call[0] for call in CALLS])
def test_what_is_asked_goes_to_the_command_behind(
    line: str, function: str, expected: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(f"flows.commands.{function}", lambda *given, **_: calls.append(given))
    result = mtz(*line.split())
    assert result.exit_code == 0, result.output
    in_place = [replace(part, project=project) if isinstance(part, Request) else part for part in expected]
    assert calls == [tuple(project if part is HERE else part for part in in_place)]
    assert ("All is well" in result.output) == ("check" in line)


def test_what_follows_the_dashes_is_dvcs_and_so_is_the_status(monkeypatch: pytest.MonkeyPatch, project: Path) -> None:
    calls: list[tuple[Any, ...]] = []

    def run_dvc(*given: Any) -> int:
        calls.append(given)
        return 251

    monkeypatch.setattr("flows.commands.dvc.run_dvc", run_dvc)
    assert mtz("dvc", "--group", "a", "--", "metrics", "show", "--group").exit_code == 251
    assert mtz("dvc", "pull", "--remote", "x").exit_code == 251
    assert calls == [
        (project, PARAMS, "a", ["metrics", "show", "--group"]),
        (project, PARAMS, None, ["pull", "--remote", "x"]),
    ]


@pytest.fixture
def scheduled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What is asked of `flows.commands.schedule`."""
    calls: list[tuple[Any, ...]] = []
    names = ("pause", "resume", "start", "status", "worker")
    module = {name: lambda *given, name=name: calls.append((name, *given)) for name in names}
    monkeypatch.setattr(cli, "_schedule", lambda: SimpleNamespace(**module))
    return calls


def test_the_deployment_is_the_fleets_unless_it_is_named(scheduled: list[tuple[Any, ...]], project: Path) -> None:
    assert "fleet is paused" in mtz("fleet", "pause").output, "without a file"
    (project / "fleet.yaml").write_text("version: 2\nname: nightly\ngroups: {g: {}}\n")
    assert mtz("fleet", "pause").output == "nightly is paused: `mtz fleet resume` ends that.\n"
    assert mtz("fleet", "resume", "-n", "other").output == "other runs by the clock again.\n"
    mtz("fleet", "status")
    mtz("fleet", "start", "-g", "a", "-s", "x=1", "--wait")
    mtz("fleet", "start")
    assert scheduled == [
        ("pause", "fleet"),
        ("pause", "nightly"),
        ("resume", "other"),
        ("status", "nightly", typer.echo),
        ("start", "nightly", {"groups": ["a"], "settings": ["x=1"]}, True, typer.echo),
        ("start", "nightly", {}, False, typer.echo),
    ]


def test_a_worker_serves_the_fleets_pool_with_room_for_any_number(scheduled: list[tuple[Any, ...]]) -> None:
    assert mtz("fleet", "worker").exit_code == mtz("fleet", "worker", "--pool", "p", "--limit", "3").exit_code == 0
    assert scheduled == [("worker", "mtz-fleets", None), ("worker", "p", 3)]
    assert mtz("fleet", "worker", "--limit", "0").exit_code == 2


def test_prefect_is_set_up_before_schedules_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    def imported(name: str) -> str:
        assert "PREFECT_HOME" in os.environ
        return name

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    os.environ.pop("PREFECT_HOME", None)
    monkeypatch.setattr(cli, "importlib", SimpleNamespace(import_module=imported))
    assert str(cli._schedule()) == "flows.commands.schedule"


def test_an_old_fleet_file_is_rewritten(project: Path) -> None:
    (project / "fleet.yaml").write_text("groups: {x: {}}\n")
    result = mtz("fleet", "upgrade")
    assert result.exit_code == 0 and "is of version 2 now" in result.output
    assert "version: 2" in (project / "fleet.yaml").read_text()


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (MtzError("no weights. Put them there."), 1, "error: no weights. Put them there.\n"),
        (FileNotFoundError(2, "No such file", "x.yaml"), 1, "error: [Errno 2] No such file: 'x.yaml'\n"),
        (KeyboardInterrupt(), 130, "\nstopped; finished stages are kept, `mtz run` goes on from there\n"),
        (typer.Exit(7), 7, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_known_errors_are_told_in_one_line(
    error: BaseException, status: int, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr("flows.commands.run.run_fleet", fails)
    result = mtz("run")
    assert (result.exit_code, result.stderr) == (status, told)


def test_our_own_mistakes_and_debugging_show_the_stack(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> None:
        raise errors.pop()

    monkeypatch.setattr("flows.commands.run.run_fleet", fails)
    errors: list[Exception] = [MtzError("debugged"), KeyError("a mistake")]
    assert isinstance(mtz("run").exception, KeyError)
    assert isinstance(mtz("run", "--debug").exception, MtzError)
    assert os.environ["MTZ_DEBUG"] == "1", "stages show theirs, too"


def test_a_terminated_command_ends_as_an_interrupted_one_and_finds_the_projects_modules(
    monkeypatch: pytest.MonkeyPatch, project: Path
) -> None:
    monkeypatch.setattr(sys, "argv", ["mtz", "--version"])
    monkeypatch.setattr(sys, "path", list(sys.path))
    before, thresholds = signal.getsignal(signal.SIGTERM), gc.get_threshold()
    try:
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
        assert signal.getsignal(signal.SIGTERM) is signal.default_int_handler
        assert sys.path[0] == str(project)
    finally:
        signal.signal(signal.SIGTERM, before)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
