"""The executor that the settings name."""

from pathlib import Path
from types import SimpleNamespace

from flows.jobs.choose import executor_for
from flows.jobs.dask import DaskExecutor
from flows.jobs.executor import Executor
from flows.jobs.local import LocalExecutor
from flows.jobs.pool import PoolExecutor
from tests.support.tiny_jobs import STORE


def test_settings_choose_the_executor(tmp_path: Path) -> None:
    settings = {"workers": "auto", "memory": 1.5, "dask": "tls://there:8786", "pool": "p"}

    def chosen(executor: str) -> Executor:
        return executor_for(SimpleNamespace(executor=executor, **settings), tmp_path, STORE, {"A": "b"})

    assert chosen("local") == LocalExecutor("auto", 1.5)
    assert chosen("dask") == DaskExecutor("tls://there:8786", "auto", 1.5, tmp_path, {"A": "b"})
    assert chosen("pool") == PoolExecutor("p", "auto", STORE)
