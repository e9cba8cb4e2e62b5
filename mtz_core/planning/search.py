"""Spend a budget: make plans, verify them on data, keep the best; or find the smallest network that keeps a floor.

Predicted damage (`mtz_core.planning.planner`) ranks moves of one kind well. Between kinds of moves, and between tasks,
it can be far off, because it misses errors that meet in later layers and errors that cancel. So several plans are made
for one size. First come those with one move alone; dropping and sharing go together with rounding, unless that is not
allowed. Then the damage of rounding, and that of sharing, is counted for more or for less, as long as this improves the
result. Then the fits of each task that gains by it get more damping. At last the damage to each task is counted for
less, the less it has really lost. Each plan is merged on most of the calibration data and measured on the rest. The
best is taken, by the root of the summed squares of what the tasks lose. So a mixture is chosen only where it does
better than any move alone, and no task is sacrificed for another.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import islice
from math import exp, hypot, log
from typing import Any

from torch import nn

from mtz_core.batches import Batch, concatenated, divided
from mtz_core.errors import InvalidCalibration, InvalidConfig
from mtz_core.evaluation import Case, Metrics, error_of, measured, outputs_of
from mtz_core.merging.judging import HELD_OUT, judge, targets_of
from mtz_core.merging.walk import finish, merge
from mtz_core.network.graph import run
from mtz_core.planning.planner import NEVER, Plan, Planner
from mtz_core.retraining import Targets, retrain_steps
from mtz_core.settings import Budget, Move, RetrainConfig, ZipConfig
from mtz_core.statistics.calibration import sampled_outputs
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.report import LayerReport, TaskReport

STEP = 4.0
"""The factor by which the damage of sharing counts for more or less from plan to plan; near the best, its root."""

EVENED, EVEN, GENTLE = 3, 1.5, 0.25
"""How often the damage to tasks is evened out by what was measured, the ratio of losses at which it need not, and the
power of that ratio by which damage counts for less: losses react strongly."""

DAMPED, MOST_DAMPED, GAIN = 4.0, 256.0, 0.98
"""The factor by which the damping of fits rises with each try, the greatest, and the ratio of losses that is worth it.
With few examples, or few neurons left, much is fitted to chance."""

NEGLIGIBLE = 1e-4
"""A share of a task's information that makes no difference."""

MOST_SHARING, MOST_ROUNDING = 4.0**5, 4.0**2
"""The greatest factors of the damage of sharing and of rounding; the least are their inverses."""

FIRST, SIZES, CLOSE = 0.3, 7, 1.03
"""A search for a floor starts at this size, tries this many sizes at most, and ends at this ratio of bounds."""

ATTEMPTS, REWEIGHED, BACK = 2, 2, 3
"""How many plans of one size such a search tries, how often it reweighs the tasks, and how many groups step back."""


AT_ONCE = 32
"""The number of examples that go through a network at once where plans are merged: values that stay in the caches."""

MOST_TARGETS = 2**30
"""The most bytes of the originals' outputs that are kept for the merging of all plans; more are computed anew."""


@dataclass(frozen=True, eq=False)
class Candidate:
    """A plan that was merged and measured.

    Attributes:
        name: How the plan was made, in words.
        plan: The plan.
        judged: How well every task came through, on examples that are held out.
        factors: By which the damage of sharing, of dropping and of rounding was multiplied.
        counted: By which the damage to each task was multiplied.
    """

    name: str
    plan: Plan
    judged: Mapping[str, TaskReport]
    factors: tuple[float, float, float]
    counted: Mapping[str, float]

    @property
    def loss(self) -> dict[str, float]:
        """The share of its information that every task loses."""
        return {task: report.lost for task, report in self.judged.items()}


