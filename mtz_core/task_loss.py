"""What a network's outputs mean, and the loss in which a task's damage is counted.

Damage is what a task loses of its own information, whatever its outputs are. Every kind of output has *natural
parameters* ``η`` and a divergence between two outputs, of an original and of what stands in for it:

- ``logits``: ``η`` are the outputs, ``T² KL(softmax(η/T) ‖ softmax(η̂/T))`` (Hinton, Vinyals, Dean 2015).
- ``probabilities``: the same with ``η = log p``.
- ``multi-label``: ``T² Σ KL`` of a Bernoulli distribution for each output; ``η`` are its logits, also where a sigmoid
  ends the network.
- ``regression``: ``½ ‖η̂ − η‖²``, with ``η`` the outputs in units of their own spread, or of a declared tolerance.
- ``heatmap``: the same with one spread for each channel, over all positions.
- ``embedding``: the same with ``η`` the outputs' direction.

Divided by the divergence of the best constant answer, the *information* in the outputs, this is the share of its own
information that a task loses: 0 for the original itself, 1 for an answer that does not depend on the input. So losses
of different kinds can be compared and added. The loss of several outputs is the mean of theirs, by declared weights;
an output that does not depend on the input has none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import log
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mtz_core.batches import Batch, NamedTensors, tensors_of
from mtz_core.errors import InvalidCalibration
from mtz_core.settings import HAVE_TOLERANCE, Kind, Output, Outputs

TEMPERATURE = 2.0
"""The temperature of predictions. Without it, a confident network would look as if it could lose everything."""

Distillation = Callable[[Any, Any], Float[Tensor, ""]]
"""A loss of outputs against the original's."""

_CATEGORICAL = ("logits", "probabilities")

_TELLING = 0.1
"""Outputs are taken for logits if their softmax tells at least this share of what it could about the input."""

_CERTAIN = 0.5
"""Outputs are not taken for logits if their softmax is 0 or 1 for more than this share of the examples."""

_CLOSE = 1e-3
"""How close to 1 a sum of probabilities or the length of a direction is."""

_WITHIN = 0.1
"""Numbers agree within this share of their spread, unless a tolerance is declared."""

_LEAST_SPREAD = 1e-2
"""The least spread of an output, relative to the root mean square of all: an output that hardly varies is not all."""

_LEAST_PROBABILITY = 1e-7


