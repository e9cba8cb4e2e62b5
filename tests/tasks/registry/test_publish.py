"""Tests of the door to MLflow, with a real registry and a real S3: what is registered, once, and what a kill leaves."""

import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mtz_core
from tasks.registry import mlflow_client, publish
from tasks.registry.mlflow_client import TrackingError
from tasks.registry.release import Release
from tasks.storage.s3 import Storage
from tests.support.services import Place, Registry
from tests.support.several import HeldEncoder, MaskedEncoder, masked, numbers, two_heads
from tests.support.stages import TokenClassifier

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def release(zipped: Path, request: pytest.FixtureRequest) -> Release:
    """A release under a model name of this test's own."""
    return Release(
        group="group",
        model=request.node.name,
        content_digest="c" * 64,
        network=zipped,
        sources={"a": "1" * 64, "b": "2" * 64},
        data={"a": "3" * 64, "b": "4" * 64},
        data_paths={"a": "data/a", "b": "data/b"},
        tags={"mtz.source.a": "1" * 64, "mtz.params": "5" * 64},
        parameters={"retrain.iterations": 20, "match.balance": None},
        metrics={"a/error_original": 1.5, "stored/parameters": 10},
        layers=[{"layer": "1", "kind": "Linear", "shared": 12, "cost": 0.25}],
        learning_curve=[{"step": 0, "a/validation_loss": 2.0}, {"step": 10, "a/validation_loss": 1.0}],
        files={"plots/layers.csv": b"layer,shared\n", "dvc.lock": b"stages: {}\n"},
    )


def versions(client: Any, model: str) -> list[int]:
    return [int(version.version) for version in client.search_model_versions(f"name = '{model}'")]


def statuses(client: Any, registry: Registry, release: Release) -> list[str]:
    experiments = [e.experiment_id for e in client.search_experiments() if e.name.startswith(registry.experiment)]
    runs = client.search_runs(experiments, f"tags.`mtz.group` = '{release.group}'")
    return sorted(run.info.status for run in runs)