def check_informative(task: str, own: Traced) -> None:
    """Check that the outputs of a network tell what it may lose.

    Args:
        task: The task's name.
        own: The network, with its sensitivities and what they were measured on.

    Raises:
        InvalidCalibration: If its outputs depend neither on the calibration examples nor on small changes of layers.
    """
    if not own.loss.tells:
        raise InvalidCalibration(
            f"the network of {task!r} puts out the same for all calibration examples, so that nothing tells what it "
            "may lose. Give examples as it meets them in use."
        )
    if not own.responds:
        raise InvalidCalibration(
            f"small changes do not show in the outputs of {task!r}, which are certain or come in steps, so nothing "
            "tells what it may lose. Declare them as regression; if the network ends in a softmax, a sigmoid, a "
            "threshold or the like, leave that out."
        )


class BudgetSearch:
    """Makes and verifies plans for one group of networks. Statistics are computed once for all sizes.

    Attributes:
        traced: The networks by task, with moments, sensitivities and calibration data.
        config: How to zip.
        budget: The budget.
        fitting: The part of the calibration data on which plans are merged.
        held_out: The examples by which they are measured.
        weights: The weight of every task's loss: its balance, and what the search for a floor makes of it.
    """

    def __init__(
        self,
        traced: Mapping[str, Traced],
        config: ZipConfig,
        budget: Budget,
        held_out: Mapping[str, Sequence[Batch]] | None = None,
    ) -> None:
        """Split the calibration data and match the networks.

        Args:
            traced: The networks by task, with moments, sensitivities and calibration data.
            config: How to zip.
            budget: The budget.
            held_out: Batches of examples by which plans are measured; one calibration example in `HELD_OUT` if they are
                left out.

        Raises:
            InvalidCalibration: If there are too few examples to hold some out, or if a network's outputs do not depend
                on them.
            InvalidConfig: If settings do not fit the networks.
            IncompatibleNetworks: If the networks differ in topology or in dtype.
            SingularHessian: If a Hessian cannot be factorised.
        """
        self.traced, self.config, self.budget = traced, config, budget
        self.fitting: dict[str, Traced] = dict(traced)
        self.held_out: dict[str, Sequence[Batch]] = dict(held_out or {})
        for task, own in traced.items() if held_out is None else ():
            examples = concatenated(own.batches)
            held = len(examples) // HELD_OUT
            if not held:
                raise InvalidCalibration(
                    f"{task!r} has {len(examples)} calibration examples; a budget holds one in {HELD_OUT} out to "
                    f"measure plans. Give at least {HELD_OUT}."
                )
            size = len(own.batches[0])
            self.fitting[task] = replace(own, batches=divided(examples[:-held], min(size, AT_ONCE)))
            self.held_out[task] = divided(examples[-held:], size)
        for task, own in traced.items():
            check_informative(task, own)
        self._targets = targets_of(traced, self.held_out)
        if config.method == "refit" and sum(map(_bytes_of_targets, traced.values())) <= MOST_TARGETS:
            self.fitting = {
                task: replace(own, targets=sampled_outputs(own.network, own.batches, config))
                for task, own in self.fitting.items()
            }
        balance = config.balance_of(tuple(traced))
        self.weights = {task: len(traced) * weight for task, weight in zip(traced, balance, strict=True)}
        _ = self.rounder if "round" in budget.moves else self.planner  # what cannot be planned is told at once

    @cached_property
    def rounder(self) -> Planner:
        """Makes plans that only round, which are often enough, and need no matching."""
        return Planner(self.traced, self.config, ("round",))

    @cached_property
    def planner(self) -> Planner:
        """Makes plans with all moves that are allowed."""
        moves = self.budget.moves
        if {*moves} == {"round"}:
            return self.rounder
        return Planner(self.traced, self.config, moves, self.rounder.precisions if "round" in moves else None)

    def reweigh(self, weights: Mapping[str, float]) -> None:
        """Count the losses of the tasks with these weights from now on."""
        self.weights = dict(weights)

    def candidates(self, size: float) -> Iterator[Candidate]:
        """Make, merge and measure plans for a size.

        Args:
            size: The size relative to the originals' bytes.

        Yields:
            Each plan that differs from those before it.

        Raises:
            InvalidConfig: If no plan is that small.
        """
        yield from _Candidates(self, size)

    def ranked(self, size: float) -> list[Candidate]:
        """The candidates for a size, the one with the least held-out loss first; of the same neurons one alone."""
        found: list[Candidate] = []
        for candidate in sorted(self.candidates(size), key=self.cost):
            if not any(candidate.plan.same(better.plan) for better in found):
                found.append(candidate)
        return found

    def best(self, size: float) -> Plan:
        """The plan for a size with the least held-out loss."""
        return self.best_of(self.candidates(size)).plan

    def best_of(self, candidates: Iterable[Candidate]) -> Candidate:
        """The candidate with the least held-out loss; of equal ones the first."""
        return min(candidates, key=self.cost)

    def zip(self, plan: Plan) -> ZippedNetwork:
        """Merge by a plan, on all calibration data."""
        return finish(self.merging(plan))

    def merging(self, plan: Plan) -> Iterator[LayerReport | ZippedNetwork]:
        """Return the steps of merging by a plan, on all calibration data; see `mtz_core.merging.walk.merge`."""
        return merge(self.traced, plan.pairings, self.config, (), plan.keep, plan.damping, plan.bits)

    def judged(self, plan: Plan) -> dict[str, TaskReport]:
        """Merge by a plan, on the examples for fitting, and judge the result on those that are held out."""
        zipped = finish(merge(self.fitting, plan.pairings, self.config, (), plan.keep, plan.damping, plan.bits))
        return judge(zipped, self.traced, self.held_out, self._targets)

    def cost(self, candidate: Candidate) -> float:
        """The root of the summed squares of all tasks' weighted losses: the largest count most."""
        return hypot(*(self.weights[task] * loss for task, loss in candidate.loss.items()))


