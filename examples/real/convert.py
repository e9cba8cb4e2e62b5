"""Weights from the files of the packages, as the state of the modules in `examples.real.networks`.

Both formats are read as data: numbers with names and shapes. Nothing in them is run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mtz_core.errors import MtzError

State = dict[str, Tensor]

_MEAN = (122.782, 117.001, 104.298)
"""The mean colour that face-api subtracts, of 255."""


class UnreadableWeights(MtzError):
    """A file does not hold the weights that it should."""


def read_tensorflow_js(manifest: Path) -> State:
    """Read the weights of a TensorFlow.js model: a manifest in JSON, and files of numbers beside it.

    Args:
        manifest: The manifest.

    Returns:
        The tensors by name, float32. Those that are stored in 8 bits are scaled back.

    Raises:
        UnreadableWeights: The manifest is damaged, a file lies elsewhere, or has another size.
    """
    try:
        groups = json.loads(manifest.read_text(encoding="utf-8"))
        return {name: values for group in groups for name, values in _group(manifest, group)}
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UnreadableWeights(f"{manifest}: {error}. Fetch its package again.") from error


def _group(manifest: Path, group: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights of a group, which lie one behind the other in its files."""
    content = b"".join(_beside(manifest, name).read_bytes() for name in group["paths"])
    position = 0
    for entry in group["weights"]:
        values, size = _values(entry, content[position:])
        yield entry["name"], values
        position += size
    if position != len(content):
        raise ValueError(f"it speaks of {position} bytes, and its files have {len(content)}")


def _beside(manifest: Path, name: str) -> Path:
    if Path(name).name != name:
        raise ValueError(f"it names the file {name!r}, which does not lie beside it")
    return manifest.parent / name


def _values(entry: Mapping[str, Any], content: bytes) -> tuple[Tensor, int]:
    """Return the numbers at the beginning of the content, and how many bytes they take."""
    shape, quantised = entry["shape"], entry.get("quantization")
    stored = quantised["dtype"] if quantised else entry["dtype"]
    if entry["dtype"] != "float32" or stored not in ("float32", "uint8"):
        raise ValueError(f"{entry['name']} is {entry['dtype']} stored as {stored}, and not float32 or 8 bits")
    numbers = np.frombuffer(content, stored, count=math.prod(shape)).reshape(shape)
    if quantised:
        scaled = numbers * np.float32(quantised["scale"]) + np.float32(quantised["min"])
        return torch.from_numpy(scaled.astype(np.float32)), numbers.nbytes
    return torch.from_numpy(numbers.copy()), numbers.nbytes


def face_state(tensors: Mapping[str, Tensor]) -> State:
    """Return the state of a `FaceNetwork`.

    Args:
        tensors: The weights as face-api has them: channels last.

    Returns:
        The state, by the names of the module.

    Raises:
        UnreadableWeights: A weight is of no kind that is known.
    """
    state = {"mean": torch.tensor(_MEAN).reshape(3, 1, 1) / 255}
    for name, values in tensors.items():
        *path, kind = name.split("/")
        if kind == "bias":
            # The bias of a separable convolution is that of its second part.
            separable = "/".join((*path, "pointwise_filter")) in tensors
            state[".".join((*path, *(("pointwise",) if separable else ()), "bias"))] = values
        elif kind in _AXES:
            part, axes = _AXES[kind]
            state[".".join((*path, *part, "weight"))] = values.permute(axes).contiguous()
        else:
            raise UnreadableWeights(f"the weight {name!r} is of an unknown kind. Known: bias, {', '.join(_AXES)}.")
    return state


_AXES: Mapping[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
    "filters": ((), (3, 2, 0, 1)),
    "depthwise_filter": (("depthwise",), (2, 3, 0, 1)),
    "pointwise_filter": (("pointwise",), (3, 2, 0, 1)),
    "weights": ((), (1, 0)),
}
"""Kinds of weights: where in the module, and the axes of the file in the order of torch."""


def read_onnx(file: Path) -> State:
    """Read the initialisers of an ONNX model that are float32: its weights, and constants.

    Args:
        file: The model.

    Returns:
        The tensors by name.

    Raises:
        UnreadableWeights: The file is no whole ONNX model, or keeps numbers elsewhere than in their raw form.
    """
    tensors: State = {}
    try:
        graphs = [value for number, value in _fields(file.read_bytes()) if number == _GRAPH]
        for graph in graphs:
            for number, value in _fields(_message(graph)):
                if number == _INITIALISER:
                    tensors |= _initialiser(_message(value))
    except (OSError, ValueError, LookupError) as error:
        raise UnreadableWeights(
            f"{file} is no ONNX model that can be read: {error}. Fetch its package again."
        ) from error
    if not tensors:
        raise UnreadableWeights(f"{file} has no weights. Fetch its package again.")
    return tensors


