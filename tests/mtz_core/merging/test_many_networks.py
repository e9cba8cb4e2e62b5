"""Laws of zipping three and more networks: order, widths, what is stored once, and taking one out."""

from collections.abc import Mapping
from functools import cache
from itertools import permutations
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import mtz_core
from mtz_core import ZipConfig, ZippedNetwork, zip_networks
from mtz_core.errors import InvalidConfig
from mtz_core.merging.difference import weigh_by_sensitivity
from mtz_core.network.graph import FIXED, KERNEL, Axis, Network
from mtz_core.network.tracing import trace
from mtz_core.settings import Method
from tests.support.networks import (
    Case,
    Residual,
    lenet5,
    match_traced,
    mlp,
    permuted,
    sensitivities_of_traced,
    zip_traced,
)

pytestmark = pytest.mark.slow

TASKS = ("a", "b", "c", "d", "e")
MLP = Case("mlp", mlp, (12,), (9, 7), dtype=torch.float64)
LENET5 = Case("lenet-5", lenet5, (1, 20, 20), (4, 6, 10), dtype=torch.float64)
RESIDUAL = Case("residual", Residual, (1, 7, 6), (5, 4, 6), dtype=torch.float64)
on_all_cases = pytest.mark.parametrize("case", [MLP, LENET5, RESIDUAL], ids=lambda case: case.name)
with_both_methods = pytest.mark.parametrize("method", ["paper", "refit"])


def module(case: Case, index: int, wider: int = 0) -> nn.Module:
    return case.network(index + 1, [width + wider for width in case.widths], case.classes + index % 2)


@cache
def traced(case: Case, index: int, wider: int = 0) -> Network:
    return trace(module(case, index, wider), case.examples(2))


def group(case: Case, count: int) -> dict[str, Network]:
    """Networks of one width, classes in turn 3 and 4."""
    return {TASKS[i]: traced(case, i) for i in range(count)}


def calibration(case: Case, count: int, examples: int = 25) -> dict[str, Tensor]:
    return {TASKS[i]: case.examples(examples + i, seed=20 + i) for i in range(count)}


@cache
def zipped_group(case: Case, count: int, share: float, method: Method = "refit") -> ZippedNetwork:
    return zip_traced(group(case, count), calibration(case, count), ZipConfig(method=method, share=share, patches=4))


