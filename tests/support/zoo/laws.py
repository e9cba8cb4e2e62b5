"""The laws that hold for every network family, checked on a narrow and a wide network with other classes.

Both are traced once for all laws; tracing checks itself by permuting every neuron group.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import mtz_core
from mtz_core import ZipConfig, ZippedNetwork
from mtz_core.merging.matching import Matcher, descent, match
from mtz_core.merging.pairing import GroupMatch
from mtz_core.merging.walk import finish, merge
from mtz_core.network.graph import FIXED, INPUT, KERNEL, Axis, Network
from mtz_core.network.tracing import trace
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities, sensitivities
from tests.support.networks import joined, zip_traced
from tests.support.zoo.table import ZooCase

EXAMPLES, PATCHES = 12, 8
TASKS = ("narrow", "wide")


def module(case: ZooCase, task: str) -> nn.Module:
    return case.network(1) if task == "narrow" else case.network(2, width=2, classes=5)


@cache
def traced(case: ZooCase, task: str) -> Network:
    return trace(module(case, task), case.examples(2))


def pair(case: ZooCase) -> dict[str, Network]:
    return {task: traced(case, task) for task in TASKS}


@cache
def batches(case: ZooCase, task: str) -> list[Tensor]:
    return as_batches(case.examples(EXAMPLES, TASKS.index(task)), task)


@cache
def moments(case: ZooCase) -> dict[str, dict[str, Moments]]:
    config = ZipConfig(patches=PATCHES)
    return {task: original_moments(network, batches(case, task), config) for task, network in pair(case).items()}


@cache
def sensitivity(case: ZooCase) -> dict[str, Sensitivities]:
    return {task: sensitivities(network, batches(case, task)) for task, network in pair(case).items()}


@cache
def matches(case: ZooCase, share: float) -> list[GroupMatch]:
    return list(match(joined(pair(case), moments(case), sensitivity(case)), ZipConfig(share=share, patches=PATCHES)))


@cache
def zipped_pair(case: ZooCase, share: float) -> ZippedNetwork:
    """What `zip_networks` makes of the two, step by step."""
    pairings = {found.group: found.pairing for found in matches(case, share)}
    data = {task: batches(case, task) for task in TASKS}
    config = ZipConfig(share=share, patches=PATCHES)
    costs = descent(matches(case, share))
    return finish(merge(joined(pair(case), sensitivity=sensitivity(case), batches=data), pairings, config, costs))


@contextmanager
def plain_attention() -> Iterator[None]:
    """torch's attention modules run operator by operator, not fused, so that values can be compared bit by bit."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def assert_close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))


def parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@plain_attention()
def sharing_nothing_gives_back_the_originals_bit_by_bit(case: ZooCase) -> None:
    zipped, x = zipped_pair(case, 0.0), case.examples(5, seed=9)
    report = zipped.report
    assert report.stored_bytes == report.original_bytes == sum(traced(case, task).bytes for task in TASKS)
    assert report.stored_parameters == sum(parameters(module(case, task)) for task in TASKS)
    for task in TASKS:
        assert torch.equal(zipped(x, task), module(case, task)(x))


@plain_attention()
def a_network_zipped_with_itself_keeps_its_outputs_and_stores_hidden_layers_once(case: ZooCase) -> None:
    network, x = traced(case, "narrow"), case.examples(5, seed=9)
    calibration = {"first": case.examples(EXAMPLES, 0), "second": case.examples(EXAMPLES, 1)}
    zipped = zip_traced(dict.fromkeys(calibration, network), calibration, ZipConfig(patches=PATCHES))
    expected = module(case, "narrow")(x)
    for task in zipped.tasks:
        assert_close(zipped(x, task), expected, 1e-4)
    report = zipped.report
    itemsize = 4  # of every network of the table
    assert report.stored_bytes == 2 * network.bytes - itemsize * common_values(network)
    assert report.stored_parameters == 2 * parameters(module(case, "narrow")) - common_values(network)
    assert report.stored_parameters < 0.6 * report.original_parameters
    outputs = zipped.run_all(x)
    for task in zipped.tasks:
        assert_close(outputs[task], zipped(x, task))


def common_values(network: Network) -> int:
    """How many values two copies of a network can store once: weights between hidden neurons, and their biases."""
    graph, total = network.graph, 0
    hidden = {group.name for group in graph.hidden_groups}
    for node in graph.layers:
        rows = belonging(graph.rows[node.name], hidden)
        total += rows * (belonging(graph.columns[node.name], hidden | {INPUT, KERNEL}) + (node.bias is not None))
    return total


def belonging(axis: Axis, groups: set[str]) -> int:
    """How many positions belong to neurons of these groups."""
    return sum(group != FIXED and axis.groups[group] in groups for group in axis.group.tolist())


