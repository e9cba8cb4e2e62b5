import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows.processes import warm
from tasks.params import StorageParams
from tasks.storage import s3
from tasks.storage.s3 import Storage
from tasks.warm_client import VARIABLE
from tests.support.small_project import Group, make_project


@pytest.fixture(scope="module")
def interpreters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The folder of a warm interpreter, for tests that call DVC again and again; others start cold."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(warm, "PRELOADED", {"dvc": warm.PRELOADED["dvc"]})
        with warm.serving(tmp_path_factory.mktemp("warm")):
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


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `.mtz` folder whose S3 server stays up for the session."""
    return tmp_path_factory.mktemp("home") / ".mtz"


@pytest.fixture(scope="session")
def session_store(home: Path) -> Iterator[Storage]:
    """Keeps that server up."""
    with s3.connect(StorageParams(), home) as store:
        yield store


@pytest.fixture
def place(session_store: Storage, request: pytest.FixtureRequest) -> StorageParams:
    """A storage of this test's own: a prefix on the session's server."""
    return StorageParams(prefix="tests/" + re.sub(r"\W", "-", request.node.name))


@pytest.fixture
def store(place: StorageParams, home: Path) -> Iterator[Storage]:
    """That storage, open."""
    with s3.connect(place, home) as opened:
        yield opened
