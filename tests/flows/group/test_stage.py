"""A stage as a task: what is tried again, what its log says, and which stages wait for a place."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from prefect.states import Completed, Failed

from flows.group import stage
from flows.group.heavy_limit import NoPlace
from flows.group.stage import log_file, reproduce_stage
from flows.results import progress
from flows.results.progress import Silent
from flows.results.stage_result import StageFailed, StageRefused, StageResult
from tasks.faults import ServiceFault

pytestmark = pytest.mark.usefixtures("without_server")


@dataclass
class Told:
    """A pipeline that says some lines, and then has this result, or fails with this."""

    lines: list[str]
    result: StageResult | Exception = field(default_factory=lambda: StageResult("match", "executed", 2.0, 1.0))
    forced: list[bool] = field(default_factory=list)

    def reproduce(self, name: str, *, force: bool, on_progress: Callable[[str], None]) -> StageResult:
        self.forced.append(force)
        for line in self.lines:
            on_progress(line)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


def run(pipeline: Any, home: Path, name: str = "match", **options: Any) -> dict[str, Any]:
    found: dict[str, Any] = reproduce_stage.fn("g", name, pipeline, home, **options)
    return found


@pytest.mark.parametrize(
    ("state", "again"),
    [
        (Failed(data=StageFailed("match", "killed", can_be_retried=True)), True),
        (Failed(data=StageFailed("match", "no weights")), False),
        (Failed(data=StageRefused("match", "too small")), False),
        (Failed(data=ServiceFault("no answer")), True),
        (Failed(data=NoPlace("no place")), True),
        (Failed(data=ValueError("our mistake")), False),
        (Completed(data=1), False),
    ],
    ids=["killed", "failed", "refused", "service", "place", "mistake", "done"],
)
def test_only_what_may_pass_is_tried_again(state: Any, again: bool) -> None:
    assert stage._can_be_retried(reproduce_stage, None, state) is again  # type: ignore[arg-type]
    assert reproduce_stage.retry_condition_fn is stage._can_be_retried


def test_the_log_has_all_that_was_said_when_the_stage_ran(tmp_path: Path) -> None:
    told = Told(["looking", "> python -m tasks match", "", "match: wrote 3 files"])
    found = run(told, tmp_path, force=True)
    assert (found["stage"], found["outcome"], found["seconds"], told.forced) == ("match", "executed", 2.0, [True])
    log = log_file(tmp_path, "g", "match")
    assert log == tmp_path / "logs" / "g" / "match.log"
    assert log.read_text() == "looking\n> python -m tasks match\n\nmatch: wrote 3 files\n"


def test_a_stage_that_need_not_run_leaves_the_last_log(tmp_path: Path) -> None:
    run(Told(["> python -m tasks match", "the last time"]), tmp_path)
    before = log_file(tmp_path, "g", "match").read_text()
    run(Told(["Stage 'match' didn't change"], StageResult("match", "unchanged")), tmp_path)
    assert log_file(tmp_path, "g", "match").read_text() == before


def test_a_failure_is_logged_even_where_no_command_started(tmp_path: Path) -> None:
    with pytest.raises(StageFailed):
        run(Told(["ERROR: dvc.lock is damaged"], StageFailed("match", "damaged")), tmp_path)
    assert log_file(tmp_path, "g", "match").read_text() == "ERROR: dvc.lock is damaged\n"


def test_people_see_the_stage_its_lines_and_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []
    for name in ("busy", "show_line", "finished"):
        monkeypatch.setattr(Silent, name, lambda self, *given, name=name: seen.append((name, *given)))
    assert type(progress.current.get()) is Silent
    told = Told(["> command", " ", "layer 1"])
    run(told, tmp_path)
    assert seen == [
        ("busy", "g", "match"),
        ("show_line", "g", "> command"),
        ("show_line", "g", "layer 1"),
        ("finished", "g", told.result),
    ]


@pytest.mark.parametrize(("name", "heavy"), [("collect@a", False), ("match", True), ("merge", True), ("retrain", True)])
def test_heavy_stages_alone_wait_for_a_place(
    name: str, heavy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int | None] = []

    @contextmanager
    def place(limit: int | None) -> Iterator[None]:
        asked.append(limit)
        yield

    monkeypatch.setattr(stage, "heavy_place", place)
    run(Told([]), tmp_path, name, heavy=2)
    run(Told([]), tmp_path, name)
    assert asked == [2 if heavy else None, None]
