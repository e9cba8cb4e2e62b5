"""Tests of where files come from: project, S3, MLflow, factories; what is fetched twice, and what errors say."""

import dataclasses
import hashlib
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from tasks.faults import ServiceFault
from tasks.models.programs import exported
from tasks.registry import mlflow_client
from tasks.sources import Access, SourceError, resolve_data, resolve_file, resolve_program, resolve_weights
from tasks.storage import s3
from tasks.storage.contents import Contents
from tasks.storage.s3 import Storage
from tests.support.services import Place, Registry

WEIGHTS = b"weights, as far as anybody here knows"
NAME = "models.a.weights"


def digest_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(scope="module")
def place(session_store: Storage) -> Place:
    """A storage of this file's own: a prefix on the session's server."""
    return Place(prefix="tests/sources")


@pytest.fixture(scope="module")
def store(place: Place, home: Path) -> Iterator[Storage]:
    """That storage, open."""
    with s3.connect(place, home) as opened:
        yield opened


@pytest.fixture
def access(tmp_path: Path, home: Path, store: Storage, registry: Registry) -> Access:
    """A project of the test's own; the session's services."""
    (tmp_path / "project").mkdir()
    (tmp_path / "home").mkdir()
    contents = Contents(tmp_path / "home" / "contents", store)
    return Access(tmp_path / "project", home, contents, store, registry)


@pytest.fixture
def asked(store: Storage) -> list[str]:
    """What the storage is asked during the test."""
    calls: list[str] = []
    store.client.meta.events.register("before-call.s3", lambda model, **_: calls.append(model.name))
    return calls


@pytest.fixture
def client(registry: Registry, home: Path) -> Any:
    return mlflow_client.connect(registry, home)


@pytest.fixture
def model(request: pytest.FixtureRequest, client: Any) -> str:
    """A registered model of the test's own, without versions."""
    client.create_registered_model(request.node.name)
    return str(request.node.name)


def register(client: Any, model: str, source: str, alias: str = "") -> None:
    version = client.create_model_version(model, source=source)
    if alias:
        client.set_registered_model_alias(model, alias, version.version)


def test_a_file_of_the_project(access: Access) -> None:
    (access.project / "networks").mkdir()
    (access.project / "networks" / "a.safetensors").write_bytes(WEIGHTS)
    digest = resolve_file(NAME, "networks/a.safetensors", access)
    assert digest == digest_of(WEIGHTS)
    assert access.contents.read(digest) == WEIGHTS


def test_an_object_is_fetched_once_while_it_is_the_same(access: Access, store: Storage, asked: list[str]) -> None:
    store.client.put_object(Bucket=store.bucket, Key="elsewhere/a.safetensors", Body=WEIGHTS)
    location = f"s3://{store.bucket}/elsewhere/a.safetensors"
    assert resolve_file(NAME, location, access) == digest_of(WEIGHTS)
    asked.clear()
    assert resolve_file(NAME, location, access) == digest_of(WEIGHTS)
    assert asked == ["HeadObject"]
    store.client.put_object(Bucket=store.bucket, Key="elsewhere/a.safetensors", Body=b"new")
    assert resolve_file(NAME, location, access) == digest_of(b"new")


def test_a_version_of_the_registry_by_alias_and_number(
    access: Access, store: Storage, client: Any, model: str, asked: list[str]
) -> None:
    store.put_files(f"{model}/run", {"MLmodel": b"", "data/model.safetensors": WEIGHTS})
    register(client, model, store.url(f"{model}/run"), "champion")
    assert resolve_file(NAME, f"models:/{model}@champion", access) == digest_of(WEIGHTS)
    asked.clear()
    assert resolve_file(NAME, f"models:/{model}/1", access) == digest_of(WEIGHTS)
    assert asked == []
    store.put_files(f"{model}/next", {"model.safetensors": b"better"})
    register(client, model, store.url(f"{model}/next"), "champion")
    assert resolve_file(NAME, f"models:/{model}@champion", access) == digest_of(b"better")


def test_one_of_several_files_of_a_version(access: Access, store: Storage, client: Any, model: str) -> None:
    store.put_files(f"{model}/run", {"a.safetensors": b"a", "deep/b.safetensors": b"b"})
    register(client, model, store.url(f"{model}/run"))
    assert resolve_file(NAME, f"models:/{model}/1#deep/b.safetensors", access) == digest_of(b"b")
    with pytest.raises(SourceError, match=rf"one \.safetensors .*a\.safetensors, deep/b\..*models:/{model}/1#path"):
        resolve_file(NAME, f"models:/{model}/1", access)
    with pytest.raises(SourceError, match=r"has no file c\.safetensors\. It has a\.safetensors, deep/b\.safetensors"):
        resolve_file(NAME, f"models:/{model}/1#c.safetensors", access)


