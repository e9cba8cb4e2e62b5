"""Tests of where the runtime state is looked for."""

from pathlib import Path

import pytest

from tasks.home import find_home


@pytest.fixture(autouse=True)
def no_configured_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MTZ_HOME", raising=False)


def test_a_fresh_project_gets_its_own_home(tmp_path: Path) -> None:
    assert find_home(tmp_path) == tmp_path / ".mtz"


def test_a_workspace_finds_the_home_around_it(tmp_path: Path) -> None:
    workspace = tmp_path / ".mtz" / "workspaces" / "lenet5"
    workspace.mkdir(parents=True)
    assert find_home(workspace) == tmp_path / ".mtz"


def test_the_nearest_home_wins(tmp_path: Path) -> None:
    inner = tmp_path / "clone"
    (tmp_path / ".mtz").mkdir()
    (inner / ".mtz").mkdir(parents=True)
    assert find_home(inner) == inner / ".mtz"


def test_the_current_folder_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_home() == tmp_path / ".mtz"


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".mtz").mkdir()
    monkeypatch.setenv("MTZ_HOME", str(tmp_path / "elsewhere"))
    assert find_home(tmp_path) == tmp_path / "elsewhere"
