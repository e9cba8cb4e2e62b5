"""The display of a run in progress: one line a group."""

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


class ProgressReceiver(Protocol):
    """A receiver of what happens in the groups, called from several threads."""

    def planned(self, group: str, stages: int) -> None:
        """Receive the number of stages of a group."""

    def busy(self, group: str, what: str) -> None:
        """Receive what a group is doing: a stage, or a step between stages."""

    def show_line(self, group: str, line: str) -> None:
        """Receive a line of output of what a group is doing."""

    def note(self, group: str, text: str) -> None:
        """Receive what people should know of a group, beside its stages."""

    def finished(self, group: str, result: StageResult) -> None:
        """Receive the result of a stage that is up to date."""

    def ended(self, group: str, status: Status, reason: str = "") -> None:
        """Receive the end of a group."""


class Silent:
    """A receiver that shows nothing."""

    def planned(self, group: str, stages: int) -> None:
        """Do nothing."""

    def busy(self, group: str, what: str) -> None:
        """Do nothing."""

    def show_line(self, group: str, line: str) -> None:
        """Do nothing."""

    def note(self, group: str, text: str) -> None:
        """Do nothing."""

    def finished(self, group: str, result: StageResult) -> None:
        """Do nothing."""

    def ended(self, group: str, status: Status, reason: str = "") -> None:
        """Do nothing."""


current: ContextVar[ProgressReceiver] = ContextVar("current", default=Silent())  # noqa: B039 - it has no state
"""The receiver for the flows of this context."""


class Lines(Silent):
    """A receiver that prints one line for each finished stage; for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def note(self, group: str, text: str) -> None:
        """Print it."""
        self._console.print(Text(f"[{group}] {text}"), soft_wrap=True)

    def finished(self, group: str, result: StageResult) -> None:
        """Print the outcome of a stage, unless it was unchanged."""
        if result.outcome != "unchanged":
            seconds = f" ({result.seconds:.1f} s)" if result.seconds else ""
            self.note(group, f"{result.stage}: {result.outcome}{seconds}")

    def ended(self, group: str, status: Status, reason: str = "") -> None:
        """Print how the group ended."""
        self.note(group, f"{status}: {reason}" if reason else status)


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
    """A live table: group, stages done, current step, its last line, elapsed time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._rows: dict[str, _Row] = {}
        self._guard = threading.Lock()

    def planned(self, group: str, stages: int) -> None:
        """Set the number of stages of a group."""
        self._row(group).stages = stages

    def busy(self, group: str, what: str) -> None:
        """Set the current step of a group."""
        row = self._row(group)
        row.what, row.line = what, ""

    def show_line(self, group: str, line: str) -> None:
        """Set the last line of a group, unless it is blank."""
        if line.strip():
            self._row(group).line = line.strip()

    def note(self, group: str, text: str) -> None:
        """Print it above the table, where it stays."""
        self._console.print(Text(f"[{group}] {text}"))

    def finished(self, group: str, result: StageResult) -> None:
        """Count a stage of a group as done."""
        self._row(group).done += 1

    def ended(self, group: str, status: Status, reason: str = "") -> None:
        """Set how a group ended, and stop its clock."""
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
        if len(rows) > _ALL_SHOWN:  # of a large fleet, only groups in progress, refused or failed
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
    """Show the progress of the flows in the block: live on a terminal, otherwise as lines.

    Args:
        console: Where to show it.
        quiet: Show lines only, for a terminal to which something else prints too.

    Yields:
        Nothing.
    """
    live = console.is_terminal and not quiet
    progress = Display(console) if live else Lines(console)
    token = current.set(progress)
    try:
        if isinstance(progress, Display):
            with Live(progress, console=console, refresh_per_second=8):
                yield
        else:
            yield
    finally:
        current.reset(token)
