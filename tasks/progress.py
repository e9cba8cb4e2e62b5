"""How a stage tells people what it is doing: one plain line a step, on standard output."""

from __future__ import annotations

import resource
import sys


def show_progress(text: str) -> None:
    """Tell one step."""
    print(text, flush=True)


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
