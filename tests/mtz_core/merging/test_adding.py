"""Adding a network to a zipped one: the others do not change, the newcomer shares what they have."""

import copy
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import mtz_core
from mtz_core.errors import IncompatibleNetworks, InvalidCalibration, InvalidConfig, ZipWarning
from mtz_core.settings import Budget, Output, ZipConfig
from mtz_core.zipped.module import ZippedNetwork
from tests.support.networks import mlp
from tests.support.zoo.table import OWN

pytestmark = pytest.mark.slow

CASES = {case.name: case for case in OWN if case.name in ("mlp", "resnext", "vit")}
CONFIG = ZipConfig(share=0.7, patches=8)


def given(name: str) -> tuple[dict[str, nn.Module], dict[str, Tensor]]:
    case = CASES[name]
    return (
        {task: case.network(seed) for seed, task in enumerate("abc", start=1)},
        {task: case.examples(16, seed) for seed, task in enumerate("abc")},
    )


@cache
def grown(name: str) -> tuple[ZippedNetwork, ZippedNetwork]:
    """Two networks zipped, and the same with a third one added."""
    networks, x = given(name)
    pair = {task: networks[task] for task in "ab"}
    zipped = mtz_core.zip_networks(pair, {task: x[task] for task in pair}, CONFIG)
    return zipped, mtz_core.add_network(zipped, "c", networks["c"], x["c"], CONFIG)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_others_do_not_change(name: str) -> None:
    before, after = grown(name)
    _, x = given(name)
    for task in before.tasks:
        assert torch.equal(after(x[task], task=task), before(x[task], task=task))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_taking_it_out_again_gives_back_what_was(name: str) -> None:
    before, after = grown(name)
    found, expected = after.without("c").tensors(), before.tensors()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_newcomer_shares_and_survives_the_disk(name: str, tmp_path: Path) -> None:
    before, after = grown(name)
    networks, x = given(name)
    alone = sum(tensor.numel() for tensor in networks["c"].state_dict().values())
    assert after.report.stored_parameters < before.report.stored_parameters + 0.8 * alone
    assert all(torch.isfinite(after(x["c"], task="c")).flatten())
    after.save(tmp_path)
    assert torch.equal(mtz_core.load(tmp_path)(x["c"], task="c"), after(x["c"], task="c"))


@torch.no_grad()
def test_sharing_nothing_adds_the_network_as_it_is() -> None:
    before, _ = grown("mlp")
    networks, x = given("mlp")
    after = mtz_core.add_network(before, "c", networks["c"], x["c"], ZipConfig(share=0.0))
    assert torch.equal(after(x["c"], task="c"), networks["c"](x["c"]))


@torch.no_grad()
def test_a_copy_of_a_network_that_is_there_costs_its_head_alone() -> None:
    networks, x = given("mlp")
    zipped = mtz_core.zip_networks(
        {"a": networks["a"], "b": networks["a"]}, {"a": x["a"], "b": x["b"]}, ZipConfig(share=1.0)
    )
    after = mtz_core.add_network(zipped, "c", networks["a"], x["a"], ZipConfig(share=1.0))
    torch.testing.assert_close(after(x["a"], task="c"), networks["a"](x["a"]))
    head = list(networks["a"].parameters())[-2:]
    added = after.report.stored_parameters - zipped.report.stored_parameters
    assert added == sum(parameter.numel() for parameter in head)


def test_refusals() -> None:
    before, _ = grown("mlp")
    networks, x = given("mlp")
    with pytest.raises(InvalidConfig, match="in this zipped network already"):
        mtz_core.add_network(before, "a", networks["c"], x["c"])
    with pytest.raises(InvalidConfig, match="cannot name a task"):
        mtz_core.add_network(before, "c/d", networks["c"], x["c"])
    other = nn.Sequential(nn.Flatten(), nn.Linear(144, 5), nn.Tanh(), nn.Linear(5, 3))
    with pytest.raises(IncompatibleNetworks, match="differ in structure"):
        mtz_core.add_network(before, "c", other, x["c"])


