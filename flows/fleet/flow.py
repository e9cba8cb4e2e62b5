"""A fleet as one Prefect flow: groups that changed are zipped in parallel, and a failing one stops no other."""

import json
import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from prefect import flow
from prefect.artifacts import create_table_artifact
from prefect.runtime import deployment

from flows.fleet.plan import FleetPlan, Measured, PlannedFleet
from flows.group import heavy_limit
from flows.jobs.choose import executor_for
from flows.jobs.executor import Executor
from flows.processes import servers
from flows.processes.peak_memory import PeakMemory
from flows.results import progress, webhook
from flows.results.fleet_result import FleetFailed, FleetResult, last_run
from flows.results.group_report import GroupReport, Status, as_report
from flows.results.summary import summary_text
from flows.spec.fleet_file import Fleet, GroupPlan, check_names, select
from flows.spec.job import Job, shown_as
from flows.spec.request import Request
from flows.spec.snapshot import Project, Snapshot
from mtz_core.errors import MtzError
from tasks.files import write_json
from tasks.home import find_home
from tasks.locks import open_lock, try_exclusive
from tasks.params import Params
from tasks.registry import mlflow_client, upload
from tasks.sources import Access
from tasks.storage import outcomes, s3
from tasks.storage.contents import Contents
from tasks.storage.s3 import Storage

_PLANNER = "planner"
_RESOLVERS = 8
"""Number of sources that are read at a time; most of the work is waiting."""


class FleetBusy(MtzError):
    """Another run of the same fleet has not ended."""


@flow(name="zip-fleet", persist_result=False, log_prints=True)
def zip_fleet(
    project: str = ".",
    params: str = "params.yaml",
    fleet: str = "fleet.yaml",
    groups: Sequence[str] = (),
    settings: Sequence[str] = (),
    verify: bool = False,
) -> FleetResult:
    """Bring all groups up to date.

    Args:
        project: The folder of the project.
        params: The parameters file, relative to the project.
        fleet: The fleet file, relative to the project.
        groups: Names of the wanted groups; all if empty.
        settings: Changes in all groups, as `key.path=value`.
        verify: Check every group with DVC, rather than trust the records of unchanged groups.

    Returns:
        The result of the run.

    Raises:
        FleetFailed: A group failed; the others are done.
        FleetBusy: Another run of this fleet has not ended; nothing was started.
        InvalidFleet: The fleet file cannot be used; nothing was started.
        InvalidParams: The parameters cannot be used; nothing was started.
        StorageError: The storage cannot be used.
        TrackingError: The registry cannot be used.
    """
    start = time.monotonic()
    request = Request.of_parameters(project=project, params=params, fleet=fleet, groups=groups, settings=settings)
    declared = request.declared
    with PeakMemory() as memory, open_fleet(declared, request.project) as run:
        reports = run.bring_up_to_date(groups, verify)
        seconds = round(time.monotonic() - start, 3)
        result = FleetResult(declared.name, run.id, run.started, reports, seconds, memory.bytes)
        result = replace(result, warning=_keep(result, run.access))
    if deployment.id:  # a deployment has no terminal for the summary of `mtz run`
        print(summary_text(result, run.access.home))
    if any(report.status == "failed" for report in reports):
        raise FleetFailed(result)
    return result


def _keep(result: FleetResult, access: Access) -> str:
    """Record the result of a run here, in the storage and on Prefect's pages; return the webhook's warning."""
    values = result.as_values()
    write_json(last_run(access.home, result.fleet), values)
    content = json.dumps(values, indent=2).encode()
    for name in (result.run, "last"):
        access.store.put(f"runs/{result.fleet}/{name}.json", content)
    create_table_artifact(values["groups"], key=f"fleet-{result.fleet}".lower().replace("_", "-"))
    return webhook.notify(values)


@flow(name="plan-fleet", persist_result=False)
def plan_fleet(
    project: str, params: str, fleet: str, groups: Sequence[str] = (), settings: Sequence[str] = ()
) -> PlannedFleet:
    """Return the fleet's groups, including those that the planner chooses, and which of them need no work.

    Args:
        project: The folder of the project.
        params: The parameters file, relative to the project.
        fleet: The fleet file, relative to the project.
        groups: Names of groups; a plan is of all.
        settings: Changes in all groups, as `key.path=value`.

    Returns:
        The plan, with reports of the groups that need no work or cannot be started.

    Raises:
        FleetBusy: Another run of this fleet has not ended.
        InvalidFleet: The fleet file cannot be used.
        InvalidParams: The parameters cannot be used.
        StorageError: The storage cannot be used.
        TrackingError: The registry cannot be used.
        ServiceFailed: A server for workers elsewhere does not start.
    """
    request = Request.of_parameters(project=project, params=params, fleet=fleet, groups=groups, settings=settings)
    with open_fleet(request.declared, request.project) as run:
        plan = run.plan()
        snapshots, failed = run.take(plan.groups, run.project.group)
        return PlannedFleet(plan, {**run.settled(snapshots), **failed})


