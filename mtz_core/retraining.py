"""Light retraining: a few steps of gradient descent that let a zipped network settle.

By default the loss is distillation on unlabelled data: each task's outputs are drawn to its original network's, by the
loss of their kind, relative to the information in them (`mtz_core.task_loss`). Labels can take part or take over. Of
several outputs each has its weight; those without labels are distilled. Every stored value learns, shared ones from all
tasks at once. A running average of the weights is validated on held-out data,
and the best one is kept. The merged network itself is the first candidate, so retraining never makes it worse there.
After a validation without improvement training goes on from the best network at a lower learning rate: a network that
is nearly as good as its originals needs smaller steps than one that has lost much.

Rounded weights learn, too, with rounding in the loop (`mtz_core.zipped.latent`): every pass sees them rounded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn
from torch.func import functional_call

from mtz_core.batches import (
    Batch,
    NamedTensors,
    call,
    concatenated,
    divided,
    flattened,
    is_finite,
    shapes_in_words,
    tensors_of,
)
from mtz_core.errors import InvalidCalibration, InvalidConfig
from mtz_core.network.graph import free_unused, given_name, input_values, run_node
from mtz_core.network.tracing import evaluation_mode
from mtz_core.settings import RetrainConfig
from mtz_core.task_loss import Distillation
from mtz_core.zipped.latent import LatentNetwork
from mtz_core.zipped.module import ZippedNetwork

WARM_UP = 5
"""Iterations over which the learning rate rises: Adam's first steps know the gradients' scale too little."""

AVERAGED = 10
"""The weights of iteration ``t`` enter their average with ``AVERAGED / (t + AVERAGED − 1)``: about the last tenth of
all iterations counts, however many there are (Shamir, Zhang 2013, polynomial-decay averaging)."""

SMALLER = 1 / 4
"""The learning rate after a validation without improvement, as a share of the one before."""


@dataclass(frozen=True)
class RetrainStep:
    """One validation. Losses mix distillation and labels as configured.

    Attributes:
        iteration: Iterations that are done.
        training_loss: Mean loss of each task since the last validation; empty at iteration 0.
        validation_loss: Loss of each task on the validation data.
        best: Whether no validation before was as good.
    """

    iteration: int
    training_loss: Mapping[str, float]
    validation_loss: Mapping[str, float]
    best: bool


@dataclass(frozen=True)
class Targets:
    """What outputs are drawn to: the originals' outputs, or labels.

    Attributes:
        training: Of each task, for its training examples. Labels of several outputs are a dict by name; outputs that it
            leaves out are distilled.
        validation: Of each task, for its validation examples.
    """

    training: Mapping[str, Num[Tensor, "_ ..."] | NamedTensors | Mapping[str, Tensor]]
    validation: Mapping[str, Num[Tensor, "_ ..."] | NamedTensors | Mapping[str, Tensor]]


@dataclass(frozen=True)
class RetrainState:
    """All that changes during light retraining, as it is at a validation.

    Attributes:
        tensors: Weights, their average, the best ones, and the optimiser's state, by name.
        curve: The learning curve so far.
    """

    tensors: Mapping[str, Tensor]
    curve: tuple[RetrainStep, ...]


def original_outputs(
    originals: Mapping[str, nn.Module],
    training: Mapping[str, Batch],
    validation: Mapping[str, Batch],
) -> Targets:
    """Compute what distillation aims at, once for all runs with the same originals and examples.

    Returns:
        The originals' outputs.

    Raises:
        InvalidCalibration: A task has no examples, or some are not finite.
    """
    found: dict[str, dict[str, Batch]] = {}
    for split, examples in (("training", training), ("validation", validation)):
        found[split] = {}
        for task, original in originals.items():
            _check_examples(task, split, examples)
            with evaluation_mode(original):
                found[split][task] = _outputs(partial(call, original), examples[task])
    return Targets(found["training"], found["validation"])


def retrain_steps(
    zipped: ZippedNetwork,
    originals: Mapping[str, nn.Module],
    training: Mapping[str, Batch],
    validation: Mapping[str, Batch],
    config: RetrainConfig,
    *,
    labels: Targets | None = None,
    outputs: Targets | None = None,
) -> Iterator[RetrainStep]:
    """Retrain a zipped network in place; when exhausted, `zipped` is the best network that was seen.

    Args:
        zipped: The zipped network.
        originals: The original network of each task.
        training: Training examples of each task.
        validation: Validation examples of each task, which take no part in training.
        config: How to retrain.
        labels: Labels of the examples, read if ``config.labels`` is above 0.
        outputs: The originals' outputs, where they are known already; see `original_outputs`.

    Yields:
        Each validation. Raises as `Retraining` does.
    """
    yield from Retraining(zipped, originals, training, validation, config, labels=labels, outputs=outputs).steps()


class Retraining:
    """A run of light retraining that can be taken down at any validation and go on elsewhere, to the same bytes.

    Raises:
        InvalidCalibration: Examples, outputs or labels are missing or impossible, or a loss is not finite.
        InvalidConfig: A task is unknown, or settings contradict what is given. Both come before any work, but for the
            loss.
    """

    def __init__(
        self,
        zipped: ZippedNetwork,
        originals: Mapping[str, nn.Module],
        training: Mapping[str, Batch],
        validation: Mapping[str, Batch],
        config: RetrainConfig,
        *,
        labels: Targets | None = None,
        outputs: Targets | None = None,
    ) -> None:
        tasks = zipped.tasks
        zipped.eval()  # dropout stays off: the originals' outputs are those without it
        self._given, self._config = zipped, config
        self._zipped = LatentNetwork(zipped) if zipped.structure.bits else zipped
        self._balance = dict(zip(tasks, config.balance_of(tasks), strict=True))
        splits = {"training": training, "validation": validation}
        own: dict[tuple[str, str], Batch] = {}
        for split, examples in splits.items():
            _check_names(f"{split} data", examples, tasks)
            for task in tasks:
                _check_examples(task, split, examples)
                own[split, task] = _output_of_one(zipped, task, split, examples[task])
        if labels is not None and not config.labels:
            raise InvalidConfig("labels are given, but their weight is 0. Raise retrain.labels, or leave them out.")
        if labels is None and config.labels:
            raise InvalidCalibration(f"there are no labels, but their weight is {config.labels}. Give them, or set 0.")
        several = any(isinstance(one, NamedTensors) for one in own.values())
        needed = config.labels < 1 or several
        if needed and outputs is None:
            _check_names("originals", originals, tasks)
            for task in tasks:
                if task not in originals:
                    raise InvalidCalibration(f"light retraining has no original network for {task!r}.")
            outputs = original_outputs(originals, training, validation)
        distil = {} if outputs is None or not needed else _distillations(zipped, outputs.training, config)
        self._data: dict[str, dict[str, _Examples]] = {}
        for split, examples in splits.items():
            aims = None if outputs is None or not needed else getattr(outputs, split)
            truth = None if labels is None else getattr(labels, split)
            for kind, given in (("outputs", aims), ("labels", truth)):
                _check_names(f"{split} {kind}", given or {}, tasks)
            self._data[split] = {}
            for task in tasks:
                one = own[split, task]
                self._data[split][task] = _Examples(
                    examples[task],
                    None if aims is None else _checked_outputs(task, split, aims, examples[task], one),
                    None if truth is None else _checked_labels(zipped, task, split, truth, examples[task], one),
                    distil.get(task, {"": (1.0, None)}),
                )
        for task in tasks:
            _check_same_outputs(task, *(self._data[split][task].labels for split in splits))
        self._optimiser = torch.optim.Adam(self._zipped.parameters(), lr=config.learning_rate)
        self._average, self._best = _snapshot(self._zipped), _snapshot(self._zipped)
        self._curve: list[RetrainStep] = []

    @property
    def curve(self) -> tuple[RetrainStep, ...]:
        """All validations so far, also those before the run was taken down."""
        return tuple(self._curve)

    @property
    def finished(self) -> bool:
        """Whether all iterations are done, or nothing has improved for too long."""
        if not self._curve:
            return False
        waited = len(self._curve) - 1 - max(i for i, step in enumerate(self._curve) if step.best)
        return self._curve[-1].iteration >= self._config.iterations or waited >= self._config.patience

    def steps(self) -> Iterator[RetrainStep]:
        """Go on from here; when exhausted, or after an error, the network is the best one that was seen.

        Until then the network holds the weights that are being trained, or, if some are rounded, those it had.

        Yields:
            Each further validation.
        """
        try:
            if not self._curve:
                yield self._validate(0, {})
            while not self.finished:
                yield self._validate(*self._train())
        except Exception:
            self._settle()
            raise
        self._settle()

    def _settle(self) -> None:
        """Let the network be the best one that was seen."""
        self._zipped.load_state_dict(self._best)
        if isinstance(self._zipped, LatentNetwork):
            self._given.load_state_dict(self._zipped.rounded(self._best))

    def state(self) -> RetrainState:
        """Return a copy of everything that changes, at the validation that `steps` has just yielded."""
        tensors = {f"network/{name}": tensor for name, tensor in _snapshot(self._zipped).items()}
        tensors |= {f"average/{name}": tensor.clone() for name, tensor in self._average.items()}
        tensors |= {f"best/{name}": tensor.clone() for name, tensor in self._best.items()}
        for parameter, values in self._optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser/{parameter}/{name}": value.clone() for name, value in values.items()}
        return RetrainState(tensors, self.curve)

    def resume(self, state: RetrainState) -> None:
        """Take up a state of a run with the same network, data and settings.

        Raises:
            InvalidConfig: It is of another network.
        """
        parts: dict[str, dict[str, Tensor]] = {"network": {}, "average": {}, "best": {}, "optimiser": {}}
        for name, tensor in state.tensors.items():
            part, _, rest = name.partition("/")
            parts.setdefault(part, {})[rest] = tensor.clone()
        own = {name: tensor.shape for name, tensor in self._zipped.state_dict().items()}
        for part in ("network", "average", "best"):
            if {name: tensor.shape for name, tensor in parts[part].items()} != own:
                raise InvalidConfig("the state to resume is of another network. Start light retraining anew.")
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in parts["optimiser"].items():
            parameter, _, moment = name.partition("/")
            moments.setdefault(int(parameter), {})[moment] = tensor
        self._zipped.load_state_dict(parts["network"])
        self._average, self._best = parts["average"], parts["best"]
        self._optimiser.load_state_dict(self._optimiser.state_dict() | {"state": moments})
        self._curve = list(state.curve)

    @torch.enable_grad()
    def _train(self) -> tuple[int, dict[str, float]]:
        """Train until the next validation is due; return the iteration and the mean loss of every task."""
        config, data = self._config, self._data["training"]
        done = self._curve[-1].iteration
        setbacks = [step.iteration for step in self._curve if not step.best]
        # After a setback, training goes on from the best network, more slowly.
        start, rate = max(setbacks, default=0), config.learning_rate * SMALLER ** len(setbacks)
        if done == start:
            self._zipped.load_state_dict(self._best)
            self._average = _snapshot(self._zipped)
            self._optimiser.state.clear()
        due = min(done + config.validate_every, config.iterations)
        draws = {
            task: islice(_draws(len(data[task].examples), config.batch_size, config.seed + i), done, due)
            for i, task in enumerate(data)
        }
        sums = dict.fromkeys(data, 0.0)
        for iteration in range(done + 1, due + 1):
            self._optimiser.zero_grad(set_to_none=True)
            for task, batches in draws.items():
                batch = data[task].part(next(batches))
                loss = batch.loss(self._run(batch.examples, task), config)
                (self._balance[task] * loss).backward()
                sums[task] += loss.item()
            for group in self._optimiser.param_groups:
                group["lr"] = rate * min(1.0, (iteration - start) / WARM_UP)
            self._optimiser.step()
            for name, tensor in self._zipped.state_dict().items():
                if tensor.is_floating_point():
                    self._average[name].lerp_(tensor, AVERAGED / (iteration - start + AVERAGED - 1))
        return due, {task: total / (due - done) for task, total in sums.items()}

    def _run(self, x: Batch, task: str) -> Batch:
        """The outputs of one task in training: whatever has statistics follows the batches if these are updated."""
        if self._config.statistics == "kept":
            return flattened(self._zipped(x, task))
        graph, state = self._zipped.structure.networks[task].graph, self._zipped.state_of(task)
        values = input_values(self._zipped.batch_for(x, task))
        for node in graph.nodes:
            if node.kind == "batch_norm" and values[node.sources[0]].numel() == values[node.sources[0]].shape[1]:
                raise InvalidConfig(
                    f"a batch of {task!r} has one value for each channel of {node.module!r}, which is too little for "
                    "the statistics of a normalisation. Give batches of two examples or more, or set "
                    "retrain.statistics to kept."
                )
            values[node.name] = run_node(node, values, state, len(x), training="running_mean" in node.arguments)
            free_unused(graph, values, node)
        output: Batch = values[graph.output]
        return output

    @torch.no_grad()
    def _validate(self, iteration: int, training_loss: Mapping[str, float]) -> RetrainStep:
        """Judge the average of the weights, and keep it if it is the best so far."""
        losses = {}
        for task, data in self._data["validation"].items():

            def averaged(x: Batch, task: str = task) -> Any:
                return functional_call(self._zipped, self._average, (x, task))

            losses[task] = float(data.loss(_outputs(averaged, data.examples), self._config))
        total = self._total(losses)
        if not torch.isfinite(torch.tensor(total)):
            remedy = "Lower retrain.learning_rate." if iteration else "The zipped network itself is broken; zip again."
            raise InvalidCalibration(f"the loss is not finite after {iteration} iterations. {remedy}")
        best = all(total < self._total(step.validation_loss) for step in self._curve)
        if best:
            self._best = {name: tensor.clone() for name, tensor in self._average.items()}
        self._curve.append(RetrainStep(iteration, training_loss, losses, best))
        return self._curve[-1]

    def _total(self, losses: Mapping[str, float]) -> float:
        return sum(self._balance[task] * loss for task, loss in losses.items())


def _distillations(
    zipped: ZippedNetwork, targets: Mapping[str, Any], config: RetrainConfig
) -> dict[str, _Distillations]:
    """For every output, its weight, and its divergence at the temperature of distillation as a share of the most."""
    found: dict[str, _Distillations] = {}
    for task in zipped.tasks:
        parts, known = zipped.loss_of(task, targets[task]).parts, tensors_of(targets[task])
        found[task] = {
            name: (weight, loss.distillation(known[name], config.temperature))
            for name, (weight, loss) in parts.items()
            if weight
        }
    return found


_Distillations = Mapping[str, tuple[float, Distillation | None]]
"""For every output that counts, its weight, and its distillation if the original's outputs are known."""


