"""Tensors by name, in safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tasks.files import InvalidArtifact


def read_tensors(path: Path, ending: str = "") -> dict[str, Tensor]:
    """All tensors of a safetensors file whose names end so. Raises `InvalidArtifact`."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.endswith(ending)}  # noqa: SIM118
    except OSError as error:
        raise InvalidArtifact(f"{path}: {error.strerror or error}. Make or fetch the file first.") from error
    except SafetensorError as error:
        raise InvalidArtifact(f"{path} is not a readable safetensors file: {error}. Make or fetch it again.") from error
