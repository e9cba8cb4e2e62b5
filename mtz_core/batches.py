"""Batches of examples: one tensor, or several tensors by name, as networks with several inputs or outputs have them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from inspect import Parameter, Signature, signature
from keyword import iskeyword
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from mtz_core.errors import InvalidCalibration, UnsupportedModule


@dataclass(frozen=True, eq=False)
class NamedTensors:
    """Several tensors that belong to the same examples, which lie along the first axis of each.

    Attributes:
        tensors: The tensors by name.
        positional: How many of them, from the first on, a module is given by their position; the others by name.
    """

    tensors: Mapping[str, Shaped[Tensor, "_ ..."]]
    positional: int = 0

    def __len__(self) -> int:
        """Return the number of examples."""
        return len(next(iter(self.tensors.values())))

    def __getitem__(self, index: Any) -> NamedTensors:
        """Return some of the examples."""
        return self.map(lambda tensor: tensor[index])

    def map(self, function: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]]) -> NamedTensors:
        """Return what a function makes of every tensor."""
        return NamedTensors({name: function(own) for name, own in self.tensors.items()}, self.positional)


Batch = Shaped[Tensor, "..."] | NamedTensors
"""One tensor of examples, which lie along its first axis, or several."""


def tensors_of(batch: Batch) -> Mapping[str, Shaped[Tensor, "..."]]:
    """The tensors of a batch by name; one alone has an empty name."""
    return batch.tensors if isinstance(batch, NamedTensors) else {"": batch}


def concatenated(parts: Sequence[Batch]) -> Batch:
    """Put batches together."""
    first = parts[0]
    together = {name: torch.cat([tensors_of(part)[name] for part in parts]) for name in tensors_of(first)}
    return NamedTensors(together, first.positional) if isinstance(first, NamedTensors) else together[""]


def divided(batch: Batch, size: int) -> tuple[Batch, ...]:
    """Cut a batch into batches of that size at most."""
    if isinstance(batch, Tensor):
        return tuple(torch.split(batch, size))
    return tuple(batch[start : start + size] for start in range(0, max(len(batch), 1), size))


def mapped(function: Callable[[Shaped[Tensor, "..."]], Shaped[Tensor, "..."]], batch: Batch) -> Batch:
    """What a function makes of every tensor of a batch."""
    return batch.map(function) if isinstance(batch, NamedTensors) else function(batch)


def is_finite(batch: Batch) -> bool:
    """Whether all values are finite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(batch).values())


def shapes_in_words(batch: Batch) -> str:
    """The shapes of one example's tensors."""
    shapes = {name: list(tensor.shape[1:]) for name, tensor in tensors_of(batch).items()}
    return ", ".join(f"{name} {shape}".strip() for name, shape in shapes.items())


def arguments_of(batch: Batch) -> tuple[tuple[Shaped[Tensor, "..."], ...], dict[str, Tensor]]:
    """What a module is given by position and by name."""
    if isinstance(batch, Tensor):
        return (batch,), {}
    given = list(batch.tensors.items())
    return tuple(own for _, own in given[: batch.positional]), dict(given[batch.positional :])


def call(network: Callable[..., Any], batch: Batch) -> Any:
    """Call a module with a batch, whose tensors it takes by position or by name."""
    by_position, by_name = arguments_of(batch)
    return network(*by_position, **by_name)


ANY_NAMES = Signature([Parameter("inputs", Parameter.VAR_KEYWORD)])
"""The signature of a forward pass that takes whatever it is given by name."""

_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def signature_of(network: object) -> Signature:
    """What the forward pass of a module takes; anything by name if that cannot be known."""
    try:
        return signature(getattr(network, "forward", network))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return ANY_NAMES


def needs_several(taken: Signature) -> bool:
    """Whether a forward pass cannot do with one input that is given by position."""
    required = [own for own in taken.parameters.values() if own.kind in _BY_POSITION and own.default is Parameter.empty]
    return len(required) > 1


def is_positional(given: object, taken: Signature) -> bool:
    """Whether a value is one batch of the inputs of a forward pass that needs several, in its order."""
    if not isinstance(given, (tuple, list)) or not needs_several(taken) or not _are_tensors(given):
        return False
    try:
        taken.bind(*given)
    except TypeError:
        return False
    return True


def _are_tensors(given: Sequence[object]) -> bool:
    return bool(given) and all(isinstance(own, Tensor) for own in given)


