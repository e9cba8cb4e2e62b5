"""What runs on this machine, with whole command lines: `ps` cuts them at the width of its terminal."""

import os
from collections.abc import Iterator
from contextlib import suppress

import psutil  # type: ignore[import-untyped]


def descendants(pid: int) -> list[int]:
    """The process and all that descend from it."""
    return [pid, *(child.pid for child in psutil.Process(pid).children(recursive=True))]


def own_children(word: str) -> list[int]:
    """The children of this process that have the word in their command lines; no zombies."""
    return [pid for pid, line in _lines(psutil.Process(os.getpid()).children()) if word in line]


def command_lines() -> str:
    """The command lines of all processes, one each line."""
    return "\n".join(line for _, line in _lines(psutil.process_iter()))


def is_alive(pid: int) -> bool:
    """Whether the process runs (a zombie does not)."""
    with suppress(psutil.NoSuchProcess):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def _lines(processes: Iterator[psutil.Process] | list[psutil.Process]) -> Iterator[tuple[int, str]]:
    for process in processes:
        with suppress(psutil.Error):
            yield process.pid, " ".join(process.cmdline())
