"""The result of a stage, and the ways in which it can fail."""

from dataclasses import dataclass
from typing import Literal

from mtz_core.errors import MtzError

StageStatus = Literal["executed", "restored", "unchanged"]


@dataclass(frozen=True)
class StageResult:
    """The result of a stage.

    Attributes:
        stage: The stage's name.
        outcome: Whether it was executed, restored or unchanged.
        seconds: Wall time including DVC's part; 0 if the stage needed no process of its own.
        command_seconds: Wall time of the stage's own process.
        last_line: The last line that the stage printed, if it was executed.
    """

    stage: str
    outcome: StageStatus
    seconds: float = 0.0
    command_seconds: float = 0.0
    last_line: str = ""


class StageFailed(MtzError):
    """A stage ended with an error.

    Attributes:
        stage: The stage's name.
        can_be_retried: Whether the same command may succeed later, since a service did not answer or the process was
            killed.
        finished: The results of the stages before it.
    """

    finished: tuple[StageResult, ...] = ()

    def __init__(self, stage: str, reason: str, can_be_retried: bool = False) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.can_be_retried = can_be_retried


class StageRefused(StageFailed):
    """A stage found that the group cannot be zipped as configured; with the same inputs it always will."""
