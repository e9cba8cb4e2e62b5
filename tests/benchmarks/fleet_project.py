"""A project in a folder of its own, as git would give it, with a generated fleet; `mtz` runs there as for a person."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

from tasks.home import HOME_NAME

ROOT = Path(__file__).parents[2]


class TooSlow(Exception):
    """A run has not ended in time, and was killed."""


@dataclass(frozen=True)
class Run:
    """One ended `mtz run`: its exit status, wall time, all that it said, and its report, empty where it left none."""

    status: int
    seconds: float
    said: str
    report: Mapping[str, Any]


@dataclass(frozen=True)
class FleetProject:
    """The project in `folder`; `variables` are what its processes have in their environment beyond a person's."""

    folder: Path
    variables: Mapping[str, str]

    @property
    def home(self) -> Path:
        """Its runtime state."""
        return self.folder / HOME_NAME

    def start(self, output: IO[bytes], *arguments: str) -> subprocess.Popen[bytes]:
        """Start `mtz` in a session of its own, as `nohup` or a service manager would."""
        return subprocess.Popen(
            [sys.executable, "-m", "flows.cli", *arguments],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def run(self, *arguments: str, limit: float | None = None) -> Run:
        """Run `mtz run` to its end.

        Args:
            limit: seconds that it may take.

        Raises:
            TooSlow: it took longer.
        """
        log = self.folder.with_name(f"{self.folder.name}.log")
        begun, start = time.time(), time.monotonic()
        with log.open("wb") as output:
            process = self.start(output, "run", *arguments)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise TooSlow(f"`mtz run` in {self.folder} was not done in {limit:.0f} s; see {log}") from None
        return Run(status, time.monotonic() - start, log.read_text(errors="replace"), self.report(since=begun))

    def report(self, since: float = 0.0) -> dict[str, Any]:
        """What the last run has left, if it was written at the time `since` or later; else nothing."""
        files = [file for file in self.home.glob("runs/*/last.json") if file.stat().st_mtime >= since]
        report: dict[str, Any] = json.loads(files[0].read_text()) if files else {}
        return report

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not re.match("AWS_|MTZ_|PREFECT_|MLFLOW_", name)}
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
        return {**kept, "PATH": path, **self.variables}


def copy_project(folder: Path) -> None:
    """Copy this project into `folder`, as git would give it with what is not committed yet."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for name in listed.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


def clone(
    folder: Path,
    project: Path,
    fleet: Path,
    settings: Mapping[str, Mapping[str, object]] | None = None,
    variables: Mapping[str, str] | None = None,
) -> FleetProject:
    """Make a project in `folder` out of the copy in `project`, with the fleet in the folder `fleet`.

    Args:
        settings: values in place of those of params.yaml, by block.
        variables: environment variables of its processes beyond a person's.
    """
    shutil.copytree(project, folder)
    shutil.copytree(fleet / "fleet", folder / "fleet")
    shutil.copy2(fleet / "fleet.yaml", folder / "fleet.yaml")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for block, values in (settings or {}).items():
        params[block] = {**params.get(block, {}), **values}
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    # A project inside of another one has a home of its own.
    (folder / HOME_NAME).mkdir()
    return FleetProject(folder, variables or {})


def with_settings(*settings: str) -> Sequence[str]:
    """The arguments that change parameters, each `key.path=value`."""
    return [word for setting in settings for word in ("--set", setting)]