@dataclass(frozen=True)
class _Examples:
    """Examples of one task and what their outputs are drawn to."""

    examples: Batch
    outputs: Batch | None
    labels: Batch | None
    distil: _Distillations

    def part(self, index: Int[Tensor, " batch"]) -> _Examples:
        return _Examples(
            self.examples[index],
            None if self.outputs is None else self.outputs[index],
            None if self.labels is None else self.labels[index],
            self.distil,
        )

    def loss(self, outputs: Batch, config: RetrainConfig) -> Float[Tensor, ""]:
        """Distillation and, of outputs that have labels, cross-entropy, mixed as configured; mean over the examples."""
        found = tensors_of(outputs)
        aims, labels = ({} if own is None else tensors_of(own) for own in (self.outputs, self.labels))
        loss = next(iter(found.values())).new_zeros(())
        for name, (weight, distil) in self.distil.items():
            labelled = config.labels if name in labels else 0.0
            if distil is not None and labelled < 1:
                loss = loss + weight * (1 - labelled) * distil(found[name], aims[name])
            if labelled:
                loss = loss + weight * labelled * F.cross_entropy(found[name], labels[name])
        return loss


def _check_names(what: str, given: Mapping[str, object], tasks: tuple[str, ...]) -> None:
    unknown = sorted(given.keys() - set(tasks))
    if unknown:
        raise InvalidConfig(f"{what}: {unknown[0]!r} is no task of the zipped network. Tasks: {', '.join(tasks)}.")