def test_a_newcomer_joins_a_network_that_has_lost_neurons() -> None:
    ancestor, calibration = mlp((16, 12), 3).eval(), {task: torch.randn(60, 12) for task in "abc"}
    networks = {}
    for task in calibration:
        networks[task] = copy.deepcopy(ancestor)
        for parameter in networks[task].parameters():
            parameter.data += 0.02 * torch.randn_like(parameter)
    two = {task: networks[task] for task in "ab"}
    budget = Budget(size=0.4, moves=("share", "drop"))
    zipped = mtz_core.zip_networks(two, {task: calibration[task] for task in two}, ZipConfig(budget=budget))
    more = mtz_core.add_network(zipped, "c", networks["c"], calibration["c"])
    assert more.report.layers[1].neurons["c"] == 12 > max(zipped.report.layers[1].neurons.values())
    assert more.report.layers[0].shared == zipped.report.layers[0].shared > 0
    for task in two:
        assert torch.equal(more(calibration[task], task), zipped(calibration[task], task))
        assert torch.equal(more.without("c")(calibration[task], task), zipped(calibration[task], task))


def trained_apart(seed: int, outputs: int = 4) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, outputs))


@torch.no_grad()
def test_the_newcomer_is_judged_on_examples_that_are_held_out() -> None:
    x = {task: torch.rand(100, 6, generator=torch.Generator().manual_seed(seed)) for seed, task in enumerate("abc")}
    pair = {task: trained_apart(seed) for seed, task in enumerate("ab")}
    zipped = mtz_core.zip_networks(pair, {task: x[task] for task in pair}, ZipConfig(share=0.2))
    newcomer, kind = trained_apart(2), Output("regression", tolerance=0.1)
    after = zipped.with_task("c", newcomer, x["c"], ZipConfig(share=0.2, outputs={"c": kind}))
    assert {task: after.report.tasks[task] for task in "ab"} == zipped.report.tasks
    judged, held_out = after.report.tasks["c"], x["c"][-20:]
    assert judged.examples == 20 and judged.declared == kind
    loss = after.loss_of("c", newcomer(x["c"][:-20]))
    assert judged.lost == pytest.approx(float(loss(after(held_out, task="c"), newcomer(held_out))), rel=1e-4)
    few = zipped.with_task("c", newcomer, x["c"][:4], ZipConfig(share=0.2))
    assert "c" not in few.report.tasks


@torch.no_grad()
def test_a_newcomer_that_does_not_fit_is_refused_by_name() -> None:
    x = {task: torch.rand(100, 6, generator=torch.Generator().manual_seed(seed)) for seed, task in enumerate("abc")}
    pair = {task: trained_apart(seed) for seed, task in enumerate("ab")}
    zipped = mtz_core.zip_networks(pair, {task: x[task] for task in pair}, ZipConfig(share=0.2))
    with pytest.raises(InvalidCalibration, match="the network of 'c': its outputs are declared as probabilities"):
        zipped.with_task("c", trained_apart(2), x["c"][:4], ZipConfig(outputs={"c": "probabilities"}))
    with pytest.raises(InvalidCalibration, match="the network of 'c': layer '0' reads values that are too large"):
        zipped.with_task("c", trained_apart(2), 1e20 * x["c"])


@torch.no_grad()
def test_a_newcomer_that_is_ruined_is_told_with_what_keeps_it() -> None:
    x = {task: torch.rand(100, 6, generator=torch.Generator().manual_seed(seed)) for seed, task in enumerate("abc")}
    pair = {task: trained_apart(seed) for seed, task in enumerate("ab")}
    zipped = mtz_core.zip_networks(pair, {task: x[task] for task in pair}, ZipConfig(share=0.0))
    newcomer = trained_apart(2, outputs=1)
    config = ZipConfig(method="paper", outputs={"c": Output("regression")})
    with pytest.warns(
        ZipWarning, match=r"^'c' has lost .* of what it knew .*ZipConfig\(share=0\.0\) keeps it as it is"
    ):
        zipped.with_task("c", newcomer, x["c"], config)
    kept = zipped.with_task("c", newcomer, x["c"], replace(config, share=0.0))
    assert kept.report.tasks["c"].lost == pytest.approx(0.0, abs=1e-6)