def bound(given: Mapping[str, Any] | Sequence[Any] | NamedTensors, taken: Signature, where: str) -> NamedTensors:
    """Name the inputs that a forward pass is given.

    Args:
        given: Its inputs by name, or in its order.
        taken: What it takes.
        where: What is given, for errors.

    Returns:
        The inputs in the order in which the forward pass declares them.

    Raises:
        InvalidCalibration: If inputs are missing, unknown, no tensors of examples, or of unequal lengths.
    """
    if isinstance(given, NamedTensors):
        given = given.tensors if not given.positional else tuple(given.tensors.values())
    by_name = isinstance(given, Mapping)
    try:
        found = taken.bind(**given) if isinstance(given, Mapping) else taken.bind(*given)
    except TypeError as error:
        known = ", ".join(name for name in taken.parameters)
        named = f" Given are: {', '.join(given)}." if isinstance(given, Mapping) else ""
        raise InvalidCalibration(f"{where}: {error}. The network takes: {known}.{named}") from error
    tensors: dict[str, Any] = {}
    for name, value in found.arguments.items():
        kind = taken.parameters[name].kind
        if kind is Parameter.VAR_POSITIONAL:
            tensors |= {f"{name}_{number}": own for number, own in enumerate(value)}
        else:
            tensors |= value if kind is Parameter.VAR_KEYWORD else {name: value}
    for name in tensors:
        if not name.isidentifier() or iskeyword(name):
            raise InvalidCalibration(f"{where}: {name!r} cannot name an input. Allowed: names as in Python.")
    _check_lengths(tensors, where)
    return NamedTensors(tensors, 0 if by_name else len(tensors))


def labels_of(given: Any, where: str) -> Any:
    """Take labels by the names of outputs for a batch; anything else is returned as it is.

    Args:
        given: Labels: a tensor, a dict of several, or whatever.
        where: What is given, for errors.

    Returns:
        The labels.

    Raises:
        InvalidCalibration: If some of several are no tensors of examples, or of unequal lengths.
    """
    if not isinstance(given, Mapping):
        return given
    _check_lengths(given, where)
    return NamedTensors(dict(given))


def _check_lengths(tensors: Mapping[str, Any], where: str) -> None:
    """Raises `InvalidCalibration` unless there are tensors, and these have as many entries."""
    for name, value in tensors.items():
        if isinstance(value, (Mapping, list, tuple)):
            raise InvalidCalibration(
                f"{where}: {name!r} is a {type(value).__name__}. Wrap the network in a module whose forward pass takes "
                "each tensor by a name of its own."
            )
        if not isinstance(value, Tensor) or not value.ndim:
            raise InvalidCalibration(
                f"{where}: {name!r} is no tensor of examples but {type(value).__name__}. Give a tensor with one entry "
                "for each example, or leave it out."
            )
    lengths = {name: len(value) for name, value in tensors.items()}
    if len({*lengths.values()}) != 1:
        counts = ", ".join(f"{name} has {count}" for name, count in lengths.items())
        raise InvalidCalibration(
            f"{where} are of unequal lengths ({counts or 'none is given'}). Give each an entry for every example."
        )


Form = list[Any] | int | None
"""What a module returns, without its tensors: a number for each, None, or a container's kind and its parts."""


def opened(output: Any) -> tuple[dict[str, Tensor], Form]:
    """Take the tensors out of what a module returns.

    Args:
        output: A tensor, or tuples, lists, dicts and dataclasses of tensors and None, nested or not.

    Returns:
        The tensors by their paths, such as ``hidden_states.0``, and what held them. A dataclass is taken for a dict.

    Raises:
        UnsupportedModule: If there is anything else in it.
    """
    tensors: dict[str, Tensor] = {}

    def below(path: str, key: str | int) -> str:
        return f"{path}.{key}" if path else str(key)

    def form(value: Any, path: str) -> Form:
        if value is None:
            return None
        if isinstance(value, Tensor):
            if path in tensors:
                raise UnsupportedModule(
                    f"two of its outputs would be called {path!r}. Wrap the network in a module that names them apart."
                )
            tensors[path] = value
            return len(tensors) - 1
        if is_dataclass(value) and not isinstance(value, (Mapping, type)):
            value = {own.name: getattr(value, own.name) for own in fields(value)}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return ["dict", *([key, form(own, below(path, key))] for key, own in value.items())]
        if isinstance(value, (tuple, list)):
            kind = "tuple" if isinstance(value, tuple) else "list"
            return [kind, *(form(own, below(path, number)) for number, own in enumerate(value))]
        raise UnsupportedModule(
            f"its output{f' {path!r}' if path else ''} is a {type(value).__name__}, not tensors in tuples, lists or "
            "dicts. Switch it off, or wrap the network in a module that leaves it out."
        )

    found = form(output, "")
    return tensors, found


def formed(form: Form, tensors: Sequence[Any]) -> Any:
    """Put tensors back into what held them."""
    if form is None:
        return None
    if isinstance(form, int):
        return tensors[form]
    kind, *parts = form
    if kind == "dict":
        return {key: formed(part, tensors) for key, part in parts}
    return {"tuple": tuple, "list": list}[kind](formed(part, tensors) for part in parts)


def flattened(output: Any) -> Any:
    """The tensors in what a module returns, as `NamedTensors`; the only one alone."""
    if isinstance(output, (Tensor, NamedTensors)):
        return output
    return one_or_named(opened(output)[0])


def one_or_named(tensors: Mapping[str, Tensor]) -> Batch:
    """The only tensor alone, several by their names."""
    return next(iter(tensors.values())) if len(tensors) == 1 else NamedTensors(tensors)
