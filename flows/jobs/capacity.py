"""How many jobs fit on this machine at a time, by the cores and memory that this process may use."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import psutil  # type: ignore[import-untyped]

_CGROUP = Path("/sys/fs/cgroup")
_GIB = 1 << 30


def places(workers: int | Literal["auto"], threads: int, memory: float | None) -> int:
    """Return how many jobs may run here at a time, at least one.

    Args:
        workers: The number in the settings; `auto` for as many as fit.
        threads: Threads that one job computes with.
        memory: GiB that one job takes; None if unknown, and then only cores count.

    Returns:
        The number of jobs.
    """
    if workers != "auto":
        return workers
    fitting = [cores() // threads]
    if memory is not None:
        fitting.append(int(available_memory() / (memory * _GIB)))
    return max(1, min(fitting))


def cores(cgroup: Path = _CGROUP) -> int:
    """Return how many cores this process may use, at least one: its affinity, and its container's quota."""
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _words(cgroup / "cpu.max")  # "max 100000", or microseconds in each period
    if len(quota) == 2 and quota[0] != "max":
        found = min(found, int(quota[0]) // int(quota[1]))
    return max(1, found)


def available_memory(cgroup: Path = _CGROUP) -> int:
    """Return how many bytes are available without swapping, within the container's limit."""
    found: int = psutil.virtual_memory().available
    limit, used = _words(cgroup / "memory.max"), _words(cgroup / "memory.current")
    if limit and used and limit[0] != "max":
        # Cached files can be evicted.
        cached = _count(cgroup / "memory.stat", ("active_file", "inactive_file"))
        found = min(found, max(0, int(limit[0]) - int(used[0]) + cached))
    return found


def _words(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="ascii").split()
    except OSError:
        return []


def _count(file: Path, names: Iterable[str]) -> int:
    words = _words(file)
    values = dict(zip(words[::2], words[1::2], strict=False))
    return sum(int(values.get(name, 0)) for name in names)
