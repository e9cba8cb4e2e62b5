"""One folder's DVC pipeline: its stages, which of them changed, running one, sharing results through the remote.

DVC runs as a process of its own each time, through its command line. It alone decides whether a stage must run.
"""

import json
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from flows.processes.child import Child, Interrupted, python_environment, stopping
from flows.results.stage_result import StageFailed, StageRefused, StageResult, StageStatus
from mtz_core.errors import MtzError
from tasks.faults import EXIT_REFUSED, EXIT_TRY_AGAIN

STAGE_STARTS = re.compile(r"> ")
"""What DVC prints when it runs a stage's command."""

_STAGE_IS_OVER = re.compile(r"(Generating|Updating) lock file |ERROR: failed to reproduce ")
_EXIT_STATUS = re.compile(r"exited with (-?\d+)$")
_RESTORED = re.compile(r"Stage '(.+)' is cached - skipping run, checking out outputs$|Pulling data for stage: '(.+)'$")
_ATTEMPTS = 3
_STUCK_SECONDS = 300.0
_SLOWEST_BYTES_PER_SECOND = 250_000
_INDEX_SCRIPT = Path(__file__).with_name("dvc_index.py")


class DvcFailed(MtzError):
    """DVC itself refused or failed."""


@dataclass(frozen=True)
class Stage:
    """A stage as DVC sees it; paths are relative to the pipeline's folder.

    Attributes:
        name: The stage's name.
        needs: The stages that it needs.
        dependencies: Local files and folders that it reads.
        outputs: Files and folders that it writes.
    """

    name: str
    needs: tuple[str, ...]
    dependencies: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Pipeline:
    """The DVC pipeline of a folder.

    Every method that runs DVC raises `DvcFailed` if DVC itself fails, and `Interrupted` if the run is being stopped.

    Attributes:
        folder: The folder.
        environment: Variables that DVC and the stages need beside this process's own, such as credentials.
    """

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict, repr=False)

    def stages(self) -> tuple[Stage, ...]:
        """Return all stages, each after those it needs."""
        found = self._json((str(_INDEX_SCRIPT),))
        return tuple(
            Stage(
                name=stage["name"],
                needs=tuple(stage["needs"]),
                dependencies=tuple(stage["dependencies"]),
                outputs=tuple(stage["outputs"]),
            )
            for stage in found
        )

    def changes(self) -> dict[str, frozenset[str]]:
        """Return the stages whose command, dependencies or outputs differ from the recorded ones.

        Returns:
            For each such stage, the paths of the dependencies that differ.
        """
        found = self._json(("dvc", "--wait-for-lock", "status", "--json"))
        return {
            stage: frozenset(
                path for reason in reasons if isinstance(reason, dict) for path in reason.get("changed deps", ())
            )
            for stage, reasons in found.items()
        }

    def reproduce(
        self, stage: str, *, force: bool = False, on_progress: Callable[[str], None] = lambda line: None
    ) -> StageResult:
        """Bring one stage up to date: run it, restore what an earlier run of it made, or leave it.

        Args:
            stage: The stage's name.
            force: Run the stage in any case.
            on_progress: Receives each line of DVC and of the stage.

        Returns:
            The result of the stage.

        Raises:
            StageFailed: The stage failed; the reason is its own `error:` line if there is one.
            StageRefused: The stage cannot do what is configured with these inputs.
            Interrupted: The run is being stopped.
        """  # noqa: DOC501 - `_stage_failure` makes one of these
        options = ["--force"] if force else []
        start = time.monotonic()
        command_start = command_end = None
        lines: list[str] = []
        outcome: StageStatus = "unchanged"
        child = self._start("dvc", "--wait-for-lock", "repro", "--single-item", *options, stage)
        for line in child.lines():
            on_progress(line)
            if STAGE_STARTS.match(line) and outcome != "executed":
                outcome, command_start = "executed", time.monotonic()
            elif command_start is not None and _STAGE_IS_OVER.match(line):
                command_end = time.monotonic()
            elif _RESTORED.match(line):
                outcome = "restored"
            if line.strip():
                lines.append(line)
        if (status := child.wait()) != 0:
            raise _stage_failure(stage, status, lines)
        end = time.monotonic()
        # DVC says nothing after a stage whose outputs are those that are recorded already.
        command_seconds = 0.0 if command_start is None else (command_end or end) - command_start
        return StageResult(
            stage,
            outcome,
            seconds=round(end - start, 3),
            command_seconds=round(command_seconds, 3),
            last_line=_last_stage_line(lines) if outcome == "executed" else "",
        )

    def restore(self) -> frozenset[str]:
        """Restore the outputs of all stages that this or any other clone has run with the same inputs; run none.

        Returns:
            The stages whose outputs existed, according to dvc.lock or to a record of runs, local or on the remote.

        Raises:
            DvcFailed: DVC itself failed.
            Interrupted: The run is being stopped.
        """
        # DVC has no option for this. It starts commands through $SHELL: if that always fails, a stage that cannot be
        # restored fails, and DVC goes on with the stages that do not need it.
        nothing_runs = {"SHELL": shutil.which("false") or "/usr/bin/false"}
        command = ("dvc", "--wait-for-lock", "repro", "--pull", "--keep-going")
        status, lines = self._run(command, self._transfer_seconds(), **nothing_runs)
        if status != 0 and not (reason := _dvc_reason(lines)).startswith("failed to reproduce"):
            raise self._failure(reason)
        return frozenset(match[1] or match[2] for line in lines if (match := _RESTORED.match(line)))

    def output_objects(self) -> frozenset[str]:
        """Return the names that the recorded outputs have below the remote's URL."""
        return frozenset(f"files/md5/{output['md5'][:2]}/{output['md5'][2:]}" for output in self._outputs())

    def push(self) -> None:
        """Send all data of this pipeline to the remote.

        Raises:
            DvcFailed: DVC failed.
            Interrupted: The run is being stopped.
        """
        # Not --run-cache: it sends the records of all runs of all groups each time. The stored dvc.lock is enough.
        self._output(("dvc", "--wait-for-lock", "push"), self._transfer_seconds())

    def _outputs(self) -> Iterator[dict[str, Any]]:
        """Yield what dvc.lock records of every output: `path`, `md5`, `size`."""
        if not (lock := self.folder / "dvc.lock").exists():
            return
        for stage in yaml.safe_load(lock.read_text(encoding="utf-8"))["stages"].values():
            yield from stage.get("outs", ())

    def _transfer_seconds(self) -> float:
        """Return the time after which a transfer of all outputs must be stuck."""
        return _STUCK_SECONDS + sum(output["size"] for output in self._outputs()) / _SLOWEST_BYTES_PER_SECOND

    def _json(self, arguments: Sequence[str]) -> Any:
        printed = [line for line in self._output(arguments) if line.startswith(("{", "["))]
        return json.loads(printed[-1])

    def _output(self, arguments: Sequence[str], patience: float | None = None) -> list[str]:
        status, lines = self._run(arguments, patience)
        if status != 0:
            raise self._failure(_dvc_reason(lines))
        return lines

    def _run(self, arguments: Sequence[str], patience: float | None = None, **variables: str) -> tuple[int, list[str]]:
        """Run a command that may safely be repeated, again if it is killed.

        Args:
            arguments: The Python module, or `.py` file, and its arguments.
            patience: Seconds after which the command is killed; None for no limit. (DVC has no limit of its own for a
                server that accepts a connection and never answers.)
            **variables: Further environment variables.

        Returns:
            The exit status and the lines of output.
        """
        for _ in range(_ATTEMPTS):
            child = self._start(*arguments, **variables)
            watchdog = threading.Timer(patience, child.stop) if patience is not None else None
            if watchdog is not None:
                watchdog.start()
            lines = [line for line in child.lines() if line.strip()]
            status = child.wait()
            if watchdog is not None:
                watchdog.cancel()
            if status >= 0 or stopping():
                break
            lines.append(f"ERROR: it was killed (signal {-status}).")
        return status, lines

    def _failure(self, reason: str) -> Exception:
        return Interrupted() if stopping() else DvcFailed(f"DVC failed in {self.folder}: {explain(reason)}")

    def _start(self, *arguments: str, **variables: str) -> Child:
        environment = {**self.environment, "DVC_NO_ANALYTICS": "1", **variables}
        return Child(arguments, self.folder, python_environment(**environment))


