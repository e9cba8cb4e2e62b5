"""`mtz pareto` on the small project: real DVC and S3; only what measures is a stand-in that writes a given table."""

import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.commands.pareto import needed_by
from flows.group.dvc import Stage
from tasks.studies.pareto import Row, write
from tests.support.small_project import GROUP_PARAMS

MEASURES = """
    import pathlib, shutil, sys
    print("1 of 1: drop only in 25.0 %", flush=True)
    if "--retrain" in sys.argv:
        sys.exit("error: there are no labels. Give some.")
    pathlib.Path("arguments").write_text(" ".join(sys.argv[1:]))
    shutil.copytree({table!r}, "pareto", dirs_exist_ok=True)
"""


def row(method: str, task: str, stored: int, error: float, least: float = 0.1) -> Row:
    return Row(
        group="small",
        method=method,
        retrained=False,
        task=task,
        stored_bytes=stored,
        original_bytes=4000,
        stored_fraction=stored / 4000,
        least_fraction=least,
        metric="error",
        error=error,
        error_original=2.0,
        rise=error - 2.0,
        held_out_loss=0.1,
        original_neurons=10,
        kept_neurons=5,
        shared_neurons=0,
    )


@pytest.fixture
def measured(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small project, with a `tasks` of its own; the workspace is brought that one."""
    (project / "params.yaml").write_text(textwrap.dedent(GROUP_PARAMS))
    (project / "fleet.yaml").write_text("groups: {small: {}, other: {collect: {images: 2}, register: {name: other}}}")
    (project / "networks").mkdir()
    (project / "networks" / "any").touch()
    rows = [row("drop", "digits", 1000, 2.5), row("drop", "fashion", 1000, 4.0), row("share", "digits", 2000, 3.0, 0.5)]
    write(tmp_path / "table", [*rows, row("share", "fashion", 2000, 2.0, 0.5)])
    (project / "tasks").mkdir()
    (project / "tasks" / "__init__.py").touch()
    (project / "tasks" / "__main__.py").write_text(textwrap.dedent(MEASURES).format(table=str(tmp_path / "table")))
    monkeypatch.chdir(project)
    monkeypatch.delenv("MTZ_DEBUG", raising=False)
    return project


def mtz(*arguments: str) -> Result:
    return CliRunner().invoke(app, ["pareto", *arguments], catch_exceptions=False)


def test_what_is_missing_runs_and_the_table_is_shown(measured: Path) -> None:
    result = mtz("--sizes", "0.5,0.25", "--methods", "share,drop")
    assert result.exit_code == 0, result.output
    folder = measured / ".mtz" / "workspaces" / "small"
    assert "collect@digits: executed" in result.output and "collect@fashion: executed" in result.output
    assert not (folder / "pairing").exists(), "nothing from match on is needed"
    assert (folder / "arguments").read_text() == "pareto --sizes 0.25,0.5 --methods drop,share"
    lines = [line.replace("│", " ").split() for line in result.output.splitlines()]
    assert ["originals", "100.0", "4,000", "2.00", "2.00"] in lines
    assert ["drop", "only", "25.0", "1,000", "2.50", "(+0.50)", "4.00", "(+2.00)", "+1.25"] in lines
    assert "Share only cannot store less than 50 %." in result.output
    assert "1 of 1: drop only in 25.0 %" in result.output
    assert f"Table and figure: {folder.relative_to(measured)}/pareto" in result.output

    again = mtz("--sizes", "0.5")
    assert again.exit_code == 0
    assert "executed" not in again.output and "cannot store less" not in again.output


def test_failures_are_told_in_one_line(measured: Path) -> None:
    result = mtz("--retrain")
    assert result.exit_code == 1
    assert result.stderr == "error: there are no labels. Give some.\n"
    (measured / "data" / "digits.txt").write_text("please refuse\n")
    result = mtz("--group", "other")
    assert result.exit_code == 1
    assert result.stderr == "error: collect@digits: the data asks to be refused. Give other data.\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "smal"], "there is no group 'smal'; did you mean 'small'?"),
        (["--sizes", "0.5,2"], "--sizes 0.5,2: is no list of sizes. Allowed: numbers above 0, at most 1"),
        (["--methods", "prune"], "there is no method 'prune'. Methods: mixture, round, drop, share, paper."),
    ],
)
def test_impossible_questions_start_nothing(measured: Path, arguments: list[str], message: str) -> None:
    result = mtz(*arguments)
    assert result.exit_code == 1
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (measured / ".mtz" / "workspaces").exists()


def test_what_a_stage_needs() -> None:
    needs = {
        "train": (),
        "collect": ("train",),
        "hessians": ("collect",),
        "match": ("hessians", "train"),
        "merge": ("match",),
    }
    stages = [Stage(name, needed, (), ()) for name, needed in needs.items()]
    assert needed_by(stages, "match") == {"train", "collect", "hessians"}
    assert needed_by(stages, "train") == frozenset()
