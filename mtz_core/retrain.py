"""Light retraining: a few steps of gradient descent that let a zipped network settle.

The loss is distillation on unlabelled data: each task's outputs are drawn to those of its original network. Every
stored value learns, shared ones from all tasks at once. The best network seen is kept, judged on validation data that
take no part in training; the merged network itself is the first candidate, so retraining never makes it worse there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mtz_core.errors import InvalidCalibration
from mtz_core.settings import RetrainConfig
from mtz_core.tracing import evaluation_mode
from mtz_core.zipped import ZippedNetwork


@dataclass(frozen=True)
class RetrainStep:
    """One judgement: mean training loss per task since the last one, validation loss per task, and whether it is best.

    Losses are distillation losses; at iteration 0 there is no training loss yet.
    """

    iteration: int
    training_loss: Mapping[str, float]
    validation_loss: Mapping[str, float]
    best: bool


def distillation_loss(
    outputs: Float[Tensor, "batch classes"], targets: Float[Tensor, "batch classes"], temperature: float
) -> Float[Tensor, ""]:
    """``T² KL(softmax(targets / T) ‖ softmax(outputs / T))``, mean over the batch (Hinton, Vinyals, Dean 2015)."""
    return temperature**2 * F.kl_div(
        F.log_softmax(outputs / temperature, dim=1),
        F.log_softmax(targets / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def retrain(
    zipped: ZippedNetwork,
    originals: Mapping[str, nn.Module],
    training: Mapping[str, Float[Tensor, "_ ..."]],
    validation: Mapping[str, Float[Tensor, "_ ..."]],
    config: RetrainConfig,
) -> Iterator[RetrainStep]:
    """Retrain a zipped network in place, yielding each judgement; when exhausted, `zipped` is the best network seen.

    Raises `InvalidCalibration` for tasks without examples, or for a loss that is not finite.
    """
    tasks = zipped.tasks
    for task in tasks:
        _check(task, originals, training, validation)
    targets, judge = {}, {}
    for task in tasks:
        with evaluation_mode(originals[task]):
            targets[task] = _outputs(originals[task], training[task])
            judge[task] = _outputs(originals[task], validation[task])
    zipped.eval()  # dropout stays off: the targets are the originals' outputs without it

    def validate() -> dict[str, float]:
        return {
            task: float(
                distillation_loss(
                    _outputs(partial(zipped, task=task), validation[task]), judge[task], config.temperature
                )
            )
            for task in tasks
        }

    optimiser = torch.optim.Adam(zipped.parameters(), lr=config.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, max(config.iterations, 1))
    draws = {task: _draws(len(training[task]), config.batch_size, config.seed + i) for i, task in enumerate(tasks)}
    losses = validate()
    best, best_state, waited = _total(losses), _snapshot(zipped), 0
    yield RetrainStep(0, {}, losses, best=True)
    sums = dict.fromkeys(tasks, 0.0)
    since = 0
    for iteration in range(1, config.iterations + 1):
        optimiser.zero_grad(set_to_none=True)
        for task in tasks:
            index = next(draws[task])
            loss = distillation_loss(zipped(training[task][index], task), targets[task][index], config.temperature)
            loss.backward()
            sums[task] += loss.item()
        optimiser.step()
        schedule.step()
        since += 1
        if iteration % config.validate_every and iteration != config.iterations:
            continue
        losses = validate()
        if not torch.isfinite(torch.tensor(_total(losses))):
            raise InvalidCalibration(
                f"the loss is not finite after {iteration} iterations. Lower retrain.learning_rate."
            )
        improved = _total(losses) < best
        if improved:
            best, best_state, waited = _total(losses), _snapshot(zipped), 0
        else:
            waited += 1
        yield RetrainStep(iteration, {t: s / since for t, s in sums.items()}, losses, best=improved)
        sums, since = dict.fromkeys(tasks, 0.0), 0
        if waited >= config.patience:
            break
    zipped.load_state_dict(best_state)


def _check(
    task: str, originals: Mapping[str, nn.Module], training: Mapping[str, Tensor], validation: Mapping[str, Tensor]
) -> None:
    if task not in originals:
        raise InvalidCalibration(f"light retraining has no original network for {task!r}.")
    for name, examples in (("training", training), ("validation", validation)):
        if task not in examples or not len(examples[task]):
            raise InvalidCalibration(f"light retraining has no {name} examples for {task!r}.")
        if not bool(torch.isfinite(examples[task]).all()):
            raise InvalidCalibration(f"the {name} examples for {task!r} have NaN or infinite values.")


@torch.no_grad()
def _outputs(
    network: Callable[[Tensor], Tensor], examples: Float[Tensor, "examples ..."], batch: int = 500
) -> Float[Tensor, "examples classes"]:
    return torch.cat([network(part) for part in torch.split(examples, batch)])


def _draws(examples: int, batch_size: int, seed: int) -> Iterator[Tensor]:
    """Batches of indices without end, every example once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, examples)
    while True:
        order = torch.randperm(examples, generator=generator)
        yield from torch.split(order[: examples // size * size], size)


def _snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def _total(losses: Mapping[str, float]) -> float:
    return sum(losses.values())
