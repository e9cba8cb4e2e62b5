"""Every law of zipping on every family of networks on tokens of the transformers package."""

from collections.abc import Callable

import pytest

from tests.support.zoo.laws import LAWS
from tests.support.zoo.table import FOREIGN, ZooCase

pytestmark = [pytest.mark.slow, pytest.mark.long]

TOKENS = [case for case in FOREIGN if not case.examples(1).is_floating_point()]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", TOKENS, ids=lambda case: case.name)
def test_law(case: ZooCase, law: Callable[[ZooCase], None]) -> None:
    law(case)
