"""Locks between processes. The kernel lets go of one when its holder ends, however it ends."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def open_lock(file: Path) -> int:
    """A descriptor of the lock file `file`, made where it is not there; not passed on to child processes."""
    return os.open(file, os.O_RDWR | os.O_CREAT, 0o600)


def try_exclusive(descriptor: int) -> bool:
    """Take the lock alone if nobody else holds it; says whether that worked."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Hold the lock alone, waiting for it."""
    descriptor = open_lock(file)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
