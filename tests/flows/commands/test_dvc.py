"""`mtz dvc`: where DVC runs, with what configuration, and what becomes of its status. A module stands for DVC."""

import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.commands.dvc import UnknownGroup, run_dvc
from flows.group.workspace import folder_of
from tasks.params import StorageParams
from tasks.storage.s3 import Storage

PARAMS = Path("params.yaml")

DVC = """
    import json, os, sys
    about = {"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}
    open(os.environ["TOLD"], "w").write(json.dumps(about))
    sys.exit(int(sys.argv[1]))
"""


@pytest.fixture
def project(tmp_path: Path, home: Path, place: StorageParams, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTZ_HOME", str(home))
    monkeypatch.setenv("TOLD", str(tmp_path / "told"))
    model = {"network": "a:b", "weights": "networks/a.safetensors", "data": "data/a"}
    params = {"group": "g", "models": {"a": model}, "register": {"name": "g"}, "storage": place.model_dump()}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    (tmp_path / "dvc.py").write_text(textwrap.dedent(DVC))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def told(project: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((project / "told").read_text())
    return content


def test_in_the_project_the_storage_is_the_last_choice_of_remotes(project: Path, store: Storage) -> None:
    assert run_dvc(project, PARAMS, None, ["0", "pull", "--jobs", "2"]) == 0
    found = told(project)
    assert (found["arguments"], found["folder"]) == (["0", "pull", "--jobs", "2"], str(project))
    configuration = Path(found["environment"]["DVC_SYSTEM_CONFIG_DIR"], "config").read_text()
    assert "remote = storage" in configuration and f"url = {store.url('dvc')}" in configuration
    assert f"endpointurl = {store.endpoint}" in configuration
    secret = store.environment()["AWS_SECRET_ACCESS_KEY"]
    assert found["environment"]["AWS_SECRET_ACCESS_KEY"] == secret and secret not in configuration
    assert found["environment"]["DVC_NO_ANALYTICS"] == "1"
    assert not (project / ".dvc").exists(), "the project's own configuration is its user's"


def test_the_status_of_dvc_is_ours(project: Path) -> None:
    assert run_dvc(project, PARAMS, None, ["251"]) == 251


def test_in_a_workspace_the_storage_is_the_remote(project: Path, home: Path, store: Storage) -> None:
    folder = folder_of(home, "of-dvc")
    folder_of(home, "another-of-dvc").mkdir(parents=True)
    (folder_of(home, "another-of-dvc") / "dvc.yaml").touch()
    told_of_others = (
        r"no workspace of group 'of-dvc'\. Workspaces: .*another-of-dvc.*run `mtz run --group of-dvc` first\."
    )
    with pytest.raises(UnknownGroup, match=told_of_others):
        run_dvc(project, PARAMS, "of-dvc", ["0"])
    assert not folder.exists() and not (project / "told").exists()
    folder.mkdir(parents=True)
    assert run_dvc(project, PARAMS, "of-dvc", ["0", "metrics", "show"]) == 0
    found = told(project)
    assert (found["arguments"][1:], found["folder"]) == (["metrics", "show"], str(folder))
    assert f"url = {store.url('dvc')}" in (folder / ".dvc" / "config").read_text()
    assert "DVC_SYSTEM_CONFIG_DIR" not in found["environment"]