def files(zipped: ZippedNetwork, folder: Path) -> dict[str, bytes]:
    zipped.save(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@with_both_methods
@on_all_cases
def test_the_order_in_which_networks_are_listed_makes_no_difference(case: Case, method: Method, tmp_path: Path) -> None:
    networks, data = group(case, 3), calibration(case, 3)
    config = ZipConfig(method=method, share=0.6, patches=4, balance={"a": 1.0, "b": 2.0, "c": 0.5})
    first, *others = [
        files(zip_traced({t: networks[t] for t in order}, {t: data[t] for t in order}, config), tmp_path / str(i))
        for i, order in enumerate(list(permutations("abc"))[::2])
    ]
    assert all(other == first for other in others)


def test_the_order_of_modules_makes_no_difference(tmp_path: Path) -> None:
    modules, data = {TASKS[i]: module(MLP, i) for i in range(5)}, calibration(MLP, 5)
    config = ZipConfig(share=0.6)
    first = files(zip_networks(modules, data, config), tmp_path / "first")
    shuffled = {task: modules[task] for task in "daceb"}
    assert files(zip_networks(shuffled, dict(reversed(list(data.items()))), config), tmp_path / "second") == first


@with_both_methods
@pytest.mark.parametrize(("count", "share"), [(3, 1.0), (3, 0.5), (5, 1.0), (5, 0.5)])
@on_all_cases
def test_each_value_of_several_tasks_is_stored_once(case: Case, count: int, share: float, method: Method) -> None:
    zipped, x = zipped_group(case, count, share, method), case.examples(5)
    networks = group(case, count)
    for name, members in zipped.structure.members.items():
        width = networks["a"].graph.widths[name]
        assert int((members >= 0).all(axis=1).sum()) == round(share * width)
        assert set((members >= 0).sum(axis=1).tolist()) <= {1, count}
    tensors, report = zipped.tensors(), zipped.report
    assert report.stored_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    assert len({t.data_ptr() for t in tensors.values()}) == len(tensors)
    assert report.original_parameters == sum(network.parameters for network in networks.values())
    own = sum(
        network.state[name].numel()
        for network in networks.values()
        for name in network.trainable - {n for node in network.graph.layers for n in node.state}
    )
    assert report.stored_parameters == own + sum(distinct_values(zipped, networks).values())
    assert {layer.layer: layer.parameters for layer in report.layers} == distinct_values(zipped, networks)
    for task in networks:
        assert bool(torch.isfinite(zipped(x, task)).all())


def distinct_values(zipped: ZippedNetwork, networks: Mapping[str, Network]) -> dict[str, int]:
    """By layer, how many different (row, column) there are, where equal neurons of different tasks are one."""
    found = {}
    for layer in zipped.structure.layers:
        keys = set()
        for t, (task, network) in enumerate(networks.items()):
            graph = network.graph
            rows, columns = (
                places(axes[layer.name], zipped.structure.members, t, task) for axes in (graph.rows, graph.columns)
            )
            keys |= {(row, column) for row in rows for column in [*columns, *["bias"] * (layer.bias is not None)]}
        found[layer.name] = len(keys)
    return found


def places(axis: Axis, members: Mapping[str, np.ndarray], task: int, name: str) -> list[tuple]:
    """What each position of an axis is: the how-manieth position of which neuron of which group."""
    seen: dict[tuple, int] = {}
    keys = []
    for number, neuron in zip(axis.group.tolist(), axis.neuron.tolist(), strict=True):
        key: tuple = (axis.groups[number], neuron) if number != FIXED else (name,)
        if key[0] in members:
            (unit,) = np.flatnonzero(members[key[0]][:, task] == neuron)
            key = (key[0], "zipped", int(unit))
        elif key[0] not in (":input", KERNEL):
            key = (name, *key)
        seen[key] = seen.get(key, -1) + 1
        keys.append((*key, seen[key]))
    return keys


@pytest.mark.parametrize("share", [1.0, 0.5])
@on_all_cases
def test_the_wider_two_of_three_networks_share_more_among_themselves(case: Case, share: float) -> None:
    wider = {"a": 3, "b": 0, "c": 5}
    networks = {task: traced(case, i, extra) for i, (task, extra) in enumerate(wider.items())}
    zipped = zip_traced(networks, calibration(case, 3), ZipConfig(share=share, patches=4))
    for name, members in zipped.structure.members.items():
        widths = {task: network.graph.widths[name] for task, network in networks.items()}
        assert widths["b"] < widths["a"] < widths["c"]
        owners, counts = np.unique(members >= 0, axis=0, return_counts=True)
        found = {"".join(np.array(list("abc"))[own]): int(n) for own, n in zip(owners, counts, strict=True)}
        of_all, of_two = round(share * widths["b"]), round(share * widths["a"])
        assert found.get("abc", 0) == of_all
        assert found.get("ac", 0) == of_two - of_all
        assert {"ab", "bc"}.isdisjoint(found)
    assert {layer.layer: layer.parameters for layer in zipped.report.layers} == distinct_values(zipped, networks)
    x = case.examples(5)
    before = {task: zipped(x, task) for task in networks}
    assert all(bool(torch.isfinite(output).all()) for output in before.values())
    for task in networks:
        rest = {other: network for other, network in networks.items() if other != task}
        left = zipped.without(task)
        assert all(torch.equal(left(x, other), before[other]) for other in rest)
        assert {layer.layer: layer.parameters for layer in left.report.layers} == distinct_values(left, rest)


@with_both_methods
@pytest.mark.parametrize("count", [3, 5])
@on_all_cases
def test_copies_of_one_network_keep_its_outputs_and_are_one(case: Case, count: int, method: Method) -> None:
    network, x = traced(case, 0), case.examples(6, seed=99)
    networks = {TASKS[i]: network for i in range(count)}
    zipped = zip_traced(networks, calibration(case, count), ZipConfig(method=method, patches=4))
    for task in networks:
        torch.testing.assert_close(zipped(x, task), module(case, 0)(x), rtol=0, atol=1e-9)
    *hidden, head = zipped.report.layers
    for layer in hidden:
        assert layer.parameters == layer.original_parameters["a"]
        assert layer.cost == pytest.approx(0, abs=1e-12)
    assert head.parameters == count * head.original_parameters["a"]
    matrices = {name for node in network.graph.layers for name in node.state}
    own = sum(network.state[name].numel() for name in network.trainable - matrices)
    rest = own + head.original_parameters["a"]
    assert zipped.report.stored_parameters == network.parameters + (count - 1) * rest


@with_both_methods
def test_permuted_copies_find_each_other(method: Method) -> None:
    original = MLP.network(1)
    orders: list[Mapping[str, Tensor]] = [{"0": torch.arange(9), "2": torch.arange(7)}]
    networks = {"a": trace(original, MLP.examples(2))}
    for i, task in enumerate("bcd"):
        changed, order = permuted(original, ["0", "2", "4"], seed=i)
        networks[task] = trace(changed, MLP.examples(2))
        orders.append(order)
    data = dict.fromkeys(networks, MLP.examples(60))
    for found in match_traced(networks, data, ZipConfig(method=method)):
        assert found.cost == pytest.approx(0, abs=1e-9)
        for members in found.pairing.members:
            assert len({int(orders[t][found.group][neuron]) for t, neuron in enumerate(members)}) == 1


@pytest.mark.parametrize("case", [MLP, LENET5], ids=lambda case: case.name)
def test_matching_anew_against_the_others_never_costs_more(case: Case) -> None:
    networks, data = group(case, 4), calibration(case, 4)
    once, again = (
        {
            found.group: found
            for found in match_traced(networks, data, ZipConfig(share=0.7, matching_rounds=n, patches=4))
        }
        for n in (0, 3)
    )
    first = next(iter(once))  # what later groups cost depends on the pairings before them
    assert again[first].cost <= once[first].cost + 1e-12


def test_what_one_of_three_shares_is_the_tuples_best_common_weights() -> None:
    """The predicted cost of a whole pairing of the first layer, from the calibration data alone."""
    networks, data = group(MLP, 3), calibration(MLP, 3, examples=40)
    damping = 0.01
    found, *_ = match_traced(networks, data, ZipConfig(damping=damping, share=0.6))
    terms = []
    sensitivity = sensitivities_of_traced(networks, data)
    weights = dict(
        zip(networks, weigh_by_sensitivity([1 / 3] * 3, [sensitivity[task]["0"] for task in networks]), strict=True)
    )
    for task, network in networks.items():
        matrix = network.matrix(network.graph.layers[0]).numpy()
        x = torch.cat([data[task], torch.ones(len(data[task]), 1, dtype=torch.float64)], dim=1).numpy()
        hessian = x.T @ x / len(x)
        hessian += damping * np.trace(hessian) / len(hessian) * np.eye(len(hessian))
        terms.append((matrix, weights[task] * hessian))
    expected = 0.0
    shared = found.pairing.members[: found.pairing.shared]
    assert len(shared) == round(0.6 * 9)
    for members in shared:
        rows = [matrix[neuron] for (matrix, _), neuron in zip(terms, members, strict=True)]
        pull = sum(hessian @ row for (_, hessian), row in zip(terms, rows, strict=True))
        common = np.linalg.solve(sum(hessian for _, hessian in terms), pull)
        expected += sum(0.5 * float((common - r) @ h @ (common - r)) for (_, h), r in zip(terms, rows, strict=True))
    assert found.cost == pytest.approx(expected)


# One task less


@pytest.mark.parametrize("share", [1.0, 0.5, 0.0])
@on_all_cases
def test_taking_a_task_out_changes_no_other(case: Case, share: float, tmp_path: Path) -> None:
    zipped, networks, x = zipped_group(case, 3, share), group(case, 3), case.examples(6, seed=99)
    before = {task: zipped(x, task) for task in networks}
    stored = files(zipped, tmp_path / "before")
    for task in networks:
        rest = {other: network for other, network in networks.items() if other != task}
        left = zipped.without(task)
        assert left.tasks == tuple(rest)
        assert all(torch.equal(left(x, other), before[other]) for other in rest)
        assert all(torch.equal(left.network(other)(x), zipped.network(other)(x)) for other in rest)
        report = left.report
        assert report.original_bytes == sum(network.bytes for network in rest.values())
        assert report.original_parameters == sum(network.parameters for network in rest.values())
        assert report.stored_bytes == sum(t.numel() * t.element_size() for t in left.tensors().values())
        assert {layer.layer: layer.parameters for layer in report.layers} == distinct_values(left, rest)
        assert all(layer.neurons.keys() == layer.error.keys() == rest.keys() for layer in report.layers)
        left.save(tmp_path / task)
        again = mtz_core.load(tmp_path / task)
        assert all(torch.equal(again(x, other), before[other]) for other in rest)
    assert files(zipped, tmp_path / "after") == stored


@on_all_cases
def test_down_to_one_task(case: Case, tmp_path: Path) -> None:
    zipped, networks, x = zipped_group(case, 3, 0.5), group(case, 3), case.examples(6, seed=99)
    alone = zipped.without("a").without("c")
    assert torch.equal(alone(x, "b"), zipped(x, "b"))
    assert alone.report.stored_bytes == alone.report.original_bytes == networks["b"].bytes
    assert alone.report.stored_parameters == networks["b"].parameters
    assert all(layer.shared == 0 for layer in alone.report.layers)
    assert set(alone.run_all(x)) == {"b"}
    assert files(alone, tmp_path / "first") == files(zipped.without("c").without("a"), tmp_path / "second")
    with pytest.raises(InvalidConfig, match=r"'b' is the only task"):
        alone.without("b")
    with pytest.raises(InvalidConfig, match=r"task 'a' is not in this zipped network\. Tasks: b"):
        alone.without("a")


def test_changing_what_is_left_changes_nothing_of_the_whole() -> None:
    zipped, x = zipped_group(MLP, 3, 1.0), MLP.examples(5)
    before = zipped(x, "b")
    left = zipped.without("a")
    with torch.no_grad():
        for parameter in left.parameters():
            parameter.zero_()
    assert torch.equal(zipped(x, "b"), before)


def coloured(channels: int, index: int, kernel: int = 3) -> nn.Module:
    """A residual network for images of so many channels."""
    network = RESIDUAL.network(index)
    with torch.random.fork_rng():
        torch.manual_seed(index)
        stem = nn.Conv2d(channels, RESIDUAL.widths[0], kernel, padding=1)
    assert isinstance(network, Residual)
    network.stem[0] = stem
    return network.double().eval()


@pytest.mark.parametrize("odd", ["a", "b", "c"])
def test_taking_out_the_one_that_prevents_sharing_changes_no_other(odd: str) -> None:
    """The stem of two networks could be shared, had the third not other input channels."""
    modules = {task: coloured(3 if task == odd else 1, i) for i, task in enumerate("abc")}
    data = {task: torch.randn(20, 3 if task == odd else 1, 7, 6, dtype=torch.float64) for task in modules}
    zipped = zip_networks(modules, data, ZipConfig(patches=6))
    assert [layer.layer for layer in zipped.report.layers if layer.note] == ["stem.0"]
    left = zipped.without(odd)
    for task in left.tasks:
        assert torch.equal(left(data[task], task), zipped(data[task], task))


class Beside(nn.Module):
    """A layer that reads flattened positions beside pooled ones: as many inputs as the image has pixels, and more."""

    def __init__(self, pixels: int) -> None:
        super().__init__()
        self.flat, self.pooled = nn.Conv2d(1, 3, 1), nn.Conv2d(1, 4, 3, padding=1)
        self.hidden, self.head = nn.Linear(3 * pixels + 4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        both = torch.cat([self.flat(x).relu().flatten(1), self.pooled(x).relu().mean((2, 3))], dim=1)
        out: Tensor = self.head(self.hidden(both).relu())
        return out


@pytest.mark.parametrize("odd", ["a", "b", "c"])
def test_taking_out_the_one_that_prevents_sharing_some_inputs_changes_no_other(odd: str) -> None:
    shapes = {task: (1, 3, 5) if task == odd else (1, 4, 3) for task in "abc"}
    modules = {task: Beside(shape[1] * shape[2]).eval() for task, shape in shapes.items()}
    data = {task: torch.randn(20, *shape) for task, shape in shapes.items()}
    zipped = zip_networks(modules, data, ZipConfig(patches=6))
    assert {layer.layer: layer.shared for layer in zipped.report.layers} == {
        "flat": 3,
        "pooled": 4,
        "hidden": 6,
        "head": 0,
    }
    left = zipped.without(odd)
    for task in left.tasks:
        assert torch.equal(left(data[task], task), zipped(data[task], task))
