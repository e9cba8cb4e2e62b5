"""Shape annotations of mtz_core, such as ``Float[Tensor, "rows inputs"]``, checked at every call by beartype.

Arguments, results and the fields of dataclasses are checked; of a mapping or a list one entry, of a generator nothing.
A dimension whose name starts with "_" is documentation only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook


def install() -> None:
    """Check every module of mtz_core that is imported from now on."""
    install_import_hook("mtz_core", "tests.support.shapes.check_shapes")


def check_shapes(function: Callable[..., Any]) -> Callable[..., Any]:
    """Check the annotations that have shapes. Other types are left alone: tests pass wrong ones to see them refused."""
    hints = {name: hint for name, hint in function.__annotations__.items() if has_shape(hint)}
    if not hints:
        return function
    function.__annotations__ = hints
    return beartype(function)


def has_shape(hint: Any) -> bool:
    """Whether an annotation holds a shape."""
    if isinstance(hint, list):
        return any(map(has_shape, hint))
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(has_shape, get_args(hint)))