@dataclass(frozen=True, eq=False)
class TaskLoss:
    """The loss of one task, made for its original network's outputs.

    Attributes:
        output: The kind of output.
        guessed: Why this kind was taken, in words; empty where it was declared.
        squashed: Whether outputs are probabilities, of which natural parameters are the logarithms.
        scale: The unit of every output, for kinds that have one.
        information: The divergence of the best constant answer from the original's outputs, at `TEMPERATURE`.
    """

    output: Output
    guessed: str
    squashed: bool
    scale: Float[Tensor, "#outputs ..."] | None
    information: float

    @classmethod
    def of(
        cls,
        targets: Float[Tensor, "examples ..."],
        declared: Output | None = None,
        ending: str = "",
    ) -> TaskLoss:
        """Make the loss of a task.

        Args:
            targets: The original network's outputs.
            declared: What they mean; guessed from the values and the last operator if it is left out.
            ending: The ATen operator that computes them, if it is known.

        Returns:
            The loss.

        Raises:
            InvalidCalibration: If outputs contradict what is declared.
        """
        output, why = (declared, "") if declared is not None else _guess(targets, ending)
        squashed = output.kind == "probabilities"
        if output.kind == "multi-label":
            squashed = bool(((targets >= 0) & (targets <= 1)).all())
        problem = _contradiction(output, targets)
        if problem:
            raise InvalidCalibration(
                f"its outputs are declared as {output.kind}, but {problem}. Declare what they are."
            )
        loss = cls(output, why, squashed, _scale(output, targets), 0.0)
        return replace(loss, information=loss.information_in(targets))

    @property
    def kind(self) -> Kind:
        """The kind of output."""
        return self.output.kind

    @property
    def parts(self) -> Mapping[str, tuple[float, TaskLoss]]:
        """The weight and the loss of every output, by its name; that of one alone is empty."""
        return {"": (1.0, self)}

    @property
    def tells(self) -> bool:
        """Whether the outputs depend on the input, so far as the data show."""
        return self.information > 1e-12

    def natural(self, outputs: Float[Tensor, "batch ..."]) -> Float[Tensor, "batch ..."]:
        """The natural parameters of outputs; their gradients are those of the outputs."""
        if self.kind == "embedding":
            return F.normalize(outputs, dim=_axis(outputs))
        if self.scale is not None:
            return outputs / self.scale
        if not self.squashed:
            return outputs
        likely = outputs.clamp(_LEAST_PROBABILITY, 1.0)
        return (
            likely.log()
            if self.kind == "probabilities"
            else likely.log() - (1 - outputs).clamp_min(_LEAST_PROBABILITY).log()
        )

    def divergences(
        self,
        outputs: Float[Tensor, "batch ..."],
        targets: Float[Tensor, "batch ..."],
        temperature: float = TEMPERATURE,
    ) -> Float[Tensor, " batch"]:
        """The divergence of outputs from the original's, for every example."""
        found, aim = self.natural(outputs), self.natural(targets)
        if self.kind in _CATEGORICAL:
            axis = _axis(found)
            each = F.kl_div(
                F.log_softmax(found / temperature, dim=axis),
                F.log_softmax(aim / temperature, dim=axis),
                reduction="none",
                log_target=True,
            )
            return temperature**2 * each.flatten(1).sum(dim=1) if each.ndim > 1 else temperature**2 * each
        if self.kind == "multi-label":
            found, aim = found / temperature, aim / temperature
            each = torch.sigmoid(aim) * (F.logsigmoid(aim) - F.logsigmoid(found))
            each = each + torch.sigmoid(-aim) * (F.logsigmoid(-aim) - F.logsigmoid(-found))
            return temperature**2 * each.reshape(len(each), -1).sum(dim=1)
        return 0.5 * (found - aim).square().reshape(len(found), -1).sum(dim=1)

    def information_in(self, targets: Float[Tensor, "batch ..."], temperature: float = TEMPERATURE) -> float:
        """The mean divergence of the best constant answer from these outputs."""
        aim = self.natural(targets).to(torch.float64)
        if self.kind in _CATEGORICAL:
            logs = F.log_softmax(aim / temperature, dim=_axis(aim))
            mean = torch.logsumexp(logs, dim=0, keepdim=True) - log(len(aim))
            return temperature**2 * float((logs.exp() * (logs - mean)).sum()) / len(aim)
        if self.kind == "multi-label":
            chance = torch.sigmoid(aim / temperature)
            return temperature**2 * float((_entropy(chance.mean(dim=0)) - _entropy(chance).mean(dim=0)).sum())
        return 0.5 * float((aim - aim.mean(dim=0)).square().sum()) / len(aim)

    def __call__(self, outputs: Float[Tensor, "batch ..."], targets: Float[Tensor, "batch ..."]) -> Float[Tensor, ""]:
        """The share of its information that a task loses, mean over the examples."""
        return self.divergences(outputs, targets).mean() / (self.information if self.tells else 1.0)

    def distillation(self, targets: Float[Tensor, "examples ..."], temperature: float) -> Distillation:
        """The divergence at another temperature, as a share of the information in these targets."""
        most = self.information_in(targets, temperature) if self.tells else 1.0

        def distil(outputs: Tensor, aims: Tensor) -> Tensor:
            return self.divergences(outputs, aims, temperature).mean() / most

        return distil

    def score(self, natural: Float[Tensor, "batch ..."], generator: torch.Generator) -> Float[Tensor, "batch ..."]:
        """Draw a gradient by the natural parameters whose second moment is the curvature of the loss.

        For distributions it is the gradient of ``log p(c | x)`` with ``c`` drawn from the network's own predictions,
        the Fisher information; for numbers a random sign for each, Gauss and Newton's matrix.

        Args:
            natural: The natural parameters of the network's outputs.
            generator: The generator of what is drawn.

        Returns:
            The gradient.
        """
        if self.kind in _CATEGORICAL:
            axis = _axis(natural)
            soft = torch.softmax(natural.movedim(axis, -1) / TEMPERATURE, dim=-1)
            drawn = torch.multinomial(soft.flatten(0, -2), 1, generator=generator).reshape(*soft.shape[:-1], 1)
            score = (-soft).scatter_add(-1, drawn, torch.ones_like(soft[..., :1])).movedim(-1, axis)
        elif self.kind == "multi-label":
            chance = torch.sigmoid(natural / TEMPERATURE)
            score = torch.bernoulli(chance, generator=generator) - chance
        else:
            score = 2 * torch.bernoulli(torch.full_like(natural, 0.5), generator=generator) - 1
        return score / self.information**0.5 if self.tells else score

    def agreements(
        self, outputs: Float[Tensor, "batch ..."], targets: Float[Tensor, "batch ..."]
    ) -> Float[Tensor, " batch"]:
        """How far outputs agree with the original's, for every example.

        Of logits and probabilities, whether the likeliest class is the same; of labels, the intersection over the union
        of those that are likelier than not; of numbers, the share of those within the tolerance, or within a tenth of
        their spread; of directions, their cosine.

        Args:
            outputs: The outputs.
            targets: The original's outputs for the same examples.

        Returns:
            The agreement of every example: 1 is full, 0 none.
        """
        if self.kind in _CATEGORICAL:
            same = outputs.argmax(dim=_axis(outputs)) == targets.argmax(dim=_axis(targets))
            return _mean(same.double())
        found, aim = self.natural(outputs), self.natural(targets)
        if self.kind == "embedding":
            return _mean((found * aim).sum(dim=_axis(found)).double().clamp_min(0))
        if self.kind == "multi-label":
            both, either = ((found > 0) & (aim > 0)), ((found > 0) | (aim > 0))
            common, union = (x.reshape(len(x), -1).sum(dim=1).double() for x in (both, either))
            return torch.where(union > 0, common / union.clamp_min(1), 1.0)
        within = 1.0 if self.output.tolerance is not None else _WITHIN
        return _mean(((found - aim).abs() <= within).double())

    def agreement(self, outputs: Float[Tensor, "batch ..."], targets: Float[Tensor, "batch ..."]) -> float:
        """The mean of `agreements`, in percent."""
        return 100 * float(self.agreements(outputs, targets).mean())

    def relative_error(self, outputs: Float[Tensor, "batch ..."], targets: Float[Tensor, "batch ..."]) -> float:
        """``E‖η̂ − η‖² / E‖η − E η‖²``, with the mean over classes taken off logits, which says nothing."""
        found, aim = (self.natural(values).double() for values in (outputs, targets))
        if self.kind in _CATEGORICAL:
            found, aim = (values - values.mean(dim=_axis(values), keepdim=True) for values in (found, aim))
        spread = float((aim - aim.mean(dim=0)).square().sum())
        return float((found - aim).square().sum()) / (spread or 1.0)


