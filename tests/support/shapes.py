"""Shape annotations of mtz_core, such as ``Float[Tensor, "rows inputs"]``, checked at every call by beartype.

Arguments, results and the fields of dataclasses are checked; of a mapping or a list one entry, of a generator nothing.
A dimension whose name starts with "_" is documentation only.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook, jaxtyped


def install() -> None:
    """Check every module of mtz_core that is imported from now on."""
    install_import_hook("mtz_core", "tests.support.shapes.check_shapes")
    # The hook decorates every function, and decorated ones are slow: those without shapes stay as they are.
    jaxtyping.jaxtyped = lambda **options: partial(decorate, **options)  # type: ignore[assignment]


def decorate(target: Any, **options: Any) -> Any:
    """What the hook does to a function or class, if it has shapes."""
    if inspect.isfunction(target) and not any(map(has_shape, hints_of(target))):
        return target
    return jaxtyped(target, **options)


def hints_of(function: Any) -> Iterator[Any]:
    """The annotations that can be told when a function is made."""
    for hint in function.__annotations__.values():
        try:
            yield eval(hint, function.__globals__) if isinstance(hint, str) else hint
        except NameError:  # a class that comes later in its module
            continue


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
