"""Ends processes of a running fleet by SIGKILL, at moments and in an order that a seed decides."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]

from tests.faults.servers import Server

Target = Literal["flow", "stage", "dvc", "interpreter", "worker", "scheduler", "S3", "MLflow"]
SHARES: Mapping[Target, int] = {
    "stage": 9,
    "flow": 6,
    "dvc": 5,
    "worker": 3,
    "S3": 3,
    "MLflow": 2,
    "interpreter": 1,
    "scheduler": 1,
}
"""How many of thirty kills meet what."""
CLUSTER_ONLY: tuple[Target, ...] = ("worker", "scheduler")

_PATIENCE_SECONDS = 15.0
_POLL_SECONDS = 0.05
_LONGEST_WAIT_SECONDS = 1.5
_FROM, _TO = 0.3, 1.7


@dataclass(frozen=True)
class Kill:
    """One kill that was delivered; `doing` says which stages ran at that moment, as GROUP:STAGE."""

    seconds: float
    target: Target
    process: int
    doing: str


def plan_of(kills: int, seed: int) -> tuple[list[Target], list[Target]]:
    """What to kill in which order: first while groups run in the flow's own process, then while they run on a cluster.

    The second part begins with the flow, which is then started again with a cluster.
    """
    total = sum(SHARES.values())
    counts = {target: max(1, round(kills * share / total)) for target, share in SHARES.items()}
    counts["stage"] += max(0, kills - sum(counts.values()))
    drawing = random.Random(seed)
    elsewhere = [target for target in CLUSTER_ONLY for _ in range(counts[target])]
    anywhere = [target for target in counts if target not in CLUSTER_ONLY for _ in range(counts[target])]
    anywhere.remove("flow")
    drawing.shuffle(anywhere)
    half = (len(anywhere) + len(elsewhere) + 1) // 2
    local, rest = anywhere[:half], [*anywhere[half:], *elsewhere]
    drawing.shuffle(rest)
    return local, ["flow", *rest]


class Killer(threading.Thread):
    """Delivers kills to whatever `flow` returns and its descendants, and to the servers, until none is left.

    Args:
        plan: what to kill, in this order; what cannot be found is put off.
        flow: the process of the run under way, if there is one.
        mean_seconds: between two kills.

    Attributes:
        kills: those that were delivered.
        left: those that were not.
    """

    def __init__(
        self,
        plan: Sequence[Target],
        flow: Callable[[], psutil.Process | None],
        servers: Sequence[Server],
        mean_seconds: float,
        seed: int,
    ) -> None:
        super().__init__(daemon=True)
        self.kills: list[Kill] = []
        self.left = list(plan)
        self._flow = flow
        self._servers = {server.name: server for server in servers}
        self._mean = mean_seconds
        self._drawing = random.Random(seed)
        self._stopping = threading.Event()
        self._begun = time.monotonic()

    def run(self) -> None:
        """See `threading.Thread`."""
        while self.left and not self._stopping.wait(self._mean * self._drawing.uniform(_FROM, _TO)):
            target = self.left[0]
            kill = self._kill_server(target) if target in self._servers else self._kill_process(target)
            if kill is None:
                self.left.append(self.left.pop(0))
            else:
                self.kills.append(kill)
                del self.left[0]

    def stop(self) -> None:
        """Deliver no more."""
        self._stopping.set()
        self.join()

    def _kill_server(self, target: Target) -> Kill:
        doing = self._doing()
        seconds = time.monotonic() - self._begun
        return Kill(seconds, target, self._servers[target].kill_and_restart(), doing)

    def _kill_process(self, target: Target) -> Kill | None:
        """Wait for such a process, let it work for a moment, and kill it; None where none came, or all had ended."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while time.monotonic() < deadline and not self._stopping.wait(_POLL_SECONDS):
            if not list(self._found(target)):
                continue
            self._stopping.wait(self._drawing.uniform(0, _LONGEST_WAIT_SECONDS))
            candidates = list(self._found(target))
            if not candidates:
                continue
            chosen = self._drawing.choice(candidates)
            doing = self._doing()
            with suppress(psutil.NoSuchProcess):
                chosen.kill()
                return Kill(time.monotonic() - self._begun, target, chosen.pid, doing)
        return None

    def _found(self, target: Target) -> Iterator[psutil.Process]:
        for process, kind, _ in self._processes():
            if kind == target:
                yield process

    def _doing(self) -> str:
        stages = Counter(where for _, kind, where in self._processes() if kind == "stage" and where)
        return ", ".join(sorted(stages))

    def _processes(self) -> Iterator[tuple[psutil.Process, Target, str]]:
        flow = self._flow()
        if flow is None:
            return
        with suppress(psutil.Error):
            if flow.status() == psutil.STATUS_ZOMBIE:
                return
            yield flow, "flow", ""
            for process in flow.children(recursive=True):
                with suppress(psutil.Error):
                    if process.status() == psutil.STATUS_ZOMBIE:
                        continue
                    command = process.cmdline()
                    parent = process.parent()
                    kind = _kind(command, forked=parent is not None and parent.cmdline() == command)
                    if kind is not None:
                        yield process, kind, _stage(process, command)


def _kind(command: Sequence[str], forked: bool) -> Target | None:
    """What a process is, by its command line; a forked one has that of the interpreter that it was forked from."""
    names = {Path(word).name for word in command[:6]}
    if "warm_server.py" in names:
        if not forked:
            return "interpreter"
        return "dvc" if any(word.startswith("dvc.") for word in command) else "stage"
    if "dask" in names:
        return next((kind for kind in CLUSTER_ONLY if kind in command), None)
    if "tasks" in command:
        return "stage"
    return "dvc" if "dvc" in names else None


def _stage(process: psutil.Process, command: Sequence[str]) -> str:
    """GROUP:STAGE of a `python -m tasks STAGE [MODEL]` in a workspace, else nothing."""
    if "tasks" not in command:
        return ""
    stage = "@".join(command[command.index("tasks") + 1 :])
    return f"{Path(process.cwd()).name}:{stage}" if stage else ""
