"""Zip networks in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mtz_core.errors import InvalidConfig
from mtz_core.merging.compatibility import check_compatible, shared_counts
from mtz_core.merging.matching import descent, match
from mtz_core.merging.walk import check_task_name, finish, merge, trace_task
from mtz_core.planning.search import BudgetSearch, FloorSearch, Validation
from mtz_core.settings import Budget, RetrainConfig, ZipConfig
from mtz_core.statistics.calibration import as_batches, original_moments
from mtz_core.statistics.sensitivity import sensitivities
from mtz_core.zipped.module import ZippedNetwork


def zip_networks(
    networks: Mapping[str, nn.Module],
    calibration: Mapping[str, Tensor | Iterable[Tensor]],
    config: ZipConfig | None = None,
    *,
    validation: Mapping[str, Validation] | None = None,
    retraining: RetrainConfig | None = None,
) -> ZippedNetwork:
    """Zip pre-trained networks into one (He, Zhou, Thiele 2018; see `ZipConfig.method`). They are not modified.

    `calibration[task]` are examples of the task's inputs, ``[batch, *input shape]``, no labels needed: one
    tensor or batches. The order in which the networks are listed makes no difference. A floor (`Budget.floor`) is kept
    on `validation`, after light retraining on the calibration data. Raises `MtzError` in its kinds: unsupported or
    incompatible networks, weights or data that are not finite or do not fit, impossible settings; all before any work
    where they can be known.
    """
    config = config or ZipConfig()
    budget = config.share if isinstance(config.share, Budget) else None
    for task in networks:
        check_task_name(task)
    if set(networks) != set(calibration):
        raise InvalidConfig(f"calibration is given for {sorted(calibration)}, but the networks are {sorted(networks)}.")
    if (budget is not None and budget.floor is not None) != (validation is not None):
        raise InvalidConfig("a floor needs validation data with labels, and nothing else does: give both or neither.")
    batches = {task: as_batches(calibration[task], task) for task in sorted(networks)}
    traced = {task: trace_task(task, networks[task], data[0], config) for task, data in batches.items()}
    check_compatible(traced)
    shared_counts(traced, config)
    moments = {task: original_moments(network, batches[task], config) for task, network in traced.items()}
    sensitivity = {task: sensitivities(network, batches[task], config.seed) for task, network in traced.items()}
    if budget is None:
        matches = list(match(traced, moments, config, sensitivity))
        del moments
        pairings = {found.group: found.pairing for found in matches}
        return finish(merge(traced, pairings, batches, config, descent(matches), sensitivity=sensitivity))
    budget_search = BudgetSearch(traced, moments, sensitivity, batches, config, budget)
    if budget.size is not None:
        return budget_search.zip(budget_search.best(budget.size))
    assert validation is not None
    training = {task: torch.cat(own) for task, own in batches.items()}
    search = FloorSearch(budget_search, networks, training, validation, retraining or RetrainConfig())
    return min((step for step in search.steps() if step.kept), key=lambda step: step.size).zipped
