"""Every law of zipping on every network family of the transformers package."""

from collections.abc import Callable

import pytest

from tests.mtz_core.zoo import FOREIGN, ZooCase
from tests.mtz_core.zoo_laws import LAWS


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", FOREIGN, ids=lambda case: case.name)
def test_law(case: ZooCase, law: Callable[[ZooCase], None]) -> None:
    law(case)
