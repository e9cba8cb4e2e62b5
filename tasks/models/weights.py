"""Weights as people have them: in one file or several, with prefixes of wrappers, of several precisions.

Weights are a safetensors file, or a folder of them with or without an index. They become the state of a network: names
lose the prefixes that wrappers add, tied tensors that are stored once get all of their names, and floating-point
numbers take the network's precision. What could only be guessed is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mtz_core.errors import InvalidWeights
from tasks.artifacts.tensors import read_metadata, read_tensors
from tasks.files import InvalidArtifact
from tasks.models.shards import INDEX, shards_of, weight_files

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What wrappers put before the names of a network's tensors: `DataParallel`, `torch.compile`, training frameworks."""

_COUNTER = "num_batches_tracked"
"""The counter of a batch normalisation. No output in evaluation mode depends on it, and older files lack it."""


@dataclass(frozen=True)
class Weights:
    """What the files of a network hold.

    Attributes:
        tensors: The tensors by name.
        aliases: For further names of tied tensors, the name under which each is stored.
    """

    tensors: Mapping[str, Tensor]
    aliases: Mapping[str, str]


def read_weights(path: Path) -> Weights:
    """Read a network's weights.

    Args:
        path: A safetensors file, or a folder of them with or without an index.

    Returns:
        The tensors of all files together.

    Raises:
        InvalidArtifact: A file is missing or damaged, two hold one tensor, or an index names another file for it.
    """
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    places: dict[str, str] = {}
    for file in weight_files(path):
        for name, tensor in read_tensors(file).items():
            if name in tensors:
                raise InvalidArtifact(
                    f"{path}: {name!r} is in {places[name]} and in {file.name}. Remove the file that is not meant."
                )
            tensors[name], places[name] = tensor, file.name
        aliases |= read_metadata(file)
    for index in path.glob(f"*{INDEX}"):
        shards = shards_of(index)
        wrong = sorted(name for name in shards.keys() | places.keys() if shards.get(name) != places.get(name))
        if wrong:
            raise InvalidArtifact(
                f"{path}: {wrong[0]!r} is in {places.get(wrong[0])}, but {index.name} names {shards.get(wrong[0])} "
                "(None: nowhere). Fetch the files of one version."
            )
    return Weights(tensors, {alias: name for alias, name in aliases.items() if name in tensors})


def join_weights(folder: Path, target: Path) -> None:
    """Write the weights of a folder to one safetensors file.

    Args:
        folder: A folder of safetensors files, with or without an index.
        target: The file to write.

    Raises:
        InvalidArtifact: The files cannot be read together.
    """
    weights = read_weights(folder)
    save_file(dict(weights.tensors), target, dict(weights.aliases))


def state_for(network: nn.Module, weights: Weights, where: str) -> tuple[dict[str, Tensor], list[str]]:
    """Make weights the state of a network.

    Args:
        network: The network.
        weights: The weights.
        where: Where they come from, for errors.

    Returns:
        All tensors of the network's `state_dict`, in its precision, and notes on what was not as in the files.

    Raises:
        InvalidWeights: The weights do not fit the network.
    """
    state = network.state_dict(keep_vars=True)
    prefix = _prefix(tuple(weights.tensors), tuple(state))
    given = {name.removeprefix(prefix): tensor for name, tensor in weights.tensors.items()}
    notes = [f"all names begin with {prefix!r}, which is left out"] if prefix else []
    aliases = {alias.removeprefix(prefix): name.removeprefix(prefix) for alias, name in weights.aliases.items()}
    notes += [f"{name!r} is stored once, as {stored!r}" for name, stored in _complete(given, state, aliases).items()]
    _check_codes(given, state, where)
    _check_ties(given, state, where)
    _check_shapes(given, state, where, notes)
    becomes: dict[str, None] = {}  # in place of a set, to keep their order
    for name, tensor in given.items():
        given[name] = _converted(name, tensor, state[name], where)
        if tensor.dtype != state[name].dtype:
            exactly = tensor.dtype.itemsize < state[name].dtype.itemsize or not tensor.is_floating_point()
            becomes[f"{tensor.dtype} becomes {state[name].dtype}, {'exactly' if exactly else 'rounded'}"] = None
    return given, [*notes, *becomes]


def _prefix(given: Sequence[str], wanted: Sequence[str]) -> str:
    """Return the prefixes that all given names have and no wanted one."""
    prefix = ""
    known = [one for one in PREFIXES if not any(name.startswith(one) for name in wanted)]
    while given and (more := [one for one in known if all(name.startswith(prefix + one) for name in given)]):
        prefix += more[0]
    return prefix


def _complete(given: dict[str, Tensor], state: Mapping[str, Tensor], aliases: Mapping[str, str]) -> dict[str, str]:
    """Add tied tensors that are stored under one of their names, and counters; return names by the stored ones."""
    found = {alias: name for alias, name in aliases.items() if alias in state and name in given and alias not in given}
    for names in _ties(state):
        stored = [name for name in names if name in given]
        found |= {name: stored[0] for name in names if stored and name not in given}
    given |= {alias: given[name] for alias, name in found.items()}
    given |= {name: state[name] for name in state if name.endswith(_COUNTER) and name not in given}
    return found


def _ties(state: Mapping[str, Tensor]) -> list[list[str]]:
    """Return the names of tensors that occupy the same memory."""
    places: dict[object, list[str]] = {}
    for name, tensor in state.items():
        memory = tensor.untyped_storage().data_ptr()
        place = (memory, tensor.storage_offset(), tensor.shape, tensor.stride()) if memory else id(tensor)
        places.setdefault(place, []).append(name)
    return [names for names in places.values() if len(names) > 1]


def _check_codes(given: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    for name, tensor in given.items():
        if name in state and state[name].is_floating_point() and not tensor.is_floating_point():
            raise InvalidWeights(
                f"{where}: {name!r} holds {tensor.dtype} in place of {state[name].dtype}. Codes of a quantised network "
                "are no weights. Save the numbers that they stand for: scale * (codes.float() - zero_point)."
            )


def _check_ties(given: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str) -> None:
    for names in _ties(state):
        first, *others = names
        for other in others if first in given else ():
            if not torch.equal(given[first], given[other]):
                raise InvalidWeights(
                    f"{where}: {first!r} and {other!r} differ, but are one tensor in the network. Build the network "
                    "without that tie."
                )


def _check_shapes(given: Mapping[str, Tensor], state: Mapping[str, Tensor], where: str, notes: Sequence[str]) -> None:
    for name in sorted(state.keys() | given.keys()):
        expected = tuple(state[name].shape) if name in state else None
        found = tuple(given[name].shape) if name in given else None
        if expected != found:
            if found is None:
                problem = f"{name!r} of shape {expected} is missing in the weights"
            elif expected is None:
                problem = f"{name!r} of shape {found} is in the weights, but not in the network"
            else:
                problem = f"{name!r} should have shape {expected}, but has {found}"
            raise InvalidWeights(
                f"{where}: {problem}{''.join(f'; {note}' for note in notes)}. Name the factory and arguments that the "
                "weights were trained with."
            )


def _converted(name: str, given: Tensor, own: Tensor, where: str) -> Tensor:
    """Return a tensor in the network's precision."""
    converted = given.to(own.dtype)
    if own.is_floating_point() or given.dtype == own.dtype or torch.equal(converted.to(given.dtype), given):
        return converted
    if name.endswith(_COUNTER):
        return own
    raise InvalidWeights(
        f"{where}: {name!r} holds {given.dtype} that no {own.dtype} can stand for. Save it as {own.dtype}."
    )
