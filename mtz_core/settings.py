"""What a user decides about zipping and light retraining."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal, TypeGuard, get_args

from mtz_core.errors import InvalidConfig

Method = Literal["refit", "paper"]
Move = Literal["share", "drop", "round"]
MOVES: tuple[Move, ...] = get_args(Move)

BITS = (8, 6, 5, 4, 3, 2)
"""The numbers of bits to which weights can be rounded."""

Kind = Literal["logits", "probabilities", "multi-label", "regression", "heatmap", "embedding"]
KINDS: tuple[Kind, ...] = get_args(Kind)
HAVE_TOLERANCE = ("regression", "heatmap")

METRIC_NAMES = (
    *("error", "top5_error", "balanced_error", "agreement", "output_error", "mean_absolute_error", "correlation"),
    "average_precision",
)
"""Names of `mtz_core.evaluation.METRICS`."""

DEFAULT_DAMPING = 5e-3
Statistics = Literal["updated", "kept"]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_seed(seed: object) -> None:
    if not _is_whole(seed) or not 0 <= seed < 2**63:
        raise InvalidConfig(f"seed: {seed!r} is impossible. Allowed: 0 or more, whole.")


@dataclass(frozen=True)
class Output:
    """What a network puts out, as its owner declares it.

    Attributes:
        kind: ``logits`` of a softmax, ``probabilities`` that sum to 1, ``multi-label`` (logits or the outputs of a
            sigmoid, one for each label), ``regression`` (numbers), ``heatmap`` (numbers for each channel and position)
            or ``embedding`` (a direction). Classes, labels and channels lie along the second axis.
        tolerance: The error that makes no difference, in units of the outputs, for ``regression`` and ``heatmap``.
            Without it each output counts in units of its own spread on calibration data. Range: above 0.
        weight: How much it counts beside other outputs of the same network. Range: above 0.

    Raises:
        InvalidConfig: The kind is unknown, the tolerance has no meaning for it, or a number is out of range.
    """

    kind: Kind
    tolerance: float | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InvalidConfig(f"output: {self.kind!r} is no kind of output. Allowed: {', '.join(KINDS)}.")
        if self.tolerance is not None:
            if self.kind not in HAVE_TOLERANCE:
                raise InvalidConfig(f"output.tolerance: {self.kind} has none. Leave it out, or declare regression.")
            if not _is_number(self.tolerance) or not 0 < self.tolerance < float("inf"):
                raise InvalidConfig(f"output.tolerance: {self.tolerance!r} is impossible. Allowed: a positive number.")
        if not _is_number(self.weight) or not 0 < self.weight < float("inf"):
            raise InvalidConfig(f"output.weight: {self.weight!r} is impossible. Allowed: a positive number.")

    @classmethod
    def declared(cls, given: Output | str | Mapping[str, Any] | None) -> Output | None:
        """Take a declaration in any of its forms: a kind, ``{kind: …, …}``, or None to have it guessed.

        Returns:
            The declaration; None if there is none.

        Raises:
            InvalidConfig: It is none of these, or impossible.
        """
        if given is None or isinstance(given, Output):
            return given
        if isinstance(given, Mapping):
            if "kind" not in given or not given.keys() <= _OUTPUT_FIELDS:
                raise InvalidConfig(
                    f"output: {dict(given)!r} is no declaration. Allowed: {{kind: …, tolerance: …, weight: …}}."
                )
            return cls(**given)
        return cls(given)  # type: ignore[arg-type]


_OUTPUT_FIELDS = frozenset({"kind", "tolerance", "weight"})


def names_outputs(given: Mapping[Any, Any]) -> bool:
    """Whether a mapping declares several outputs by name; otherwise it declares one, as ``{kind: …, …}``.

    An output may be called ``kind``, ``tolerance`` or ``weight``. If such a name stands alone, the mapping says by a
    value that is a declaration itself, as ``{"kind": {"kind": "logits"}}``, that it is meant.

    Args:
        given: What is declared of a network's outputs.

    Returns:
        Whether its keys are names of outputs.
    """
    if not given.keys() & _OUTPUT_FIELDS:
        return True
    if any(isinstance(own, (Output, Mapping)) for own in given.values()):
        return True
    return not given.keys() <= _OUTPUT_FIELDS and all(own is None or own in KINDS for own in given.values())


Outputs = Output | Mapping[str, Output]
"""What a network puts out: one output, or several by name."""


def _declared(given: Any) -> Outputs | None:
    """Take what is declared of a network's outputs: of one, or of each by its name."""
    if isinstance(given, Mapping) and given and names_outputs(given):
        found = {str(name): Output.declared(own) for name, own in given.items()}
        return {name: own for name, own in found.items() if own is not None}
    return Output.declared(given)


