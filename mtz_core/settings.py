"""What a user decides about zipping and light retraining."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Literal

from mtz_core.errors import InvalidConfig

Method = Literal["refit", "paper"]


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


@dataclass(frozen=True)
class ZipConfig:
    """How to zip.

    `method`: ``refit`` (default: own inputs compensate, layers are refitted to the originals' outputs on what the
    zipped network really feeds them, optimal assignment) or ``paper`` (MTZ as published: neither, greedy matching).
    `share`: the fraction of each hidden layer's neurons to share, of the narrower network's width, or a count per
    layer. `damping`: λ of every Hessian, relative to the mean of its diagonal. `balance`: weight of each task in the
    shared neurons, equal if not given. `patches`: rows that one example contributes to a convolution's Hessian, sampled
    from its positions with `seed`. `sweeps`: how often ``refit`` fits a layer again after the first time, its targets
    then relaxed to what the following activation can tell apart. `descents`: how often ``refit`` matches neuron groups
    again whose pairings depend on each other, or more than two networks. `keep_separate`: paths of submodules that stay
    task-specific, and whose operators need not be understood.
    """

    method: Method = "refit"
    share: float | Mapping[str, int] = 1.0
    damping: float = 5e-3
    balance: Mapping[str, float] | None = None
    patches: int = 64
    sweeps: int = 4
    descents: int = 3
    keep_separate: Sequence[str] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in ("refit", "paper"):
            raise InvalidConfig(f"method: {self.method!r} is not a method. Allowed: 'refit', 'paper'.")
        if isinstance(self.share, Mapping):
            for layer, count in self.share.items():
                if not _is_whole(count) or count < 0:
                    raise InvalidConfig(f"share.{layer}: {count!r} is not a count. Allowed: 0 or more, whole.")
        elif not _is_number(self.share) or not 0 <= self.share <= 1:
            raise InvalidConfig(f"share: {self.share!r} is not a fraction. Allowed: 0 to 1, or {{layer: count}}.")
        if not _is_number(self.damping) or not 0 < self.damping < float("inf"):
            raise InvalidConfig(f"damping: {self.damping!r} is impossible. Allowed: a positive number, such as 0.005.")
        if not _is_whole(self.patches) or self.patches < 1:
            raise InvalidConfig(f"patches: {self.patches!r} is impossible. Allowed: 1 or more, whole.")
        if not _is_whole(self.sweeps) or self.sweeps < 0:
            raise InvalidConfig(f"sweeps: {self.sweeps!r} is impossible. Allowed: 0 or more, whole.")
        if not _is_whole(self.descents) or self.descents < 0:
            raise InvalidConfig(f"descents: {self.descents!r} is impossible. Allowed: 0 or more, whole.")
        if isinstance(self.keep_separate, str) or not all(isinstance(path, str) for path in self.keep_separate):
            raise InvalidConfig(f"keep_separate: {self.keep_separate!r} is no list. Allowed: [path of a submodule, …].")
        if self.balance is not None and not (
            isinstance(self.balance, Mapping)
            and all(_is_number(value) and 0 < value < float("inf") for value in self.balance.values())
        ):
            raise InvalidConfig(f"balance: {self.balance!r} is impossible. Allowed: {{task: positive number}}.")

    def counts(self, widths: Mapping[str, Sequence[int]]) -> dict[str, int]:
        """Neurons to share in each hidden group, given the group's width in every network.

        Raises `InvalidConfig` for layers that do not exist and counts that are too large.
        """
        narrowest = {group: min(values) for group, values in widths.items()}
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

    `iterations` of Adam with a cosine schedule from `learning_rate` to 0, each on `batch_size` examples of every task.
    `temperature` softens the originals' outputs. Every `validate_every` iterations the network is judged;
    after `patience` judgements without improvement training stops early.
    """

    iterations: int = 200
    batch_size: int = 128
    learning_rate: float = 5e-4
    temperature: float = 2.0
    validate_every: int = 20
    patience: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        positive = ("batch_size", "validate_every", "patience", "learning_rate", "temperature")
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise InvalidConfig(f"{name}: {getattr(self, name)} is impossible. Allowed: a positive number.")
        if self.iterations < 0:
            raise InvalidConfig(f"iterations: {self.iterations} is impossible. Allowed: 0 or more.")
