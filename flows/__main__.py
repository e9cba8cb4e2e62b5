"""The command `mtz`, also `python -m flows`; without the extra `[pipeline]` it exits with one line that names it."""

import sys
from importlib.util import find_spec

_PIPELINE = ("boto3", "dvc", "mlflow", "prefect", "typer")


def main() -> None:
    """Run the command line if its dependencies are installed."""
    missing = [name for name in _PIPELINE if find_spec(name) is None]
    if missing:
        sys.exit(
            f"error: the command mtz needs the pipeline, and {', '.join(missing)} cannot be found. "
            'Run in a checkout of this project: pip install ".[pipeline]"'
        )
    from flows.cli import main as run_command_line

    run_command_line()


if __name__ == "__main__":
    main()
