"""Whoever catches `MtzError` catches everything that a user can cause."""

import inspect

import mtz_core
from mtz_core import errors
from mtz_core.statistics import linalg


def test_all_errors_have_one_base_and_say_when_they_are_raised() -> None:
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if not issubclass(kind, Warning)]
    kinds.append(linalg.SingularHessian)
    assert len(kinds) > 5
    for kind in kinds:
        assert issubclass(kind, mtz_core.MtzError)
        assert kind.__doc__
    assert not issubclass(mtz_core.MtzError, (ValueError, RuntimeError, OSError))
