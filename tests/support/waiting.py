"""Waiting in tests: for a condition, and for minutes where the machine is busy."""

import time
from collections.abc import Callable

PATIENCE_SECONDS = 900.0
"""A bound for whatever a test waits for. Only what hangs meets it, so it says nothing of how fast a machine is."""

_POLL_SECONDS = 0.05


def until(condition: Callable[[], bool], what: str = "") -> None:
    """Wait until the condition holds; `what` puts it into words. Raises `AssertionError` where it never does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {PATIENCE_SECONDS:.0f} s {what and f'until {what}'}"
        time.sleep(_POLL_SECONDS)
