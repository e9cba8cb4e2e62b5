import dataclasses
import os
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from flows.processes import warm
from tasks.params import StorageParams
from tasks.warm_client import VARIABLE
from tests.support.services import Place
from tests.support.small_project import Group, make_project


@pytest.fixture(scope="session")
def interpreters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The folder of a warm interpreter, for tests that call DVC again and again; others start cold."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(warm, "PRELOADED", {"dvc": warm.PRELOADED["dvc"]})
            stack.enter_context(warm.serving(tmp_path_factory.mktemp("warm")))
        folder = os.environ.pop(VARIABLE)
        yield folder
        os.environ[VARIABLE] = folder


@pytest.fixture
def project(tmp_path: Path, interpreters: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small project in a folder of its own, with DVC's state there too."""
    monkeypatch.setenv(VARIABLE, interpreters)
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "dvc-state"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "dvc-config"))
    monkeypatch.delenv("MTZ_HOME", raising=False)
    root = tmp_path / "project"
    make_project(root)
    return root


@pytest.fixture
def group(project: Path) -> Group:
    return Group(project)


@pytest.fixture
def place(own_place: Place) -> StorageParams:
    """A storage of this test's own, as settings."""
    return StorageParams(**dataclasses.asdict(own_place))
