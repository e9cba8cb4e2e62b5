"""Teach zipping an operator that it does not know. Takes some seconds on one core.

Run it from the project's folder: `python examples/register_an_operation.py`

Before any work, zipping finds out which neurons belong together. For that it needs a rule for every operator of a
network. An operator without a rule is refused. One line adds a rule, and a check refuses a rule that is wrong.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import mtz_core as mtz


class Perceptron(nn.Module):
    """Two layers, and between them an operator of your choice."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(20, 32)
        self.between = between
        self.second = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return one output for each of five classes."""
        outputs: Tensor = self.second(self.between(self.first(x)))
        return outputs


def running_sum(x: Tensor) -> Tensor:
    """Return the sum of each neuron and all before it: what comes out depends on the order of the neurons."""
    return x.cumsum(dim=1)


def try_to_trace(network: nn.Module, examples: Tensor) -> None:
    """Print why a network is refused."""
    try:
        mtz.trace(network, examples)
    except mtz.MtzError as refusal:
        print(f"  refused: {refusal}\n")


def main() -> None:
    """See a refusal, the rule that ends it, and a wrong rule that is caught."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    examples = torch.randn(500, 20)
    networks: dict[str, nn.Module] = {"one": Perceptron(torch.asinh), "other": Perceptron(torch.asinh)}

    print("The inverse hyperbolic sine has no rule yet.")
    try_to_trace(networks["one"], examples)

    print("It acts on every element alone, as a ReLU does. So its rule is `pointwise`.")
    mtz.register_operation("asinh", mtz.Operation(mtz.pointwise, keeps=True))
    zipped = mtz.zip_networks(networks, calibration=dict.fromkeys(networks, examples))
    print(zipped.report)

    print("\nA running sum does not act on every element alone. A rule that says so is wrong.")
    mtz.register_operation("cumsum", mtz.Operation(mtz.pointwise))
    try_to_trace(Perceptron(running_sum), examples)


if __name__ == "__main__":
    main()
