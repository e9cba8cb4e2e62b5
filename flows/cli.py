"""The command `mtz`. Everything heavy is imported where it is needed, so that `--help` is quick."""

import gc
import importlib
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Literal

import typer

if TYPE_CHECKING:
    from flows.spec.request import Request

app = typer.Typer(
    name="mtz",
    help="Multi-task zipping: one compact network out of several pre-trained ones, as a versioned pipeline.",
    epilog="Example: `mtz run` zips all groups of fleet.yaml; `mtz ui` shows what came out.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)

fleet_app = typer.Typer(
    name="fleet",
    help="Check, plan, schedule and retry the fleet that *fleet.yaml* declares; `mtz run` runs it.",
    epilog='Example: `mtz fleet plan`, then `mtz fleet deploy --cron "0 2 * * *"`.',
    no_args_is_help=True,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(fleet_app)

_FLAG = ""
"""The metavar of what takes no value: help would show its type."""

Groups = Annotated[
    list[str] | None,
    typer.Option("--group", "-g", metavar="NAME", help="A group of the fleet; may be repeated. Default: all."),
]
ParamsPath = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameters of a group.")]
FleetPath = Annotated[Path, typer.Option("--fleet", metavar="FILE", help="The groups, as changes to the parameters.")]
SetOptions = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY.PATH=VALUE", help="Change a parameter in all groups; may be repeated."),
]
Debug = Annotated[bool, typer.Option("--debug", metavar=_FLAG, help="Show stack traces and Prefect's own log.")]

PARAMS = Path("params.yaml")
FLEET = Path("fleet.yaml")
FLEETS_POOL = "mtz-fleets"
_GARBAGE_THRESHOLD = 100_000


def _show_version(wanted: bool) -> None:
    if wanted:
        from mtz_core import __version__

        typer.echo(f"mtz {__version__}")
        raise typer.Exit


@app.callback()
def mtz(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar=_FLAG, callback=_show_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Multi-task zipping: one compact network out of several pre-trained ones, as a versioned pipeline."""


@app.command()
def run(
    group: Groups = None,
    params: ParamsPath = PARAMS,
    fleet: FleetPath = FLEET,
    settings: SetOptions = None,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify", metavar=_FLAG, help="Ask DVC in every group's workspace instead of trusting recorded outcomes."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Zip the groups of the fleet: run every stage whose inputs changed, store the data in S3, register the networks.

    Groups whose sources, data, parameters and code are those of their last outcome cost nothing. A group that fails
    stops no other; the exit status is then 1.

    Example: `mtz run --group lenet5 --set retrain.iterations=50`
    """
    with _errors_in_one_line(debug):
        from flows.commands.run import run_fleet

        run_fleet(_request(params, fleet, group, settings), verify, debug)


@fleet_app.command("check")
@app.command()
def check(
    group: Groups = None,
    params: ParamsPath = PARAMS,
    fleet: FleetPath = FLEET,
    settings: SetOptions = None,
    debug: Debug = False,
) -> None:
    """Check the fleet, its parameters, sources, networks, disk, storage and registry; run nothing.

    Example: `mtz check --set storage.endpoint=https://s3.example.org`; `mtz fleet check` is the same command.
    """
    with _errors_in_one_line(debug):
        from flows.commands.check import check_all

        check_all(_request(params, fleet, group, settings), on_progress=typer.echo)
        typer.echo("All is well: `mtz run` can start.")


@fleet_app.command("plan")
def fleet_plan(
    params: ParamsPath = PARAMS, fleet: FleetPath = FLEET, settings: SetOptions = None, debug: Debug = False
) -> None:
    """Show which groups the fleet has, what the planner chose and why, and what `mtz run` would do; zip nothing.

    Makes the statistics of models in no listed group, where they changed. The picture goes to *.mtz/plans/FLEET.svg*.

    Example: `mtz fleet plan`
    """
    with _errors_in_one_line(debug):
        from flows.commands.run import show_plan

        show_plan(_request(params, fleet, None, settings), debug)


@fleet_app.command("retry")
def fleet_retry(
    params: ParamsPath = PARAMS, fleet: FleetPath = FLEET, settings: SetOptions = None, debug: Debug = False
) -> None:
    """Run only the groups that failed in the fleet's last run.

    Example: `mtz fleet retry`
    """
    with _errors_in_one_line(debug):
        from flows.commands.run import retry_failed

        retry_failed(_request(params, fleet, None, settings), debug)


Fleets = Annotated[
    str | None, typer.Option("--name", "-n", metavar="NAME", help="Name of the deployment. Default: the fleet's name.")
]
Pool = Annotated[
    str,
    typer.Option(
        "--pool", metavar="NAME", help="The Prefect work pool for runs of fleets; `flow.pool` is the one for groups."
    ),
]


@fleet_app.command("deploy")
def fleet_deploy(
    cron: Annotated[
        str, typer.Option("--cron", metavar="CRON", help="When to run: five fields, as in crontab: *0 2 \\* \\* \\**.")
    ],
    timezone: Annotated[
        str, typer.Option("--timezone", metavar="ZONE", help="Time zone, for example *Europe/Zurich*.")
    ] = "UTC",
    name: Fleets = None,
    pool: Pool = FLEETS_POOL,
    overlap: Annotated[
        Literal["skip", "queue"],
        typer.Option("--overlap", help="If a run is due while another is in progress: *skip* it, or *queue* it."),
    ] = "skip",
    params: ParamsPath = PARAMS,
    fleet: FleetPath = FLEET,
    settings: SetOptions = None,
    debug: Debug = False,
) -> None:
    """Have a Prefect server run the fleet on a schedule; deploying again changes it.

    The server is that of PREFECT_API_URL, which `mtz ui` or *infra/compose.yaml* serves; a worker must run, see
    `mtz fleet worker`. No second run of a fleet starts while one is in progress.

    Example: `mtz fleet deploy --cron "0 2 * * *" --timezone Europe/Zurich`
    """
    with _errors_in_one_line(debug):
        from flows.commands.run import deploy_fleet
        from flows.spec.request import Timetable

        request, timetable = _request(params, fleet, None, settings), Timetable(cron, timezone, overlap)
        deploy_fleet(request, name, timetable, pool, typer.echo)


@fleet_app.command("pause")
def fleet_pause(name: Fleets = None, fleet: FleetPath = FLEET, debug: Debug = False) -> None:
    """Start no more scheduled runs; runs in progress go on to their end.

    Example: `mtz fleet pause`
    """
    with _errors_in_one_line(debug):
        deployment = _deployment(name, fleet)
        _schedule().pause(deployment)
        typer.echo(f"{deployment} is paused: `mtz fleet resume` ends that.")


@fleet_app.command("resume")
def fleet_resume(name: Fleets = None, fleet: FleetPath = FLEET, debug: Debug = False) -> None:
    """Start scheduled runs again.

    Example: `mtz fleet resume`
    """
    with _errors_in_one_line(debug):
        deployment = _deployment(name, fleet)
        _schedule().resume(deployment)
        typer.echo(f"{deployment} runs by the clock again.")


@fleet_app.command("start")
def fleet_start(
    name: Fleets = None,
    group: Groups = None,
    settings: SetOptions = None,
    wait: Annotated[
        bool, typer.Option("--wait", metavar=_FLAG, help="Wait until it ends; the exit status is 1 if it failed.")
    ] = False,
    fleet: FleetPath = FLEET,
    debug: Debug = False,
) -> None:
    """Have a worker run the deployed fleet now.

    Example: `mtz fleet start --group lenet5 --set retrain.iterations=50 --wait`
    """
    with _errors_in_one_line(debug):
        changes = {"groups": group, "settings": settings}
        given = {key: list(value) for key, value in changes.items() if value}
        _schedule().start(_deployment(name, fleet), given, wait, typer.echo)


@fleet_app.command("status")
def fleet_status(name: Fleets = None, fleet: FleetPath = FLEET, debug: Debug = False) -> None:
    """Show when the deployed fleet runs next, how the last runs ended, and whether a worker is there.

    Example: `mtz fleet status`
    """
    with _errors_in_one_line(debug):
        _schedule().status(_deployment(name, fleet), typer.echo)


@fleet_app.command("worker")
def fleet_worker(
    pool: Pool = FLEETS_POOL,
    limit: Annotated[int | None, typer.Option("--limit", min=1, metavar="N", help="Runs at a time.")] = None,
    debug: Debug = False,
) -> None:
    """Carry out the runs of a work pool on this machine, in this folder, until Ctrl-C.

    Example: `PREFECT_API_URL=http://127.0.0.1:4200/api mtz fleet worker`
    """
    with _errors_in_one_line(debug):
        _schedule().worker(pool, limit)


def _request(params: Path, fleet: Path, groups: list[str] | None, settings: list[str] | None) -> "Request":
    from flows.spec.request import Request

    return Request(Path.cwd(), params, fleet, tuple(groups or ()), tuple(settings or ()))


def _schedule() -> ModuleType:
    """Return `flows.commands.schedule`, with Prefect's settings made before it is imported."""
    from flows.processes.servers import prefect_environment
    from tasks.home import find_home

    os.environ.update(prefect_environment(find_home()))
    return importlib.import_module("flows.commands.schedule")


def _deployment(name: str | None, fleet: Path) -> str:
    from flows.spec.fleet_file import fleet_name

    return name or fleet_name(fleet)


@fleet_app.command("upgrade")
def fleet_upgrade(fleet: FleetPath = FLEET) -> None:
    """Rewrite a fleet file of the format before version 2; the old one stays beside it, as *fleet.yaml.old*.

    Example: `mtz fleet upgrade`
    """
    with _errors_in_one_line():
        from flows.spec.fleet_file import upgrade_file

        typer.echo(upgrade_file(fleet))


@app.command()
def pareto(
    group: Annotated[
        str | None, typer.Option("--group", "-g", metavar="NAME", help="The group. Default: that of the parameters.")
    ] = None,
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="LIST", help="Stored bytes, as fractions of the originals' bytes.")
    ] = "0.15,0.25,0.35,0.5,0.75",
    methods: Annotated[
        str,
        typer.Option(
            "--methods",
            metavar="LIST",
            help="*mixture* shares and drops neurons, whichever does less harm; *drop* prunes each network alone; "
            "*share* drops none; *paper* shares as MTZ was published.",
        ),
    ] = "mixture,drop,share,paper",
    retrain: Annotated[
        bool,
        typer.Option(
            "--retrain", metavar=_FLAG, help="Measure after light retraining, too, with the group's settings."
        ),
    ] = False,
    params: ParamsPath = PARAMS,
    fleet: FleetPath = FLEET,
    settings: SetOptions = None,
    debug: Debug = False,
) -> None:
    """Show what size costs: one group's test error against its stored bytes, for several methods.

    Runs the stages before *match* if they changed, then makes and measures a network for every size and method. The
    table and the figure go to *pareto/* in the group's workspace and to MLflow; `mtz dvc --group NAME -- plots show`
    plots them, too.

    Example: `mtz pareto --group lenet5 --sizes 0.25,0.5 --methods mixture,paper`
    """
    with _errors_in_one_line(debug):
        from flows.commands.pareto import draw_pareto
        from tasks.studies.pareto import Asked

        asked = Asked.parse(sizes, methods, retrain)
        draw_pareto(_request(params, fleet, None, settings), group, asked, on_progress=typer.echo)


