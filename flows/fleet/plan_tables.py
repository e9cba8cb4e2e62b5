"""`mtz fleet plan` for people: the groups, what they would save and why, and the models that are better left alone."""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from flows.fleet.plan import Choice, PlannedFleet
from tasks.studies.affinities import write_affinities
from tasks.studies.charts import draw_fleet


def print_plan(console: Console, planned: PlannedFleet, home: Path, fleet: str) -> None:
    """Print the plan; if the planner chose groups, also draw the fleet."""
    plan, choice = planned.plan, planned.plan.choice
    console.print(_groups(planned))
    if choice is not None:
        if choice.grouping.groups:
            console.print(_chosen(choice))
        if choice.grouping.alone:
            console.print(_alone(choice))
        saved, total = choice.grouping.saved, choice.grouping.bytes
        if total:
            share = 100 * saved / total
            console.print(f"Sharing everything would save {saved:,} of {total:,} bytes ({share:.0f} %).")
        picture = home / "plans" / f"{fleet}.svg"
        draw_fleet(choice.affinities, choice.grouping, picture, list(choice.groups()))
        write_affinities(picture.with_suffix(".json"), choice.affinities)
        console.print(Text(f"Picture: {picture}\nNumbers: {picture.with_suffix('.json')}"), soft_wrap=True)
    for report in plan.failed:
        console.print(Text(f"left out: {report.group}: {report.reason}", "red"), soft_wrap=True)


def _groups(planned: PlannedFleet) -> Table:
    table = Table(title="Groups", title_justify="left", title_style="bold")
    for column in ("group", "models", "mtz run would"):
        table.add_column(column, overflow="fold")
    for group in planned.plan.groups:
        report = planned.reports.get(group.name)
        if report is None:
            message = "zip it"
        elif report.status == "unchanged":
            message = f"leave it: {report.model} version {report.version}" if report.version is not None else "leave it"
        else:
            message = f"{'refuse it' if report.status == 'refused' else 'fail'}: {report.reason}"
        table.add_row(group.name, ", ".join(group.params.models), Text(message))
    return table


def _chosen(choice: Choice) -> Table:
    table = Table(title="Chosen by the planner", title_justify="left", title_style="bold")
    table.add_column("group")
    for column in ("bytes now", "all shared", "saved %", "similarity", "least", "damage, nats"):
        table.add_column(column, justify="right")
    for name, group in zip(choice.groups(), choice.grouping.groups, strict=True):
        table.add_row(
            name,
            f"{group.bytes:,}",
            f"{group.after:,}",
            f"{100 * group.saved / group.bytes:.0f}",
            f"{group.similarity:.2f}",
            f"{group.least:.2f}",
            f"{group.mean_damage:.3g}",
        )
    return table


def _alone(choice: Choice) -> Table:
    table = Table(title="Better left alone", title_justify="left", title_style="bold")
    table.add_column("model")
    table.add_column("why", overflow="fold")
    for one in choice.grouping.alone:
        table.add_row(one.model, Text(one.why))
    return table
