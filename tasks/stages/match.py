"""Stage `match`: pair the neurons of a group's networks layer by layer, as configured or as a budget allows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from mtz_core.errors import InvalidConfig
from mtz_core.merging import matching
from mtz_core.merging.compatibility import common_part
from mtz_core.planning.planner import Plan
from mtz_core.planning.search import BudgetSearch, FloorSearch, Validation
from mtz_core.statistics.traced import Traced
from tasks.artifacts.paths import Workspace
from tasks.artifacts.plans import CandidateRecord, Matched, Search, write_matched
from tasks.artifacts.statistics import read_traced
from tasks.data.examples import read_images
from tasks.models.calibration import calibration
from tasks.models.load import load_network, trace_on_own_image
from tasks.params import InvalidParams, Params
from tasks.progress import show_progress
from tasks.stages.budget_checks import check_budget


def run(params: Params, workspace: Workspace) -> None:
    """Write which neurons are kept, which are shared, and the damage that this is expected to cause.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.

    Raises:
        InvalidParams: There are fewer than two models.
        MtzError: The networks cannot be zipped together, the budget is impossible, or a file cannot be used.
    """
    if len(params.models) < 2:
        raise InvalidParams("models: name two at least; one alone has nothing to share.")
    originals = {model: load_network(params, workspace, model) for model in sorted(params.models)}
    networks = {m: trace_on_own_image(params, workspace, m, original) for m, original in originals.items()}
    networks = common_part(networks)
    validation = check_budget(params, workspace, networks)
    traced = {model: read_traced(workspace, model, network) for model, network in networks.items()}
    budget = params.zip_config().budget
    if budget is None:
        found = _match(params, traced)
    else:
        traced = {
            model: replace(
                own,
                batches=calibration(params, workspace, model, own.network),
                output=params.models[model].declared_output,
            )
            for model, own in traced.items()
        }
        budget_search = BudgetSearch(traced, params.zip_config(), budget)
        if budget.size is not None:
            found = _spend(budget_search, budget.size)
        else:
            found = _search(params, workspace, budget_search, originals, validation)
    write_matched(workspace, list(networks), found)


def _match(params: Params, traced: Mapping[str, Traced]) -> Matched:
    """Share as many neurons as the settings ask for."""
    matches = []
    for match in matching.match(traced, params.zip_config()):
        widths = " and ".join(
            str(own.network.graph.widths[match.group])
            for own in traced.values()
            if match.group in own.network.graph.hidden_widths
        )
        again = "" if math.isnan(match.total) else f"; all groups {match.total:.4g} (round {match.sweep})"
        show_progress(f"{match.group}: {match.pairing.shared} shared of {widths} neurons, cost {match.cost:.4g}{again}")
        matches.append(match)
    last = {match.group: match for match in matches}
    return Matched(
        {name: match.pairing for name, match in last.items()},
        {name: match.cost for name, match in last.items()},
        [(name, count, cost) for name, match in last.items() for count, cost in enumerate((0.0, *match.curve))],
        matching.descent(matches),
    )


def _spend(budget_search: BudgetSearch, size: float) -> Matched:
    """Return the plan of a given size that does best on held-out data."""
    candidates = []
    try:
        for candidate in budget_search.candidates(size):
            show_progress(
                f"{candidate.name}: predicted damage {candidate.plan.damage:.4g}, "
                f"held-out loss {_by_task(candidate.loss)}"
            )
            candidates.append(candidate)
    except InvalidConfig as error:
        raise InvalidConfig(f"match.{error}") from error
    best = budget_search.best_of(candidates)
    size_of = budget_search.planner.original_bytes
    tried = [
        CandidateRecord(t.name, t.plan.bytes / size_of, t.plan.damage, t.loss, "chosen" if t is best else "worse")
        for t in candidates
    ]
    return _planned(budget_search, best.plan, tried, f"the size asked for, {size:g} of the bytes")


def _search(
    params: Params,
    workspace: Workspace,
    budget_search: BudgetSearch,
    originals: Mapping[str, nn.Module],
    validation: Mapping[str, Validation],
) -> Matched:
    """Return the smallest network that keeps every task's floor after light retraining."""
    settings = params.retrain
    training = {
        model: read_images(workspace.root / block.data, "train", settings.images, settings.seed)
        for model, block in params.models.items()
    }
    search = FloorSearch(budget_search, originals, training, validation, settings.config())
    plans: list[Plan] = []
    tried: list[CandidateRecord] = []
    for step in search.steps():
        verdict = _KEEPS if step.kept else "breaks the floor"
        show_progress(
            f"{step.what}: stored {100 * step.size:.1f} %, points lost {_by_task(step.lost)} "
            f"after {step.iterations} iterations; {verdict}"
        )
        plans.append(step.plan)
        tried.append(CandidateRecord(step.what, step.size, step.plan.damage, step.lost, verdict))
    best = min((i for i, one in enumerate(tried) if one.verdict == _KEEPS), key=lambda i: tried[i].stored)
    limit = _limit(tried, tried[best], search.floors)
    tried[best] = replace(tried[best], verdict="chosen")
    return _planned(budget_search, plans[best], tried, limit)


_KEEPS = "keeps the floor"


def _limit(tried: Sequence[CandidateRecord], best: CandidateRecord, floors: Mapping[str, float]) -> str:
    """Return which task broke its floor in the next smaller network than the best, and by how much."""
    smaller = [one for one in tried if one.stored < best.stored]
    if not smaller:
        return "nothing smaller was tried"
    nearest = max(smaller, key=lambda one: one.stored)
    broken = [
        f"{name} loses {nearest.loss[name]:.2f} points, allowed are {points:g}"
        for name, points in floors.items()
        if nearest.loss[name] > points
    ]
    return f"at {nearest.stored:.3f} of the bytes {'; '.join(broken)}"


def _planned(budget_search: BudgetSearch, plan: Plan, tried: Sequence[CandidateRecord], limit: str) -> Matched:
    """Print a plan and return it in the form that is written."""
    planner = budget_search.planner
    stored = plan.bytes / planner.original_bytes
    for name, pairing in plan.pairings.items():
        kept = " and ".join(
            f"{len(plan.keep[task][name])} of {network.graph.widths[name]}"
            for task, network in planner.networks.items()
            if name in plan.keep[task]
        )
        show_progress(f"{name}: {kept} neurons kept, {pairing.shared} shared")
    if plan.bits:
        show_progress(f"weights are rounded to {', '.join(map(str, sorted({*plan.bits.values()})))} bits")
    show_progress(f"stored {100 * stored:.1f} % of the bytes, predicted damage {plan.damage:.4g}; limit: {limit}")
    return Matched(
        plan.pairings,
        {name: plan.sharing[name] + plan.dropping[name] for name in plan.pairings},
        list(_curves(budget_search)),
        keep=plan.keep,
        damping=plan.damping,
        bits=plan.bits,
        search=Search(limit, plan.bytes, stored, plan.damage, tried),
    )


def _curves(budget_search: BudgetSearch) -> Iterator[tuple[str, int, float]]:
    """Yield what sharing costs in every group while none of its neurons is dropped, over all tasks."""
    for name, options in budget_search.planner.options.items():
        whole, damage = np.flatnonzero(options.gone == 0), options.sharing.sum(axis=0)
        for shared in np.unique(options.shared[whole]).tolist():
            yield name, shared, float(damage[whole][options.shared[whole] == shared].min())


def _by_task(values: Mapping[str, float]) -> str:
    return ", ".join(f"{task} {value:.3g}" for task, value in values.items())
