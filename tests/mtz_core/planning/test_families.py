"""Families: relatives are found among strangers, and what some can share is shared by them alone."""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtz_core import Budget, ZipConfig, ZippedNetwork, zip_networks
from mtz_core.network.tracing import trace
from mtz_core.planning.families import Family, Sharing, ways_to_share
from mtz_core.planning.planner import Planner
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.ownership import NOT_A_MEMBER
from tests.support.fleets import BOTH
from tests.support.networks import mlp

CONFIG = ZipConfig(budget=Budget(size=0.5))


def relative(network: nn.Module, seed: int) -> nn.Module:
    """A network with almost the same weights, its hidden neurons in another order."""
    generator, other = torch.Generator().manual_seed(seed), copy.deepcopy(network)
    hidden, head = other.get_submodule("0"), other.get_submodule("2")
    assert isinstance(hidden, nn.Linear)
    assert isinstance(head, nn.Linear)
    order = torch.randperm(len(hidden.bias), generator=generator)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * parameter.std() * torch.randn(parameter.shape, generator=generator))
        hidden.weight[:], hidden.bias[:], head.weight[:] = (
            hidden.weight[order],
            hidden.bias[order],
            head.weight[:, order],
        )
    return other


def modules() -> dict[str, nn.Module]:
    torch.manual_seed(3)
    first, second, stranger = (mlp((10,), 4) for _ in range(3))
    # In alphabetical order relatives are not next to each other.
    return {
        "a": first,
        "b": second,
        "c": stranger,
        "d": relative(first, 1),
        "e": relative(second, 2),
    }


def data(count: int = 60) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return {task: torch.randn(count, 12, generator=generator) for task in "abcde"}


@cache
def measured() -> dict[str, Traced]:
    found = {}
    for task, module in modules().items():
        batches = as_batches(data()[task], task)
        found[task] = Traced.measured(trace(module, batches[0]), batches, CONFIG)
    return found


def some(tasks: str) -> dict[str, Traced]:
    return {task: measured()[task] for task in tasks}


def families_of(way: Sharing, tasks: str) -> set[str]:
    return {"".join(tasks[place] for place in family.places) for family in way.families}


@pytest.mark.parametrize(
    ("tasks", "expected"), [("abde", {"ad", "be"}), ("abcde", {"ad", "be"}), ("acd", {"ad"}), ("bce", {"be"})]
)
def test_relatives_are_found_among_strangers(tasks: str, expected: set[str]) -> None:
    ways = ways_to_share(some(tasks), CONFIG, np.ones(len(tasks)))
    assert expected in [families_of(way, tasks) for way in ways]
    assert families_of(ways[-1], tasks) == {tasks}, "all with each other is always a way"


def test_two_networks_have_one_way() -> None:
    (way,) = ways_to_share(some("ab"), CONFIG, np.ones(2))
    assert families_of(way, "ab") == {"ab"}


def test_tuples_of_families_are_disjoint_and_concern_their_tasks_alone() -> None:
    tasks = "abcde"
    for way in ways_to_share(some(tasks), CONFIG, np.ones(5)):
        for tuples, damage in way.tuples.values():
            assert bool(((tuples >= 0) | (damage == 0)).all()), "what a task does not share does it no damage"
            assert bool((damage >= 0).all())
            for column in tuples.T:
                own = column[column != NOT_A_MEMBER]
                assert len(set(own.tolist())) == len(own)
            rank = damage.sum(axis=1) / ((tuples >= 0).sum(axis=1) - 1)
            assert bool((np.diff(rank) >= 0).all()), "the cheapest come first"


def test_relatives_share_for_less_than_strangers() -> None:
    def cost(tasks: str) -> float:
        family = Family(measured(), tuple(tasks), CONFIG)
        return sum(float(damage.sum()) for _, damage in family.tuples.values())

    assert 20 * max(cost("ad"), cost("be")) < min(cost("ab"), cost("ac"), cost("de"))


def zipped(size: float, tasks: str) -> ZippedNetwork:
    networks = {task: module for task, module in modules().items() if task in tasks}
    return zip_networks(
        networks, {task: data()[task] for task in tasks}, ZipConfig(budget=Budget(size, moves=("share",)))
    )


def test_a_budget_merges_families_and_leaves_strangers_alone() -> None:
    found = zipped(0.72, "abcde")
    owners = {tuple(sorted(segment.owners)) for segment in found.structure.rows["0"].segments}
    assert {own for own in owners if len(own) > 1} == {("a", "d"), ("b", "e")}
    assert found.report.stored_bytes <= 0.72 * found.report.original_bytes
    assert max(report.lost for report in found.report.tasks.values()) < 0.02


class Normalised(nn.Module):
    """A layer normalisation between two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, width), nn.LayerNorm(width), nn.Linear(width, width)
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(self.second(self.norm(self.first(x)).relu()).relu())
        return out


@pytest.mark.slow
def test_the_wider_of_three_share_what_the_narrowest_has_not() -> None:
    torch.manual_seed(0)
    networks = {task: Normalised(width) for task, width in zip("abc", (4, 24, 24), strict=True)}
    x = {task: torch.randn(80, 6) for task in networks}
    everything = zip_networks(networks, x, ZipConfig(share=1.0)).report
    for size in (0.75, everything.stored_bytes / everything.original_bytes + 1e-3):
        report = zip_networks(networks, x, ZipConfig(budget=Budget(size=size, moves=("share",)))).report
        assert report.stored_bytes <= size * report.original_bytes


def test_a_plan_of_some_is_never_worse_than_one_of_all_or_none() -> None:
    """Predicted: every plan that shares among all tasks, or drops alone, is among those that can be chosen."""
    own = Planner(some("abde"), CONFIG, BOTH)
    for size in (0.7, 0.5, 0.35):
        plan = own.plan(size)
        assert plan.bytes <= size * own.original_bytes
        assert plan.damage <= own.plan(size, dropping=1.0, sharing=1e12).damage * (1 + 1e-9)


@pytest.mark.slow
def test_a_group_that_one_network_alone_has_is_shared_by_nobody() -> None:
    torch.manual_seed(1)
    networks = {task: nn.Sequential(mlp((8,), 4), nn.Linear(4, 3)) for task in "ab"}
    networks["c"] = nn.Sequential(mlp((8,), 4), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)))
    x = {task: torch.randn(60, 12) for task in networks}
    report = zip_networks(networks, x, ZipConfig(budget=Budget(size=0.8), keep_separate=["1"])).report
    assert report.stored_bytes <= 0.8 * report.original_bytes