def _check_examples(task: str, split: str, examples: Mapping[str, Batch]) -> None:
    if task not in examples or not len(examples[task]):
        raise InvalidCalibration(f"light retraining has no {split} examples for {task!r}.")
    if not is_finite(examples[task]):
        raise InvalidCalibration(f"the {split} examples for {task!r} have NaN or infinite values.")


@torch.no_grad()
def _output_of_one(zipped: ZippedNetwork, task: str, split: str, examples: Batch) -> Batch:
    """What the network puts out for the first example, if it accepts such examples."""
    try:
        return flattened(zipped(examples[:1], task))
    except Exception as error:  # torch raises many kinds for shapes and types that do not fit
        inputs = zipped.structure.networks[task].inputs
        made_for = ", ".join(f"{given_name(name)} {list(own.shape)}".strip() for name, own in inputs.items())
        dtypes = ", ".join(str(own.dtype) for own in tensors_of(examples).values())
        raise InvalidCalibration(
            f"the {split} examples for {task!r} have shape {shapes_in_words(examples)} and are {dtypes}; the zipped "
            f"network, made from shape {made_for}, does not accept them: " + str(error).partition("\n")[0]
        ) from error


def _checked_outputs(task: str, split: str, given: Mapping[str, Batch], examples: Batch, one: Batch) -> Batch:
    """The originals' outputs of one task, if they fit its examples and the network's own output for `one` of them."""
    expected = {name: [len(examples), *own.shape[1:]] for name, own in tensors_of(one).items()}
    known = tensors_of(given[task]) if task in given else {}
    found = {name: list(own.shape) for name, own in known.items()}
    if found != expected:
        shapes = [", ".join(f"{name} {shape}".strip() for name, shape in own.items()) for own in (expected, found)]
        raise InvalidCalibration(
            f"the original outputs for the {split} examples of {task!r} should have shape {shapes[0]}, "
            f"but have {shapes[1] or 'none'}. Compute them from the same examples."
        )
    if not is_finite(given[task]):
        raise InvalidCalibration(
            f"the original network of {task!r} puts out NaN or infinite values for its {split} examples. "
            "Mend its weights, or leave such examples out."
        )
    return given[task]