def test_a_version_says_where_it_comes_from(
    registry: Registry, home: Path, store: Storage, release: Release, client: Any
) -> None:
    number = publish.register_release(registry, home, store, release)
    version = client.get_model_version(release.model, str(number))
    assert version.tags == {
        **release.tags,
        "mtz.content_digest": release.content_digest,
        "mtz.release": store.url("releases", release.model, release.content_digest),
    }
    run = client.get_run(version.run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "group"
    assert run.data.params == {"retrain.iterations": "20", "match.balance": "None"}
    assert run.data.metrics["a/error_original"] == 1.5
    assert run.data.metrics["layers/1/shared"] == 12
    curve = client.get_metric_history(version.run_id, "retrain/a/validation_loss")
    assert [(point.step, point.value) for point in curve] == [(0, 2.0), (10, 1.0)]
    inputs = {entry.tags[0].value: entry.dataset for entry in run.inputs.dataset_inputs}
    assert {task: entry.digest for task, entry in inputs.items()} == {"a": "3" * 32, "b": "4" * 32}
    artifacts = store.names(run.info.artifact_uri.removeprefix(store.url() + "/"))
    assert artifacts == ["dvc.lock", "layers.json", "plots/layers.csv"]


def test_outputs_and_layers_may_have_any_name(
    registry: Registry, home: Path, store: Storage, release: Release, client: Any
) -> None:
    named = dataclasses.replace(
        release,
        parameters={"models.a.metric.p(x)": "error", "models.a.metric.ä b": "error"},
        metrics={"a.p(x)/examples": 1.0, "a.p{x}/examples": 2.0, "a.b//c/examples": 3.0, "a.ä b/examples": 4.0},
        layers=[{"layer": "conv+norm", "kind": "Linear", "shared": 12, "cost": 0.25}],
    )
    number = publish.register_release(registry, home, store, named)
    run = client.get_run(client.get_model_version(release.model, str(number)).run_id)
    assert run.data.params == {"models.a.metric.p_28_x_29_": "error", "models.a.metric.ä b": "error"}
    assert (
        run.data.metrics.items()
        >= {
            "a.p_28_x_29_/examples": 1.0,
            "a.p_7b_x_7d_/examples": 2.0,
            "a.b/_2f_c/examples": 3.0,
            "a.ä b/examples": 4.0,
            "layers/conv_2b_norm/shared": 12.0,
        }.items()
    )


def test_a_network_of_texts_is_served_tokens(
    registry: Registry, home: Path, store: Storage, release: Release, client: Any, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    networks = {task: TokenClassifier() for task in "ab"}
    tokens = torch.randint(0, 40, (30, 6))
    mtz_core.zip_networks(networks, dict.fromkeys("ab", tokens), mtz_core.ZipConfig(share=0.5)).save(tmp_path / "texts")
    number = publish.register_release(registry, home, store, dataclasses.replace(release, network=tmp_path / "texts"))
    source = client.get_model_version_download_uri(release.model, str(number))
    model = client.get_logged_model(source.removeprefix("models:/")) if source.startswith("models:/") else None
    place = (model.artifact_location if model else source).removeprefix(store.url() + "/")
    assert "int64" in store.read(f"{place}/MLmodel").decode()


def test_a_network_of_several_inputs_is_served_them_by_name(
    registry: Registry, home: Path, store: Storage, release: Release, client: Any, tmp_path: Path
) -> None:
    """The stored model is loaded and compared before it is registered."""
    networks = {"a": MaskedEncoder(), "b": HeldEncoder()}
    whole = mtz_core.zip_networks(networks, dict.fromkeys("ab", masked(30)), mtz_core.ZipConfig(share=0.5))
    whole.save(tmp_path / "masked")
    number = publish.register_release(registry, home, store, dataclasses.replace(release, network=tmp_path / "masked"))
    source = client.get_model_version_download_uri(release.model, str(number))
    model = client.get_logged_model(source.removeprefix("models:/")) if source.startswith("models:/") else None
    place = (model.artifact_location if model else source).removeprefix(store.url() + "/")
    described = store.read(f"{place}/MLmodel").decode()
    assert "input_ids" in described
    assert "attention_mask" in described


def test_a_network_of_several_outputs_gives_them_by_name(
    registry: Registry, home: Path, store: Storage, release: Release, client: Any, tmp_path: Path
) -> None:
    networks = {task: two_heads(seed) for seed, task in enumerate("ab")}
    whole = mtz_core.zip_networks(networks, dict.fromkeys("ab", numbers(30)), mtz_core.ZipConfig(share=0.5))
    whole.save(tmp_path / "heads")
    number = publish.register_release(registry, home, store, dataclasses.replace(release, network=tmp_path / "heads"))
    source = client.get_model_version_download_uri(release.model, str(number))
    model = client.get_logged_model(source.removeprefix("models:/")) if source.startswith("models:/") else None
    place = (model.artifact_location if model else source).removeprefix(store.url() + "/")
    described = store.read(f"{place}/MLmodel").decode()
    assert "logits" in described
    assert "found.0" in described


@pytest.mark.long
def test_the_registered_model_gives_the_logits_of_the_file(
    registry: Registry, home: Path, store: Storage, release: Release
) -> None:
    number = publish.register_release(registry, home, store, release)
    network = mtz_core.load(release.network)
    x = np.random.default_rng(1).random((7, 1, 4, 4), dtype=np.float32)
    script = (
        "import sys, numpy, mlflow\n"
        "model = mlflow.pyfunc.load_model(sys.argv[1])\n"
        "x = numpy.load(sys.argv[2])\n"
        "for task in ('a', 'b'): numpy.save(f'{task}.npy', model.predict(x, params={'task': task}))\n"
        "print(model.metadata.signature.params, model.metadata.signature.inputs, model.input_example is not None)\n"
    )
    folder = home.parent / "elsewhere"
    folder.mkdir()
    np.save(folder / "x.npy", x)
    strict = {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    where = {"MLFLOW_TRACKING_URI": mlflow_client.tracking_uri(registry, home)}
    variables = {**os.environ, **store.environment(), **strict, **where}
    command = [
        sys.executable,
        "-W",
        "error::UserWarning:tasks",
        "-c",
        script,
        f"models:/{release.model}/{number}",
        "x.npy",
    ]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Type hint" not in done.stderr
    assert "'task': string (default: a)" in done.stdout
    assert "(-1, 1, 4, 4)" in done.stdout
    assert done.stdout.strip().endswith("True")
    for task in ("a", "b"):
        with torch.inference_mode():
            expected = network(torch.from_numpy(x), task=task).numpy()
        assert np.array_equal(np.load(folder / f"{task}.npy"), expected)


def test_the_model_is_stored_without_pickle_and_bytecode(
    registry: Registry, home: Path, store: Storage, release: Release
) -> None:
    publish.register_release(registry, home, store, release)
    files = store.names("mlflow/models")
    suffixes = {Path(file).suffix for file in files}
    assert suffixes <= {"", ".json", ".yaml", ".txt", ".py", ".typed", ".safetensors"}
    assert not any("__pycache__" in file for file in files)
    (requirements,) = [file for file in files if file.endswith("requirements.txt")]
    lines = store.client.get_object(Bucket=store.bucket, Key=store.key("mlflow/models", requirements))["Body"].read()
    assert all("==" in line and "+" not in line for line in lines.decode().splitlines())


def test_the_same_content_is_registered_once(
    registry: Registry, home: Path, store: Storage, release: Release, client: Any
) -> None:
    assert mlflow_client.find_version(registry, home, release.model, release.content_digest) is None
    first = publish.register_release(registry, home, store, release)
    assert publish.register_release(registry, home, store, release) == first
    assert mlflow_client.find_version(registry, home, release.model, release.content_digest, store) == first
    other = dataclasses.replace(release, content_digest="d" * 64)
    assert publish.register_release(registry, home, store, other) == first + 1
    assert versions(client, release.model) == [first + 1, first]
    assert mlflow_client.find_versions(registry, home, store) == {
        (release.model, "c" * 64): first,
        (release.model, "d" * 64): first + 1,
    }


def test_a_version_whose_files_are_lost_is_registered_anew(
    registry: Registry, home: Path, store: Storage, release: Release
) -> None:
    first = publish.register_release(registry, home, store, release)
    for name in store.names("mlflow/models"):
        store.client.delete_object(Bucket=store.bucket, Key=store.key("mlflow/models", name))
    assert mlflow_client.find_version(registry, home, release.model, release.content_digest, store) is None
    assert mlflow_client.find_versions(registry, home, store) == {}
    assert publish.register_release(registry, home, store, release) == first + 1
    assert mlflow_client.find_versions(registry, home, store) == {(release.model, release.content_digest): first + 1}


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from mlflow import MlflowClient
from tasks.registry import publish
from tasks.storage import s3

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if sys.argv[1] == "before":
    publish._check_served = die
else:
    create = MlflowClient.create_model_version
    MlflowClient.create_model_version = lambda *a, **k: die(create(*a, **k))
place, registry, home, release = pickle.loads(Path(sys.argv[2]).read_bytes())
with s3.connect(place, home) as store:
    publish.register_release(registry, home, store, release)
"""


@pytest.mark.long
@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_killed_registration_leaves_one_version_in_the_end(
    moment: str, registry: Registry, home: Path, store: Storage, place: Place, release: Release, client: Any
) -> None:
    """Killed before, or just after, the version appears."""
    release = dataclasses.replace(release, model=f"killed-{moment}", group=f"killed-{moment}")
    arguments = home.parent / f"killed-{moment}"
    arguments.write_bytes(pickle.dumps((place, registry, home, release)))
    done = subprocess.run([sys.executable, "-c", KILLED, moment, str(arguments)], cwd=ROOT, check=False)
    assert done.returncode == -9
    assert statuses(client, registry, release) == ["RUNNING"]
    found = mlflow_client.find_version(registry, home, release.model, release.content_digest, store)
    assert found == (None if moment == "before" else 1)
    assert publish.register_release(registry, home, store, release) == 1
    assert versions(client, release.model) == [1]
    assert statuses(client, registry, release) == ["FINISHED", "KILLED"][: 2 if moment == "before" else 1]


def test_each_storage_has_its_experiment(
    registry: Registry, home: Path, store: Storage, client: Any, request: pytest.FixtureRequest
) -> None:
    settings = dataclasses.replace(registry, experiment=request.node.name)
    first = publish._experiment(client, settings, store)
    assert publish._experiment(client, settings, store) == first
    moved = dataclasses.replace(store, prefix="elsewhere")
    second = publish._experiment(client, settings, moved)
    assert second != first
    assert client.get_experiment(second).artifact_location == moved.url("mlflow")
    client.delete_experiment(first)
    with pytest.raises(TrackingError, match="was deleted"):
        publish._experiment(client, settings, store)
