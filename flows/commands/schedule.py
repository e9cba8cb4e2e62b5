"""Fleets on a schedule: a deployment on a permanent Prefect server, and workers that carry out its runs.

Only a name is deployed: workers import the flow from their own installed environment, so no code travels. The server
admits one run at a time. A run whose process is killed is marked as crashed by its worker; if the worker dies too, the
server marks the run once it has missed heartbeats for `_SILENCE`. In both cases the next run may start.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timedelta
from typing import Any, NoReturn

import httpx
from prefect import Flow, get_client
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions, FlowRun, StateType
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events.actions import ChangeFlowRunState
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.events.schemas.events import ResourceSpecification
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.utilities.urls import url_for
from prefect.workers.process import ProcessWorker
from pydantic import ValidationError

from flows.processes import servers
from flows.processes.child import python_environment
from flows.spec.request import Overlap, Request, Timetable
from mtz_core.errors import MtzError
from tasks.home import find_home

FLEET_FLOW = "zip-fleet"
HEARTBEAT_SECONDS = 30  # the shortest that Prefect allows
_SILENCE = timedelta(seconds=4 * HEARTBEAT_SECONDS)
_WATCHED = (FLEET_FLOW, "zip-group", "zip-group-job")
_AUTOMATION = "mtz: mark runs without heartbeat as crashed"
# A worker's own default; given explicitly, it saves a process that would look for code to fetch.
_COMMAND = "python -m prefect.engine"
_POLL_SECONDS = 2.0
_SHOWN_RUNS = 5


_STRATEGIES: dict[Overlap, ConcurrencyLimitStrategy] = {
    "skip": ConcurrencyLimitStrategy.CANCEL_NEW,
    "queue": ConcurrencyLimitStrategy.ENQUEUE,
}

_CRASHED = ChangeFlowRunState(
    name="Crashed", state=StateType.CRASHED, message="its process is gone: no heartbeat", force=False
)


class NoServer(MtzError):
    """There is no Prefect server that could keep a schedule."""


class InvalidSchedule(MtzError):
    """The schedule, or what it should run, is impossible."""


class NoSchedule(MtzError):
    """The server has no such deployment."""


class RunFailed(MtzError):
    """A run that was waited for did not succeed."""


def deploy(
    request: Request,
    name: str,
    timetable: Timetable,
    pool: str,
    group_pool: str | None = None,
) -> str:
    """Let the server run a fleet on a schedule; deploying the same name again changes the deployment.

    Args:
        request: The fleet, and changes for every run; its project is a folder on the machine of the pool's workers.
        name: Name of the deployment.
        timetable: When it runs.
        pool: The work pool; created, for workers that run processes, if it is missing.
        group_pool: The work pool of the groups' jobs, if a pool runs them.

    Returns:
        The full name of the deployment.

    Raises:
        NoServer: No server answers.
        InvalidSchedule: The schedule or the parameters are wrong, or both pools are the same.
    """
    schedule = _schedule(timetable.cron, timetable.timezone)
    if group_pool == pool:
        raise InvalidSchedule(
            f"the work pool '{pool}' would hold the fleet's run and the jobs that it waits for: with as many fleets as "
            "its workers take, no job would ever start. Name another pool for the schedule, or in flow.pool."
        )
    from flows.fleet.flow import zip_fleet

    given = request.as_parameters()
    with _server() as client:
        deploy_flow(client, zip_fleet, "flows.fleet.flow.zip_fleet", name, pool, given, schedule, timetable.overlap)
        if group_pool is not None:
            from flows.jobs.pool import zip_group_job

            deploy_flow(client, zip_group_job, "flows.jobs.pool.zip_group_job", "group", group_pool)
        _watch_heartbeats(client)
    return f"{FLEET_FLOW}/{name}"


def deploy_flow(
    client: SyncPrefectClient,
    flow: Flow[..., Any],
    entrypoint: str,
    name: str,
    pool: str,
    parameters: Mapping[str, Any] | None = None,
    schedule: CronSchedule | IntervalSchedule | None = None,
    overlap: Overlap | None = None,
) -> None:
    """Create or change the deployment of a flow to a work pool.

    Args:
        client: Client of the Prefect server.
        flow: The flow.
        entrypoint: Where workers import the flow from, `package.module.name`.
        name: Name of the deployment.
        pool: The work pool; created, for workers that run processes, if it is missing.
        parameters: Parameters of the flow for every run.
        schedule: When runs start; None for no schedule.
        overlap: Whether a run that is due while the last one is still going is skipped or queued; None allows any
            number of runs at a time.

    Raises:
        InvalidSchedule: The flow has no such parameters.
    """
    try:
        if parameters:
            flow.validate_parameters(dict(parameters))
    except Exception as error:
        raise InvalidSchedule(f"the flow '{flow.name}' does not take these parameters: {error}") from error
    try:
        found = client.read_work_pool(pool)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        found = client.create_work_pool(WorkPoolCreate(name=pool, type=ProcessWorker.type, base_job_template=template))
    client.create_deployment(
        client.create_flow(flow),
        name,
        schedules=[DeploymentScheduleCreate(schedule=schedule, active=True)] if schedule else [],
        concurrency_limit=None if overlap is None else 1,
        concurrency_options=ConcurrencyOptions(collision_strategy=_STRATEGIES[overlap]) if overlap else None,
        parameters=dict(parameters or {}),
        work_pool_name=pool,
        job_variables={"command": _COMMAND} if found.type == ProcessWorker.type else {},
        entrypoint=entrypoint,
        parameter_openapi_schema=flow.parameters.model_dump_for_openapi() | {"additionalProperties": False},
        enforce_parameter_schema=True,
    )


def pause(name: str) -> None:
    """Stop starting runs on the schedule.

    Args:
        name: Name of the deployment.

    Raises:
        NoServer: No server answers.
        NoSchedule: There is no such deployment.
    """
    _set_paused(name, True)


def resume(name: str) -> None:
    """Start runs on the schedule again.

    Args:
        name: Name of the deployment.

    Raises:
        NoServer: No server answers.
        NoSchedule: There is no such deployment.
    """
    _set_paused(name, False)


def start(name: str, parameters: Mapping[str, Any], wait: bool, on_progress: Callable[[str], None]) -> None:
    """Start a run now and report its name.

    Args:
        name: Name of the deployment.
        parameters: Parameters of this run, in place of the deployment's; `settings` are added to the deployment's own.
        wait: Whether to wait for the end of the run.
        on_progress: Receives the run's name and address.

    Raises:
        NoServer: No server answers.
        NoSchedule: There is no such deployment.
        InvalidSchedule: The server refuses the parameters.
        RunFailed: The run was waited for and did not succeed.
    """
    with _server() as client:
        found = _read(client, name)
        added = [*found.parameters.get("settings", ()), *parameters.get("settings", ())]
        given = {**parameters, "settings": added} if added else dict(parameters)
        try:
            run = client.create_flow_run_from_deployment(found.id, parameters=given)
        except PrefectHTTPStatusError as error:
            raise InvalidSchedule(f"the server refuses these parameters: {error.response.text}") from error
        on_progress(f"{run.name}  {url_for(run) or run.id}")
        while wait and not (run.state and run.state.is_final()):
            time.sleep(_POLL_SECONDS)
            run = client.read_flow_run(run.id)
    if wait and run.state and not run.state.is_completed():
        message = (run.state.message or "without a message").rstrip(".")
        raise RunFailed(f"the run '{run.name}' ended as {run.state.name}: {message}. Its log is in Prefect's pages.")


def status(name: str, on_progress: Callable[[str], None]) -> None:
    """Report when the next runs are due and how the last ones ended.

    Args:
        name: Name of the deployment.
        on_progress: Receives the lines.

    Raises:
        NoServer: No server answers.
        NoSchedule: There is no such deployment.
    """
    with _server() as client:
        found = _read(client, name)
        waiting = FlowRunFilterStateType(any_=[StateType.SCHEDULED])
        other = FlowRunFilterStateType(not_any_=[StateType.SCHEDULED])
        due = _runs(client, found, waiting, FlowRunSort.EXPECTED_START_TIME_ASC)
        last = _runs(client, found, other, FlowRunSort.EXPECTED_START_TIME_DESC)
        workers = client.read_workers_for_work_pool(found.work_pool_name) if found.work_pool_name else []
    given = [each.schedule for each in found.schedules]
    clocks = [f"{each.cron} ({each.timezone})" for each in given if isinstance(each, CronSchedule)]
    on_progress(f"{_full(name)}: {', '.join(clocks) or 'no schedule'}{', paused' if found.paused else ''}")
    online = sum(worker.status == "ONLINE" for worker in workers)
    remedy = "" if online else f"; start one with `mtz fleet worker --pool {found.work_pool_name}`"
    on_progress(f"pool {found.work_pool_name}: {online} {'worker' if online == 1 else 'workers'}{remedy}")
    for run in due:
        on_progress(f"next  {_at(run.expected_start_time)}  {run.state_name}")
    for run in last:
        message = run.state.message if run.state and not run.state.is_completed() else None
        on_progress(
            f"last  {_at(run.start_time or run.expected_start_time)}  {run.name}  {run.state_name}  {message or ''}"
        )


def worker(pool: str, limit: int | None) -> NoReturn:
    """Become a worker of the pool, in this folder, until Ctrl-C; runs are processes of this machine.

    Args:
        pool: The work pool.
        limit: The most runs at a time; None for any number. A worker also takes the runs that are to be skipped, so it
            needs room for two: with one, such runs wait and are late.

    Raises:
        NoServer: No server answers.
    """
    _check_server()
    home = find_home()
    home.mkdir(parents=True, exist_ok=True)
    environment = python_environment(
        **servers.prefect_environment(home, debug=True),
        MTZ_HOME=str(home),
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY=str(HEARTBEAT_SECONDS),
    )
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", ProcessWorker.type]
    if limit is not None:
        command += ["--limit", str(limit)]
    # So that it receives the signals of its supervisor, or of the terminal, itself.
    os.execve(sys.executable, command, environment)


def _schedule(cron: str, timezone: str) -> CronSchedule:
    try:
        return CronSchedule(cron=cron, timezone=timezone)
    except ValidationError as error:
        problem = error.errors()[0]
        reason = f"{'.'.join(map(str, problem['loc']))}: {problem['msg'].removeprefix('Value error, ')}"
        raise InvalidSchedule(
            f"{reason}. Write cron as five fields (minute, hour, day of the month, month, day of the week), such as "
            "'0 2 * * *', and the time zone as Europe/Zurich."
        ) from error


def _check_server() -> None:
    if not servers.uses_own_prefect_server():
        raise NoServer(
            "a schedule needs a Prefect server that goes on running, and PREFECT_API_URL names none. Serve one with "
            "`mtz ui`, or with infra/compose.yaml, and set the variable to its address and /api."
        )
    try:
        servers.check_own_prefect_server()
    except servers.ServiceFailed as error:
        raise NoServer(
            f"no Prefect server answers at PREFECT_API_URL ({os.environ['PREFECT_API_URL']}). Serve one with `mtz ui`, "
            "or with infra/compose.yaml, or correct the address."
        ) from error


@contextmanager
def _server() -> Iterator[SyncPrefectClient]:
    """Connect to the server that PREFECT_API_URL names; raise `NoServer`, also if it goes away in the block."""
    _check_server()
    try:
        with get_client(sync_client=True) as client:
            yield client
    except httpx.TransportError as error:
        raise NoServer(f"the Prefect server went away: {error or type(error).__name__}. Try again.") from error


def _full(name: str) -> str:
    return name if "/" in name else f"{FLEET_FLOW}/{name}"


def _read(client: SyncPrefectClient, name: str) -> DeploymentResponse:
    try:
        return client.read_deployment_by_name(_full(name))
    except ObjectNotFound as error:
        fleets = FlowFilter(name=FlowFilterName(any_=[FLEET_FLOW]))
        known = [f"{FLEET_FLOW}/{found.name}" for found in client.read_deployments(flow_filter=fleets)]
        raise NoSchedule(
            f"the server has no deployment '{_full(name)}'. It has: {', '.join(known) or 'none'}. "
            "`mtz fleet deploy` makes one."
        ) from error


def _set_paused(name: str, paused: bool) -> None:
    with _server() as client:
        found = _read(client, name)
        (client.pause_deployment if paused else client.resume_deployment)(found.id)


def _runs(
    client: SyncPrefectClient, found: DeploymentResponse, states: FlowRunFilterStateType, order: FlowRunSort
) -> list[FlowRun]:
    return client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[found.id])),
        flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=states)),
        sort=order,
        limit=_SHOWN_RUNS,
    )


def _at(when: datetime | None) -> str:
    return when.astimezone().strftime("%Y-%m-%d %H:%M:%S %Z") if when else "?"


def _watch_heartbeats(client: SyncPrefectClient) -> None:
    """Let the server mark runs as crashed when their heartbeats stop."""
    beat = "prefect.flow-run.heartbeat"
    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    automation = AutomationCore(
        name=_AUTOMATION,
        trigger=EventTrigger(
            after={beat},
            expect={beat, *ends},
            match=ResourceSpecification({"prefect.resource.id": "prefect.flow-run.*"}),
            match_related=ResourceSpecification(
                {"prefect.resource.role": "flow", "prefect.resource.name": list(_WATCHED)}
            ),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=_SILENCE,
        ),
        actions=[_CRASHED],
    )
    known = client.read_automations_by_name(_AUTOMATION)
    if known:
        client.update_automation(known[0].id, automation)
    else:
        client.create_automation(automation)