@dataclass(frozen=True)
class Budget:
    """What a zipped network may cost: a size or an accuracy floor, one of them.

    Attributes:
        size: Stored bytes at most, relative to the originals' bytes. Range: above 0, at most 1.
        floor: Percentage points that a task may lose on validation data, one number for all tasks or one for each; for
            one of several outputs that are measured, it is named ``task.output``. The smallest network that keeps the
            floor after light retraining is searched for. Range: 0 to 100.
        moves: What may be done to save bytes: ``share`` neurons across networks, ``drop`` neurons within one network,
            ``round`` weights to a few bits.

    Raises:
        InvalidConfig: A value is out of range, or not exactly one of `size` and `floor` is given.
    """

    size: float | None = None
    floor: float | Mapping[str, float] | None = None
    moves: Sequence[Move] = MOVES

    def __post_init__(self) -> None:
        if (self.size is None) == (self.floor is None):
            raise InvalidConfig("budget: give either size (of the originals' bytes) or floor (points to lose).")
        if self.size is not None and (not _is_number(self.size) or not 0 < self.size <= 1):
            raise InvalidConfig(f"budget.size: {self.size!r} is impossible. Allowed: above 0, at most 1.")
        if self.floor is not None:
            for value in self.floor.values() if isinstance(self.floor, Mapping) else (self.floor,):
                if not _is_number(value) or not 0 <= value <= 100:
                    raise InvalidConfig(f"budget.floor: {value!r} is impossible. Allowed: 0 to 100 points.")
        if (
            isinstance(self.moves, str)
            or not isinstance(self.moves, Sequence)
            or not self.moves
            or not all(move in MOVES for move in self.moves)
        ):
            raise InvalidConfig(
                f"budget.moves: {self.moves!r} is impossible. Allowed: one or more of {', '.join(MOVES)}."
            )

    def floors(self, measured: Sequence[str]) -> dict[str, float]:
        """Return the percentage points that may be lost, by what is measured: tasks, or outputs as ``task.output``.

        Raises:
            InvalidConfig: `floor` is a mapping that leaves a task out, or names what is not measured.
        """
        tasks = {name.partition(".")[0] for name in measured}
        given = self.floor if isinstance(self.floor, Mapping) else dict.fromkeys(tasks, self.floor or 0.0)
        if {name.partition(".")[0] for name in given} != tasks:
            raise InvalidConfig(f"budget.floor: names {sorted(given)}, but the tasks are {sorted(tasks)}.")
        return floors_by_name(given, measured, "budget.floor")


def floors_by_name(floors: Mapping[str, float], measured: Sequence[str], where: str) -> dict[str, float]:
    """Say what each floor holds for.

    Args:
        floors: The points that may be lost, by task, or by output as ``task.output``.
        measured: What is measured: tasks, or their outputs.
        where: The setting, for errors.

    Returns:
        The points by what is measured. A floor for a task of which outputs are measured holds for each of them that has
        none of its own.

    Raises:
        InvalidConfig: A floor is for something that is not measured.
    """
    found: dict[str, float] = {}
    for name in sorted(floors, key=len):
        own = [one for one in measured if one == name] or [one for one in measured if one.startswith(f"{name}.")]
        if not own:
            raise InvalidConfig(f"{where}: nothing is measured under {name!r}. Measured: {', '.join(measured)}.")
        found |= dict.fromkeys(own, float(floors[name]))
    return found


