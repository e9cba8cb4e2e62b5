"""What became of a stage, and how one can fail."""

from dataclasses import dataclass
from typing import Literal

from mtz_core.errors import MtzError

StageStatus = Literal["executed", "restored", "unchanged"]


class StageFailed(MtzError):
    """A stage ended with an error.

    Attributes:
        stage: its name.
        can_be_retried: the same command may succeed later: a service did not answer, or the process was killed.
    """

    def __init__(self, stage: str, reason: str, can_be_retried: bool = False) -> None:
        super().__init__(f"{stage}: {reason}")
        self.stage = stage
        self.can_be_retried = can_be_retried


class StageRefused(StageFailed):
    """A stage found that the group cannot be zipped as asked; with the same inputs it always will."""


@dataclass(frozen=True)
class StageResult:
    """What became of a stage."""

    stage: str
    outcome: StageStatus
    seconds: float = 0.0
    """Wall time with DVC's part, 0 where the stage needed no process of its own."""
    command_seconds: float = 0.0
    """Wall time of the stage's own process."""
    last_line: str = ""
