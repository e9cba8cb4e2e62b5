"""A plan of a fleet: what the planner's groups are called."""

from flows.fleet.plan import FleetPlan
from tests.support.groupings import choice


def test_a_chosen_group_is_named_after_its_first_model() -> None:
    assert choice("ab", "cd", loners=("e",)).groups() == {"auto-a": ("a", "b"), "auto-c": ("c", "d")}


def test_a_model_that_joins_behind_the_first_changes_no_name() -> None:
    assert choice("abf", "cd").groups().keys() == choice("ab", "cd").groups().keys()


def test_a_plan_without_a_planner_has_nothing_to_explain() -> None:
    plan = FleetPlan(())
    assert (list(plan.groups), list(plan.failed), plan.choice) == ([], [], None)
