"""Texts go through the whole pipeline: tokens in, classes out."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

import mtz_core
from tasks.__main__ import main
from tasks.data.examples import read_images
from tests.support.stages import SIZES, TokenClassifier, refused

WORDS, LENGTH = 40, 7
STAGES: list[tuple[str, ...]] = [("collect", "a"), ("collect", "b"), ("hessians", "a"), ("hessians", "b")]
STAGES += [("match",), ("merge",), ("retrain",), ("evaluate",)]


def write_texts(folder: Path, seed: int) -> None:
    """Write all splits as `save_to_disk` of Hugging Face datasets does."""
    draw = np.random.default_rng(seed)
    for split, count in SIZES.items():
        tokens = draw.integers(0, WORDS, (count, LENGTH))
        table = pa.table({"input": pa.array(tokens.tolist()), "label": draw.integers(0, 3, count)})
        place = folder / split
        place.mkdir(parents=True)
        with pa.ipc.new_stream(place / "data-00000-of-00001.arrow", table.schema) as writer:
            writer.write_table(table, max_chunksize=16)
        (place / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))


def write_shards(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write weights as `save_pretrained` of transformers does."""
    folder.mkdir()
    places = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(state)}
    for file in set(places.values()):
        save_file({name: tensor for name, tensor in state.items() if places[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two classifiers of texts; the weights of one are in two files, those of the other are halves."""
    root = tmp_path_factory.mktemp("template")
    (root / "networks").mkdir()
    for seed, name in enumerate("ab"):
        write_texts(root / "data" / name, seed)
        torch.manual_seed(seed)
        state = TokenClassifier(WORDS).state_dict()
        if name == "a":
            write_shards({f"module.{n}": tensor for n, tensor in state.items()}, root / "networks" / "a")
        else:
            save_file({n: tensor.half() for n, tensor in state.items()}, root / "networks" / "b.safetensors")
    model = {"network": "tests.support.stages:TokenClassifier", "arguments": {"words": WORDS}}
    params = {
        "group": "texts",
        "models": {
            "a": model | {"weights": "networks/a", "data": "data/a"},
            "b": model | {"weights": "networks/b.safetensors", "data": "data/b"},
        },
        "collect": {"images": 50},
        "match": {"share": 0.5},
        "retrain": {"iterations": 4, "validate_every": 2, "batch_size": 16},
        "register": {"name": "texts"},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def test_texts_go_through_all_stages(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for stage in STAGES:
        assert main(list(stage)) == 0
    said = capsys.readouterr().out
    assert "networks/a: all names begin with 'module.', which is left out" in said
    assert "networks/b.safetensors: torch.float16 becomes torch.float32, exactly" in said
    metrics = json.loads(Path("metrics.json").read_text())
    assert metrics["stored"]["original_bytes"] == sum(f.stat().st_size for f in Path("networks").rglob("*.safetensors"))
    assert all(metrics["tasks"][task]["examples"] == SIZES["test"] for task in "ab")
    tokens = read_images(project / "data" / "a", "test")
    assert tokens.dtype == torch.int64
    assert mtz_core.load("retrained")(tokens, task="a").shape == (SIZES["test"], 3)


@pytest.mark.parametrize("split", SIZES)
@pytest.mark.parametrize("token", [WORDS, -1])
def test_a_word_that_the_network_does_not_know(
    project: Path, capsys: pytest.CaptureFixture[str], split: str, token: int
) -> None:
    tokens = read_images(project / "data" / "a", split)
    tokens[-1, -1] = token
    shutil.rmtree(project / "data" / "a" / split)
    table = pa.table({"input": pa.array(tokens.tolist()), "label": np.zeros(len(tokens), np.int64)})
    pq.write_table(table, project / "data" / "a" / f"{split}.parquet")
    message = refused(capsys, "collect", "a")
    assert message == (
        f"error: models.a.data: {split} holds token {token}, but the network knows 0 to {WORDS - 1}. Use the "
        "vocabulary that it was trained with."
    )
    assert not Path("activations").exists()
