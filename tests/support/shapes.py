"""Shape annotations of mtz_core, such as ``Float[Tensor, "rows inputs"]``, checked by beartype.

In every test the first calls of each function are checked; a loop that calls one a thousand times has no new shapes.

Arguments, results and the fields of dataclasses are checked; of a mapping or a list one entry, of a generator nothing.
A dimension whose name starts with "_" is documentation only.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, get_args

import jaxtyping
from beartype import beartype
from jaxtyping import AbstractArray, install_import_hook, jaxtyped

CHECKED = 3
"""How many calls of each function are checked in a test."""

calls: Counter[Callable[..., Any]] = Counter()
"""How often each function was called in the present test."""


def install() -> None:
    """Check every module of mtz_core that is imported from now on."""
    install_import_hook("mtz_core", "tests.support.shapes.check_shapes")
    # The hook decorates every function, and decorated ones are slow: those without shapes stay as they are.
    jaxtyping.jaxtyped = lambda **options: partial(decorate, **options)  # type: ignore[assignment]


def decorate(target: Any, **options: Any) -> Any:
    """What the hook does to a function or class, if it has shapes."""
    if not inspect.isfunction(target):
        plain = target.__init__
        checked = jaxtyped(target, **options)
        if checked.__init__ is not plain:
            checked.__init__ = _checked_at_first(plain, checked.__init__)
        return checked
    # A function inside another would be compiled anew whenever that one is called.
    if "<locals>" in target.__qualname__ or not any(map(has_shape, hints_of(target))):
        return target
    return _checked_at_first(target, jaxtyped(target, **options))


def _checked_at_first(plain: Callable[..., Any], checked: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(checked)
    def first_checked(*arguments: Any, **named: Any) -> Any:
        calls[plain] += 1
        return (checked if calls[plain] <= CHECKED else plain)(*arguments, **named)

    return first_checked


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
