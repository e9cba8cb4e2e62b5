"""What people see while a run is going on: one line a group."""

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from flows.results.group_report import Status
from flows.results.stage_result import StageResult


class Progress(Protocol):
    """Receives what happens in the groups, from several threads."""

    def planned(self, group: str, stages: int) -> None:
        """The group has that many stages."""

    def busy(self, group: str, what: str) -> None:
        """The group is at a stage, or at something between stages."""

    def show_line(self, group: str, line: str) -> None:
        """What it is at has printed a line."""

    def finished(self, group: str, result: StageResult) -> None:
        """A stage is up to date."""

    def ended(self, group: str, status: Status, reason: str = "") -> None:
        """Nothing more will happen in the group."""


class Silent:
    """Shows nothing."""

    def planned(self, group: str, stages: int) -> None: ...
    def busy(self, group: str, what: str) -> None: ...
    def show_line(self, group: str, line: str) -> None: ...
    def finished(self, group: str, result: StageResult) -> None: ...
    def ended(self, group: str, status: Status, reason: str = "") -> None: ...


current: ContextVar[Progress] = ContextVar("current", default=Silent())  # noqa: B039 - it has no state
"""Where the flows of this context report to."""


class Lines(Silent):
    """Prints one line for each stage that is finished; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def _print(self, group: str, text: str) -> None:
        self._console.print(Text(f"[{group}] {text}"), soft_wrap=True)

    def finished(self, group: str, result: StageResult) -> None:
        if result.outcome != "unchanged":
            seconds = f" ({result.seconds:.1f} s)" if result.seconds else ""
            self._print(group, f"{result.stage}: {result.outcome}{seconds}")

    def ended(self, group: str, status: Status, reason: str = "") -> None:
        self._print(group, f"{status}: {reason}" if reason else status)


_ALL_SHOWN = 20

_MARKS = {
    "merged": Text("✓", "green"),
    "unchanged": Text("✓", "dim"),
    "measured": Text("✓", "green"),
    "refused": Text("–", "yellow"),
    "failed": Text("✗", "red"),
}


@dataclass
class _Row:
    start: float = field(default_factory=time.monotonic)
    end: float | None = None
    stages: int = 0
    done: int = 0
    what: str = "waiting"
    line: str = ""
    status: Status | None = None
    spinner: Spinner = field(default_factory=lambda: Spinner("dots"))


class Display(Silent):
    """A live table: group, stages done, what it is at, its last line, how long."""

    def __init__(self) -> None:
        self._rows: dict[str, _Row] = {}
        self._guard = threading.Lock()

    def planned(self, group: str, stages: int) -> None:
        self._row(group).stages = stages

    def busy(self, group: str, what: str) -> None:
        row = self._row(group)
        row.what, row.line = what, ""

    def show_line(self, group: str, line: str) -> None:
        if line.strip():
            self._row(group).line = line.strip()

    def finished(self, group: str, result: StageResult) -> None:
        self._row(group).done += 1

    def ended(self, group: str, status: Status, reason: str = "") -> None:
        row = self._row(group)
        row.what, row.line, row.status = status, reason, status
        row.end = time.monotonic()

    def _row(self, group: str) -> _Row:
        with self._guard:
            return self._rows.setdefault(group, _Row())

    def __rich__(self) -> Table:
        table = Table.grid(padding=(0, 2))
        for style, width in (("", None), ("bold", None), ("dim", None), ("cyan", None), ("dim", None)):
            table.add_column(style=style, width=width, no_wrap=True)
        table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
        with self._guard:
            rows = list(self._rows.items())
        if len(rows) > _ALL_SHOWN:  # of a large fleet, those that are worth looking at
            well = Counter(row.status for _, row in rows if row.status not in (None, "refused", "failed"))
            rows = [(group, row) for group, row in rows if row.status not in well]
            table.add_row("", "", "", ", ".join(f"{count} {status}" for status, count in well.items()), "", Text())
        for group, row in rows:
            seconds = (row.end or time.monotonic()) - row.start
            mark = row.spinner if row.status is None else _MARKS[row.status]
            done = f"{row.done}/{row.stages}" if row.stages else ""
            table.add_row(mark, group, done, row.what, f"{seconds:4.0f} s", Text(row.line))
        return table


@contextmanager
def shown(console: Console, quiet: bool = False) -> Iterator[None]:
    """Show the progress of the flows that run inside: live on a terminal, otherwise as lines.

    Args:
        quiet: show lines only, where something else prints to the terminal too.
    """
    live = console.is_terminal and not quiet
    progress = Display() if live else Lines(console)
    token = current.set(progress)
    try:
        if isinstance(progress, Display):
            with Live(progress, console=console, refresh_per_second=8):
                yield
        else:
            yield
    finally:
        current.reset(token)