_GRAPH, _INITIALISER = 7, 5
_SHAPE, _TYPE, _NAME, _RAW = 1, 2, 8, 9
_FLOAT = 1
"""Numbers of fields, and of a type, in `onnx.proto`."""

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
"""How a field of a Protocol Buffers message is stored."""


def _initialiser(message: bytes) -> State:
    fields = list(_fields(message))
    shape = [size for number, value in fields if number == _SHAPE for size in _numbers(value)]
    last = dict(fields)
    if last.get(_TYPE) != _FLOAT:
        return {}
    name = _message(last[_NAME]).decode()
    if _RAW not in last:
        raise ValueError(f"{name} is not stored in its raw form")
    values = np.frombuffer(_message(last[_RAW]), "<f4").reshape(shape)
    return {name: torch.from_numpy(values.astype(np.float32))}


def _fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yield the fields of a Protocol Buffers message: their numbers and values."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, stored = key >> 3, key & 7
        if stored == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if stored == _LENGTH:
            length, position = _varint(message, position)
        elif stored in (_EIGHT_BYTES, _FOUR_BYTES):
            length = 8 if stored == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field is stored in the unknown way {stored}")
        if position + length > len(message):
            raise ValueError("it ends too early")
        yield number, message[position : position + length]
        position += length


def _varint(message: bytes, position: int) -> tuple[int, int]:
    """Return the number that begins at a position, and the position behind it."""
    value = shift = 0
    while True:
        byte = message[position]
        value |= (byte & 0x7F) << shift
        position, shift = position + 1, shift + 7
        if byte < 0x80:
            return value, position


def _numbers(value: int | bytes) -> Iterator[int]:
    """Yield the numbers of a repeated field, of which each stands alone or all stand together."""
    if isinstance(value, int):
        yield value
        return
    position = 0
    while position < len(value):
        number, position = _varint(value, position)
        yield number


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field is a number where bytes should be")
    return value


def content_type_state(tensors: Mapping[str, Tensor]) -> State:
    """Return the state of a `ContentType`.

    Args:
        tensors: The initialisers of magika's model.

    Returns:
        The state, by the names of the module.

    Raises:
        UnreadableWeights: A weight is missing, or there are several that it could be.
    """
    found = {name: _only(tensors, *wanted) for name, wanted in _CONTENT_TYPE.items()}
    vectors = {name: values.flatten() for name, values in found.items() if values.shape.numel() == max(values.shape)}
    bias = vectors.pop("embedding.bias")
    return {
        **vectors,
        # A dense layer on one-hot bytes is an embedding whose every row has the bias.
        "embedding.weight": found["embedding.weight"] + bias,
        "convolution.weight": found["convolution.weight"].squeeze(3),
        "types.weight": found["types.weight"].T.contiguous(),
    }


_CONTENT_TYPE: Mapping[str, tuple[str, tuple[int | None, ...]]] = {
    "embedding.weight": ("Const", (257, 64)),
    "embedding.bias": ("Dense_0/Reshape", (1, 1, 64)),
    "position_norm.weight": ("LayerNorm_0/Reshape_2", (1, 512, 1)),
    "position_norm.bias": ("LayerNorm_0/Reshape_3", (1, 512, 1)),
    "convolution.weight": ("Conv_0/", (512, 256, 5, 1)),
    "convolution.bias": ("const_fold", (1, 512, 1)),
    "norm.weight": ("LayerNorm_1/Reshape_2", (1, 512)),
    "norm.bias": ("LayerNorm_1/Reshape_3", (1, 512)),
    "types.weight": ("Const", (512, None)),
    "types.bias": ("Dense_1/Reshape", (1, None)),
}
"""Part of the name, and the shape, of every weight; None for any size."""


def _only(tensors: Mapping[str, Tensor], part: str, shape: tuple[int | None, ...]) -> Tensor:
    found = [
        values
        for name, values in tensors.items()
        if part in name
        and len(values.shape) == len(shape)
        and all(wanted in (None, size) for size, wanted in zip(values.shape, shape, strict=True))
    ]
    if len(found) != 1:
        raise UnreadableWeights(
            f"{len(found)} weights are called {part!r} and have the shape {shape}, not one. Take the pinned version of "
            "the package."
        )
    return found[0]
