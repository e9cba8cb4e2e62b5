"""What a user decides about zipping and light retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from mtz_core.errors import InvalidConfig

Method = Literal["refit", "paper"]
Move = Literal["share", "drop"]

DEFAULT_DAMPING = 5e-3
Statistics = Literal["updated", "kept"]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class Budget:
    """What a zipped network may cost, in place of counts: how many bytes, or how much accuracy.

    `size`: stored bytes relative to the originals'. `floor`: percentage points that each task may lose on validation
    data, one number or one per task; the smallest network that keeps it is searched for, retrained lightly.
    `moves`: what may be done to save bytes, ``share`` neurons across networks, ``drop`` neurons within one.
    """

    size: float | None = None
    floor: float | Mapping[str, float] | None = None
    moves: Sequence[Move] = ("share", "drop")

    def __post_init__(self) -> None:
        if (self.size is None) == (self.floor is None):
            raise InvalidConfig("budget: give either size (of the originals' bytes) or floor (points to lose).")
        if self.size is not None and (not _is_number(self.size) or not 0 < self.size <= 1):
            raise InvalidConfig(f"budget.size: {self.size!r} is impossible. Allowed: above 0, at most 1.")
        if self.floor is not None:
            for value in self.floor.values() if isinstance(self.floor, Mapping) else (self.floor,):
                if not _is_number(value) or not 0 <= value <= 100:
                    raise InvalidConfig(f"budget.floor: {value!r} is impossible. Allowed: 0 to 100 points.")
        if not self.moves or not set(self.moves) <= {"share", "drop"} or isinstance(self.moves, str):
            raise InvalidConfig(f"budget.moves: {self.moves!r} is impossible. Allowed: share, drop, or both.")

    def floors(self, tasks: Sequence[str]) -> dict[str, float]:
        """Points that each task may lose. Raises `InvalidConfig` unless a mapping names exactly the tasks."""
        if not isinstance(self.floor, Mapping):
            return dict.fromkeys(tasks, float(self.floor or 0.0))
        if set(self.floor) != set(tasks):
            raise InvalidConfig(f"budget.floor: names {sorted(self.floor)}, but the tasks are {sorted(tasks)}.")
        return {task: float(self.floor[task]) for task in tasks}


@dataclass(frozen=True)
class ZipConfig:
    """How to zip.

    `method`: ``refit`` (default: own inputs compensate, layers are refitted to the originals' outputs on what the
    zipped network really feeds them, optimal assignment) or ``paper`` (MTZ as published: neither, greedy matching).
    `share`: the fraction of each hidden layer's neurons to share, of the narrower network's width, or a count per
    layer, or a `Budget` to plan for. `damping`: λ of every Hessian, relative to the mean of its diagonal, or ``auto``:
    chosen by held-out calibration data for every refit (matching takes the default). `balance`: weight of each task in
    the shared neurons, equal if not given. `patches`: rows that one example contributes to a convolution's Hessian,
    sampled from its positions with `seed`. `refit_rounds`: how often ``refit`` fits a layer again after the first time,
    its targets then relaxed to what the following activation can tell apart. `matching_rounds`: how often ``refit``
    matches neuron groups again whose pairings depend on each other, or more than two networks. `keep_separate`: paths
    of submodules that stay task-specific, and whose operators need not be understood.
    """

    method: Method = "refit"
    share: float | Mapping[str, int] | Budget = 1.0
    damping: float | Literal["auto"] = DEFAULT_DAMPING
    balance: Mapping[str, float] | None = None
    patches: int = 64
    refit_rounds: int = 4
    matching_rounds: int = 3
    keep_separate: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("refit", "paper"):
            raise InvalidConfig(f"method: {self.method!r} is not a method. Allowed: 'refit', 'paper'.")
        if isinstance(self.share, Mapping):
            for layer, count in self.share.items():
                if not _is_whole(count) or count < 0:
                    raise InvalidConfig(f"share.{layer}: {count!r} is not a count. Allowed: 0 or more, whole.")
        elif isinstance(self.share, Budget):
            if self.method == "paper" and "drop" in self.share.moves:
                raise InvalidConfig("budget.moves: method 'paper' does not drop neurons. Allowed: [share].")
        elif not _is_number(self.share) or not 0 <= self.share <= 1:
            raise InvalidConfig(f"share: {self.share!r} is not a fraction. Allowed: 0 to 1, or {{layer: count}}.")
        if self.damping != "auto" and (not _is_number(self.damping) or not 0 < self.damping < float("inf")):
            raise InvalidConfig(
                f"damping: {self.damping!r} is impossible. Allowed: a positive number, such as 0.005, or auto."
            )
        if not _is_whole(self.patches) or self.patches < 1:
            raise InvalidConfig(f"patches: {self.patches!r} is impossible. Allowed: 1 or more, whole.")
        if not _is_whole(self.refit_rounds) or self.refit_rounds < 0:
            raise InvalidConfig(f"sweeps: {self.refit_rounds!r} is impossible. Allowed: 0 or more, whole.")
        if not _is_whole(self.matching_rounds) or self.matching_rounds < 0:
            raise InvalidConfig(f"descents: {self.matching_rounds!r} is impossible. Allowed: 0 or more, whole.")
        if isinstance(self.keep_separate, str) or not all(isinstance(path, str) for path in self.keep_separate):
            raise InvalidConfig(f"keep_separate: {self.keep_separate!r} is no list. Allowed: [path of a submodule, …].")
        if self.balance is not None and not (
            isinstance(self.balance, Mapping)
            and all(_is_number(value) and 0 < value < float("inf") for value in self.balance.values())
        ):
            raise InvalidConfig(f"balance: {self.balance!r} is impossible. Allowed: {{task: positive number}}.")

    @property
    def fixed_damping(self) -> float:
        """The damping where it is not chosen by held-out data."""
        return DEFAULT_DAMPING if self.damping == "auto" else self.damping

    def counts(self, widths: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Neurons to share in each hidden group, given the group's width in every network.

        Raises `InvalidConfig` for layers that do not exist and counts that are too large.
        """
        narrowest = {group: min(values) for group, values in widths.items()}
        if isinstance(self.share, Budget):
            return narrowest
        if not isinstance(self.share, Mapping):
            return {group: round(self.share * width) for group, width in narrowest.items()}
        for layer, count in self.share.items():
            if layer not in narrowest:
                known = ", ".join(narrowest) or "none"
                raise InvalidConfig(f"share.{layer}: there is no such hidden layer. Hidden layers: {known}.")
            if count > narrowest[layer]:
                raise InvalidConfig(f"share.{layer}: {count} is impossible. Allowed: 0 to {narrowest[layer]}.")
        return {group: int(self.share.get(group, 0)) for group in narrowest}

    def balance_of(self, tasks: Sequence[str]) -> list[float]:
        """Weights of the tasks, summing to 1. Raises `InvalidConfig` unless `balance` names exactly the tasks."""
        if self.balance is None:
            return [1 / len(tasks)] * len(tasks)
        if set(self.balance) != set(tasks):
            raise InvalidConfig(f"balance: names {sorted(self.balance)}, but the tasks are {sorted(tasks)}.")
        total = sum(self.balance.values())
        return [self.balance[task] / total for task in tasks]


@dataclass(frozen=True)
class RetrainConfig:
    """How to retrain lightly.

    `iterations` of Adam at `learning_rate`, each on `batch_size` examples of every task; what is judged and kept is a
    running average of the weights. `labels` is the weight of cross-entropy with labels beside distillation: none are
    read at 0, nothing else counts at 1. `temperature` softens the outputs in distillation. `balance`: weight of each
    task's loss, equal if not given. `statistics` of batch normalisations are ``updated``, each task's following its
    batches, or ``kept``. Every `validate_every` iterations the network is judged; after `patience` judgements without
    improvement training stops early.
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
        ZipConfig(balance=self.balance)  # its rules hold here, too

    def balance_of(self, tasks: Sequence[str]) -> list[float]:
        """Weights of the tasks, summing to 1. Raises `InvalidConfig` unless `balance` names exactly the tasks."""
        return ZipConfig(balance=self.balance).balance_of(tasks)
