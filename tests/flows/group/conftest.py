from collections.abc import Iterator
from typing import Any

import pytest
from prefect.logging import disable_run_logger
from prefect.tasks import Task


@pytest.fixture
def without_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let Prefect's tasks run as the functions that they are: once, in this thread, and no server is told."""

    def call(task: Task[..., Any], *arguments: Any, **named: Any) -> Any:
        return task.fn(*arguments, **named)

    monkeypatch.setattr(Task, "__call__", call)
    with disable_run_logger():
        yield
