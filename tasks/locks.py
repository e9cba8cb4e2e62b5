"""Locks between processes. The kernel releases a lock when its holder ends, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_lock(file: Path) -> int:
    """Return a descriptor of a lock file, created if necessary; child processes do not inherit it."""
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o600)


def try_exclusive(descriptor: int) -> bool:
    """Take the lock exclusively if nobody else holds it; return whether that worked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Hold the lock exclusively while the block runs, waiting for it if necessary."""
    descriptor = open_lock(file)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
