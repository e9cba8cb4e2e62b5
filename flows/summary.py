"""What a run came to, for people: errors, sizes, versions, what was done, how long it took, where to look further."""

import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.group import GroupReport, metrics_table


def print_summary(
    console: Console, reports: Sequence[GroupReport], home: Path, wall_seconds: float, peak_bytes: int
) -> None:
    """Print the whole summary."""
    done = [report for report in reports if not report.error]
    if any(report.metrics for report in done):
        console.print()
        console.print(_errors(done))
    if any(report.stages for report in done):
        console.print(_times(done))
        console.print(
            f"Wall time {wall_seconds:.0f} s, peak memory {peak_bytes / 2**30:.1f} GiB. {_what_was_done(done)}"
        )
    for report in done:
        if report.version is not None:
            name = f"{report.model} version {report.version}"
            console.print(Text(f"Registered: {name}  models:/{report.model}/{report.version}"), soft_wrap=True)
            console.print(Text(f"            {report.release}"), soft_wrap=True)
    if done:
        console.print(
            "Look further: `make ui` serves the MLflow and Prefect pages; each group's files, DVC included, are in"
        )
        console.print(Text(f"              {shlex.quote(_short(home / 'workspaces'))}/GROUP"), soft_wrap=True)


def _errors(reports: Sequence[GroupReport]) -> Table:
    table = Table(title="Test error, %", title_justify="left", title_style="bold")
    for column in ("group", "task"):
        table.add_column(column)
    for column in ("before", "zipped", "after light\nretraining", "stored %", "bytes", "of"):
        table.add_column(column, justify="right")
    for report in reports:
        for number, row in enumerate(metrics_table(report) if report.metrics else []):
            table.add_row(
                report.group if number == 0 else "",
                row["task"],
                *(f"{row[name]:.2f}" for name in ("error before", "error zipped", "error after retraining")),
                f"{row['stored %']:.1f}" if number == 0 else "",
                *(f"{row[name]:,}" if number == 0 else "" for name in ("bytes", "bytes before")),
            )
        table.add_section()
    return table


def _times(reports: Sequence[GroupReport]) -> Table:
    table = Table(title="Seconds", title_justify="left", title_style="bold")
    table.add_column("group")
    for column in ("pre-training", "zipping", "orchestration", "all"):
        table.add_column(column, justify="right")
    for report in reports:
        seconds = (report.pretraining_seconds, report.zipping_seconds, report.orchestration_seconds, report.seconds)
        table.add_row(report.group, *(f"{value:.1f}" for value in seconds))
    return table


def _what_was_done(reports: Sequence[GroupReport]) -> str:
    outcomes = Counter(stage.outcome for report in reports for stage in report.stages)
    if set(outcomes) == {"unchanged"}:
        return f"Nothing to do: all {outcomes.total()} stages unchanged."
    return "Stages: " + ", ".join(f"{outcomes[name]} {name}" for name in ("executed", "restored", "unchanged")) + "."


def _short(path: Path) -> str:
    """Return the path as people would type it in the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