def test_a_version_whose_files_lie_outside_of_s3(access: Access, client: Any, model: str, tmp_path: Path) -> None:
    (tmp_path / "artifacts" / "data").mkdir(parents=True)
    (tmp_path / "artifacts" / "data" / "model.safetensors").write_bytes(WEIGHTS)
    (tmp_path / "artifacts" / "MLmodel").write_text("")
    register(client, model, (tmp_path / "artifacts").as_uri())
    assert resolve_file(NAME, f"models:/{model}/1", access) == digest_of(WEIGHTS)
    with pytest.raises(SourceError, match=r"has no file b\.safetensors\. It has MLmodel, data/model\.safetensors"):
        resolve_file(NAME, f"models:/{model}/1#b.safetensors", access)


def test_a_model_without_safetensors(access: Access, store: Storage, client: Any, model: str) -> None:
    store.put_files(f"{model}/run", {"MLmodel": b"", "data/model.pth": b"pickled"})
    register(client, model, store.url(f"{model}/run"))
    with pytest.raises(SourceError, match=r"has none among 2 files\. Register one"):
        resolve_file(NAME, f"models:/{model}/1", access)


TENSORS = {"a": torch.arange(3.0), "b": torch.ones(2), "c": torch.zeros(1, dtype=torch.bfloat16)}
INDEX = "model.safetensors.index.json"


def shards() -> dict[str, bytes]:
    """Weights in two files, with their index."""
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    places = {"a": first, "b": second, "c": first}
    return {
        first: save({"a": TENSORS["a"], "c": TENSORS["c"]}, {"format": "pt"}),
        second: save({"b": TENSORS["b"]}),
        INDEX: json.dumps({"weight_map": places}).encode(),
    }


def whole(access: Access, digest: str) -> bool:
    found = load(access.contents.read(digest))
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


@pytest.mark.parametrize("where", ["project", "s3"])
def test_weights_in_several_files_become_one(access: Access, store: Storage, where: str) -> None:
    if where == "s3":
        store.put_files("sharded", {**shards(), "README.md": b"", "deeper/b.safetensors": b"?"})
        folder = store.url("sharded")
    else:
        folder = "networks/sharded"
        (access.project / folder).mkdir(parents=True)
        for name, content in {**shards(), "README.md": b""}.items():
            (access.project / folder / name).write_bytes(content)
    digest = resolve_weights(NAME, f"{folder}/", access)
    assert whole(access, digest)
    assert resolve_weights(NAME, f"{folder}/{INDEX}", access) == digest
    one = f"{folder}/model-00002-of-00002.safetensors"
    assert resolve_weights(NAME, one, access) == resolve_file(NAME, one, access) != digest


def test_weights_in_several_files_of_a_version(access: Access, store: Storage, client: Any, model: str) -> None:
    store.put_files(f"{model}/run", {"MLmodel": b"", **{f"data/{name}": content for name, content in shards().items()}})
    register(client, model, store.url(f"{model}/run"), "champion")
    for location in (f"models:/{model}@champion", f"models:/{model}/1#data/{INDEX}"):
        assert whole(access, resolve_weights(NAME, location, access))


@pytest.mark.parametrize(
    ("changes", "location", "said"),
    [
        ({INDEX: b"[]"}, "many/", rf"{INDEX} is no index of safetensors files"),
        (
            {"model-00001-of-00002.safetensors": None},
            "many",
            r"model-00001-of-00002\.safetensors: there is no such file",
        ),
        ({"model-00001-of-00002.safetensors": None}, f"many/{INDEX}", r"00001-of-00002\.safetensors: there is no such"),
        ({"model-00001-of-00002.safetensors": save({"a": TENSORS["a"]})}, "many/", "'c' is in None, but"),
        ({"other.safetensors": save({"d": TENSORS["a"]})}, "many/", r"does not name other\.safetensors"),
        ({}, f"none/{INDEX}", "there is no such file"),
        ({}, "s3://mtz-tests/none/", "has no .safetensors file"),
    ],
)
def test_files_that_are_not_all_of_the_weights(
    access: Access, changes: dict[str, bytes | None], location: str, said: str
) -> None:
    (access.project / "many").mkdir()
    for name, content in {**shards(), **changes}.items():
        if content is not None:
            (access.project / "many" / name).write_bytes(content)
    with pytest.raises(SourceError, match=said) as caught:
        resolve_weights(NAME, location, access)
    assert str(caught.value).startswith(f"{NAME}: {location}")
    assert "/tmp" not in str(caught.value).replace(str(access.project), "")


