"""The executor that the settings name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Protocol

from flows.jobs.dask import DaskExecutor
from flows.jobs.executor import Executor
from flows.jobs.local import LocalExecutor
from tasks.storage.s3 import Storage


class ExecutorSettings(Protocol):
    """What the flow's settings say about where jobs run."""

    @property
    def executor(self) -> Literal["local", "dask", "pool"]: ...
    @property
    def workers(self) -> int | Literal["auto"]: ...
    @property
    def memory(self) -> float | None: ...
    @property
    def dask(self) -> str: ...
    @property
    def pool(self) -> str: ...


def executor_for(settings: ExecutorSettings, home: Path, store: Storage, environment: Mapping[str, str]) -> Executor:
    """Return the executor that the settings name.

    Args:
        store: through which reports come back from where they cannot come otherwise.
        environment: variables that workers which we start ourselves need on top of this process's own: the storage's
            address and credentials, and PREFECT_API_URL.
    """
    if settings.executor == "dask":
        return DaskExecutor(settings.dask, settings.workers, settings.memory, home, environment)
    if settings.executor == "pool":
        from flows.jobs.pool import PoolExecutor

        return PoolExecutor(settings.pool, settings.workers, store)
    return LocalExecutor(settings.workers, settings.memory)