def _checked_labels(
    zipped: ZippedNetwork, task: str, split: str, given: Mapping[str, Any], examples: Batch, one: Batch
) -> Batch | None:
    """The labels of one task, or of its outputs, as class numbers, if every example has one that the network knows."""
    if task not in given:
        raise InvalidCalibration(f"there are no {split} labels for {task!r}. Give them, or set retrain.labels to 0.")
    outputs = tensors_of(one)
    if isinstance(one, Tensor):
        _check_logits(zipped, task, "")
        if not isinstance(given[task], Tensor):
            raise InvalidConfig(f"the {split} labels for {task!r} are no tensor, but its network has one output.")
        return _classes(f"the {split} labels for {task!r}", given[task], examples, one)
    labels = given[task].tensors if isinstance(given[task], NamedTensors) else given[task]
    if not isinstance(labels, Mapping):
        raise InvalidConfig(
            f"the {split} labels for {task!r} are one tensor, but its network has several outputs: "
            f"{', '.join(outputs)}. Give {{output: labels}}; outputs that are left out are distilled."
        )
    for name in labels:
        if name not in outputs:
            raise InvalidConfig(
                f"the {split} labels for {task!r} are for an output {name!r}, but its outputs are {', '.join(outputs)}."
            )
        _check_logits(zipped, task, name)
    checked = {
        name: _classes(f"the {split} labels for {task!r} ({name})", own, examples, outputs[name])
        for name, own in labels.items()
    }
    return NamedTensors(checked) if checked else None


