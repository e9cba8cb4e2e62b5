"""One DVC stage as a Prefect task: shown, logged, and tried again where that can help."""

from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.tasks import Task

from flows.group.dvc import STAGE_STARTS, Pipeline
from flows.group.heavy_limit import heavy_place
from flows.results import progress
from flows.results.stage_result import StageFailed
from tasks.faults import ServiceFault

HEAVY_STAGES = ("match", "merge", "retrain")
"""The stages that take most of a group's time and memory."""


def log_file(home: Path, group: str, stage: str) -> Path:
    """Return the file with everything that DVC and the stage printed when the stage ran last."""
    return home / "logs" / group / f"{stage}.log"


def _can_be_retried(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    try:
        state.result(raise_on_failure=True)
    except StageFailed as error:
        return error.can_be_retried
    except ServiceFault:
        return True
    except Exception:
        return False
    return False


# DVC alone decides what is up to date, so Prefect must not keep results.
@task(
    name="stage",
    task_run_name="{group} · {stage}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_condition_fn=_can_be_retried,
)
def reproduce_stage(
    group: str, stage: str, pipeline: Pipeline, home: Path, force: bool = False, heavy: int | None = None
) -> dict[str, Any]:
    """Bring one stage up to date.

    Args:
        group: The name under which the stage is shown and logged.
        stage: Name of the stage.
        pipeline: The workspace's pipeline.
        home: The folder of the worker's runtime state.
        force: Run the stage in any case.
        heavy: How many heavy stages may run at a time on all workers together; None for no limit.

    Returns:
        The `StageResult` as a mapping.

    Raises:
        StageFailed: The stage failed.
        StageRefused: The stage cannot do what is configured with these inputs.
        NoPlace: The server granted no place for a heavy stage.
    """
    logger = get_run_logger()
    shown = progress.current.get()
    shown.busy(group, stage)
    log = _Log(log_file(home, group, stage))

    def on_progress(line: str) -> None:
        log.add(line)
        if line.strip():
            logger.info(line)
            shown.show_line(group, line)

    try:
        with heavy_place(heavy if stage in HEAVY_STAGES else None):
            result = pipeline.reproduce(stage, force=force, on_progress=on_progress)
    except Exception:
        log.begin()
        raise
    finally:
        log.close()
    logger.info("%s in %.1f s", result.outcome, result.seconds)
    shown.finished(group, result)
    return asdict(result)


class _Log:
    """The log of a stage, written from when the stage starts: if it need not run, its last log stays."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._before: list[str] = []
        self._open: IO[str] | None = None

    def add(self, line: str) -> None:
        """Add a line of DVC or of the stage."""
        if self._open is not None:
            print(line, file=self._open, flush=True)
            return
        self._before.append(line)
        if STAGE_STARTS.match(line):
            self.begin()

    def begin(self) -> None:
        """Begin the file with the lines so far."""
        if self._open is None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._open = self._file.open("w", encoding="utf-8")
            print(*self._before, sep="\n", file=self._open, flush=True)

    def close(self) -> None:
        """Close the file."""
        if self._open is not None:
            self._open.close()
