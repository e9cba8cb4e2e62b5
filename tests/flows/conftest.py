from pathlib import Path

import pytest

from tests.flows.small_project import Group, make_project


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The small project in a folder of its own, with DVC's state there too."""
    monkeypatch.setenv("DVC_SITE_CACHE_DIR", str(tmp_path / "dvc-state"))
    monkeypatch.setenv("DVC_GLOBAL_CONFIG_DIR", str(tmp_path / "dvc-config"))
    monkeypatch.delenv("MTZ_HOME", raising=False)
    root = tmp_path / "project"
    make_project(root)
    return root


@pytest.fixture
def group(project: Path) -> Group:
    return Group(project)
