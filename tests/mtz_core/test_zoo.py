"""Every law of zipping on every network family that is written here."""

from collections.abc import Callable

import pytest

from tests.support.zoo.laws import LAWS, zipped_pair
from tests.support.zoo.table import OWN, ZooCase

pytestmark = pytest.mark.slow

LARGE = ("vgg-16, normalised", "resnet-28, decathlon", "vit, torch encoder", "vit, attention module", "decoder")
"""Families that take long, and of which a smaller one is tried, too."""

CASES = [pytest.param(case, id=case.name, marks=[pytest.mark.long] * (case.name in LARGE)) for case in OWN]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("case", CASES)
def test_law(case: ZooCase, law: Callable[[ZooCase], None]) -> None:
    law(case)


@pytest.mark.parametrize(("name", "share"), [("resnet-18", 1.0), ("squeeze-excite", 0.4)])
def test_matching_coupled_groups_again_lowers_the_cost(name: str, share: float) -> None:
    (case,) = (case for case in OWN if case.name == name)
    costs = zipped_pair(case, share).report.descent
    assert len(costs) > 1
    assert costs[-1] < costs[0]
