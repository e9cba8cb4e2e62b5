"""The table of small networks that every law is tried on. A new kind of layer is one more row."""

import copy
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.merging.matching import descent, match
from mtz_core.merging.pairing import GroupMatch
from mtz_core.merging.walk import finish, merge
from mtz_core.network.graph import Network
from mtz_core.network.tracing import trace
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities, sensitivities
from mtz_core.statistics.traced import Traced

TASKS = ("digits", "fashion")


@dataclass(frozen=True)
class Case:
    """A topology: `make(widths, classes)` builds a network of it. The second network of a pair may be another size."""

    name: str
    make: Callable[[Sequence[int], int], nn.Module]
    input_shape: tuple[int, ...]
    widths: tuple[int, ...]
    other_widths: tuple[int, ...] = ()
    classes: int = 3
    other_classes: int = 0
    dtype: torch.dtype = torch.float32

    def network(self, seed: int, widths: Sequence[int] = (), classes: int = 0) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return self.make(widths or self.widths, classes or self.classes).to(self.dtype).eval()

    def pair(self) -> dict[str, nn.Module]:
        first, second = TASKS
        return {
            first: self.network(1),
            second: self.network(2, self.other_widths or self.widths, self.other_classes or self.classes),
        }

    def examples(self, count: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(count, *self.input_shape, generator=generator, dtype=self.dtype)

    def calibration(self, count: int = 60) -> dict[str, Tensor]:
        return {task: self.examples(count, seed=10 + i) for i, task in enumerate(TASKS)}


@cache
def traced_pair(case: Case) -> Mapping[str, Network]:
    """The case's pair, traced once for all tests: tracing takes most of the time of a small network."""
    return {task: trace(network, case.examples(2)) for task, network in case.pair().items()}


def joined(
    networks: Mapping[str, Network],
    moments: Mapping[str, Mapping[str, Moments]] | None = None,
    sensitivity: Mapping[str, Sensitivities] | None = None,
    batches: Mapping[str, Sequence[Tensor]] | None = None,
) -> dict[str, Traced]:
    """Networks and what is known of them, task by task."""
    return {
        task: Traced(
            network,
            moments[task] if moments else {},
            sensitivity[task] if sensitivity else None,
            batches[task] if batches else (),
        )
        for task, network in networks.items()
    }


def sensitivities_of_traced(
    networks: Mapping[str, Network], calibration: Mapping[str, Tensor], seed: int = 0
) -> dict[str, Sensitivities]:
    """The sensitivities of networks that are traced already."""
    return {task: sensitivities(n, as_batches(calibration[task], task), seed) for task, n in networks.items()}


def measured(networks: Mapping[str, Network], calibration: Mapping[str, Any], config: ZipConfig) -> dict[str, Traced]:
    """Networks that are traced already, with all statistics."""
    return {t: Traced.measured(network, as_batches(calibration[t], t), config) for t, network in networks.items()}


def match_traced(
    networks: Mapping[str, Network], calibration: Mapping[str, Any], config: ZipConfig
) -> list[GroupMatch]:
    """All steps of the matching of networks that are traced already."""
    return list(match(measured(networks, calibration, config), config))


def zip_traced(
    networks: Mapping[str, Network],
    calibration: Mapping[str, Any],
    config: ZipConfig,
    bits: Mapping[str, int] | None = None,
) -> ZippedNetwork:
    """What `zip_networks` makes of networks that are traced already; some rows may be rounded besides."""
    matches = match_traced(networks, calibration, config)
    pairings = {found.group: found.pairing for found in matches}
    return finish(merge(measured(networks, calibration, config), pairings, config, descent(matches), bits=bits))


def mlp(
    widths: Sequence[int],
    classes: int,
    inputs: int = 12,
    activation: Callable[[], nn.Module] = nn.ReLU,
    bias: bool = True,
) -> nn.Module:
    sizes = [inputs, *widths, classes]
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        parts += [nn.Linear(before, after, bias=bias), activation()]
    return nn.Sequential(*parts[:-1])


def lenet5(widths: Sequence[int], classes: int) -> nn.Module:
    first, second, third = widths
    return nn.Sequential(
        nn.Conv2d(1, first, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Conv2d(first, second, 5),
        nn.MaxPool2d(2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(second * 4, third),
        nn.ReLU(),
        nn.Linear(third, classes),
    )


def strided(widths: Sequence[int], classes: int) -> nn.Module:
    first, second, third = widths
    return nn.Sequential(
        nn.Conv2d(2, first, (3, 2), stride=(2, 1), padding=(1, 2)),
        nn.ReLU(),
        nn.Conv2d(first, second, 3, dilation=(1, 2), padding="same"),
        nn.Tanh(),
        nn.Conv2d(second, third, (2, 3), stride=2, dilation=(2, 1), padding="valid"),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(third * 10, classes),
    )


class Functional(nn.Module):
    """Written with functions and methods, dropout as a function."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        first, second = widths
        self.conv = nn.Conv2d(1, first, 3)
        self.hidden = nn.Linear(first * 9, second)
        self.last = nn.Linear(second, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv(x)), 2)
        x = x.view(x.size(0), -1)
        x = F.dropout(self.hidden(x).relu_(), 0.3, self.training)
        return F.log_softmax(self.last(x), dim=1)


class Nested(nn.Module):
    """Layers deep inside, declared in another order than they run."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        first, second = widths
        self.head = nn.ModuleDict({"out": nn.Linear(second, classes, bias=False)})
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(1, first, 3), nn.ReLU(inplace=True), nn.Dropout2d(0.2)),
            nn.Sequential(nn.AvgPool2d(2), nn.Identity(), nn.Conv2d(first, second, 2), nn.GELU(approximate="tanh")),
        )
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head["out"](torch.flatten(self.pool(self.body(x)), 1))
        return out


class Parameters(nn.Module):
    """Weights held by submodules with one layer each, whose names mean something elsewhere."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        self.x = nn.Linear(12, widths[0])
        self.keys = nn.Linear(widths[0], widths[1])
        self.weight = nn.Linear(widths[1], classes)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.weight(torch.sigmoid(self.keys(F.leaky_relu(self.x(x), 0.2))))
        return out


def dropout(widths: Sequence[int], classes: int) -> nn.Module:
    first, second = widths
    return nn.Sequential(
        nn.Dropout(0.1),
        nn.Linear(12, first),
        nn.SELU(),
        nn.AlphaDropout(0.3),
        nn.Linear(first, second),
        nn.ReLU(),
        nn.Dropout(0.5, inplace=True),
        nn.Linear(second, classes),
    )


def flattened_first(widths: Sequence[int], classes: int) -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), mlp(widths, classes, inputs=18), nn.Softmax(dim=1))


class Residual(nn.Module):
    """Two branches on one stream, normalised; three layers write the stream's neurons, four tensors pin them."""

    def __init__(self, widths: Sequence[int], classes: int) -> None:
        super().__init__()
        stream, first, second = widths
        self.stem = nn.Sequential(nn.Conv2d(1, stream, 3, padding=1), nn.BatchNorm2d(stream), nn.ReLU())
        self.branches = nn.ModuleList(
            nn.Sequential(
                *(nn.Conv2d(stream, inner, 3, padding=1, bias=False), nn.BatchNorm2d(inner), nn.ReLU()),
                *(nn.Conv2d(inner, stream, 1), nn.BatchNorm2d(stream)),
            )
            for inner in (first, second)
        )
        self.head = nn.Linear(stream, classes)
        for part in self.modules():
            if isinstance(part, nn.BatchNorm2d):
                assert part.running_mean is not None
                assert part.running_var is not None
                nn.init.normal_(part.running_mean, std=0.3)
                nn.init.uniform_(part.running_var, 0.5, 2.0)
                nn.init.normal_(part.weight, mean=1.0, std=0.3)
                nn.init.normal_(part.bias, std=0.3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in self.branches:
            x = F.relu(x + branch(x))
        out: Tensor = self.head(x.mean((2, 3)))
        return out


CASES = (
    Case("mlp", mlp, (12,), (9, 7)),
    Case("widths and classes differ", mlp, (12,), (9, 7), (6, 10), classes=3, other_classes=5),
    Case("float64", mlp, (12,), (9, 7), (8, 8), dtype=torch.float64),
    Case("no bias", partial(mlp, bias=False), (12,), (9, 7)),
    Case("no bias, float64", partial(mlp, bias=False), (12,), (9, 7), (8, 8), dtype=torch.float64),
    Case("one neuron", mlp, (12,), (1, 5), (4, 1), classes=1),
    Case("one layer", mlp, (12,), ()),
    Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), (5, 4, 12), other_classes=4),
    Case("strides, paddings, dilations", strided, (2, 9, 8), (4, 5, 3), (3, 6, 5)),
    Case("functional", Functional, (1, 8, 8), (4, 8), (6, 5)),
    Case("nested", Nested, (1, 8, 8), (4, 5), (5, 4)),
    Case("plain names", Parameters, (12,), (6, 5)),
    Case("dropout", dropout, (12,), (9, 7)),
    Case("flattened first", flattened_first, (2, 6, 6), (9, 7), (7, 9)),
)