@dataclass(frozen=True, eq=False)
class JointLoss:
    """The loss of a task with several outputs, which are `NamedTensors`; see `TaskLoss` for what its methods do.

    Attributes:
        losses: The loss of every output, by its name.
    """

    losses: Mapping[str, TaskLoss]

    @property
    def kind(self) -> str:
        """The kind of every output, in words."""
        return ", ".join(f"{name}: {loss.kind}" for name, loss in self.losses.items())

    @property
    def parts(self) -> Mapping[str, tuple[float, TaskLoss]]:
        """The weight and the loss of every output, by its name."""
        return {name: (self.weights[name], loss) for name, loss in self.losses.items()}

    @property
    def tells(self) -> bool:
        """Whether any output depends on the input, so far as the data show."""
        return any(loss.tells for loss in self.losses.values())

    @property
    def guessed(self) -> str:
        """Why kinds were taken, in words; empty where all were declared."""
        return "; ".join(f"{name}: {loss.guessed}" for name, loss in self.losses.items() if loss.guessed)

    @cached_property
    def weights(self) -> Mapping[str, float]:
        """How much every output counts. The sum is 1."""
        given = {name: loss.output.weight * (loss.tells or not self.tells) for name, loss in self.losses.items()}
        return {name: weight / sum(given.values()) for name, weight in given.items()}

    def natural(self, outputs: Any) -> Any:
        """The natural parameters of outputs; their gradients are those of the outputs."""
        return NamedTensors({name: loss.natural(outputs.tensors[name]) for name, loss in self.losses.items()})

    def __call__(self, outputs: Any, targets: Any) -> Float[Tensor, ""]:
        """The share of its information that a task loses, mean over the examples."""
        each = [w * self.losses[n](outputs.tensors[n], targets.tensors[n]) for n, w in self.weights.items() if w]
        return torch.stack(each).sum()

    def score(self, natural: Any, generator: torch.Generator) -> Any:
        """Draw a gradient for each output, independently, so that its second moment is the curvature of the loss.

        Args:
            natural: The natural parameters of the network's outputs.
            generator: The generator of what is drawn.

        Returns:
            The gradients.
        """
        drawn = {name: loss.score(natural.tensors[name], generator) for name, loss in self.losses.items()}
        return NamedTensors({name: self.weights[name] ** 0.5 * own for name, own in drawn.items()})

    def agreements(self, outputs: Any, targets: Any) -> Float[Tensor, " batch"]:
        """How far outputs agree with the original's, for every example; see `TaskLoss.agreements`."""
        each = [w * self.losses[n].agreements(outputs.tensors[n], targets.tensors[n]) for n, w in self.weights.items()]
        return torch.stack(each).sum(dim=0)

    def agreement(self, outputs: Any, targets: Any) -> float:
        """The mean of `agreements`, in percent."""
        return 100 * float(self.agreements(outputs, targets).mean())

    def relative_error(self, outputs: Any, targets: Any) -> float:
        """The mean of the outputs' relative errors, by their weights; see `TaskLoss.relative_error`."""
        return sum(
            w * self.losses[n].relative_error(outputs.tensors[n], targets.tensors[n]) for n, w in self.weights.items()
        )


