"""Networks that differ somewhere: other heads, poolings, activations, depth. What they have in common is zipped."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mtz_core
from mtz_core import Budget, ZipConfig, ZippedNetwork, zip_networks
from mtz_core.errors import IncompatibleNetworks, InvalidConfig, UnsupportedModule, ZipWarning
from mtz_core.merging.compatibility import common_part
from mtz_core.merging.matching import match
from mtz_core.merging.walk import finish, merge, trace_task
from mtz_core.network.tracing import trace
from mtz_core.planning.planner import Planner
from mtz_core.settings import MOVES, Move, RetrainConfig
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.traced import Traced

pytestmark = pytest.mark.slow


class Speech(nn.Module):
    """Convolutions with normalisation, poolings, and dense layers: each of two has other kernels, poolings, widths."""

    def __init__(self, kernel: tuple[int, int], pools: Mapping[int, tuple[int, int]], dense: int, classes: int) -> None:
        super().__init__()
        widths = (1, 4, 6, 6)
        kernels = (kernel, (3, 3), (3, 3))
        self.convs = nn.ModuleList(nn.Conv2d(a, b, k) for a, b, k in zip(widths, widths[1:], kernels, strict=False))
        self.cbn = nn.ModuleList(nn.BatchNorm2d(width) for width in widths[1:])
        self.pools = nn.ModuleDict({str(i): nn.MaxPool2d(size) for i, size in pools.items()})
        self.fcs = nn.ModuleList(nn.Linear(a, b) for a, b in ((6, dense), (dense, dense)))
        self.fbn = nn.ModuleList(nn.BatchNorm1d(dense) for _ in range(2))
        self.out = nn.Linear(dense, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = x.unsqueeze(1)
        for i, (conv, norm) in enumerate(zip(self.convs, self.cbn, strict=True)):
            h = F.relu(norm(conv(h)))
            if str(i) in self.pools:
                h = self.pools[str(i)](h)
        h = h.permute(0, 2, 3, 1).flatten(1)
        for layer, norm in zip(self.fcs, self.fbn, strict=True):
            h = F.relu(norm(layer(h)))
        out: Tensor = self.out(h)
        return out


def speech(name: str) -> nn.Module:
    choices: dict[str, Any] = {
        "music": {"kernel": (5, 4), "pools": {0: (2, 2), 2: (4, 1)}, "dense": 10, "classes": 2},
        "noise": {"kernel": (7, 4), "pools": {0: (4, 2), 2: (2, 1)}, "dense": 7, "classes": 3},
    }
    return Speech(**choices[name])


SPEECH: dict[str, tuple[int, ...]] = {"music": (20, 14), "noise": (30, 14)}


def body() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU())


def headed(head: nn.Module, **between: nn.Module) -> nn.Module:
    network = nn.Sequential()
    network.add_module("body", body())
    for name, module in between.items():
        network.add_module(name, module)
    network.add_module("head", head)
    return network


def mlp_head(outputs: int = 4, inputs: int = 8) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, 6), nn.Tanh(), nn.Linear(6, outputs))


def stemmed(stem: nn.Module) -> nn.Module:
    """A residual stream that a stem and two branches write; only the stem differs."""

    class Stemmed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = stem
            self.first, self.second, self.head = nn.Linear(7, 7), nn.Linear(7, 7), nn.Linear(7, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.stem(x)
            h = h + torch.relu(self.first(h))
            h = h + torch.relu(self.second(h))
            out: Tensor = self.head(torch.relu(h))
            return out

    return Stemmed()


def pooled(size: int, depth: int = 0) -> nn.Module:
    deeper = [nn.Sequential(nn.Conv2d(5, 5, 3, padding=1), nn.ReLU()) for _ in range(depth)]
    network = nn.Sequential()
    network.add_module("first", nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU()))
    network.add_module("pool", nn.MaxPool2d(size))
    network.add_module("more", nn.Sequential(*deeper))
    network.add_module("second", nn.Sequential(nn.Conv2d(5, 6, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network.add_module("third", nn.Sequential(nn.Linear(6, 4), nn.Tanh()))
    network.add_module("head", nn.Linear(4, 3))
    return network


Case = tuple[Callable[[], dict[str, nn.Module]], dict[str, tuple[int, ...]], dict[str, Any], dict[str, int]]
CASES: dict[str, Case] = {
    "heads": (
        lambda: {"a": headed(nn.Linear(8, 3)), "b": headed(mlp_head())},
        {"a": (12,), "b": (12,)},
        {"keep_separate": ["head"]},
        {"body.0": 9, "body.2": 8},
    ),
    "heads, the body named": (
        lambda: {"a": headed(nn.Linear(8, 3)), "b": headed(mlp_head())},
        {"a": (12,), "b": (12,)},
        {"zip": ["body"]},
        {"body.0": 9, "body.2": 8},
    ),
    "poolings and depth": (
        lambda: {"a": pooled(2), "b": pooled(3, depth=2)},
        {"a": (1, 16, 16), "b": (1, 20, 20)},
        {"keep_separate": ["pool", "more"]},
        {"first.0": 5, "third.0": 4},
    ),
    "activations": (
        lambda: {"a": headed(nn.Linear(8, 3), act=nn.GELU()), "b": headed(nn.Linear(8, 5), act=nn.Hardswish())},
        {"a": (12,), "b": (12,)},
        {"keep_separate": ["act"]},
        {"body.0": 9, "body.2": 8},
    ),
    "stems": (
        lambda: {"a": stemmed(nn.Linear(12, 7)), "b": stemmed(mlp_head(7, inputs=5))},
        {"a": (12,), "b": (5,)},
        {"keep_separate": ["stem"]},
        {"first": 7, "second": 7},
    ),
    "speech": (
        lambda: {name: speech(name) for name in SPEECH},
        SPEECH,
        {"keep_separate": ["pools.0", "pools.2"]},
        {"convs.1": 6, "convs.2": 6, "fcs.0": 7, "fcs.1": 7},
    ),
    "three": (
        lambda: {
            "a": headed(nn.Linear(8, 3)),
            "b": headed(mlp_head()),
            "c": headed(nn.Sequential(nn.Tanh(), nn.Linear(8, 2))),
        },
        {"a": (12,), "b": (12,), "c": (12,)},
        {"keep_separate": ["head"]},
        {"body.0": 9, "body.2": 8},
    ),
}


Given = tuple[dict[str, nn.Module], dict[str, Tensor], dict[str, Any], dict[str, int]]


@cache
def given(name: str) -> Given:
    """Networks, calibration data, what to keep separate, and what is shared then."""
    return made(name)


@cache
def zipped_whole(name: str) -> ZippedNetwork:
    """Everything shared; not to be modified."""
    networks, x, settings, _ = given(name)
    return zip_networks(networks, x, ZipConfig(patches=9, **settings))


def made(name: str) -> Given:
    torch.manual_seed(3)
    make, shapes, settings, shared = CASES[name]
    networks = {task: network.eval() for task, network in make().items()}
    for network in networks.values():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                assert module.running_mean is not None and module.running_var is not None
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 2)
    return networks, {task: torch.randn(40, *shape) for task, shape in shapes.items()}, settings, shared


def shared_in(zipped: ZippedNetwork) -> dict[str, int]:
    return {layer.layer: layer.shared for layer in zipped.report.layers if layer.shared}


def check(zipped: ZippedNetwork, x: Mapping[str, Tensor], folder: Path) -> None:
    """It runs, is as large as it says, and survives the disk."""
    zipped.save(folder)
    again = mtz_core.load(folder)
    assert (folder / "manifest.json").stat().st_size > 0
    for task in zipped.tasks:
        expected = zipped(x[task], task)
        assert bool(torch.isfinite(expected).all())
        assert torch.equal(again(x[task], task), expected)
        torch.testing.assert_close(zipped.network(task)(x[task]), expected, rtol=1e-5, atol=1e-5)
    assert again.report == zipped.report
    content = (folder / "weights.safetensors").read_bytes()
    assert zipped.report.stored_bytes == len(content) - 8 - int.from_bytes(content[:8], "little")
    assert str(zipped.report)


@pytest.mark.parametrize("name", CASES)
def test_what_is_in_common_is_shared_and_the_rest_is_each_tasks_own(name: str, tmp_path: Path) -> None:
    networks, x, _, shared = given(name)
    zipped = zipped_whole(name)
    assert shared_in(zipped) == shared
    check(zipped, x, tmp_path)
    for task, network in networks.items():
        assert {n: p.shape for n, p in zipped.network(task).named_parameters()} == {
            n: p.shape for n, p in network.named_parameters()
        }


@pytest.mark.parametrize("name", CASES)
def test_sharing_nothing_returns_the_originals(name: str, tmp_path: Path) -> None:
    networks, x, settings, _ = given(name)
    zipped = zip_networks(networks, x, ZipConfig(share=0.0, patches=9, **settings))
    for task, network in networks.items():
        assert torch.equal(zipped(x[task], task), network(x[task]))
    assert zipped.report.stored_bytes == zipped.report.original_bytes
    check(zipped, x, tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_a_network_zipped_with_itself_stores_once_what_takes_part(name: str) -> None:
    networks, x, settings, shared = given(name)
    (_, network), *_ = networks.items()
    (_, data), *_ = x.items()
    twins = {"a": network, "b": network}
    zipped = zip_networks(twins, dict.fromkeys(twins, data), ZipConfig(patches=9, **settings))
    for task in twins:
        torch.testing.assert_close(zipped(data, task), network(data), rtol=1e-3, atol=1e-4)
    once = {layer.layer: layer for layer in zipped.report.layers}
    for layer in shared:
        assert once[layer].shared == once[layer].neurons["a"]


@pytest.mark.parametrize(
    ("name", "moves"),
    [("heads", ("drop",)), ("three", ("share", "drop")), ("stems", ("share", "drop")), ("speech", ("share", "drop"))],
)
def test_budgets_are_kept(name: str, moves: tuple[Any, ...], tmp_path: Path) -> None:
    networks, x, settings, _ = given(name)
    zipped = zip_networks(networks, x, ZipConfig(budget=Budget(size=0.7, moves=moves), patches=9, **settings))
    assert zipped.report.stored_bytes <= 0.7 * zipped.report.original_bytes
    check(zipped, x, tmp_path)


@cache
def measured(name: str) -> tuple[dict[str, Traced], ZipConfig]:
    networks, x, settings, _ = given(name)
    config = ZipConfig(budget=Budget(size=0.3), patches=9, refit_rounds=0, **settings)
    traced = {task: trace_task(task, network, x[task], config) for task, network in networks.items()}
    common = common_part(traced)
    return {t: Traced.measured(network, as_batches(x[t], t), config) for t, network in common.items()}, config


@pytest.mark.parametrize("moves", [MOVES, ("round",), ("share", "round")], ids="+".join)
@pytest.mark.parametrize("name", CASES)
def test_rounded_networks_are_as_large_as_planned(name: str, moves: tuple[Move, ...], tmp_path: Path) -> None:
    traced, config = measured(name)
    networks, x, _, _ = given(name)
    planner = Planner(traced, config, moves)
    for size in (0.3, planner.least_bytes / planner.original_bytes + 1e-9):
        plan = planner.plan(size)
        assert plan.bytes <= size * planner.original_bytes + 1e-6
        zipped = finish(merge(traced, plan.pairings, config, (), plan.keep, plan.damping, plan.bits))
        assert zipped.report.stored_bytes == plan.bytes
        check(zipped, x, tmp_path)
    if moves == MOVES:
        for task in traced:
            left = zipped.without(task)
            assert all(torch.equal(left(x[other], other), zipped(x[other], other)) for other in left.tasks)
            check(left, x, tmp_path)
        *_, kind = networks
        grown = zipped.with_task("new", networks[kind], x[kind], ZipConfig(patches=9))
        assert all(torch.equal(grown(x[task], task), zipped(x[task], task)) for task in traced)
        check(grown, {**x, "new": x[kind]}, tmp_path)


def test_parts_of_ones_own_lose_neurons_too() -> None:
    torch.manual_seed(0)
    networks = {"a": headed(nn.Linear(8, 3)), "b": headed(nn.Sequential(nn.Linear(8, 30), nn.Tanh(), nn.Linear(30, 4)))}
    x = {task: torch.randn(60, 12) for task in networks}
    zipped = zip_networks(
        networks, x, ZipConfig(budget=Budget(size=0.5, moves=("share", "drop")), keep_separate=["head"])
    )
    assert zipped.report.stored_bytes <= 0.5 * zipped.report.original_bytes
    (own,) = (layer.neurons for layer in zipped.report.layers if layer.layer == "head.0")
    assert own.keys() == {"b"}
    assert 2 <= own["b"] < 30


@pytest.mark.parametrize("name", CASES)
def test_without_a_task_the_others_compute_what_they_did(name: str, tmp_path: Path) -> None:
    networks, x, _, _ = given(name)
    zipped = zipped_whole(name)
    for task in networks:
        left = zipped.without(task)
        for other in left.tasks:
            torch.testing.assert_close(left(x[other], other), zipped(x[other], other), rtol=1e-5, atol=1e-6)
        check(left, x, tmp_path / task)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("place", [0, -1], ids=["like the first", "like the last"])
def test_a_task_is_added_and_the_others_compute_what_they_did(name: str, place: int, tmp_path: Path) -> None:
    networks, x, _, shared = given(name)
    zipped, kind = zipped_whole(name), list(networks)[place]
    newcomer, data = networks[kind], x[kind]
    grown = zipped.with_task("new", newcomer, data, ZipConfig(patches=9))
    assert shared_in(grown).keys() == shared.keys()
    check(grown, {**x, "new": data}, tmp_path)
    left = grown.without("new")
    for task in networks:
        torch.testing.assert_close(grown(x[task], task), zipped(x[task], task), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(left(x[task], task), zipped(x[task], task), rtol=1e-5, atol=1e-6)
    nothing = zipped.with_task("new", newcomer, data, ZipConfig(share=0.0, patches=9))
    assert torch.equal(nothing(data, "new"), newcomer(data))


@pytest.mark.parametrize("name", ["heads", "three"])
@pytest.mark.parametrize("share", [0.5, 1.0])
def test_running_all_tasks_at_once_changes_nothing(name: str, share: float) -> None:
    networks, x, settings, _ = given(name)
    zipped = zip_networks(networks, x, ZipConfig(share=share, patches=9, **settings))
    found = zipped.run_all(x["a"])
    for task in networks:
        torch.testing.assert_close(found[task], zipped(x["a"], task))


def test_own_parts_are_fitted_to_what_the_zipped_network_feeds_them() -> None:
    networks, x, settings, _ = given("heads")
    refitted = zip_networks(networks, x, ZipConfig(**settings))
    for task, head in (("a", "head"), ("b", "head.0")):
        before, after = networks[task].get_submodule(head), refitted.network(task).get_submodule(head)
        assert not torch.equal(before.get_parameter("weight"), after.get_parameter("weight"))


def test_it_retrains_and_evaluates() -> None:
    networks, x, settings, _ = given("heads")
    zipped = zip_networks(networks, x, ZipConfig(**settings), retraining=RetrainConfig(iterations=2))
    found = mtz_core.evaluate(zipped, x, originals=networks, metric="agreement")
    assert found.keys() == networks.keys()


def test_layers_of_one_name_may_be_of_other_kinds_and_in_another_order(tmp_path: Path) -> None:
    torch.manual_seed(0)

    class Ordered(nn.Module):
        def __init__(self, turned: bool) -> None:
            super().__init__()
            self.one, self.two, self.turned = nn.Linear(8, 8), nn.Linear(8, 8), turned
            self.three = nn.Linear(8, 3, bias=turned)

        def forward(self, x: Tensor) -> Tensor:
            first, second = (self.two, self.one) if self.turned else (self.one, self.two)
            out: Tensor = self.three(torch.tanh(second(torch.relu(first(x)))))
            return out

    class Convolved(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Conv1d(1, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.one(x.unsqueeze(1)).mean(-1)
            return out

    networks = {"a": headed(Ordered(False)), "b": headed(Ordered(True)), "c": headed(Convolved())}
    x = {task: torch.randn(30, 12) for task in networks}
    for some in ("abc", "ab"):
        data = {task: x[task] for task in some}
        originals = {task: networks[task] for task in some}
        whole = zip_networks(originals, data, ZipConfig(share=0.0, keep_separate=["head"]))
        assert all(torch.equal(whole(x[task], task), networks[task](x[task])) for task in some)
        zipped = zip_networks(originals, data, ZipConfig(keep_separate=["head"]))
        assert shared_in(zipped) == {"body.0": 9, "body.2": 8}
        check(zipped, data, tmp_path / some)
        check(zipped.without("a"), data, tmp_path / f"{some} without a")
        check(zipped.with_task("d", networks["b"], x["b"]), {**data, "d": x["b"]}, tmp_path / f"{some} and d")


def test_what_one_network_keeps_separate_all_do() -> None:
    """In the pipeline every model has its own list."""
    networks, x, _, shared = given("heads")
    listed: dict[str, list[str]] = {"a": ["head"], "b": []}
    alike = {"a": headed(nn.Linear(8, 3)), "b": headed(nn.Linear(8, 5))}
    for given_networks in (networks, alike):
        traced = common_part({t: trace(n, x[t][:2], listed[t]) for t, n in given_networks.items()})
        own = {task: Traced.measured(network, [x[task]], ZipConfig()) for task, network in traced.items()}
        pairings = {found.group: found.pairing for found in match(own, ZipConfig())}
        assert shared_in(finish(merge(own, pairings, ZipConfig()))) == shared


def test_files_in_which_a_group_is_named_after_a_separate_writer_are_read(tmp_path: Path) -> None:
    """As before version 4."""
    networks, x, settings, _ = given("stems")
    twins = dict.fromkeys(("a", "b"), networks["a"])
    zipped = zip_networks(twins, dict.fromkeys(twins, x["a"]), ZipConfig(**settings))
    zipped.save(tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert "first" in manifest["members"]
    manifest["version"] = 3
    manifest["members"] = {{"first": "stem"}.get(name, name): rows for name, rows in manifest["members"].items()}
    del manifest["report"]["tasks"], manifest["manifest_sha256"]
    canonical = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    manifest["manifest_sha256"] = hashlib.sha256(canonical).hexdigest()
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    again = mtz_core.load(tmp_path)
    assert all(torch.equal(again(x["a"], task), zipped(x["a"], task)) for task in twins)


# Nothing is named


def test_the_longest_common_trunk_is_found_and_said(tmp_path: Path) -> None:
    networks, x, settings, shared = given("heads")
    with pytest.warns(ZipWarning, match=r"'head' and 2 more stay separate: the networks differ from there on \(a has"):
        zipped = zip_networks(networks, x)
    assert shared_in(zipped) == shared
    notes = {layer.layer: layer.note for layer in zipped.report.layers if layer.note}
    assert notes.keys() == {"head", "head.0", "head.2"}
    assert "where b has linear 'head.0'" in notes["head"]
    check(zipped, x, tmp_path)
    named = zip_networks(networks, x, ZipConfig(**settings))
    assert all(torch.equal(zipped(x[task], task), named(x[task], task)) for task in networks)


def test_the_trunk_of_three_ends_where_the_first_of_them_differs() -> None:
    torch.manual_seed(0)
    networks = {
        "a": headed(nn.Linear(8, 3)),
        "b": headed(mlp_head()),
        "c": nn.Sequential(),
    }
    networks["c"].add_module("body", nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 8), nn.Tanh()))
    networks["c"].add_module("head", nn.Linear(8, 3))
    x = {task: torch.randn(30, 12) for task in networks}
    with pytest.warns(ZipWarning, match="stay separate"):
        zipped = zip_networks(networks, x)
    assert shared_in(zipped) == {"body.0": 9, "body.2": 8}


def test_a_trunk_ends_at_the_outputs_of_the_shallower() -> None:
    torch.manual_seed(0)
    parts = list(body().children())
    networks = {"a": nn.Sequential(*parts[:3]), "b": nn.Sequential(*parts, nn.Linear(8, 2))}
    x = {task: torch.randn(30, 12) for task in networks}
    with pytest.warns(ZipWarning, match="separate"):
        zipped = zip_networks(networks, x)
    assert shared_in(zipped) == {"0": 9}
    assert {layer.layer: layer.note for layer in zipped.report.layers}["2"] == "its neurons are outputs of a"


def remedy_of(error: Exception) -> list[str]:
    found = re.search(r"keep_separate: \[(.*?)\]", str(error))
    assert found is not None, error
    return re.findall(r"'(.*?)'", found[1])


def front(activation: nn.Module, head: nn.Module | None = None) -> nn.Module:
    """Nothing before the first difference can be shared."""
    network = nn.Sequential()
    network.add_module("scale", activation)
    network.add_module("body", body())
    network.add_module("head", head or nn.Linear(8, 3))
    return network


REMEDIES: dict[str, tuple[Callable[[], dict[str, nn.Module]], dict[str, tuple[int, ...]], list[str], str]] = {
    "front": (
        lambda: {"a": front(nn.Tanh()), "b": front(nn.GELU())},
        {"a": (12,), "b": (12,)},
        ["scale"],
        "a has tanh reading input where b has gelu reading input, in 'scale'",
    ),
    "front and head": (
        lambda: {"a": front(nn.Tanh()), "b": front(nn.GELU(), mlp_head())},
        {"a": (12,), "b": (12,)},
        ["head", "scale"],
        "a has tanh reading input where b has gelu",
    ),
    "speech": (
        lambda: {name: speech(name) for name in SPEECH},
        SPEECH,
        ["pools.0", "pools.2"],
        "music has max_pool2d (kernel_size=[2, 2]) reading step 3 where noise has max_pool2d (kernel_size=[4, 2])",
    ),
    "three": (
        lambda: {"a": front(nn.Tanh()), "b": front(nn.Tanh(), mlp_head()), "c": front(nn.Hardswish())},
        {"a": (12,), "b": (12,), "c": (12,)},
        ["head", "scale"],
        "where b has linear 'head.0'",
    ),
}


@pytest.mark.parametrize("name", ["front", "front and head", "speech"])
def test_networks_that_differ_at_once_are_refused_with_a_remedy_that_works(name: str) -> None:
    torch.manual_seed(0)
    make, shapes, paths, difference = REMEDIES[name]
    networks = {task: network.eval() for task, network in make().items()}
    x = {task: torch.randn(30, *shape) for task, shape in shapes.items()}
    with pytest.raises(IncompatibleNetworks, match=re.escape(difference)) as caught:
        zip_networks(networks, x, ZipConfig(patches=9))
    assert remedy_of(caught.value) == paths
    zipped = zip_networks(networks, x, ZipConfig(patches=9, keep_separate=remedy_of(caught.value)))
    assert shared_in(zipped)


def test_paths_that_are_not_enough_are_refused_with_what_to_add() -> None:
    torch.manual_seed(0)
    networks = {"a": front(nn.Tanh()), "b": front(nn.GELU(), mlp_head())}
    x = {task: torch.randn(30, 12) for task in networks}
    with pytest.raises(IncompatibleNetworks, match=r"where b has linear 'head\.0'.*add to keep_separate") as caught:
        zip_networks(networks, x, ZipConfig(keep_separate=["scale"]))
    assert remedy_of(caught.value) == ["head"]
    assert shared_in(zip_networks(networks, x, ZipConfig(keep_separate=["scale", "head"]))) == {
        "body.0": 9,
        "body.2": 8,
    }


def test_a_remedy_tells_which_network_has_which_part() -> None:
    torch.manual_seed(0)
    networks = {"a": front(nn.Tanh()), "b": headed(nn.Linear(8, 3))}
    x = {task: torch.randn(30, 12) for task in networks}
    with pytest.raises(IncompatibleNetworks, match=r"keep_separate: \['scale'\]; b has \[\]\.") as caught:
        zip_networks(networks, x)
    assert shared_in(zip_networks(networks, x, ZipConfig(keep_separate=remedy_of(caught.value)))) == {
        "body.0": 9,
        "body.2": 8,
    }


def test_networks_with_nothing_in_common_are_refused() -> None:
    networks = {"a": headed(nn.Linear(8, 3)), "b": nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))}
    x = {task: torch.randn(30, 12) for task in networks}
    with pytest.raises(IncompatibleNetworks, match="They have nothing in common that could be shared"):
        zip_networks(networks, x)


def test_a_newcomer_that_lacks_what_the_others_share_is_refused() -> None:
    networks, x, settings, _ = given("heads")
    zipped = zip_networks(networks, x, ZipConfig(**settings))
    other = nn.Sequential()
    other.add_module("body", nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 8), nn.ReLU()))
    other.add_module("head", nn.Linear(8, 3))
    with pytest.raises(
        IncompatibleNetworks, match=r"a has relu .* where c has tanh .* in 'body.1'.*zip all of them anew"
    ):
        zipped.with_task("c", other, x["a"])
    with pytest.warns(ZipWarning):
        zip_networks({**networks, "c": other}, {**x, "c": x["a"]})


def config(setting: str, value: Any) -> ZipConfig:
    settings: dict[str, Any] = {setting: value}
    return ZipConfig(**settings)


@pytest.mark.parametrize("setting", ["keep_separate", "zip"])
def test_paths_name_submodules(setting: str) -> None:
    networks, x, _, _ = given("heads")
    with pytest.raises(UnsupportedModule, match=f"{setting}: there is no submodule 'nope'. Submodules: body"):
        zip_networks(networks, x, config(setting, ["nope"]))
    with pytest.raises(InvalidConfig, match=rf"{setting}: 'body' is no list"):
        config(setting, "body")


def test_counts_of_parts_of_ones_own_are_refused() -> None:
    networks, x, settings, _ = given("heads")
    with pytest.raises(InvalidConfig, match=r"share\.head\.0: 2 is impossible. Allowed: 0 to 0"):
        zip_networks(networks, x, ZipConfig(share={"head.0": 2}, **settings))
    assert shared_in(zip_networks(networks, x, ZipConfig(share={"body.0": 2}, **settings))) == {"body.0": 2}
