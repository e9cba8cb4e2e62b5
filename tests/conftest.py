"""For all tests: shape annotations of mtz_core are checked, and the longest tests come first.

So no worker is left with a long test when all others are done. ``MTZ_SHAPES=unchecked`` switches the checks off.
"""

import os

import pytest

from tests.support import shapes

if os.environ.get("MTZ_SHAPES") != "unchecked":
    shapes.install()  # before anything imports mtz_core


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
