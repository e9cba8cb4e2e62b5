"""Evaluation reads the test split batch by batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import save_file

import mtz_core
from tests.support.stages import wide

INPUTS, ROWS = 1000, 20_000
ROOT = Path(__file__).parents[3]

EVALUATE = """
from tasks.__main__ import main
from tasks.progress import peak_memory

assert main(["evaluate"]) == 0
print(peak_memory() // 1024)
"""


def write(file: Path, rows: int) -> None:
    inputs = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((rows, INPUTS), np.float32))
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"input": inputs, "label": np.zeros(rows, np.int64)}), file)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of two networks, zipped, that is to be evaluated."""
    root = tmp_path_factory.mktemp("template")
    (root / "networks").mkdir()
    networks = {}
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        networks[name] = wide(INPUTS)
        save_file(networks[name].state_dict(), root / "networks" / f"{name}.safetensors")
        write(root / "data" / name / "test.parquet", rows=600)
    zipped = mtz_core.zip_networks(
        networks, dict.fromkeys("ab", torch.randn(20, INPUTS)), mtz_core.ZipConfig(share=0.0)
    )
    for folder in ("merged", "retrained"):
        zipped.save(root / folder)
    model = {"network": "tests.support.stages:wide", "arguments": {"inputs": INPUTS}}
    models = {name: model | {"weights": f"networks/{name}.safetensors", "data": f"data/{name}"} for name in "ab"}
    (root / "params.yaml").write_text(yaml.safe_dump({"group": "g", "models": models, "register": {"name": "g"}}))
    return root


@pytest.mark.long
def test_the_test_split_may_be_larger_than_memory(project: Path) -> None:
    """80 MB more of test data take less than a quarter of that in memory."""

    def peak() -> int:
        variables = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", EVALUATE]
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
        return int(done.stdout.split()[-1])

    before = peak()
    write(project / "data" / "b" / "test.parquet", ROWS)
    assert peak() - before < 20_000
    assert json.loads(Path("metrics.json").read_text())["tasks"]["b"]["examples"] == ROWS