def explain(reason: str) -> str:
    """Return the reason, with the remedy for faults that any program can meet."""
    if "No space left on device" in reason or "Disk quota exceeded" in reason:
        return f"{reason} Free some space on the disk and run again; finished stages are kept."
    return reason


def _dvc_reason(lines: list[str]) -> str:
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return errors[-1] if errors else (lines[-1] if lines else "there was no output.")


def _stage_failure(stage: str, status: int, lines: list[str]) -> Exception:
    """Return the exception for a failed `dvc repro`, from its status and its output."""
    if stopping():
        return Interrupted()
    if status < 0:
        return StageFailed(stage, f"DVC was killed (signal {-status}).", can_be_retried=True)
    reason = _dvc_reason(lines)
    ended = _EXIT_STATUS.search(reason)
    if ended is None:
        return StageFailed(stage, explain(reason.removeprefix(f"failed to reproduce '{stage}': ")))
    code = int(ended[1])
    signal = -code if code < 0 else code - 128
    if signal > 0:
        return StageFailed(
            stage,
            f"its process was killed (signal {signal}). If the machine ran out of memory, give it more, or lower "
            "flow.workers or the stage's batch and sample sizes in params.yaml.",
            can_be_retried=True,
        )
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    message = errors[-1] if errors else _last_stage_line(lines) or f"it ended with status {code}."
    if code == EXIT_REFUSED:
        return StageRefused(stage, message)
    return StageFailed(stage, explain(message), can_be_retried=code == EXIT_TRY_AGAIN)


def _last_stage_line(lines: list[str]) -> str:
    """Return the last line that came from the stage's own process."""
    last = ""
    running = False
    for line in lines:
        if STAGE_STARTS.match(line):
            running = True
        elif _STAGE_IS_OVER.match(line):
            running = False
        elif running:
            last = line.strip()
    return last
