"""How a stage can fail: what people read, and whether it is worth trying again."""

import pytest

from flows.results.stage_result import StageFailed, StageRefused
from mtz_core.errors import MtzError


def test_a_failure_names_its_stage_and_is_final_unless_said_otherwise() -> None:
    failure = StageFailed("match", "the disk is full.")
    assert isinstance(failure, MtzError)
    assert (str(failure), failure.stage, failure.can_be_retried) == ("match: the disk is full.", "match", False)
    assert StageFailed("match", "no answer.", can_be_retried=True).can_be_retried


def test_a_refusal_is_a_failure_that_no_retry_cures() -> None:
    with pytest.raises(StageFailed, match=r"^merge: too few neurons\.$") as refusal:
        raise StageRefused("merge", "too few neurons.")
    assert not refusal.value.can_be_retried
