"""Tensors by name, in safetensors files."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from tasks.files import InvalidArtifact


def read_tensors(path: Path, ending: str = "") -> dict[str, Tensor]:
    """Read tensors from a safetensors file.

    Args:
        path: The file.
        ending: What the names of the wanted tensors end with; all tensors by default.

    Returns:
        The tensors by name.

    Raises:
        InvalidArtifact: The file is missing, or is no safetensors file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys() if name.endswith(ending)}  # noqa: SIM118
    except OSError as error:
        raise InvalidArtifact(f"{path}: {error.strerror or error}. Make or fetch the file first.") from error
    except SafetensorError as error:
        raise InvalidArtifact(f"{path} is not a readable safetensors file: {error}. Make or fetch it again.") from error
