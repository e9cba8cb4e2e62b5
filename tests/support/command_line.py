"""The command `mtz` as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

from tests.support import interpreters
from tests.support.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).parents[2]


def start(project: Path, *arguments: str, output: Path | None = None, **variables: str) -> "subprocess.Popen[str]":
    """Start the command in a project, without the settings of whoever runs the tests.

    It uses the tests' warm interpreters; with an empty MTZ_WARM it has its own.
    """
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MTZ_", "PREFECT_", "AWS_"))
    }
    environment |= {"PYTHONPATH": str(ROOT), **interpreters.running(str(ROOT)), **variables}
    return subprocess.Popen(
        [sys.executable, "-m", "flows.cli", *arguments],
        cwd=project,
        env={name: value for name, value in environment.items() if value},
        stdout=subprocess.PIPE if output is None else output.open("wb"),
        stderr=subprocess.PIPE if output is None else subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def mtz(project: Path, *arguments: str, **variables: str) -> tuple[int, str, str]:
    """Run the command; return its status and what it printed."""
    process = start(project, *arguments, output=None, **variables)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return process.returncode, out, err
