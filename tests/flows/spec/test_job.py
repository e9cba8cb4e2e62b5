"""Jobs: the name under which each is shown."""

from flows.spec.job import Job, shown_as


def test_a_model_and_a_group_of_one_name_are_told_apart() -> None:
    group = Job(fleet="f", kind="group", group="digits", fingerprint="0" * 64, settings={}, run="r")
    model = Job(fleet="f", kind="model", group="digits", fingerprint="0" * 64, settings={}, run="r")
    assert (shown_as(group), shown_as(model)) == ("digits", "statistics/digits")
