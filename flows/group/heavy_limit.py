"""A limit on heavy stages at a time over all workers: a global concurrency limit of the Prefect server.

A stage holds its place by a lease, which it renews. A holder that is killed stops renewing, and the server frees the
place within `LEASE_SECONDS` and a quarter of a minute.
"""

import random
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import httpx
from prefect import get_client
from prefect.concurrency.sync import concurrency
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_logger

from flows.processes import child
from tasks.faults import ServiceFault

HEAVY = "mtz-heavy"
"""Name of the limit on the server."""

LEASE_SECONDS = 60.0
"""The shortest lease that the server grants, in seconds."""

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 5.0


class NoPlace(ServiceFault):
    """The Prefect server granted no place for a heavy stage."""


def ensure(limit: int | None) -> None:
    """Set the most heavy stages that the server lets run at a time.

    The server has one such limit: of several fleets that run at a time, the one that started last decides.

    Args:
        limit: The number of stages; None removes the limit.
    """
    with get_client(sync_client=True) as client:
        if limit is not None:
            client.upsert_global_concurrency_limit_by_name(HEAVY, limit)
            return
        try:
            client.delete_global_concurrency_limit_by_name(HEAVY)
        except ObjectNotFound:
            return


@contextmanager
def heavy_place(limit: int | None) -> Iterator[None]:
    """Hold one of the places for heavy stages while the block runs, waiting for it if necessary.

    Args:
        limit: As given to `ensure`. Only whether there is a limit matters here; without one there is no wait.

    Yields:
        Nothing; the place is held while the block runs.

    Raises:
        NoPlace: The server has no limit of this name, or does not answer.
        Interrupted: The run is being stopped.
    """
    if limit is None:
        yield
        return
    place = _taken()
    try:
        yield
    finally:
        try:
            place.__exit__(None, None, None)
        except httpx.HTTPError as error:
            get_logger().warning("a place for heavy stages comes free only when its lease ends: %s", error)


def _taken() -> AbstractContextManager[None]:
    """Wait for a place; return the context whose exit releases it."""
    pause = _FIRST_PAUSE_SECONDS
    while True:
        # Running work matters more than the limit: if the server is unreachable beyond all retries, the block goes on.
        # For a while, one stage too many may then run.
        place = concurrency(
            HEAVY, strict=True, max_retries=0, lease_duration=LEASE_SECONDS, raise_on_lease_renewal_failure=False
        )
        try:
            place.__enter__()
            return place
        except Exception as error:
            if not _is_full(error):
                raise NoPlace(
                    f"the Prefect server gave no place for a heavy stage: {error}. Check that it runs, and that "
                    f"flow.heavy is set for all fleets that share it: it is the limit '{HEAVY}' there."
                ) from error
        # Prefect's own waiting cannot be interrupted.
        if child.stopping():
            raise child.Interrupted
        time.sleep(pause * random.uniform(0.5, 1.0))
        pause = min(1.5 * pause, _LONGEST_PAUSE_SECONDS)


def _is_full(error: Exception) -> bool:
    cause = error.__cause__
    return isinstance(cause, httpx.HTTPStatusError) and cause.response.status_code == httpx.codes.LOCKED