@dataclass(frozen=True)
class ZipConfig:
    """How to zip.

    Attributes:
        method: ``refit``: own inputs compensate, pairs are assigned at least total cost, and each layer is fitted to
            the originals' outputs on what the zipped network feeds it. ``paper``: MTZ as published, without any of it.
        share: Neurons to share in each hidden layer: a fraction of the narrowest network's width (range: 0 to 1), or
            ``{layer: count}``, where layers that are not named share nothing. If neither this nor a budget is given,
            all that can be shared.
        damping: λ of every Hessian, relative to the mean of its diagonal. Range: above 0. ``auto`` chooses it on
            held-out calibration data for every layer that is fitted; matching then uses 0.005.
        balance: Weight of each task in the shared neurons, ``{task: weight}``. Range: above 0. None weighs all alike.
        patches: Positions of one example that enter a convolution's Hessian, sampled with `seed`. Range: 1 or more.
            One in groups takes no more than a neuron has inputs, or 8.
        refit_rounds: How often ``refit`` fits a layer again after the first time, each time to targets relaxed to what
            the next activation can tell apart. Range: 0 or more.
        matching_rounds: How often ``refit`` matches again the neuron groups whose pairings depend on each other, and
            the tuples of more than two networks. Range: 0 or more.
        keep_separate: Paths of submodules that stay task-specific, or names of operators as errors show them; ``""`` is
            the outermost forward pass. What is kept separate need not be understood, and networks may differ there: a
            path need not be in all of them.
        zip: Paths of the submodules that take part, as if everything else were listed under `keep_separate`. All
            networks have them. Empty: everything takes part.
        seed: Seed of everything that is sampled. Range: 0 or more.
        budget: What the zipped network may cost, in place of `share`.
        outputs: What each network puts out, ``{task: Output}``, or its kind alone; of several outputs
            ``{task: {name: Output}}``. Where it is left out it is guessed.

    Raises:
        InvalidConfig: A value is out of range, or both `share` and `budget` are given.
    """

    method: Method = "refit"
    share: float | Mapping[str, int] | None = None
    damping: float | Literal["auto"] = DEFAULT_DAMPING
    balance: Mapping[str, float] | None = None
    patches: int = 64
    refit_rounds: int = 4
    matching_rounds: int = 3
    keep_separate: Sequence[str] = ()
    seed: int = 0
    budget: Budget | None = None
    outputs: Mapping[str, Output | Kind | Mapping[str, Any]] | None = None
    zip: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.method not in ("refit", "paper"):
            raise InvalidConfig(f"method: {self.method!r} is not a method. Allowed: 'refit', 'paper'.")
        self._check_sharing()
        if self.damping != "auto" and (not _is_number(self.damping) or not 0 < self.damping < float("inf")):
            raise InvalidConfig(
                f"damping: {self.damping!r} is impossible. Allowed: a positive number, such as 0.005, or auto."
            )
        if not _is_whole(self.patches) or self.patches < 1:
            raise InvalidConfig(f"patches: {self.patches!r} is impossible. Allowed: 1 or more, whole.")
        if not _is_whole(self.refit_rounds) or self.refit_rounds < 0:
            raise InvalidConfig(f"refit_rounds: {self.refit_rounds!r} is impossible. Allowed: 0 or more, whole.")
        if not _is_whole(self.matching_rounds) or self.matching_rounds < 0:
            raise InvalidConfig(f"matching_rounds: {self.matching_rounds!r} is impossible. Allowed: 0 or more, whole.")
        _check_seed(self.seed)
        for name, paths in (("keep_separate", self.keep_separate), ("zip", self.zip)):
            if (
                isinstance(paths, str)
                or not isinstance(paths, Sequence)
                or not all(isinstance(path, str) for path in paths)
            ):
                raise InvalidConfig(f"{name}: {paths!r} is no list. Allowed: [path of a submodule, …].")
        if self.balance is not None and not (
            isinstance(self.balance, Mapping)
            and all(_is_number(value) and 0 < value < float("inf") for value in self.balance.values())
        ):
            raise InvalidConfig(f"balance: {self.balance!r} is impossible. Allowed: {{task: positive number}}.")
        if self.outputs is not None:
            if not isinstance(self.outputs, Mapping):
                raise InvalidConfig(f"outputs: {self.outputs!r} is impossible. Allowed: {{task: kind of output}}.")
            object.__setattr__(self, "outputs", {task: _declared(own) for task, own in self.outputs.items()})

    def _take_former_budget(self) -> None:
        """Take a budget given as `share`, as before version 0.2, for one."""
        former: object = self.share
        if isinstance(former, Budget):
            warnings.warn(
                "ZipConfig(share=Budget(…)) is deprecated and will be refused from version 0.3 on. "
                "Write ZipConfig(budget=Budget(…)).",
                FutureWarning,
                stacklevel=5,
            )
            if self.budget is not None:
                raise InvalidConfig("share: two budgets are given. Leave out share.")
            object.__setattr__(self, "budget", former)
            object.__setattr__(self, "share", None)

    def _check_sharing(self) -> None:
        self._take_former_budget()
        if self.budget is not None:
            if not isinstance(self.budget, Budget):
                raise InvalidConfig(
                    f"budget: {self.budget!r} is not a Budget. Allowed: Budget(size=…), Budget(floor=…)."
                )
            if self.share is not None:
                raise InvalidConfig("share: a budget decides what is shared. Give either share or budget.")
            if self.method == "paper" and {*self.budget.moves} != {"share"}:
                raise InvalidConfig("budget.moves: method 'paper' neither drops neurons nor rounds. Allowed: [share].")
        elif isinstance(self.share, Mapping):
            for layer, count in self.share.items():
                if not isinstance(layer, str):
                    raise InvalidConfig(f"share: {layer!r} is no name of a layer. Names are strings: '{layer}'.")
                if not _is_whole(count) or count < 0:
                    raise InvalidConfig(f"share.{layer}: {count!r} is not a count. Allowed: 0 or more, whole.")
        elif self.share is not None and (not _is_number(self.share) or not 0 <= self.share <= 1):
            raise InvalidConfig(f"share: {self.share!r} is not a fraction. Allowed: 0 to 1, or {{layer: count}}.")

    @property
    def shared_fraction(self) -> float | None:
        """The fraction of every hidden layer's neurons to share; None with counts or a budget."""
        if self.share is None:
            return None if self.budget is not None else 1.0
        return None if isinstance(self.share, Mapping) else float(self.share)

    @property
    def fixed_damping(self) -> float:
        """The damping where it is not chosen by held-out data."""
        return DEFAULT_DAMPING if self.damping == "auto" else self.damping

    def counts(self, widths: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Return how many neurons each hidden group shares; with a budget, how many it can share at most.

        Args:
            widths: The width of each group in every network.

        Raises:
            InvalidConfig: `share` names a layer that does not exist, or too many of its neurons.
        """
        narrowest = {group: min(values) for group, values in widths.items()}
        if self.budget is not None:
            return narrowest
        if not isinstance(self.share, Mapping):
            fraction = self.shared_fraction or 0.0
            return {group: round(fraction * width) for group, width in narrowest.items()}
        for layer, count in self.share.items():
            if layer not in narrowest:
                known = ", ".join(narrowest) or "none"
                raise InvalidConfig(f"share.{layer}: there is no such hidden layer. Hidden layers: {known}.")
            if count > narrowest[layer]:
                raise InvalidConfig(f"share.{layer}: {count} is impossible. Allowed: 0 to {narrowest[layer]}.")
        return {group: int(self.share.get(group, 0)) for group in narrowest}

    def output_of(self, task: str) -> Outputs | None:
        """Return what a task's network is declared to put out; None if that is to be guessed."""
        return _declared((self.outputs or {}).get(task))

    def balance_of(self, tasks: Sequence[str]) -> list[float]:
        """Return the weights of the tasks, which sum to 1.

        Raises:
            InvalidConfig: `balance` does not name exactly the tasks.
        """
        if self.balance is None:
            return [1 / len(tasks)] * len(tasks)
        if set(self.balance) != set(tasks):
            raise InvalidConfig(f"balance: names {sorted(self.balance)}, but the tasks are {sorted(tasks)}.")
        total = sum(self.balance.values())
        return [self.balance[task] / total for task in tasks]


@dataclass(frozen=True)
class RetrainConfig:
    """How to retrain lightly, with Adam.

    Attributes:
        iterations: Steps at most; each takes one batch of every task. Range: 0 or more.
        batch_size: Examples of a batch. Range: 1 or more.
        learning_rate: Adam's, after a short warm-up; a quarter of it after each validation without improvement. Range:
            above 0.
        labels: Weight of cross-entropy with labels; distillation from the originals has the rest. Range: 0 (labels are
            not read) to 1 (nothing else counts).
        temperature: Softens the outputs in distillation. Range: above 0.
        balance: Weight of each task's loss, ``{task: weight}``. Range: above 0. None weighs all alike.
        statistics: Of batch normalisations: ``updated``, each task's follow its batches, or ``kept`` as they are.
        validate_every: Iterations between two validations. Range: 1 or more.
        patience: Validations without improvement after which training stops. Range: 1 or more.
        seed: Seed of the order of the examples.

    Raises:
        InvalidConfig: A value is out of range.
    """

    iterations: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    labels: float = 0.0
    temperature: float = 4.0
    balance: Mapping[str, float] | None = None
    statistics: Statistics = "updated"
    validate_every: int = 20
    patience: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("batch_size", "validate_every", "patience"):
            if not _is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise InvalidConfig(f"{name}: {getattr(self, name)!r} is impossible. Allowed: 1 or more, whole.")
        for name in ("learning_rate", "temperature"):
            if not _is_number(getattr(self, name)) or not 0 < getattr(self, name) < float("inf"):
                raise InvalidConfig(f"{name}: {getattr(self, name)!r} is impossible. Allowed: a positive number.")
        if not _is_whole(self.iterations) or self.iterations < 0:
            raise InvalidConfig(f"iterations: {self.iterations!r} is impossible. Allowed: 0 or more, whole.")
        if not _is_number(self.labels) or not 0 <= self.labels <= 1:
            raise InvalidConfig(
                f"labels: {self.labels!r} is not a weight. Allowed: 0 (none are read) to 1 (only they)."
            )
        if self.statistics not in ("updated", "kept"):
            raise InvalidConfig(f"statistics: {self.statistics!r} is unknown. Allowed: 'updated', 'kept'.")
        _check_seed(self.seed)
        ZipConfig(balance=self.balance)  # its rules hold here, too

    def balance_of(self, tasks: Sequence[str]) -> list[float]:
        """Return the weights of the tasks, which sum to 1.

        Raises:
            InvalidConfig: `balance` does not name exactly the tasks.
        """
        return ZipConfig(balance=self.balance).balance_of(tasks)
