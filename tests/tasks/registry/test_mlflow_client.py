"""Tests of the registry itself: made once, migrated, or told why it cannot be used; what it is asked."""

import shutil
import socket
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tasks.registry import mlflow_client
from tasks.registry.mlflow_client import TrackingError
from tasks.storage.s3 import Storage
from tests.support.services import Registry


def test_versions_of_many_models_are_found_by_few_questions(
    registry: Registry, home: Path, store: Storage, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected: dict[tuple[str, str], int] = {}
    for number in range(5):
        model = f"many-{number}"
        client.create_registered_model(model)
        store.put(f"mlflow/{model}/MLmodel", b"")
        for digest in ("e", "f", "e"):
            tags = {"mtz.content_digest": digest * 64}
            version = client.create_model_version(model, store.url(f"mlflow/{model}"), tags=tags)
            expected.setdefault((model, digest * 64), int(version.version))
        client.create_model_version(model, store.url(f"mlflow/{model}"))
        client.create_model_version(model, "s3://elsewhere/mlflow", tags={"mtz.content_digest": "a" * 64})
    monkeypatch.setattr(mlflow_client, "_PAGE", 8)
    asked: list[str] = []
    store.client.meta.events.register("before-call.s3", lambda model, **_: asked.append(model.name))
    assert mlflow_client.find_versions(registry, home, store) == expected
    assert asked == 5 * ["HeadObject"]
    assert mlflow_client.find_versions(registry, home / "none", store) == {}


def test_processes_that_prepare_at_once_make_one_registry(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: mlflow_client.prepare(Registry(), tmp_path / ".mtz"), range(2)))
    assert mlflow_client.find_version(Registry(), tmp_path / ".mtz", "none", "0" * 64) is None
    assert sorted(file.name for file in (tmp_path / ".mtz").iterdir()) == ["mlflow.db", "mlflow.lock"]


@pytest.mark.long
def test_a_registry_of_an_older_mlflow_is_migrated(registry: Registry, home: Path, tmp_path: Path) -> None:
    from alembic import command
    from mlflow.store.db.utils import _get_alembic_config

    old = tmp_path / "mlflow.db"
    shutil.copy(home / "mlflow.db", old)
    command.downgrade(_get_alembic_config(f"sqlite:///{old}"), "-1")  # type: ignore[no-untyped-call]
    mlflow_client.prepare(registry, tmp_path)
    assert revision(old) == revision(home / "mlflow.db") != revision(tmp_path / "mlflow.db.old")


@pytest.mark.long
def test_a_registry_of_a_newer_mlflow_is_left_alone(registry: Registry, home: Path, tmp_path: Path) -> None:
    newer = tmp_path / "mlflow.db"
    shutil.copy(home / "mlflow.db", newer)
    with sqlite3.connect(newer) as database:
        database.execute("UPDATE alembic_version SET version_num = 'from_the_future'")
    database.close()
    before = newer.read_bytes()
    with pytest.raises(TrackingError, match="cannot be migrated"):
        mlflow_client.prepare(registry, tmp_path)
    assert newer.read_bytes() == before


def test_a_damaged_registry_is_named(registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_bytes(b"not a database at all" * 1000)
    with pytest.raises(TrackingError, match=r"mlflow\.db is not a readable.*not a database"):
        mlflow_client.prepare(registry, tmp_path)


def test_a_registry_that_does_not_answer(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(TrackingError, match=r"127\.0\.0\.1.*tracking\.uri") as caught:
        mlflow_client.prepare(Registry(uri=f"http://me:password@127.0.0.1:{port}"), tmp_path)
    assert "password" not in str(caught.value)


def test_a_registry_that_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow by itself would wait for minutes, many times; so would this test, if the first contact had no limit."""
    monkeypatch.setitem(mlflow_client._IMPATIENT, "MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.raises(TrackingError, match=r"tracking\.uri"):
        mlflow_client.prepare(Registry(uri=f"http://127.0.0.1:{silent.getsockname()[1]}"), tmp_path)


def revision(database: Path) -> str:
    with sqlite3.connect(database) as connection:
        (found,) = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    connection.close()
    return str(found)