def _check_same_outputs(task: str, *labels: Batch | None) -> None:
    """Raises `InvalidCalibration` unless labels are for the same outputs in training and validation."""
    names = [[] if own is None else sorted(tensors_of(own)) for own in labels]
    if names[0] != names[1]:
        said = [", ".join(own) or "none" for own in names]
        raise InvalidCalibration(
            f"the training labels for {task!r} are for outputs {said[0]}, the validation labels for {said[1]}. Give "
            "both for the same."
        )


def _check_logits(zipped: ZippedNetwork, task: str, name: str) -> None:
    """Raises `InvalidConfig` where an output is known to be no logits, which is what labels are read for."""
    judged = zipped.report.tasks.get(task)
    if judged is None:
        return
    declared = judged.declared[name] if isinstance(judged.declared, Mapping) else judged.declared
    if declared.kind in ("probabilities", "multi-label", "embedding") or (
        declared.kind != "logits" and not judged.has_guessed(name)
    ):
        remedy = "Leave its labels out: it is distilled" if name else "Set retrain.labels to 0"
        raise InvalidConfig(
            f"labels are compared with logits, but the network of {task!r} puts out {declared.kind}"
            f"{f' as {name!r}' if name else ''}. {remedy}."
        )


def _classes(what: str, labels: Tensor, examples: Batch, one: Tensor) -> Tensor:
    """Labels as class numbers, if every example has one that the output knows."""
    if one.ndim < 2:
        raise InvalidConfig(f"{what} are for an output of one number, which has no classes. Leave them out.")
    classes, expected = one.shape[1], (len(examples), *one.shape[2:])
    if labels.shape != expected:
        raise InvalidCalibration(f"{what} have shape {list(labels.shape)}, not {list(expected)}: one per example.")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise InvalidCalibration(f"{what} are {labels.dtype}. Give whole class numbers.")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise InvalidCalibration(
            f"{what} go from {least} to {most}. Allowed: 0 to {classes - 1}, as the network has {classes} classes."
        )
    return labels.long()


@torch.no_grad()
def _outputs(network: Callable[[Batch], Any], examples: Batch, batch: int = 500) -> Batch:
    return concatenated([flattened(network(part)) for part in divided(examples, batch)])


def _draws(examples: int, batch_size: int, seed: int) -> Iterator[Int[Tensor, " batch"]]:
    """Batches of indices without end, every example once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(batch_size, examples)
    while True:
        order = torch.randperm(examples, generator=generator)
        yield from torch.split(order[: examples // size * size], size)


def _snapshot(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}
