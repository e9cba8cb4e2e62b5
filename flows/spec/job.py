"""A job: what a worker, on whatever machine, has to bring up to date. It names contents and contains no secrets."""

from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic, and so Prefect, refuses the one of typing before 3.12


class Job(TypedDict):
    """One group to zip, or one model to measure, in plain values.

    Attributes:
        fleet: The fleet's name.
        kind: `group`, or `model` for a model's statistics.
        group: Name of the group or model.
        fingerprint: Fingerprint of the snapshot, which the storage has.
        settings: The whole content of its params.yaml, including where the storage and the registry are.
        run: Identifier of the fleet's run, for records.
    """

    fleet: str
    kind: Literal["group", "model"]
    group: str
    fingerprint: str
    settings: dict[str, Any]
    run: str


def shown_as(job: Job) -> str:
    """Return the name under which the job is shown and logged."""
    return job["group"] if job["kind"] == "group" else f"statistics/{job['group']}"
