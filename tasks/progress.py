"""Progress of a stage: one plain line a step, on standard output."""

from __future__ import annotations

import re
import resource
import sys
from pathlib import Path


def show_progress(text: str) -> None:
    """Print one step."""
    print(text, flush=True)


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held so far.

    Every stage is a process of its own. What its parent held when it began does not count, as it does in `ru_maxrss`
    on Linux.
    """
    if sys.platform == "darwin":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])
