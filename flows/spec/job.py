"""A job: what a worker, on whatever machine, has to bring up to date. It names contents, and has no secrets."""

from typing import Any, Literal

from typing_extensions import TypedDict  # pydantic, and so Prefect, refuses the one of typing before 3.12


class Job(TypedDict):
    """One group to zip, or one model whose statistics to make, in plain values."""

    fleet: str
    kind: Literal["group", "model"]
    group: str
    """The name of the group, or of the model."""
    fingerprint: str
    """Of the snapshot, which the storage has."""
    settings: dict[str, Any]
    """All that its params.yaml says, and so where the storage and the registry are."""
    run: str
    """Of the fleet, for records."""


def shown_as(job: Job) -> str:
    """Return the name under which the job is shown and logged."""
    return job["group"] if job["kind"] == "group" else f"statistics/{job['group']}"