class _Candidates:
    """The plans that are tried for one size, in turn."""

    def __init__(self, search: BudgetSearch, size: float) -> None:
        self._search, self._size, self._cost = search, size, search.cost
        self._moves = {*search.budget.moves}
        self._done: list[Candidate] = []
        self._counted: Mapping[str, float] = search.weights
        self._damping: Mapping[str, float] = {}
        self._rounding = 1.0

    def __iter__(self) -> Iterator[Candidate]:
        """Make, merge and measure the plans, each on those before it."""
        rounder = self._search.rounder if "round" in self._moves else None
        if rounder is not None and rounder.reaches(self._size, {"round"}):
            only = NEVER, NEVER, 1.0
            yield from self._tried("round only", rounder.plan(self._size, counted=self._counted), only)
            if self._cost(self._done[-1]) <= NEGLIGIBLE:
                return  # nothing that is worth a try could do better
            if (alike := rounder.alike(self._size)) is not None:
                yield from self._tried("round only, all layers alike", alike, only)
        if self._reaches("drop"):
            yield from self._dropping()
        if self._reaches("share"):
            yield from self._attempt(f"share{self._suffix}", 1.0, NEVER, self._rounding)
        if {"share", "drop"} <= self._moves:
            yield from self._mixed(1.0)
            yield from self._climb(self._mixed, (1 / STEP, STEP, STEP**-0.5, STEP**0.5), MOST_SHARING)
        if not self._done:
            self._search.planner.plan(self._size)  # raises an error that names the least size
        for damped in self._damped(self._search.best_of(self._done)):
            self._done.append(damped)
            yield damped
        yield from self._even_out(self._search.best_of(self._done))

    @property
    def _suffix(self) -> str:
        return " and round" if "round" in self._moves else " only"

    def _reaches(self, move: Move) -> bool:
        """Whether a move reaches the size by itself, or together with rounding."""
        return move in self._moves and self._search.planner.reaches(self._size, {move} | (self._moves & {"round"}))

    def _attempt(self, name: str, sharing: float, dropping: float = 1.0, rounding: float = 1.0) -> Iterator[Candidate]:
        """Plan with these factors of damage."""
        plan = self._search.planner.plan(self._size, sharing, dropping, self._counted, rounding)
        return self._tried(name, replace(plan, damping=self._damping), (sharing, dropping, rounding))

    def _tried(self, name: str, plan: Plan, factors: tuple[float, float, float]) -> Iterator[Candidate]:
        """Merge and measure a plan unless it is known."""
        known = next((candidate for candidate in self._done if candidate.plan.same(plan)), None)
        self._done.append(known or Candidate(name, plan, self._search.judged(plan), factors, self._counted))
        if known is None:
            yield self._done[-1]

    def _mixed(self, factor: float) -> Iterator[Candidate]:
        return self._attempt(f"sharing counted {factor:.3g} times", factor, 1.0, self._rounding)

    def _dropping(self) -> Iterator[Candidate]:
        """Drop, and round if that is allowed, its damage counted as it does best."""
        yield from self._attempt(f"drop{self._suffix}", NEVER)
        if "round" in self._moves:

            def counted(factor: float) -> Iterator[Candidate]:
                return self._attempt(f"drop, rounding counted {factor:.3g} times", NEVER, 1.0, factor)

            self._rounding = yield from self._climb(counted, (1 / STEP, STEP), MOST_ROUNDING)
        if len({*self._search.weights.values()}) > 1:  # predictions may be far too low for what counts less
            self._counted = dict.fromkeys(self._search.weights, 1.0)
            yield from self._attempt(f"drop{self._suffix}, tasks counted alike", NEVER, 1.0, self._rounding)
            self._counted = self._search.weights

    def _climb(
        self, attempt: Callable[[float], Iterator[Candidate]], steps: Sequence[float], most: float
    ) -> Generator[Candidate, None, float]:
        """Multiply a factor of damage, 1 at first, by each step for as long as this improves the last candidate.

        Args:
            attempt: Tries a factor.
            steps: The steps.
            most: The greatest factor; the least is its inverse.

        Yields:
            The candidates.

        Returns:
            The best factor.
        """
        factor, best = 1.0, self._done[-1]
        for step in steps:
            while 1 / most <= factor * step <= most:
                yield from attempt(factor * step)
                same = self._done[-1] is best  # the damage may have to count for much less until anything changes
                if self._cost(self._done[-1]) >= self._cost(best) and not (same and step == 1 / STEP):
                    break
                factor, best = factor * step, self._done[-1]
        return factor

    def _damped(self, candidate: Candidate) -> Iterator[Candidate]:
        """Merge the same neurons with more damping, each task's fits for as long as this improves it.

        Nothing is tried where damping is chosen layer by layer, or nothing is fitted.

        Yields:
            Each candidate that is worth it.
        """
        if self._search.config.damping == "auto" or self._search.config.method == "paper":
            return
        best, factor = candidate, DAMPED
        name, shares = candidate.name, any(pairing.shared for pairing in candidate.plan.pairings.values())
        while factor <= MOST_DAMPED and self._cost(best) > NEGLIGIBLE:
            more = dict.fromkeys(self._search.traced, factor * self._search.config.fixed_damping)
            tried = self._search.judged(replace(best.plan, damping=more))
            better = {task for task, report in tried.items() if report.lost < best.loss[task]}
            if not better:
                return
            plan = replace(best.plan, damping={**best.plan.damping, **{task: more[task] for task in better}})
            if shares and better < tried.keys():
                tried = self._search.judged(plan)  # what is shared is fitted for all tasks together
            judged = {task: tried[task] if shares or task in better else best.judged[task] for task in tried}
            damped = replace(best, name=f"{name}, damped {factor:g} times", plan=plan, judged=judged)
            if self._cost(damped) > GAIN * self._cost(best):
                return
            yield damped
            best, factor = damped, DAMPED * factor

    def _even_out(self, start: Candidate) -> Iterator[Candidate]:
        """Count the damage to tasks for less, the less they have lost by the last plan, while losses are uneven."""
        self._counted, self._damping = start.counted, start.plan.damping
        last = start
        for number in range(EVENED):
            if self._even(last):
                return
            self._counted = self._evened(self._counted, last)
            yield from self._attempt(f"{start.name}, evened {number + 1} times", *start.factors)
            last = self._done[-1]

    def _even(self, candidate: Candidate) -> bool:
        losses = [self._search.weights[task] * loss for task, loss in candidate.loss.items()]
        return max(losses) <= EVEN * max(min(losses), NEGLIGIBLE)

    def _evened(self, counted: Mapping[str, float], candidate: Candidate) -> dict[str, float]:
        """Count the damage to a task for less, the less the task has lost by a plan in comparison to the others."""
        losses = {task: self._search.weights[task] * max(loss, NEGLIGIBLE) for task, loss in candidate.loss.items()}
        return {task: counted[task] * (loss / max(losses.values())) ** GENTLE for task, loss in losses.items()}