@dataclass(frozen=True)
class FleetRun:
    """A run of a fleet, with its services up; no other run of the same fleet is under way.

    Attributes:
        fleet: The fleet.
        project: The project's files.
        access: How models' files are fetched.
        executor: What runs the jobs.
        places: Returns the blocks `storage` and `tracking` for workers, with addresses that they can reach.
        id: Identifier of the run, which starts with its time.
        started: When the run started, ISO 8601, UTC.
    """

    fleet: Fleet
    project: Project
    access: Access
    executor: Executor
    places: Callable[[], Mapping[str, Any]]
    id: str = field(default_factory=lambda: f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{secrets.token_hex(3)}")
    started: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))

    def bring_up_to_date(self, names: Sequence[str], verify: bool) -> list[GroupReport]:
        """Bring groups up to date.

        Args:
            names: Names of the wanted groups; all if empty.
            verify: Check every group with DVC, rather than trust the records of unchanged groups.

        Returns:
            A report of every model that the planner had to leave out, then of every group, in the fleet's order.
        """
        plan = self.plan(names)
        plans = select(plan.groups, names)
        snapshots, reports = self.take(plans, self.project.group)
        if not verify:
            reports |= self.settled(snapshots)
        for report in reports.values():
            progress.current.get().ended(report.group, report.status, report.reason)
        waiting = [plan for plan in plans if plan.name not in reports]
        reports |= self.run("group", waiting, snapshots)
        return [*plan.failed, *(reports[plan.name] for plan in plans)]

    def plan(self, names: Sequence[str] = ()) -> FleetPlan:
        """Return the groups that the file lists and those that the planner chooses.

        Args:
            names: Names of the wanted groups; all if empty. If the file lists them all, the planner is not needed, nor
                is it if there are no two models to compare.

        Returns:
            The groups, and the models that the planner left out.

        Raises:
            InvalidFleet: Two groups would register under one name, or a group would zip what the fleet registers.
        """
        listed = self.fleet.explicit_groups()
        check_names(listed)
        if self.fleet.file.auto is None or (names and {plan.name for plan in listed}.issuperset(names)):
            return FleetPlan(listed)
        free = self.fleet.file.free_models()
        if len(free) < 2:
            for name in free:
                progress.current.get().note(_PLANNER, f"{name} stays alone: no other model is to be grouped")
            return FleetPlan(listed)
        from flows.fleet.choose import choose  # imports torch, which no other part of a run needs

        measured, failed = self._measure()
        progress.current.get().busy(_PLANNER, "comparing models")
        choice = choose(self.fleet, measured, self.access, partial(progress.current.get().show_line, _PLANNER))
        progress.current.get().ended(_PLANNER, "measured")
        groups = (*listed, *(self.fleet.group(name, models) for name, models in choice.groups().items()))
        check_names(groups)
        return FleetPlan(groups, failed, choice)

    def take(
        self, plans: Sequence[GroupPlan], take: Callable[[GroupPlan, Access], Snapshot]
    ) -> tuple[dict[str, Snapshot], dict[str, GroupReport]]:
        """Take the snapshots of groups or models, several at a time.

        Args:
            plans: The groups or models.
            take: Takes the snapshot of one.

        Returns:
            The snapshots by name, and a report of each whose sources cannot be fetched.
        """
        snapshots: dict[str, Snapshot] = {}
        reports: dict[str, GroupReport] = {}
        with ThreadPoolExecutor(_RESOLVERS) as pool:
            for plan, taken in [(plan, pool.submit(take, plan, self.access)) for plan in plans]:
                try:
                    snapshots[plan.name] = taken.result()
                except (MtzError, OSError) as error:
                    reports[plan.name] = GroupReport(plan.name, "failed", str(error))
        return snapshots, reports

    def run(
        self, kind: Literal["group", "model"], plans: Sequence[GroupPlan], snapshots: Mapping[str, Snapshot]
    ) -> dict[str, GroupReport]:
        """Run jobs in parallel.

        Args:
            kind: `group`, or `model` for a model's statistics.
            plans: The groups or models.
            snapshots: Their snapshots by name.

        Returns:
            A report of each, by name.
        """
        contents, reports = self.access.contents, dict[str, GroupReport]()
        if not plans:
            return reports
        jobs = [
            Job(
                fleet=self.fleet.name,
                kind=kind,
                group=plan.name,
                fingerprint=snapshots[plan.name].keep(contents),
                settings={**plan.content, **self.places()},
                run=self.id,
            )
            for plan in plans
        ]
        contents.upload({d for job in jobs for d in (job["fingerprint"], *snapshots[job["group"]].files.values())})

        def done(job: Job, values: Mapping[str, Any]) -> None:
            report = reports[job["group"]] = as_report(values)
            progress.current.get().ended(shown_as(job), report.status, report.reason)

        self.executor.run(jobs, done)
        return reports

    def _measure(self) -> tuple[dict[str, Measured], list[GroupReport]]:
        """Return the statistics of all models in no group, measured where they changed, and reports of failed ones."""
        plans = {name: self.fleet.model(name) for name in self.fleet.file.free_models()}
        snapshots, reports = self.take(list(plans.values()), self.project.model)
        fingerprints = {name: snapshot.keep(self.access.contents) for name, snapshot in snapshots.items()}
        known = outcomes.recall(self.access.store, fingerprints.values())
        for name, fingerprint in fingerprints.items():
            if (outcome := known.get(fingerprint)) is not None:
                status: Status = "refused" if outcome.status == "refused" else "measured"
                reports[name] = GroupReport(name, status, outcome.reason, statistics=outcome.statistics)
        reports |= self.run("model", [plans[name] for name in fingerprints if name not in reports], snapshots)
        measured = {
            name: Measured(plan, snapshots[name], reports[name].statistics, frozenset(plan.models[name].tags))
            for name, plan in plans.items()
            if reports[name].status == "measured"
        }
        return measured, [replace(reports[name], kind="model") for name in plans if name not in measured]

    def settled(self, snapshots: Mapping[str, Snapshot]) -> dict[str, GroupReport]:
        """Return reports of the groups with a known outcome that this registry and this storage have, too."""
        store, common = self.access.store, self.fleet.common()
        fingerprints = {name: snapshot.keep(self.access.contents) for name, snapshot in snapshots.items()}
        known = outcomes.recall(store, fingerprints.values())
        manifests = {fp: upload.manifest_key(outcome.release) for fp, outcome in known.items() if outcome.release}
        stored = store.read_many(manifests.values()) if manifests else {}
        versions = mlflow_client.find_versions(common.tracking, self.access.home, store) if manifests else {}
        settled = {}
        for name, fingerprint in fingerprints.items():
            if (outcome := known.get(fingerprint)) is None:
                continue
            report = GroupReport(name, "unchanged", outcome.reason, fingerprint=fingerprint, metrics=outcome.metrics)
            if outcome.status == "refused":
                report.status = "refused"
            elif outcome.release:
                report.model, report.content_digest = outcome.model, outcome.content_digest
                report.release = store.url(outcome.release)
                report.version = versions.get((outcome.model, outcome.content_digest))
                if report.version is None or stored.get(manifests[fingerprint]) is None:
                    continue  # this registry or storage lacks it, and its flow adds it
            settled[name] = report
        return settled


