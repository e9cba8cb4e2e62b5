"""Every public function of mtz_core has shape annotations, and these tests run with them checked."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from torch import Tensor

import mtz_core
from mtz_core.evaluation import error_rate, predict
from mtz_core.merging.pairing import Pairing, assign
from mtz_core.network.graph import Axis
from mtz_core.statistics.linalg import DenseHessian, RowsHessian, invert
from mtz_core.statistics.moments import Moments
from mtz_core.zipped.ownership import Segment, arrange
from tests.support.shapes import has_shape

checked = pytest.mark.skipif(os.environ.get("MTZ_SHAPES") == "unchecked", reason="MTZ_SHAPES=unchecked")
MODULES = [importlib.import_module(found.name) for found in pkgutil.walk_packages(mtz_core.__path__, "mtz_core.")]
AXIS = Axis(("g",), np.zeros(2, dtype=np.int64), np.arange(2))

GIVEN = {"calibration", "data", "example"}
"""Parameters for what users give in many forms, as in the façade. These functions refuse what is wrong themselves."""

REFUSED: Mapping[str, Callable[[], object]] = {
    "a function's argument": lambda: invert(torch.eye(2)[:1]),
    "arguments that do not fit each other": lambda: error_rate(torch.zeros(2).long(), torch.zeros(3).long()),
    "a dtype": lambda: error_rate(torch.zeros(2), torch.zeros(2)),
    "a NumPy array": lambda: assign(np.zeros(3), 1),
    "a method's argument": lambda: DenseHessian(torch.eye(2)).select(torch.zeros(1, 1).long()),
    "an argument that does not fit the object": lambda: Moments(3, conv_groups=2).add(torch.zeros(4, 3)),
    "a class method's argument": lambda: Moments.from_rows(torch.zeros(3)),
    "what a function returns": lambda: predict(lambda x: x[..., None], [torch.zeros(2, 3)]),
    "a field of a dataclass": lambda: RowsHessian(torch.zeros(3), 1.0),
    "fields that do not fit each other": lambda: Axis(("g",), np.zeros(2, dtype=np.int64), np.arange(3)),
    "a value of a mapping": lambda: Segment(("a",), {"a": np.zeros((2, 2), dtype=np.int64)}),
    "a value of a mapping behind an alias": lambda: arrange(("a",), {"a": AXIS}, {"g": np.arange(2)}),
    "a constructor's argument": lambda: Pairing(("a", "b"), np.arange(2)),
}


@checked
@pytest.mark.parametrize("call", REFUSED.values(), ids=REFUSED.keys())
def test_a_wrong_shape_is_refused(call):
    with pytest.raises(TypeCheckError):
        call()


@checked
def test_every_shape_annotation_is_checked():
    with_shapes = {name: one for name, one in public_functions() if any(map(has_shape, hints_of(one).values()))}
    assert len(with_shapes) > 50
    assert [name for name, function in with_shapes.items() if not hasattr(function, "__wrapped__")] == []


def test_every_public_tensor_has_a_shape():
    bare = [
        f"{name}: {parameter}"
        for name, function in public_functions()
        for parameter, hint in hints_of(function).items()
        if has_bare_tensor(hint) and parameter not in GIVEN and not name.startswith("mtz_core.facade.")
    ]
    assert bare == []


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """Functions, methods, properties and constructors, those of dataclasses included."""
    for module in MODULES:
        for name, value in public(module):
            if inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value
            elif inspect.isclass(value):
                for member, function in methods(value):
                    yield f"{module.__name__}.{name}.{member}", function


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    for name, value in vars(module).items():
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__:
            yield name, value


def methods(owner: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, value in vars(owner).items():
        function = getattr(value, "__func__", None) or getattr(value, "fget", None) or getattr(value, "func", value)
        if inspect.isfunction(function) and (name == "__init__" or not name.startswith("_")):
            yield name, function


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    return get_type_hints(function, include_extras=True)


def has_bare_tensor(hint: Any) -> bool:
    """Whether a tensor or array stands in an annotation without a shape. Tensors by name have one shape each."""
    if get_origin(hint) in (Mapping, dict) and get_args(hint) == (str, Tensor):
        return False
    if isinstance(hint, list):
        return any(map(has_bare_tensor, hint))
    return hint in (Tensor, np.ndarray) or any(map(has_bare_tensor, get_args(hint)))
