"""Spending a budget: sizes, verified plans, floors."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from mtz_core import Budget, MtzError, RetrainConfig, Validation, ZipConfig, ZippedNetwork, zip_networks
from mtz_core.errors import InvalidCalibration, InvalidConfig, ZipWarning
from mtz_core.merging.walk import finish, merge
from mtz_core.network.tracing import trace
from mtz_core.planning.search import NEGLIGIBLE, BudgetSearch, FloorCandidate, FloorSearch
from mtz_core.settings import MOVES, Kind, Move
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import sensitivities
from tests.support.fleets import BOTH
from tests.support.networks import joined, mlp

pytestmark = pytest.mark.slow

CLASSES = 3


def networks(tasks: tuple[str, ...] = ("a", "b"), related: bool = False) -> dict[str, nn.Module]:
    torch.manual_seed(1)
    found: dict[str, nn.Module] = {}
    ancestor = mlp((16, 12), CLASSES)
    for task in tasks:
        network = mlp((16, 12), CLASSES)
        if related:
            network.load_state_dict(
                {
                    name: value if name.startswith("4") else value + 0.02 * torch.randn_like(value)
                    for name, value in {**ancestor.state_dict(), **last(network)}.items()
                }
            )
        found[task] = network.eval()
    return found


def last(network: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in network.state_dict().items() if name.startswith("4")}


def images(tasks: Mapping[str, object], count: int = 120, seed: int = 5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {task: torch.randn(count, 12, generator=generator) for task in tasks}


def budget_search(found: Mapping[str, nn.Module], calibration: Mapping[str, Tensor], config: ZipConfig) -> BudgetSearch:
    batches = {task: as_batches(x, task) for task, x in calibration.items()}
    traced = {task: trace(network, batches[task][0]) for task, network in found.items()}
    moments = {task: original_moments(network, batches[task], config) for task, network in traced.items()}
    sensitivity = {task: sensitivities(network, batches[task], config.seed) for task, network in traced.items()}
    assert config.budget is not None
    return BudgetSearch(joined(traced, moments, sensitivity, batches), config, config.budget)


def stored(zipped: ZippedNetwork) -> float:
    return zipped.report.stored_bytes / zipped.report.original_bytes


class Ending(nn.Module):
    """A network whose outputs are large, and end in another operator."""

    def __init__(self, network: nn.Module, end: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.end = network, end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(1e6 * self.network(x))


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        (lambda y: y.softmax(1), None),
        (torch.sigmoid, None),
        (torch.sign, None),
        (lambda y: y, "logits"),
        (lambda y: y, "multi-label"),
    ],
    ids=["softmax", "sigmoid", "sign", "logits", "labels"],
)
def test_no_plan_is_made_of_outputs_in_which_small_changes_do_not_show(
    end: Callable[[Tensor], Tensor], kind: Kind | None
) -> None:
    found: dict[str, nn.Module] = {task: Ending(own, end) for task, own in networks().items()}
    outputs = None if kind is None else dict.fromkeys(found, kind)
    config = ZipConfig(budget=Budget(size=0.6), outputs=outputs)
    with pytest.raises(InvalidCalibration, match=r"small changes do not show in the outputs of 'a'.*as regression"):
        zip_networks(found, images(found), config)
    with pytest.warns(ZipWarning, match="No size can be proposed: .* in the outputs of 'a', 'b'"):
        zip_networks(found, images(found), ZipConfig(outputs=outputs))
    remedy = {task: Ending(own, lambda y: y) for task, own in networks().items()}
    zipped = zip_networks(remedy, images(found), ZipConfig(budget=Budget(size=0.6)))
    assert 0.5 < stored(zipped) <= 0.6


def test_a_size_is_reached_whatever_it_costs() -> None:
    found = networks()
    far = {task: 1e7 + x for task, x in images(found).items()}  # of which nothing is left but rounding
    search = budget_search(found, far, ZipConfig(budget=Budget(size=0.1)))
    plan = search.planner.plan(0.1)
    assert max(plan.lost.values()) > 1e4
    assert plan.bytes <= 0.1 * search.planner.original_bytes


def test_a_size_is_proposed_above_one_that_was_too_small() -> None:
    found = networks()
    planner = budget_search(found, images(found), ZipConfig(budget=Budget(size=0.4))).planner
    first = planner.size_for(math.inf)
    assert first is not None
    assert planner.size_for(math.inf, above=first) == pytest.approx(first + 0.05)
    assert planner.size_for(math.inf, above=0.95) is None


def test_plans_are_merged_alike_whether_the_originals_outputs_are_kept_or_computed_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, config = networks(), ZipConfig(budget=Budget(size=0.4))
    kept = budget_search(found, images(found), config)
    monkeypatch.setattr("mtz_core.planning.search.MOST_TARGETS", 0)
    anew = budget_search(found, images(found), config)
    assert all(own.targets is not None for own in kept.fitting.values())
    assert all(own.targets is None for own in (*anew.fitting.values(), *kept.traced.values()))
    plan = kept.planner.plan(0.4)
    merged = [finish(merge(one.fitting, plan.pairings, config, keep=plan.keep)) for one in (kept, anew)]
    for name, tensor in merged[0].tensors().items():
        torch.testing.assert_close(tensor, merged[1].tensors()[name], rtol=1e-4, atol=1e-6)
    assert kept.best(0.4).same(anew.best(0.4))


@pytest.mark.parametrize("size", [0.2, 0.35, 0.6, 0.9])
@pytest.mark.parametrize("moves", [("share", "drop"), ("drop",)])
def test_a_size_is_kept_and_nearly_used_up(size: float, moves: tuple[Move, ...]) -> None:
    found = networks()
    zipped = zip_networks(found, images(found), ZipConfig(budget=Budget(size=size, moves=moves), refit_rounds=1))
    assert size - 0.05 < stored(zipped) <= size
    for task in found:
        assert zipped(images(found)[task][:3], task).shape == (3, CLASSES)


def test_the_whole_size_gives_back_the_originals() -> None:
    found = networks()
    zipped = zip_networks(found, images(found), ZipConfig(budget=Budget(size=1.0)))
    for task, network in found.items():
        x = images(found)[task]
        assert torch.equal(zipped(x, task), network(x))


def test_where_rounding_alone_loses_next_to_nothing_no_neurons_are_matched() -> None:
    found = networks()
    own = budget_search(found, images(found), ZipConfig(budget=Budget(size=0.7)))
    (candidate,) = own.candidates(0.7)
    assert candidate.name == "round only" and own.cost(candidate) <= NEGLIGIBLE
    assert "planner" not in vars(own)
    assert own.zip(candidate.plan).report.stored_bytes == candidate.plan.bytes
    assert len(list(own.candidates(0.2))) > 1 and "planner" in vars(own)


def test_equal_networks_cost_the_bytes_of_one_and_no_accuracy() -> None:
    found = networks(("a",))
    twice = {"a": found["a"], "b": found["a"]}
    calibration = {"a": images(found)["a"], "b": images(found)["a"]}
    zipped = zip_networks(twice, calibration, ZipConfig(budget=Budget(size=0.62, moves=BOTH)))
    for task in twice:
        torch.testing.assert_close(zipped(calibration[task], task), found["a"](calibration[task]))


def test_the_same_input_gives_the_same_bytes_whatever_the_order() -> None:
    found = networks()
    config = ZipConfig(budget=Budget(size=0.4), refit_rounds=1)
    one = zip_networks(found, images(found), config)
    backwards = dict(reversed(found.items()))
    other = zip_networks(backwards, dict(reversed(images(found).items())), config)
    assert one.tensors().keys() == other.tensors().keys()
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())


def test_few_examples_are_fitted_with_more_damping_each_tasks_for_as_long_as_it_helps() -> None:
    found, config = networks(), ZipConfig(budget=Budget(size=0.4, moves=("drop",)))
    few = {"a": images(found, 500)["a"], "b": images(found, 30)["b"]}
    search = budget_search(found, few, config)
    first, *others = candidates = list(search.candidates(0.4))
    damped = [one for one in others if "damped" in one.name and "evened" not in one.name]
    assert first.plan.damping == {} and damped
    assert all(one.plan.same(first.plan) for one in damped)
    chosen = damped[-1].plan.damping
    assert chosen["b"] > max(config.fixed_damping, chosen["a"])
    costs = [search.cost(one) for one in (first, *damped)]
    assert costs == sorted(costs, reverse=True)
    assert all(one.plan.damping == chosen for one in candidates if "evened" in one.name)
    plain, more = search.zip(first.plan).tensors(), search.zip(damped[-1].plan).tensors()
    assert not torch.equal(plain["2/weight/b/b"], more["2/weight/b/b"])
    assert not any(candidate.plan.damping for candidate in budget_search(found, few, AUTO).candidates(0.4))


@pytest.mark.parametrize("weight", [8.0, 1 / 8])
def test_under_a_balance_nothing_is_behind_what_counts_all_tasks_alike(weight: float) -> None:
    found, alike = networks(), ZipConfig(budget=Budget(size=0.4), refit_rounds=1)
    first, *_ = budget_search(found, images(found), alike).candidates(0.4)
    weighed = budget_search(found, images(found), replace(alike, balance={"a": weight, "b": 1.0}))
    candidates = list(weighed.candidates(0.4))
    assert any(one.plan.same(first.plan) for one in candidates)
    assert weighed.cost(weighed.best_of(candidates)) <= weighed.cost(first)


AUTO = ZipConfig(budget=Budget(size=0.4, moves=("drop",)), damping="auto", refit_rounds=1)


@pytest.mark.parametrize("related", [False, True])
@pytest.mark.parametrize("size", [0.25, 0.4, 0.6])
def test_the_best_plan_is_behind_neither_move_alone_on_held_out_data(related: bool, size: float) -> None:
    found = networks(("a", "b", "c"), related)
    candidates = list(
        budget_search(found, images(found), ZipConfig(budget=Budget(size=size, moves=BOTH), refit_rounds=1)).candidates(
            size
        )
    )
    by_name = {candidate.name: sum(candidate.loss.values()) for candidate in candidates}
    assert "drop only" in by_name and len(by_name) > 1
    assert ("share only" in by_name) == (size >= 0.4)
    assert all(
        candidate.plan.bytes <= size * 3 * 4 * sum(p.numel() for p in found["a"].parameters())
        for candidate in candidates
    )


def test_related_networks_share_and_unrelated_ones_drop() -> None:
    for related in (True, False):
        found = networks(("a", "b", "c", "d"), related)
        candidates = list(
            budget_search(
                found, images(found), ZipConfig(budget=Budget(size=0.25, moves=BOTH), refit_rounds=1)
            ).candidates(0.25)
        )
        best = min(candidates, key=lambda candidate: math.hypot(*candidate.loss.values()))
        assert (sum(pairing.shared for pairing in best.plan.pairings.values()) >= 12) == related


def test_one_move_alone_is_taken_at_its_word() -> None:
    found = networks()
    dropped = budget_search(found, images(found), ZipConfig(budget=Budget(size=0.5, moves=("drop",))))
    plan = dropped.best(0.5)
    assert all(pairing.shared == 0 for pairing in plan.pairings.values())
    shared = budget_search(found, images(found), ZipConfig(budget=Budget(size=0.8, moves=("share",))))
    plan = shared.best(0.8)
    assert all(
        len(kept) == width for own in plan.keep.values() for kept, width in zip(own.values(), (16, 12), strict=True)
    )


def test_the_published_method_spends_a_budget_by_sharing() -> None:
    found = networks()
    zipped = zip_networks(found, images(found), ZipConfig(method="paper", budget=Budget(size=0.8, moves=("share",))))
    assert stored(zipped) <= 0.8
    with pytest.raises(InvalidConfig, match="neither drops"):
        ZipConfig(method="paper", budget=Budget(size=0.8))


@pytest.mark.parametrize("moves", [("share", "drop"), ("drop",), ("share",)])
def test_an_impossible_size_is_refused_with_the_least_one(moves: tuple[Move, ...]) -> None:
    found = networks()
    with pytest.raises(InvalidConfig, match=r"the least that these networks can be stored in is 0\.\d+ of their bytes"):
        zip_networks(found, images(found), ZipConfig(budget=Budget(size=0.01, moves=moves)))


def test_too_few_examples_to_hold_some_out_are_refused() -> None:
    found = networks()
    with pytest.raises(InvalidCalibration, match="Give at least 5"):
        zip_networks(found, images(found, 4), ZipConfig(budget=Budget(size=0.5)))


# --- floors ---

LIGHT = RetrainConfig(iterations=20, batch_size=32, validate_every=10)


def labelled(found: Mapping[str, nn.Module], metric: str = "error") -> dict[str, Validation]:
    """Validation data of which the originals get all but a few right."""
    validation = {}
    for task, x in images(found, 200, seed=9).items():
        labels = found[task](x).argmax(dim=1)
        labels[:10] = (labels[:10] + 1) % CLASSES
        validation[task] = Validation(x, labels, metric)
    return validation


def search(found: Mapping[str, nn.Module], floor: float | dict[str, float], **budget: object) -> list[FloorCandidate]:
    config = ZipConfig(budget=Budget(floor=floor, **budget), refit_rounds=1)  # type: ignore[arg-type]
    calibration = images(found)
    steps = FloorSearch(budget_search(found, calibration, config), found, calibration, labelled(found), LIGHT).steps()
    return list(steps)


def lost(zipped: ZippedNetwork, found: Mapping[str, nn.Module], task: str) -> float:
    """Points by which the error rises, counted example by example."""
    data = labelled(found)[task]
    assert data.labels is not None
    wrong = [
        int(run(data.examples).argmax(dim=1).ne(data.labels).sum()) for run in (partial(zipped, task=task), found[task])
    ]
    return 100 * (wrong[0] - wrong[1]) / len(data.labels)


@pytest.mark.parametrize("floor", [2.0, *(pytest.param(floor, marks=pytest.mark.long) for floor in (0.0, 10.0))])
def test_what_is_found_keeps_the_floor_of_every_task(floor: float) -> None:
    found = networks()
    config = ZipConfig(budget=Budget(floor=floor), refit_rounds=1)
    zipped = zip_networks(found, images(found), config, validation=labelled(found), retraining=LIGHT)
    for task in found:
        assert lost(zipped, found, task) <= floor


@pytest.mark.long
def test_every_step_says_what_it_lost_and_a_lower_floor_never_stores_less() -> None:
    found = networks()
    sizes = []
    for floor in (1.0, 5.0, 20.0):
        steps = search(found, floor)
        assert steps[0].size == 1.0 and steps[0].kept and set(steps[0].lost.values()) == {0.0}
        for step in steps:
            assert step.kept == all(points <= floor + 1e-9 for points in step.lost.values())
            for task in found:
                assert step.lost[task] == pytest.approx(lost(step.zipped, found, task))
        sizes.append(min(step.size for step in steps if step.kept))
    assert sizes == sorted(sizes, reverse=True)


def test_each_task_has_its_own_floor() -> None:
    found = networks()
    step = min((s for s in search(found, {"a": 30.0, "b": 0.0}) if s.kept), key=lambda s: s.size)
    assert step.lost["b"] <= 0.0 and step.lost["a"] <= 30.0


def test_validation_data_belong_to_floors() -> None:
    found = networks()
    with pytest.raises(InvalidConfig, match="needs validation data"):
        zip_networks(found, images(found), ZipConfig(budget=Budget(floor=1.0)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: {"a": data["a"]}, "validation data is given for"),
        (lambda data: {**data, "c": data["a"]}, "validation data is given for"),
        (lambda data: {**data, "a": replace(data["a"], metric="accuracy")}, "the metric 'accuracy' is unknown"),
        (lambda data: {**data, "a": replace(data["a"], labels=data["a"].labels + 2)}, "labels of 'a' go from"),
        (lambda data: {**data, "a": replace(data["a"], labels=data["a"].labels[:-1])}, "199 labels for 200 examples"),
    ],
    ids=["missing", "unknown task", "unknown metric", "out of range", "too few labels"],
)
def test_validation_data_that_cannot_be_are_refused_before_work(change, message: str) -> None:
    found = networks()
    with pytest.raises(MtzError, match=message):
        zip_networks(found, images(found), ZipConfig(budget=Budget(floor=1.0)), validation=change(labelled(found)))


def test_floors_name_the_tasks() -> None:
    found = networks()
    with pytest.raises(InvalidConfig, match=r"budget\.floor: names \['a'\], but the tasks are"):
        search(found, {"a": 1.0})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give either size"),
        ({"size": 0.5, "floor": 1.0}, "give either size"),
        ({"size": 0.0}, "budget.size"),
        ({"size": 1.5}, "budget.size"),
        ({"size": float("nan")}, "budget.size"),
        ({"floor": -1.0}, "budget.floor"),
        ({"floor": {"a": "much"}}, "budget.floor"),
        ({"size": 0.5, "moves": ()}, "budget.moves"),
        ({"size": 0.5, "moves": ("merge",)}, "budget.moves"),
        ({"size": 0.5, "moves": "drop"}, "budget.moves"),
    ],
)
def test_budgets_that_cannot_be_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidConfig, match=message):
        Budget(**settings)  # type: ignore[arg-type]


# --- few data ---


def test_damping_chosen_by_held_out_data_does_better_where_data_are_few() -> None:
    found = networks(related=True)
    calibration, fresh = images(found, 14), images(found, 500, seed=77)

    def error(damping: object) -> float:
        zipped = zip_networks(found, calibration, ZipConfig(damping=damping))  # type: ignore[arg-type]
        return float(np.mean([float((zipped(x, t) - found[t](x)).detach().square().mean()) for t, x in fresh.items()]))

    assert error("auto") < error(5e-4)
    assert error("auto") <= 1.05 * min(error(value) for value in (5e-4, 5e-3, 2e-2, 1e-1))


def test_too_few_rows_are_told_in_numbers() -> None:
    found = networks()
    few = zip_networks(found, images(found, 10)).report.layers
    assert few[0].few_rows == "a has 8 rows for 13 inputs; b has 8 rows for 13 inputs"
    assert not any(layer.few_rows for layer in zip_networks(found, images(found, 100)).report.layers)


# Rounding


@pytest.mark.parametrize(
    ("size", "moves"),
    [
        (0.9, MOVES),
        (0.3, MOVES),
        (0.12, MOVES),
        (0.3, ("share", "round")),
        (0.12, ("drop", "round")),
        (0.3, ("round",)),
    ],
)
def test_rounding_each_network_alone_is_among_the_candidates_wherever_it_reaches(
    size: float, moves: tuple[Move, ...]
) -> None:
    found = networks(related=True)
    config = ZipConfig(budget=Budget(size=size, moves=moves), refit_rounds=1)
    search = budget_search(found, images(found), config)
    candidates = {candidate.name: candidate for candidate in search.candidates(size)}
    alone = budget_search(found, images(found), replace(config, budget=Budget(size=size, moves=("round",))))
    reaches = alone.planner.least_bytes <= size * alone.planner.original_bytes
    assert ("round only" in candidates) == reaches == (size > 0.12)
    if reaches:
        only = candidates["round only"]
        assert only.plan.bits
        assert only.plan.damage <= alone.planner.plan(size).damage * 1.001
        assert not any(only.plan.sharing.values()) and not any(only.plan.dropping.values())  # but what costs nothing
        assert search.cost(search.best_of(candidates.values())) <= search.cost(only)
    assert all(one.plan.bytes <= size * search.planner.original_bytes for one in candidates.values())


@pytest.mark.parametrize("moves", [("share",), ("drop",), ("share", "drop")], ids="+".join)
def test_without_the_move_no_candidate_rounds(moves: tuple[Move, ...]) -> None:
    found = networks(related=True)
    config = ZipConfig(budget=Budget(size=0.7, moves=moves), refit_rounds=1)
    candidates = list(budget_search(found, images(found), config).candidates(0.7))
    assert candidates
    assert not any(one.plan.bits or "round" in one.name for one in candidates)


@pytest.mark.parametrize("size", [0.5, 0.25, 0.1])
def test_sizes_are_kept_where_weights_are_rounded(size: float, tmp_path: Path) -> None:
    found = networks(related=True)
    zipped = zip_networks(found, images(found), ZipConfig(budget=Budget(size=size), refit_rounds=1))
    assert stored(zipped) <= size
    assert stored(zipped) > size - 0.05 or all(judged.lost < 1e-4 for judged in zipped.report.tasks.values())
    zipped.save(tmp_path)
    content = (tmp_path / "weights.safetensors").read_bytes()
    assert len(content) - 8 - int.from_bytes(content[:8], "little") == zipped.report.stored_bytes


def test_a_quarter_of_the_bytes_loses_less_than_by_sharing_and_dropping_alone() -> None:
    found = networks(related=True)
    losses = []
    for moves in (MOVES, ("share", "drop")):
        search = budget_search(found, images(found), ZipConfig(budget=Budget(size=0.3, moves=moves), refit_rounds=1))
        losses.append(search.cost(search.best_of(search.candidates(0.3))))
    assert losses[0] < losses[1] / 5


def test_the_same_input_gives_the_same_bits_whatever_the_order() -> None:
    found = networks()
    config = ZipConfig(budget=Budget(size=0.15), refit_rounds=1)
    one = zip_networks(found, images(found), config)
    other = zip_networks(dict(reversed(found.items())), dict(reversed(images(found).items())), config)
    assert one.structure.bits == other.structure.bits and one.structure.bits
    assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