def hidden_layers(case: Case) -> list[str]:
    """The names of the layers with weights, in the order in which they run, but the last."""
    order: list[str] = []
    network = case.network(0)
    for name, part in network.named_modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            part.register_forward_hook(lambda *_, name=name: order.append(name))
    network(case.examples(1))
    return order[:-1]


def permuted(network: nn.Module, layers: Sequence[str], seed: int) -> tuple[nn.Module, Mapping[str, Tensor]]:
    """The same function with the neurons of all layers but the last in another order, and the order of each layer.

    `layers` are all layers with weights in the order in which they run.
    """
    generator = torch.Generator().manual_seed(seed)
    changed = copy.deepcopy(network)
    orders: dict[str, Tensor] = {}
    before: Tensor | None = None
    for i, name in enumerate(layers):
        layer = changed.get_submodule(name)
        assert isinstance(layer, (nn.Linear, nn.Conv2d))
        with torch.no_grad():
            if before is not None:
                weight = layer.weight.reshape(layer.weight.shape[0], len(before), -1)
                layer.weight.copy_(weight[:, before].reshape(layer.weight.shape))
            if i < len(layers) - 1:
                before = orders[name] = torch.randperm(layer.weight.shape[0], generator=generator)
                layer.weight.copy_(layer.weight[before].clone())
                if layer.bias is not None:
                    layer.bias.copy_(layer.bias[before].clone())
    return changed, orders
