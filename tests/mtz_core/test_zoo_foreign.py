"""Every law of zipping on every family of networks on images of the transformers package."""

from collections.abc import Callable

import pytest

from tests.support.zoo.laws import LAWS
from tests.support.zoo.table import FOREIGN, ZooCase

pytestmark = [pytest.mark.slow, pytest.mark.long]

IMAGES = [case for case in FOREIGN if case.examples(1).is_floating_point()]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", IMAGES, ids=lambda case: case.name)
def test_law(case: ZooCase, law: Callable[[ZooCase], None]) -> None:
    law(case)
