"""What people see of a run that is going on: lines where output is kept, a live table on a terminal."""

import io

import pytest
from rich.console import Console

from flows.results import progress
from flows.results.progress import Display, Lines, Silent, shown
from flows.results.stage_result import StageResult


def console(terminal: bool = False) -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, width=100, force_terminal=terminal, color_system=None), text


def rows(display: Display) -> list[list[str]]:
    own, text = console()
    own.print(display)
    return [line.split() for line in text.getvalue().splitlines()]


def test_lines_tell_of_work_and_of_ends_alone() -> None:
    own, text = console()
    lines = Lines(own)
    lines.planned("g", 4)
    lines.busy("g", "match")
    lines.show_line("g", "noise")
    lines.finished("g", StageResult("collect@a", "unchanged"))
    lines.finished("g", StageResult("match", "executed", 1.26, 1.0))
    lines.finished("g", StageResult("merge", "restored"))
    lines.ended("g", "failed", "no [weights]")
    lines.ended("h", "unchanged")
    assert text.getvalue().splitlines() == [
        "[g] match: executed (1.3 s)",
        "[g] merge: restored",
        "[g] failed: no [weights]",
        "[h] unchanged",
    ]


def test_the_table_says_where_each_group_is() -> None:
    display = Display(Console())
    display.planned("g", 4)
    assert rows(display)[0][1:4] == ["g", "0/4", "waiting"]
    display.finished("g", StageResult("collect@a", "unchanged"))
    display.busy("g", "match")
    display.show_line("g", "  layer 3 of 7 ")
    display.show_line("g", "   ")
    assert rows(display)[0][1:] == ["g", "1/4", "match", "0", "s", "layer", "3", "of", "7"]
    display.busy("g", "merge")
    assert rows(display)[0][1:] == ["g", "1/4", "merge", "0", "s"], "what the last stage said is over"
    display.ended("g", "refused", "too small")
    assert rows(display) == [["–", "g", "1/4", "refused", "0", "s", "too", "small"]]


def test_the_clock_of_an_ended_group_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("flows.results.progress.time.monotonic", lambda: now[0])
    display = Display(Console())
    display._rows["g"] = progress._Row(start=100.0)
    now[0] = 107.0
    display.ended("g", "merged")
    now[0] = 900.0
    assert rows(display) == [["✓", "g", "merged", "7", "s"]]


@pytest.mark.parametrize("count", [20, 21])
def test_of_a_large_fleet_only_what_is_worth_a_look_is_shown(count: int) -> None:
    display = Display(Console())
    for number in range(count - 2):
        display.ended(f"same-{number}", "unchanged")
    display.ended("bad", "failed", "why")
    display.busy("slow", "merge")
    shown_rows = rows(display)
    if count == 20:
        assert len(shown_rows) == 20
    else:
        assert shown_rows[0] == ["19", "unchanged"]
        assert [words[1] for words in shown_rows[1:]] == ["bad", "slow"]


@pytest.mark.parametrize(
    ("terminal", "quiet", "kind"), [(True, False, Display), (True, True, Lines), (False, False, Lines)]
)
def test_flows_report_to_what_fits_the_console_and_to_nothing_afterwards(
    terminal: bool, quiet: bool, kind: type
) -> None:
    own, text = console(terminal)
    with shown(own, quiet=quiet):
        assert type(progress.current.get()) is kind
        progress.current.get().ended("g", "merged")
    assert "merged" in text.getvalue()
    assert type(progress.current.get()) is Silent
    with pytest.raises(KeyError), shown(own):
        raise KeyError
    assert type(progress.current.get()) is Silent


def test_a_note_stays_on_the_screen(capsys: pytest.CaptureFixture[str]) -> None:
    for receiver in (Lines(Console()), Display(Console())):
        receiver.note("g", "code has changed")
    assert capsys.readouterr().out == "[g] code has changed\n" * 2