@plain_attention()
def saved_and_loaded_is_the_same(case: ZooCase) -> None:
    zipped, x = zipped_pair(case, 0.6), case.examples(5, seed=9)
    with tempfile.TemporaryDirectory() as name:
        first, second = Path(name, "first"), Path(name, "second")
        zipped.save(first)
        again = mtz_core.load(first)
        again.save(second)
        assert all(path.read_bytes() == (second / path.name).read_bytes() for path in first.iterdir())
    assert again.report == zipped.report
    for task in TASKS:
        assert torch.equal(again(x, task), zipped(x, task))


@plain_attention()
def a_plain_network_has_the_originals_names_and_loads_into_it(case: ZooCase) -> None:
    zipped, x = zipped_pair(case, 0.6), case.examples(5, seed=9)
    for task in TASKS:
        original, plain = module(case, task), zipped.network(task)
        shapes = [{name: tuple(p.shape) for name, p in n.named_parameters()} for n in (plain, original)]
        assert shapes[0] == shapes[1]
        state = {name: tensor for name, tensor in plain.state_dict().items() if not name.startswith("constant_")}
        assert state.keys() <= dict(original.state_dict(), **dict(original.named_buffers())).keys()
        expected = zipped(x, task)
        assert_close(plain(x), expected)
        original.load_state_dict(state, strict=False)
        assert_close(original(x), expected)


@plain_attention()
def a_wide_and_a_narrow_network_share_the_narrow_ones_neurons(case: ZooCase) -> None:
    zipped, x = zipped_pair(case, 1.0), case.examples(5, seed=9)
    graphs = [traced(case, task).graph for task in TASKS]
    for group in graphs[0].hidden_groups:
        members = zipped.structure.members[group.name]
        narrow, wide = (graph.widths[group.name] for graph in graphs)
        separate = all(layer.note for layer in zipped.report.layers if layer.layer in group.writers)
        shared = int((members >= 0).all(axis=1).sum())
        assert shared == (0 if separate else narrow)
        assert len(members) == narrow + wide - shared
        for column, width in zip(members.T, (narrow, wide), strict=True):
            assert np.array_equal(np.sort(column[column >= 0]), np.arange(width))
    report = zipped.report
    assert report.stored_bytes == sum(t.numel() * t.element_size() for t in zipped.tensors().values())
    assert report.stored_bytes < report.original_bytes
    hidden = {group.name for group in graphs[0].hidden_groups}
    for layer in report.layers:
        if not layer.note:
            assert layer.shared == belonging(graphs[0].rows[layer.layer], hidden), layer
    outputs = zipped.run_all(x)
    for task in TASKS:
        expected = zipped(x, task)
        assert bool(torch.isfinite(expected).all())
        assert_close(outputs[task], expected)
        assert torch.equal(zipped.without(next(t for t in TASKS if t != task))(x, task), expected)


def layers_that_cannot_correspond_share_nothing(case: ZooCase) -> None:
    """Heads of other sizes, grouped convolutions with other numbers of inputs, other vocabularies."""
    for layer in zipped_pair(case, 1.0).report.layers:
        if layer.note:
            assert layer.shared == 0, layer
            assert layer.parameters == sum(layer.original_parameters.values()), layer


def matching_never_accepts_an_increase(case: ZooCase) -> None:
    """The costs that the descent reports fall, and the last is that of the pairings that it ends with."""
    found, groups = matches(case, 0.6), traced(case, "narrow").graph.hidden_groups
    assert {one.group for one in found} == {group.name for group in groups}
    assert [one.sweep for one in found] == sorted(one.sweep for one in found)
    costs = descent(found)
    if not costs:
        return  # no pairing depends on a later one
    assert all(after < before for before, after in itertools.pairwise(costs))
    matcher = Matcher(joined(pair(case), moments(case), sensitivity(case)), ZipConfig(share=0.6, patches=PATCHES))
    pairings = {one.group: one.pairing for one in found}
    recounted = sum(matcher.cost(name, pairings) for name in pairings)
    assert abs(recounted - costs[-1]) <= 1e-6 * recounted


LAWS: tuple[Callable[[ZooCase], None], ...] = (
    sharing_nothing_gives_back_the_originals_bit_by_bit,
    a_network_zipped_with_itself_keeps_its_outputs_and_stores_hidden_layers_once,
    saved_and_loaded_is_the_same,
    a_plain_network_has_the_originals_names_and_loads_into_it,
    a_wide_and_a_narrow_network_share_the_narrow_ones_neurons,
    layers_that_cannot_correspond_share_nothing,
    matching_never_accepts_an_increase,
)
