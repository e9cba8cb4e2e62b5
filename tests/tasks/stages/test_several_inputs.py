"""Networks with several inputs go through the whole pipeline: a column for each, tokens and masks in, classes out."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

import mtz_core
from mtz_core.batches import NamedTensors
from tasks.__main__ import main
from tasks.data.examples import read_images, read_labelled
from tasks.faults import EXIT_REFUSED
from tests.support.several import TOKENS, HeldEncoder, MaskedEncoder, masked
from tests.support.stages import SIZES, refused

STAGES: list[tuple[str, ...]] = [("collect", "a"), ("collect", "b"), ("hessians", "a"), ("hessians", "b")]
STAGES += [("match",), ("merge",), ("retrain",), ("evaluate",)]


def write_texts(folder: Path, seed: int) -> None:
    """Write all splits, with the text itself, which no network reads."""
    folder.mkdir(parents=True)
    for split, count in SIZES.items():
        columns = {name: pa.array(own.tolist()) for name, own in masked(count, seed, torch.bool).items()}
        labels = torch.randint(0, 3, (count,), generator=torch.Generator().manual_seed(seed)).numpy()
        table = pa.table({"text": ["some words"] * count, **columns, "number": range(count), "label": labels})
        pq.write_table(table, folder / f"{split}.parquet", row_group_size=16)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two encoders with masks, one of which holds its logits in a dict."""
    root = tmp_path_factory.mktemp("template")
    (root / "networks").mkdir()
    models = {}
    for seed, (name, make) in enumerate({"a": MaskedEncoder, "b": HeldEncoder}.items()):
        write_texts(root / "data" / name, seed)
        torch.manual_seed(seed)
        save_file(make().state_dict(), root / "networks" / f"{name}.safetensors")
        models[name] = {
            "network": f"tests.support.several:{make.__name__}",
            "weights": f"networks/{name}.safetensors",
            "data": f"data/{name}",
        }
    params = {
        "group": "masked",
        "models": models,
        "collect": {"images": 50},
        "match": {"share": 0.5},
        "retrain": {"iterations": 4, "validate_every": 2, "batch_size": 16},
        "register": {"name": "masked"},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params))
    return root


def test_tokens_and_masks_go_through_all_stages(project: Path) -> None:
    for stage in STAGES:
        assert main(list(stage)) == 0
    metrics = json.loads(Path("metrics.json").read_text())
    assert all(metrics["tasks"][task]["examples"] == SIZES["test"] for task in "ab")
    inputs, labels = read_labelled(project / "data" / "b", "test")
    assert isinstance(inputs, NamedTensors)
    assert {name: own.dtype for name, own in inputs.tensors.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.bool,
    }
    zipped = mtz_core.load("retrained")
    logits = zipped(inputs.tensors, task="b")["logits"]
    assert labels is not None
    wrong = 100 * float((logits.argmax(dim=1) != labels).double().mean())
    assert metrics["tasks"]["b"]["error_retrained"] == pytest.approx(wrong)


def test_a_sample_has_the_same_rows_of_every_input(project: Path) -> None:
    sample = read_images(project / "data" / "a", "train", count=9, seed=3)
    whole = read_images(project / "data" / "a", "train")
    rows = [
        next(i for i, row in enumerate(whole.tensors["input_ids"]) if torch.equal(row, own))
        for own in sample.tensors["input_ids"]
    ]
    assert torch.equal(sample.tensors["attention_mask"], whole.tensors["attention_mask"][rows])


def test_a_word_that_the_network_does_not_know(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    columns = masked(20)
    columns["input_ids"][3, 2] = TOKENS
    table = pa.table({name: pa.array(own.tolist()) for name, own in columns.items()})
    pq.write_table(table, project / "data" / "a" / "validation.parquet")
    message = refused(capsys, "collect", "a")
    assert f"validation holds token {TOKENS} of input_ids, but the network knows 0 to {TOKENS - 1}" in message


def test_columns_have_the_names_of_the_inputs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = project / "data" / "a" / "train.parquet"
    tokens = pa.array(masked(20)["input_ids"].tolist())
    pq.write_table(pa.table({"input": tokens}), train)
    message = refused(capsys, "collect", "a", status=EXIT_REFUSED)
    assert "models.a.network: MaskedEncoder needs several inputs (input_ids, attention_mask, weights)" in message
    assert "Name their columns after the inputs" in message
    pq.write_table(pa.table({"input_ids": tokens, "mask": tokens}), train)
    message = refused(capsys, "collect", "a")
    assert "models.a: the inputs of MaskedEncoder: missing a required argument: 'attention_mask'" in message
