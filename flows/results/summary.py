"""The summary of a run for people: errors, sizes, the status of every group, times, and where to find more."""

import io
import shlex
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.results.fleet_result import FleetResult
from flows.results.group_report import GroupReport, Status, metrics_table

_WIDTH_OF_TEXT = 120
_UNCHANGED_LISTED = 20
_STYLES: dict[Status, str] = {
    "merged": "green",
    "unchanged": "dim",
    "refused": "yellow",
    "failed": "red",
    "measured": "green",
}


def summary_text(result: FleetResult, home: Path) -> str:
    """Return the whole summary as text."""
    text = io.StringIO()
    print_summary(Console(file=text, width=_WIDTH_OF_TEXT), result, home)
    return text.getvalue()


def print_summary(console: Console, result: FleetResult, home: Path) -> None:
    """Print the whole summary."""
    reports = result.reports
    worked = [report for report in reports if report.stages]
    if measured := [report for report in reports if report.metrics and report.status == "merged"]:
        console.print()
        console.print(_errors(measured))
    if worked:
        console.print(_times(worked))
    console.print(_groups(reports))
    console.print(
        f"Wall time {result.seconds:.0f} s without the start of services, peak memory "
        f"{result.peak_bytes / 2**30:.1f} GiB."
    )
    console.print(_what_was_done(reports))
    for report in reports:
        if report.log:
            console.print(Text(f"Log of {report.group}: {report.log}"), soft_wrap=True)
    if result.warning:
        console.print(Text(result.warning), soft_wrap=True)
    if any(report.status == "failed" for report in reports):
        console.print("Try the failed groups again: `mtz fleet retry`.")
    if worked:
        console.print(
            "Look further: `make ui` serves the MLflow and Prefect pages; each group's files, DVC included, are in"
        )
        console.print(Text(f"              {shlex.quote(_short(home / 'workspaces'))}/GROUP"), soft_wrap=True)


def _errors(reports: Sequence[GroupReport]) -> Table:
    table = Table(title="Test errors, and agreement with the originals", title_justify="left", title_style="bold")
    for column in ("group", "task", "error by"):
        table.add_column(column)
    for column in ("before", "zipped", "after light\nretraining", "agreement\n%", "stored\n%", "bytes", "of"):
        table.add_column(column, justify="right")
    for report in reports:
        for number, row in enumerate(metrics_table(report)):
            table.add_row(
                report.group if number == 0 else "",
                row["task"],
                ", ".join(filter(None, (row["metric"].rpartition(":")[2], row["unit"]))),
                *(f"{row[name]:.2f}" for name in ("error before", "error zipped", "error after retraining")),
                f"{row['agreement %']:.1f}",
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


def _groups(reports: Sequence[GroupReport]) -> Table:
    table = Table(title="Groups", title_justify="left", title_style="bold")
    for column in ("group", "what became of it"):
        table.add_column(column, no_wrap=True)
    table.add_column("registered, or why not", overflow="fold")
    listed = [report for report in reports if report.status != "unchanged"]
    if len(reports) - len(listed) <= _UNCHANGED_LISTED:
        listed = list(reports)
    for report in listed:
        registered = f"models:/{report.model}/{report.version}  {report.release}" if report.version is not None else ""
        table.add_row(report.group, Text(report.status, _STYLES[report.status]), Text(report.reason or registered))
    if len(listed) < len(reports):
        table.add_row(f"{len(reports) - len(listed)} more", "unchanged", "")
    return table


def _what_was_done(reports: Sequence[GroupReport]) -> str:
    groups = Counter(report.status for report in reports)
    outcomes = Counter(stage.outcome for report in reports for stage in report.stages)
    message = ", ".join(f"{groups[status]} {status}" for status in _STYLES if groups[status])
    if set(groups) == {"unchanged"} and set(outcomes) <= {"unchanged"}:
        stages = f", all {outcomes.total()} stages" if outcomes else ""
        return f"Nothing to do: {len(reports)} of {len(reports)} groups unchanged{stages}."
    stages = ", ".join(f"{outcomes[name]} {name}" for name in ("executed", "restored", "unchanged"))
    return f"Groups: {message}. Stages: {stages}."


def _short(path: Path) -> str:
    """Return the path as people would type it in the current folder."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