def test_a_version_that_holds_an_exported_program(
    access: Access, store: Storage, client: Any, model: str, tmp_path: Path
) -> None:
    """As MLflow's flavour for torch logs it."""
    import mlflow

    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.randn(5, 3)
    mlflow.pytorch.save_model(
        network,
        tmp_path / "logged",
        serialization_format="pt2",
        input_example=torch.randn(2, 3).numpy(),
        pip_requirements=["torch"],
    )
    files = {file.relative_to(tmp_path / "logged").as_posix(): file for file in (tmp_path / "logged").rglob("*.*")}
    store.put_files(f"{model}/run", {name: file.read_bytes() for name, file in files.items() if file.is_file()})
    register(client, model, store.url(f"{model}/run"), "champion")
    digest = resolve_program("models.a.program", f"models:/{model}@champion", access)
    assert torch.equal(exported(str(access.contents.path(digest)))(x), network(x))
    advice = rf"an exported program, data/model\.pt2\. Write program: (models:/{model}/1#data/model\.pt2) in place of"
    with pytest.raises(SourceError, match=advice) as caught:
        resolve_weights(NAME, f"models:/{model}@champion", access)
    advised = str(caught.value).partition("program: ")[2].partition(" ")[0]
    assert resolve_program("models.a.program", advised, access) == digest


def test_a_version_without_a_program(access: Access, store: Storage, client: Any, model: str) -> None:
    store.put_files(f"{model}/run", {"MLmodel": b"", "data/model.pth": b"pickled"})
    register(client, model, store.url(f"{model}/run"))
    with pytest.raises(SourceError, match=r"should have one \.pt2 file, an exported program \(.*serialization_format"):
        resolve_program("models.a.program", f"models:/{model}/1", access)


def test_data_in_folders_of_a_folder(access: Access, store: Storage) -> None:
    """As `save_to_disk` of Hugging Face datasets writes them."""
    files = {f"{split}/data-00000-of-00001.arrow": split.encode() for split in ("train", "validation")}
    files |= {f"{split}/state.json": b"{}" for split in ("train", "validation")} | {"test.parquet": b"3"}
    for name, content in {**files, "train/dataset_info.json": b"", "dataset_dict.json": b""}.items():
        (access.project / "saved" / name).parent.mkdir(parents=True, exist_ok=True)
        (access.project / "saved" / name).write_bytes(content)
        store.put(f"sets/saved/{name}", content)
    expected = {name: digest_of(content) for name, content in files.items()}
    assert resolve_data("models.a.data", "saved", access) == expected
    assert resolve_data("models.a.data", f"{store.url('sets/saved')}/", access) == expected
    (access.project / "saved" / "train.parquet").write_bytes(b"")
    with pytest.raises(SourceError, match=r"has train\.parquet and train/ for train"):
        resolve_data("models.a.data", "saved", access)


def test_data_in_a_folder(access: Access, store: Storage) -> None:
    files = {"train.parquet": b"1", "validation.arrow": b"2", "test.parquet": b"3"}
    (access.project / "data").mkdir()
    for name, content in {**files, "README.md": b""}.items():
        (access.project / "data" / name).write_bytes(content)
        store.put(f"sets/a/{name}", content)
    expected = {name: digest_of(content) for name, content in files.items()}
    assert resolve_data("models.a.data", "data", access) == expected
    assert resolve_data("models.a.data", f"{store.url('sets/a')}/", access) == expected


def test_data_file_by_file(access: Access, store: Storage) -> None:
    store.put("sets/unlabelled.arrow", b"1")
    for name in ("v.parquet", "t.parquet"):
        (access.project / name).write_bytes(name.encode())
    spec = {"calibration": store.url("sets/unlabelled.arrow"), "validation": "v.parquet", "test": "t.parquet"}
    assert resolve_data("models.a.data", spec, access) == {
        "train.arrow": digest_of(b"1"),
        "validation.parquet": digest_of(b"v.parquet"),
        "test.parquet": digest_of(b"t.parquet"),
    }


FACTORY = """
import numpy
def rows(split, count):
    print("made", split)
    open("made", "a").write(split)
    return numpy.ones((count, 2), "float32"), numpy.arange(count)
"""