Loss = TaskLoss | JointLoss
"""The loss of one task."""


def make_loss(targets: Batch, declared: Outputs | None, endings: Mapping[str, str]) -> Loss:
    """Make the loss of a task.

    Args:
        targets: The original network's outputs.
        declared: What they mean; guessed from the values and the last operators if it is left out.
        endings: The ATen operator that computes each output, by the output's name; of one alone the name may be empty.

    Returns:
        The loss.

    Raises:
        InvalidCalibration: If outputs contradict what is declared, or if there are no such outputs.
    """
    names = ", ".join(name for name in endings if name)
    if isinstance(declared, Mapping):
        for name in declared:
            if name not in endings:
                raise InvalidCalibration(f"there is no output {name!r}. Outputs: {names or 'one without a name'}.")
        known = dict(declared)
    elif declared is not None and len(endings) > 1:
        raise InvalidCalibration(f"it has several outputs ({names}). Declare each by its name.")
    else:
        known = {} if declared is None else dict.fromkeys(endings, declared)
    losses = {}
    for (name, ending), own in zip(endings.items(), tensors_of(targets).values(), strict=True):
        try:
            losses[name] = TaskLoss.of(own, known.get(name), ending)
        except InvalidCalibration as error:
            raise InvalidCalibration(f"output {name!r}: {error}" if name else str(error)) from error
    return JointLoss(losses) if len(losses) > 1 else next(iter(losses.values()))


