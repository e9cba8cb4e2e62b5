"""The executor that the settings name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from flows.jobs.dask import DaskExecutor
from flows.jobs.executor import Executor
from flows.jobs.local import LocalExecutor
from tasks.storage.s3 import Storage


class ExecutorSettings(Protocol):
    """The flow's settings of where jobs run."""

    @property
    def executor(self) -> Literal["local", "dask", "pool"]:
        """`local` for threads of this process, `dask` for a Dask cluster, `pool` for a Prefect work pool."""

    @property
    def workers(self) -> int | Literal["auto"]:
        """The most jobs at a time; `auto` leaves it to the executor."""

    @property
    def memory(self) -> float | None:
        """GiB that one job takes; None if unknown."""

    @property
    def dask(self) -> str:
        """Address of the Dask scheduler; `local` for a cluster on this machine."""

    @property
    def pool(self) -> str:
        """Name of the Prefect work pool."""


def executor_for(settings: ExecutorSettings, home: Path, store: Storage, environment: Mapping[str, str]) -> Executor:
    """Return the executor that the settings name.

    Args:
        settings: The settings.
        home: The folder of the project's runtime state.
        store: The storage through which reports come back from a work pool.
        environment: Variables that workers started here need beside this process's own: the storage's address and
            credentials, and PREFECT_API_URL.

    Returns:
        The executor.
    """
    if settings.executor == "dask":
        return DaskExecutor(settings.dask, settings.workers, settings.memory, home, environment)
    if settings.executor == "pool":
        from flows.jobs.pool import PoolExecutor

        return PoolExecutor(settings.pool, settings.workers, store)
    return LocalExecutor(settings.workers, settings.memory)