def _bytes_of_targets(own: Traced) -> int:
    """The size of what a network's layers put out at the sampled positions of its calibration data."""
    network = own.network
    return sum(
        own.moments[node.name].count * len(network.graph.rows[node.name].group) * network.state[node.weight].itemsize
        for node in network.graph.layers
    )


@dataclass(frozen=True)
class Validation:
    """A task's validation data: examples that were used for nothing else.

    Attributes:
        examples: The inputs; several by name.
        labels: The class of every example, or its true outputs; of several outputs a dict by name, for some or all of
            them. None where there are none.
        metric: A metric, its name, or a function, see `mtz_core.evaluation.metric_of`; or one for each output by name.
    """

    examples: Any
    labels: Any
    metric: Metrics = "error"


@dataclass(frozen=True, eq=False)
class FloorCandidate:
    """One network that the search for a floor has tried.

    Attributes:
        what: What was tried, in words.
        plan: The plan that the network was merged by.
        size: The stored bytes relative to the originals'.
        lost: The percentage points that each task, or each output as ``task.output``, has lost on validation data.
        kept: Whether the network keeps the floor of every task.
        iterations: The number of iterations of light retraining.
        zipped: The network, after light retraining.
    """

    what: str
    plan: Plan
    size: float
    lost: Mapping[str, float]
    kept: bool
    iterations: int
    zipped: ZippedNetwork = field(repr=False)


