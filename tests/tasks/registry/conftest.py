"""The session's registry, asked by MLflow's own client."""

from pathlib import Path
from typing import Any

import pytest

from tasks.registry import mlflow_client
from tests.support.services import Registry


@pytest.fixture
def client(registry: Registry, home: Path) -> Any:
    return mlflow_client.connect(registry, home)
