"""What the tests of the rivals have in common."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from mtz_core.merging.walk import trace_task
from mtz_core.network.graph import Network
from mtz_core.settings import ZipConfig


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="module")
def traced_once() -> Iterator[None]:
    """Equal networks, which most tests have, are traced once."""
    known: dict[object, Network] = {}

    def remember(task: str, module: nn.Module, example: Tensor, config: ZipConfig) -> Network:
        weights = tuple(tensor.numpy().tobytes() for tensor in module.state_dict().values())
        key = (str(module), weights, example.shape[1:])
        if key not in known:
            known[key] = trace_task(task, module, example, config)
        return known[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.benchmarks.rivals.assemble.trace_task", remember)
        yield