@contextmanager
def open_fleet(fleet: Fleet, project: Path) -> Iterator[FleetRun]:
    """Start a run of the fleet: its services are up, and no other run of it is under way.

    Args:
        fleet: The fleet.
        project: The folder of the project.

    Yields:
        The run.

    Raises:
        FleetBusy: Another run of this fleet has not ended.
        InvalidParams: The parameters cannot be used.
        StorageError: The storage cannot be used.
        TrackingError: The registry cannot be used.
        ServiceFailed: A server for workers elsewhere does not start.
    """
    home, common = find_home(project), fleet.common()
    with ExitStack() as stack:
        stack.enter_context(_alone(home, fleet.name))
        store = stack.enter_context(s3.connect(common.storage, home))
        mlflow_client.prepare(common.tracking, home)
        heavy_limit.ensure(common.flow.heavy)
        contents = Contents(home / "contents", store)
        access = Access(project, home, contents, store, common.tracking)
        places = cache(partial(_places, common, store, home, stack))
        environment = {**store.environment(), "PREFECT_API_URL": os.environ.get("PREFECT_API_URL", "")}
        executor = executor_for(common.flow, home, store, environment)
        yield FleetRun(fleet, Project(project, contents), access, executor, places)


def _places(common: Params, store: Storage, home: Path, stack: ExitStack) -> dict[str, Any]:
    """Return the blocks `storage` and `tracking` for workers; embedded services are served to workers elsewhere."""
    places = {"storage": common.storage.model_dump(), "tracking": common.tracking.model_dump()}
    if common.flow.executor == "local":
        return places
    places["storage"]["endpoint"] = store.endpoint or s3.AWS
    if common.tracking.uri == mlflow_client.EMBEDDED:
        uri = mlflow_client.tracking_uri(common.tracking, home)
        server = stack.enter_context(servers.mlflow_server(home, uri, store.environment()))
        server.wait()
        places["tracking"]["uri"] = server.url
    return places


@contextmanager
def _alone(home: Path, fleet: str) -> Iterator[None]:
    """Hold the fleet's lock while the block runs; raise `FleetBusy` if another process holds it."""
    file = home / "runs" / f"{fleet}.lock"
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = open_lock(file)
    try:
        if not try_exclusive(descriptor):
            raise FleetBusy(f"a run of fleet '{fleet}' is under way in {home}. Wait for it to end, or stop it.")
        yield
    finally:
        os.close(descriptor)