class FloorSearch:
    """Searches for the smallest network that keeps every floor on validation data, after light retraining.

    Sizes are bisected. Where some tasks break their floor while others have room, the losses are reweighed. At the end,
    the smallest plan that failed is tried again with its most damaging groups as in the plan that kept the floor, so
    that a layer that is to blame steps back alone.

    Attributes:
        floors: The percentage points that may be lost, by task, or by output as ``task.output``.
    """

    def __init__(
        self,
        budget_search: BudgetSearch,
        originals: Mapping[str, nn.Module],
        training: Mapping[str, Batch],
        validation: Mapping[str, Validation],
        retraining: RetrainConfig,
    ) -> None:
        """Check the validation data and measure the originals.

        Args:
            budget_search: Makes and merges plans.
            originals: The original modules by task, the teachers of light retraining.
            training: The examples of every task for light retraining.
            validation: The validation data of every task.
            retraining: How to retrain.

        Raises:
            InvalidConfig: If validation data, floors or metrics do not fit the tasks.
            InvalidCalibration: If labels do not fit the examples or the classes.
        """
        tasks = tuple(budget_search.traced)
        if set(validation) != set(tasks):
            raise InvalidConfig(
                f"budget.floor: validation data are given for {sorted(validation)}, but the tasks are {sorted(tasks)}."
            )
        self._budget_search, self._validation, self._retraining = budget_search, validation, retraining
        self._reweighed = 0
        self._originals, self._training = originals, training
        examples = {task: own.examples for task, own in validation.items()}
        outputs = {}
        networks = {task: own.network for task, own in budget_search.traced.items()}
        for task, network in networks.items():
            outputs[task] = outputs_of(partial(run, network.graph, network.state), divided(examples[task], 500))
        self._targets = Targets(
            {t: outputs_of(partial(run, n.graph, n.state), divided(training[t], 500)) for t, n in networks.items()},
            outputs,
        )
        self._before = {task: self._errors(task, outputs[task]) for task in tasks}
        self.floors = budget_search.budget.floors([name for errors in self._before.values() for name in errors])

    def _errors(self, task: str, outputs: Batch) -> dict[str, float]:
        """The errors of a task, or of its outputs."""
        own, loss = self._validation[task], self._budget_search.traced[task].loss
        case = Case(outputs, own.labels, self._targets.validation[task], loss)
        return {name: error_of(metric, part, name) for name, (metric, part) in measured(case, own.metric, task).items()}

    def steps(self) -> Iterator[FloorCandidate]:
        """Try networks of different sizes.

        Yields:
            Every network that is tried. The first one stores the originals. The smallest one that is `kept` is the
                result.
        """
        budget_search = self._budget_search
        best = self._try("everything kept", budget_search.planner.whole())
        yield best
        least = budget_search.planner.least_bytes / budget_search.planner.original_bytes
        low, size = least, max(least, FIRST)
        failed: FloorCandidate | None = None
        for _ in range(SIZES):
            tried = []
            for step in self._attempts(size):
                tried.append(step)
                yield step
            if not step.kept and self._uneven(tried[0]):
                budget_search.reweigh(self._fairer(tried[0]))
                for step in self._attempts(size):
                    yield step
            if step.kept:
                best = min(best, step, key=lambda one: one.size)
            else:
                low, failed = max(low, step.size), step
            if best.size < CLOSE * low:
                break
            size = exp((log(low) + log(best.size)) / 2)
        if failed is not None and failed.size < best.size:
            for group, plan in islice(budget_search.planner.stepped_back(failed.plan, best.plan), BACK):
                step = self._try(f"{group} stepped back", plan)
                yield step
                if step.kept:
                    return

    def _attempts(self, size: float) -> Iterator[FloorCandidate]:
        """The likeliest plans for a size, until one keeps the floor."""
        for candidate in self._budget_search.ranked(size)[:ATTEMPTS]:
            step = self._try(f"at most {100 * size:.1f} % stored, {candidate.name}", candidate.plan)
            yield step
            if step.kept:
                return

    def _try(self, what: str, plan: Plan) -> FloorCandidate:
        zipped = self._budget_search.zip(plan)
        iterations = 0
        if plan.bytes < self._budget_search.planner.original_bytes:
            examples = {task: own.examples for task, own in self._validation.items()}
            for step in retrain_steps(
                zipped, self._originals, self._training, examples, self._retraining, outputs=self._targets
            ):
                iterations = step.iteration
        lost: dict[str, float] = {}
        for task, own in self._validation.items():
            outputs = outputs_of(partial(zipped, task=task), divided(own.examples, 500))
            lost |= {name: error - self._before[task][name] for name, error in self._errors(task, outputs).items()}
        size = plan.bytes / self._budget_search.planner.original_bytes
        kept = all(lost[name] <= points + 1e-9 for name, points in self.floors.items())
        return FloorCandidate(what, plan, size, lost, kept, iterations, zipped)

    def _room(self, step: FloorCandidate) -> dict[str, float]:
        """How much of its floor each task has used up; 1 is all of it. Of several floors, the one that is nearest."""
        used = {name: max(step.lost[name], 0.0) / max(points, 0.01) for name, points in self.floors.items()}
        return {task: max(used[name] for name in own if name in used) for task, own in self._before.items()}

    def _uneven(self, step: FloorCandidate) -> bool:
        used = self._room(step).values()
        return min(used) < 0.5 < 1 < max(used) and self._reweighed < REWEIGHED

    def _fairer(self, step: FloorCandidate) -> dict[str, float]:
        """Weights that make a task count more, the more of its floor it has used up."""
        self._reweighed += 1
        used = {task: min(max(share, 0.25), 4.0) for task, share in self._room(step).items()}
        mean = exp(sum(log(share) for share in used.values()) / len(used))
        return {task: self._budget_search.weights[task] * share / mean for task, share in used.items()}
