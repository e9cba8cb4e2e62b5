"""`mtz ui` and `mtz s3`: what is started, what is told, and when."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from flows.commands import serve
from flows.commands.serve import NotEmbedded, export_storage, serve_pages, serve_storage
from flows.processes import servers
from tasks.params import StorageParams
from tasks.registry import mlflow_client

PARAMS = Path("params.yaml")
MODEL = {"network": "a:b", "weights": "networks/a.safetensors", "data": "data/a"}


class Interrupted:
    """An event that nobody sets; Ctrl-C ends the wait for it."""

    def wait(self) -> None:
        raise KeyboardInterrupt


@pytest.fixture
def project(tmp_path: Path, home: Path, place: StorageParams, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose storage is the session's; whoever serves it is interrupted at once."""
    monkeypatch.setenv("MTZ_HOME", str(home))
    monkeypatch.setattr(serve, "threading", SimpleNamespace(Event=Interrupted))
    write(tmp_path, storage=place.model_dump())
    return tmp_path


def write(project: Path, **blocks: object) -> None:
    params = {"group": "g", "models": {"a": MODEL}, "register": {"name": "g"}, **blocks}
    (project / "params.yaml").write_text(yaml.safe_dump(params))


def test_other_programs_are_told_how_to_reach_the_storage(project: Path, home: Path) -> None:
    told: list[str] = []
    serve_storage(project, PARAMS, told.append)
    assert [line.split()[0] for line in told[:4]] == ["endpoint", "bucket", "DVC", "credentials"]
    assert told[0].split()[1].startswith("http://127.0.0.1:")
    assert told[2].split()[2].startswith("s3://mtz-tests/tests/") and told[2].endswith("/dvc")
    assert Path(told[3].split()[1]) == home / "s3" / "credentials.json"
    assert told[4].startswith('In another terminal: eval "$(mtz s3 --export)"')
    assert told[5:] == ["Ctrl-C stops.", "\nstopping …"]
    assert not any("SECRET" in line for line in told)


def test_the_variables_are_shell_commands(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    export_storage(project, PARAMS, told.append)
    assert all(line.startswith("export ") for line in told)
    names = {line.removeprefix("export ").partition("=")[0] for line in told}
    assert {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"} <= names
    monkeypatch.setattr("tasks.storage.s3.Storage.environment", lambda _: {"A": "it's $HOME"})
    export_storage(project, PARAMS, told.append)
    assert told[-1] == """export A='it'"'"'s $HOME'"""


@pytest.mark.parametrize("command", [serve_storage, export_storage])
def test_a_storage_that_is_not_ours_is_not_served(project: Path, command: Callable[..., None]) -> None:
    write(project, storage={"endpoint": "https://s3.example.org"})
    told: list[str] = []
    with pytest.raises(
        NotEmbedded, match=r"storage\.endpoint in params\.yaml is https://s3\.example\.org, not embedded"
    ):
        command(project, PARAMS, told.append)
    assert told == []


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of the servers, which are none."""
    found: list[str] = []

    @contextmanager
    def server(name: str) -> Iterator[SimpleNamespace]:
        found.append(f"{name} starts")
        yield SimpleNamespace(name=name, url=f"http://{name}", wait=lambda: found.append(f"{name} answers"))
        found.append(f"{name} ends")

    monkeypatch.setattr(servers, "prefect_server", lambda *_: server("Prefect"))
    monkeypatch.setattr(servers, "mlflow_server", lambda *_: server("MLflow"))
    monkeypatch.setattr(mlflow_client, "prepare", lambda *_: found.append("registry is ready"))
    return found


def test_pages_are_told_once_they_answer(project: Path, events: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    serve_pages(project, PARAMS, events.append)
    assert events == [
        "Starting (half a minute on the first time) …",
        "Prefect starts",
        "registry is ready",
        "MLflow starts",
        "Prefect answers",
        "MLflow answers",
        "MLflow   http://MLflow",
        "Prefect  http://Prefect",
        "Ctrl-C stops.",
        "\nstopping …",
        "MLflow ends",
        "Prefect ends",
    ]


def test_servers_of_the_user_are_named_and_not_started(
    project: Path, place: StorageParams, events: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://team:4200/api")
    write(project, storage=place.model_dump(), tracking={"uri": "https://mlflow.example.org"})
    serve_pages(project, PARAMS, events.append)
    assert events[1:] == [
        "MLflow   https://mlflow.example.org",
        "Prefect  at your PREFECT_API_URL",
        "Ctrl-C stops.",
        "\nstopping …",
    ]