@app.command()
def ui(params: ParamsPath = PARAMS, debug: Debug = False) -> None:
    """Serve the MLflow and Prefect pages on this machine until Ctrl-C.

    Example: `mtz ui`, then open the addresses that it prints.
    """
    with _errors_in_one_line(debug):
        from flows.commands.serve import serve_pages

        serve_pages(Path.cwd(), params, on_progress=typer.echo)


@app.command()
def s3(
    params: ParamsPath = PARAMS,
    export: Annotated[
        bool,
        typer.Option(
            "--export", metavar=_FLAG, help="Print shell commands that set the variables, secrets included, and end."
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve the embedded S3 storage until Ctrl-C, for other programs to use.

    Example: `mtz s3` in one terminal; in another `eval "$(mtz s3 --export)"`, then `dvc pull` or `aws s3 ls`.
    """
    with _errors_in_one_line(debug):
        from flows.commands.serve import export_storage, serve_storage

        (export_storage if export else serve_storage)(Path.cwd(), params, typer.echo)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def dvc(
    context: typer.Context,
    group: Annotated[
        str | None, typer.Option("--group", "-g", metavar="NAME", help="Run in this group's workspace.")
    ] = None,
    params: ParamsPath = PARAMS,
) -> None:
    """Run DVC with the storage as its remote: in the project, or in a group's workspace.

    Example: `mtz dvc -- pull`, `mtz dvc --group lenet5 -- metrics show`
    """  # noqa: DOC501 - the command's help, and an exit
    with _errors_in_one_line():
        from flows.commands.dvc import run_dvc

        raise typer.Exit(run_dvc(Path.cwd(), params, group, context.args))


@contextmanager
def _errors_in_one_line(debug: bool = False) -> Iterator[None]:
    """Tell a known error in one line and end with status 1; a stack trace only if asked for."""
    if debug:
        os.environ["MTZ_DEBUG"] = "1"
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("\nstopped; finished stages are kept, `mtz run` goes on from there", err=True)
        raise typer.Exit(130) from None
    except typer.Exit:
        raise
    except Exception as error:
        if os.environ.get("MTZ_DEBUG"):
            raise
        from mtz_core.errors import MtzError

        if not isinstance(error, MtzError | OSError):
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def main() -> None:
    """Run the command line."""
    # Hundreds of thousands of objects come with the imports; looking for garbage among them again and again, and once
    # more at the end, takes seconds.
    gc.set_threshold(_GARBAGE_THRESHOLD)
    # Being terminated must stop the servers and stages too, as Ctrl-C does.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # The modules that fleets name are the project's.
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        app()
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