def test_data_of_a_factory_are_made_once(access: Access) -> None:
    (access.project / "sets.py").write_text(FACTORY)
    spec: dict[str, Any] = {"factory": "sets:rows", "arguments": {"count": 3}}
    files = resolve_data("models.a.data", spec, access)
    assert sorted(files) == ["test.arrow", "train.arrow", "validation.arrow"]
    assert resolve_data("models.a.data", spec, access) == files
    assert (access.project / "made").read_text() == "trainvalidationtest"
    spec = {"factory": "sets:rows", "arguments": {"count": "three"}}
    with pytest.raises(SourceError, match=r"models\.a\.data: sets:rows: sets:rows, split train: it failed with"):
        resolve_data("models.a.data", spec, access)


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("networks/none.safetensors", r"networks/none\.safetensors: there is no such file in .*Put it there"),
        (".", "is a folder"),
        ("https://example.org/a", r"is no location\. Give"),
        ("s3://mtz-tests", "names no object"),
        ("s3://mtz-tests/none", "no such object, or no such bucket"),
        ("s3://no-such-bucket/none", "no such object, or no such bucket"),
        ("models:/a", "names no version"),
        ("models:/nobody/1", r"nobody.*not found"),
        ("models:/nobody@champion", r"nobody.*not found"),
    ],
)
def test_what_is_not_there(access: Access, location: str, said: str) -> None:
    with pytest.raises(SourceError, match=said) as caught:
        resolve_file(NAME, location, access)
    assert str(caught.value).startswith(f"{NAME}: {location}")


def test_an_alias_that_nobody_has_given(access: Access, client: Any, model: str) -> None:
    with pytest.raises(SourceError, match=r"alias.*champion.*not found"):
        resolve_file(NAME, f"models:/{model}@champion", access)


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("nothing", "there is no such folder"),
        ("data", r"has no file for validation\. Have one: validation\.parquet or validation\.arrow"),
        ("twice", "has train.parquet and train.arrow for train"),
        ({"train": "a.parquet", "test": "b.parquet"}, "names the files train, test"),
        ({"train": "a.parquet", "calibration": "c", "test": "b.parquet"}, "names the files"),
        (
            {"train": "a.csv", "validation": "a", "test": "b"},
            r"a\.csv, for train, should end with \.parquet or \.arrow",
        ),
        ({"factory": "no_such_module:a"}, "there is no module no_such_module"),
        ({"factory": "a:b", "argument": {}}, r"'argument' is unknown beside a factory"),
    ],
)
def test_data_that_are_not_there(access: Access, spec: Any, said: str) -> None:
    for file in ("data/train.parquet", "twice/train.parquet", "twice/train.arrow"):
        (access.project / file).parent.mkdir(exist_ok=True)
        (access.project / file).write_bytes(b"")
    with pytest.raises(SourceError, match=said) as caught:
        resolve_data("models.a.data", spec, access)
    assert str(caught.value).startswith("models.a.data: ")


def test_wrong_credentials(access: Access, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", access.store.credentials["AWS_ACCESS_KEY_ID"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-at-all")
    assert access.store.endpoint is not None
    stranger = s3._remote(dataclasses.replace(place, endpoint=access.store.endpoint), s3._IMPATIENT)
    with pytest.raises(SourceError, match="access is denied") as caught:
        resolve_file(NAME, "s3://mtz-tests/a", dataclasses.replace(access, store=stranger))
    assert "not-the-secret-at-all" not in str(caught.value)


def test_services_that_are_away_are_no_fault_of_the_source(
    access: Access, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "a")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "b")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
    away = dataclasses.replace(
        access,
        store=s3._remote(dataclasses.replace(place, endpoint=url), s3._IMPATIENT),
        registry=Registry(uri=url),
    )
    for location in ("s3://mtz-tests/a", "models:/a/1"):
        with pytest.raises(ServiceFault, match=f"{NAME}: {location}: "):
            resolve_file(NAME, location, away)


@pytest.mark.parametrize("times", [1, 9])
def test_an_object_that_changes_while_it_is_fetched(access: Access, store: Storage, times: int) -> None:
    store.put("moving", b"0")
    left = [times]

    def store_anew(**_: Any) -> None:
        if left[0]:
            left[0] -= 1
            store.client.put_object(Bucket=store.bucket, Key=store.key("moving"), Body=os.urandom(8))

    store.client.meta.events.register("after-call.s3.GetObject", store_anew)
    if times == 1:
        digest = resolve_file(NAME, store.url("moving"), access)
        assert access.contents.read(digest) == store.read("moving")
    else:
        with pytest.raises(SourceError, match="changes while it is read"):
            resolve_file(NAME, store.url("moving"), access)
    store.client.meta.events.unregister("after-call.s3.GetObject", store_anew)


def test_no_secret_is_kept(access: Access, tmp_path: Path) -> None:
    secret = access.store.credentials["AWS_SECRET_ACCESS_KEY"].encode()
    access.store.put("a", b"1")
    resolve_file(NAME, access.store.url("a"), access)
    kept = [file.read_bytes() for file in (tmp_path / "home").rglob("*") if file.is_file()]
    assert kept
    assert not any(secret in content for content in kept)
