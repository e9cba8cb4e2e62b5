"""Networks written down in a line, and how a traced one is compared with its module."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mtz_core.network.graph import Network, run
from mtz_core.network.tracing import evaluation_mode


class Written(nn.Module):
    """A network of two layers whose forward pass is given; further parts are submodules, parameters or buffers."""

    def __init__(self, run: Callable[[Any, Tensor], object], **parts: Any) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)
        self.run = run

    def forward(self, x: Tensor) -> object:
        return self.run(self, x)


class Apply(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def assert_runs_as(module: nn.Module, network: Network, shape: tuple[int, ...], scale: float = 1.0) -> None:
    """The traced network computes what the module does in evaluation mode, for batches of other sizes too."""
    for count in (1, 2, 5):
        x = scale * torch.randn(count, *shape, dtype=network.input_dtype)
        with evaluation_mode(module):
            expected = module(x.clone())
        torch.testing.assert_close(run(network.graph, network.state, x), expected)
