"""Networks, a registry and a project for the tests of the stages."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

import mtz_core
from tasks.registry import mlflow_client
from tests.support.services import Place, Registry


@pytest.fixture(autouse=True)
def no_foreign_aws_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep the account of whoever runs the tests out of them."""
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "PROFILE", "ENDPOINT_URL", "ENDPOINT_URL_S3"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "no-config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "no-credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@pytest.fixture
def place(own_place: Place) -> Place:
    """A storage of this test's own."""
    return own_place


@pytest.fixture(scope="session")
def registry(home: Path) -> Registry:
    """The session's registry, ready."""
    mlflow_client.prepare(Registry(), home)
    return Registry()


@pytest.fixture(scope="session")
def networks() -> dict[str, nn.Module]:
    """Two small networks for two tasks."""
    torch.manual_seed(0)
    return {task: nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3)) for task in ("a", "b")}


@pytest.fixture(scope="session")
def zipped(networks: dict[str, nn.Module], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of those two, zipped."""
    folder = tmp_path_factory.mktemp("zipped") / "retrained"
    images = torch.rand(64, 1, 4, 4)
    mtz_core.zip_networks(networks, calibration={"a": images, "b": images}).save(folder)
    return folder


@pytest.fixture
def project(template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the test file's own `template` of a project, as the current folder."""
    root = tmp_path / "project"
    shutil.copytree(template, root)
    monkeypatch.chdir(root)
    monkeypatch.syspath_prepend(str(root))
    monkeypatch.delenv("MTZ_DEBUG", raising=False)
    return root