def _mean(each: Tensor) -> Tensor:
    """The mean over everything but the examples."""
    return each.reshape(len(each), -1).mean(dim=1)


def _axis(outputs: Tensor) -> int:
    """The axis of classes, labels or coordinates."""
    return min(1, outputs.ndim - 1)


def _entropy(chance: Tensor) -> Tensor:
    return -torch.special.xlogy(chance, chance) - torch.special.xlogy(1 - chance, 1 - chance)


def _scale(output: Output, targets: Float[Tensor, "examples ..."]) -> Tensor | None:
    """The unit of every output: the tolerance, or the root mean square of its distance from its mean."""
    if output.kind not in HAVE_TOLERANCE:
        return None
    if output.tolerance is not None:
        return torch.full([1] * targets.ndim, output.tolerance, dtype=targets.dtype)
    axes = [axis for axis in range(targets.ndim) if axis == 0 or (axis > 1 and output.kind == "heatmap")]
    exact = targets.to(torch.float64)
    variance = (exact - exact.mean(dim=axes, keepdim=True)).square().mean(dim=axes, keepdim=True)
    least = _LEAST_SPREAD * float(variance.mean()) ** 0.5
    return variance.sqrt().clamp_min(least or 1.0).to(targets.dtype)


def _contradiction(output: Output, targets: Float[Tensor, "examples ..."]) -> str:
    """Why outputs cannot be what they are declared as; empty if they can."""
    channels = targets.shape[1] if targets.ndim > 1 else 1
    if output.kind in (*_CATEGORICAL, "embedding") and channels < 2:
        return "there is one only"
    if output.kind == "probabilities" and not _sum_to_one(targets):
        return "they are negative or do not sum to 1"
    if output.kind == "logits" and _sum_to_one(targets):
        return "they are positive and sum to 1, as probabilities do"
    return ""


def _sum_to_one(outputs: Float[Tensor, "examples ..."]) -> bool:
    return bool((outputs >= 0).all()) and bool(((outputs.sum(dim=_axis(outputs)) - 1).abs() < _CLOSE).all())


def _guess(targets: Float[Tensor, "examples ..."], ending: str) -> tuple[Output, str]:
    """The kind of output that values and the last operator speak for, and what speaks for it."""
    if ending.startswith("sigmoid"):
        return Output("multi-label"), "a sigmoid ends the network"
    if targets.ndim < 2 or targets.shape[1] == 1:
        return Output("regression"), "it has one output"
    if _sum_to_one(targets):
        return Output("probabilities"), "its outputs are positive and sum to 1"
    if bool(((targets.norm(dim=1) - 1).abs() < _CLOSE).all()):
        return Output("embedding"), "its outputs have length 1"
    if len(targets) == 1 or ending.startswith(("log_softmax", "_log_softmax")):
        return Output("logits"), "it has several outputs"
    logs = F.log_softmax(targets.to(torch.float64).movedim(1, -1).flatten(0, -2), dim=-1)
    mean = torch.logsumexp(logs, dim=0) - log(len(logs))
    told = float((logs.exp() * (logs - mean)).sum()) / len(logs)
    if told >= _TELLING * log(min(logs.shape)):
        soft = torch.softmax(targets.movedim(1, -1).flatten(0, -2) / TEMPERATURE, dim=-1)
        if float(((soft == 0) | (soft == 1)).all(dim=-1).double().mean()) > _CERTAIN:
            return Output("regression"), "their softmax is certain, so they are no scores"
        return Output("logits"), "their softmax tells inputs apart"
    return Output("regression"), "their softmax hardly tells inputs apart"
