"""The command `mtz`. Everything heavy is imported where it is needed, so that `--help` is quick."""

import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

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

Groups = Annotated[
    list[str] | None,
    typer.Option("--group", "-g", metavar="NAME", help="A group of the fleet; may be repeated. Default: all."),
]
ParamsFile = Annotated[Path, typer.Option("--params", metavar="FILE", help="The parameters of a group.")]
FleetFile = Annotated[Path, typer.Option("--fleet", metavar="FILE", help="The groups, as changes to the parameters.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY.PATH=VALUE", help="Change a parameter in all groups; may be repeated."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show stack traces and Prefect's own log.")]

PARAMS = Path("params.yaml")
FLEET = Path("fleet.yaml")
_GARBAGE_THRESHOLD = 100_000


@app.command()
def run(
    group: Groups = None,
    params: ParamsFile = PARAMS,
    fleet: FleetFile = FLEET,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Zip the groups of the fleet: run every stage whose inputs changed, store the data in S3, register the networks.

    Example: `mtz run --group lenet5 --set retrain.iterations=50`
    """
    with _told(debug):
        from flows.run import run_fleet

        run_fleet(Path.cwd(), params, fleet, tuple(group or ()), tuple(settings or ()), debug)


@app.command()
def check(
    group: Groups = None,
    params: ParamsFile = PARAMS,
    fleet: FleetFile = FLEET,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Check parameters, files, networks, disk, storage and registry; run nothing.

    Example: `mtz check --set storage.endpoint=https://s3.example.org`
    """
    with _told(debug):
        from flows.checks import check_all

        check_all(Path.cwd(), params, fleet, tuple(group or ()), tuple(settings or ()), tell=typer.echo)
        typer.echo("All is well: `mtz run` can start.")


@app.command()
def pareto(
    group: Annotated[
        str | None, typer.Option("--group", "-g", metavar="NAME", help="The group. Default: that of the parameters.")
    ] = None,
    sizes: Annotated[
        str, typer.Option("--sizes", metavar="LIST", help="Stored bytes, as parts of the originals' bytes.")
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
        bool, typer.Option("--retrain", help="Measure after light retraining, too, with the group's settings.")
    ] = False,
    params: ParamsFile = PARAMS,
    fleet: FleetFile = FLEET,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Show what size costs: one group's test error against its stored bytes, for several methods.

    Runs the stages before *match* if they changed, then makes and measures a network for every size and method. The
    table and the figure go to *pareto/* in the group's workspace and to MLflow; `mtz dvc --group NAME -- plots show`
    plots them, too.

    Example: `mtz pareto --group lenet5 --sizes 0.25,0.5 --methods mixture,paper`
    """
    with _told(debug):
        from flows.pareto import draw_pareto
        from tasks.pareto import Asked

        asked = Asked.parse(sizes, methods, retrain)
        draw_pareto(Path.cwd(), params, fleet, group, asked, tuple(settings or ()), tell=typer.echo)


@app.command()
def ui(params: ParamsFile = PARAMS, debug: Debug = False) -> None:
    """Serve the MLflow and Prefect pages on this machine until Ctrl-C.

    Example: `mtz ui`, then open the addresses that it prints.
    """
    with _told(debug):
        from flows.pages import serve_pages

        serve_pages(Path.cwd(), params, tell=typer.echo)


@app.command()
def s3(
    params: ParamsFile = PARAMS,
    export: Annotated[
        bool, typer.Option("--export", help="Print shell commands that set the variables, secrets included, and end.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Serve the embedded S3 storage until Ctrl-C, for other programs to use.

    Example: `mtz s3` in one terminal; in another `eval "$(mtz s3 --export)"`, then `dvc pull` or `aws s3 ls`.
    """
    with _told(debug):
        from flows.pages import export_storage, serve_storage

        (export_storage if export else serve_storage)(Path.cwd(), params, typer.echo)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def dvc(
    context: typer.Context,
    group: Annotated[
        str | None, typer.Option("--group", "-g", metavar="NAME", help="In this group's workspace.")
    ] = None,
    params: ParamsFile = PARAMS,
) -> None:
    """Run DVC with the storage as its remote: in the project, or in a group's workspace.

    Example: `mtz dvc -- pull`, `mtz dvc --group lenet5 -- metrics show`
    """
    with _told():
        from flows.by_hand import run_dvc

        raise typer.Exit(run_dvc(Path.cwd(), params, group, context.args))


@contextmanager
def _told(debug: bool = False) -> Iterator[None]:
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
    try:
        app()
    finally:
        gc.freeze()


if __name__ == "__main__":
    main()
