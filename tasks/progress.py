"""Progress of a stage: one plain line a step, on standard output."""

from __future__ import annotations

import resource
import sys


def show_progress(text: str) -> None:
    """Print one step."""
    print(text, flush=True)


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
