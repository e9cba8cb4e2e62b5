"""Tensors by name, in safetensors files."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.endswith(ending)}  # noqa: SIM118


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file.

    Args:
        path: The file.

    Returns:
        The metadata, which may be empty.

    Raises:
        InvalidArtifact: The file is missing, or is no safetensors file.
    """
    with _opened(path) as file:
        return dict(file.metadata() or {})


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        path.open("rb").close()  # safetensors takes every file that cannot be opened for a missing one
        with safe_open(path, framework="pt") as file:
            yield file
    except OSError as error:
        remedy = "Allow this user to read it" if isinstance(error, PermissionError) else "Make or fetch the file first"
        raise InvalidArtifact(f"{path}: {error.strerror or error}. {remedy}.") from error
    except SafetensorError as error:
        raise InvalidArtifact(f"{path} is not a readable safetensors file: {error}. Make or fetch it again.") from error
