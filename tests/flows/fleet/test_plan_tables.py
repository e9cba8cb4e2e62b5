"""`mtz fleet plan`, as people read it."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from flows.fleet.plan import FleetPlan, PlannedFleet
from flows.fleet.plan_tables import print_plan
from flows.results.group_report import GroupReport
from flows.spec.fleet_file import GroupPlan
from tasks.params import validate
from tasks.studies.affinities import read_affinities
from tests.support.groupings import choice

MODEL = {"network": "a:b", "weights": "networks/a.safetensors", "data": "data/a"}


def group(name: str, *models: str) -> GroupPlan:
    content = {"group": name, "models": dict.fromkeys(models, MODEL), "register": {"name": name}}
    return GroupPlan(name, content, validate(content, name))


def printed(plan: FleetPlan, home: Path, *reports: GroupReport) -> list[str]:
    """The lines, those of tables with their words one space apart."""
    text = io.StringIO()
    console = Console(file=text, width=140, color_system=None)
    print_plan(console, PlannedFleet(plan, {report.group: report for report in reports}), home, "nightly")
    return [" ".join(line.replace("│", " ").split()) for line in text.getvalue().splitlines()]


def test_every_group_says_what_a_run_would_do(tmp_path: Path) -> None:
    groups = [group(name, "a", "b") for name in ("new", "same", "kept", "no", "gone")]
    reports = [
        GroupReport("same", "unchanged", version=3, model="zip"),
        GroupReport("kept", "unchanged"),
        GroupReport("no", "refused", "match: [too] small"),
        GroupReport("gone", "failed", "models/gone: there is no such file"),
    ]
    lines = printed(FleetPlan(groups), tmp_path, *reports)
    assert [line for line in lines if " a, b " in line] == [
        "new a, b zip it",
        "same a, b leave it: zip version 3",
        "kept a, b leave it",
        "no a, b refuse it: match: [too] small",
        "gone a, b fail: models/gone: there is no such file",
    ]
    assert not list(tmp_path.iterdir()), "no planner, no picture"


def test_the_planners_choice_is_shown_with_its_reasons_and_drawn(tmp_path: Path) -> None:
    failed = GroupReport("f", "failed", "its data is gone", kind="model")
    chosen = choice("ab", "cd", loners=("e",))
    plan = FleetPlan([group("auto-a", "a", "b"), group("auto-c", "c", "d")], [failed], chosen)
    lines = printed(plan, tmp_path)
    assert "auto-a 2,000 1,600 20 0.90 0.90 0.02" in lines
    assert [line.split()[0] for line in lines if line.startswith("e ")] == ["e"]
    assert "Sharing everything would save 800 of 5,000 bytes (16 %)." in lines
    assert "left out: f: its data is gone" in lines
    picture = tmp_path / "plans" / "nightly.svg"
    assert f"Picture: {picture}" in lines and f"Numbers: {picture.with_suffix('.json')}" in lines
    drawn = picture.read_text()
    assert drawn.startswith("<?xml")
    numbers = read_affinities(picture.with_suffix(".json"))
    assert (numbers.bytes, numbers.pairs) == (chosen.affinities.bytes, chosen.affinities.pairs)


@pytest.mark.parametrize(("chosen", "shown", "hidden"), [("ab", "Chosen by", "alone"), ("", "alone", "Chosen by")])
def test_tables_without_rows_are_left_out(chosen: str, shown: str, hidden: str, tmp_path: Path) -> None:
    found = choice("ab") if chosen else choice(loners=("a", "b"))
    lines = printed(FleetPlan((), (), found), tmp_path)
    assert any(shown in line for line in lines) and not any(hidden in line for line in lines)
