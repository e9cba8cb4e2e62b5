"""What a command was asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from flows.spec.fleet_file import Fleet, read_fleet
from tasks.home import find_home

Overlap = Literal["skip", "queue"]


@dataclass(frozen=True)
class Request:
    """A project and its fleet, as a command line or a deployment names them.

    Attributes:
        project: The folder of the project.
        params: The parameters file, relative to the project.
        fleet: The fleet file, relative to the project.
        groups: Names of the wanted groups; all if empty.
        settings: Changes in all groups, as `key.path=value`.
    """

    project: Path
    params: Path = Path("params.yaml")
    fleet: Path = Path("fleet.yaml")
    groups: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()

    @cached_property
    def declared(self) -> Fleet:
        """The fleet, read once: raises `InvalidFleet` and `InvalidParams`, as `read_fleet` does."""
        return read_fleet(self.project / self.params, self.project / self.fleet, self.settings)

    @cached_property
    def home(self) -> Path:
        """The folder of the project's runtime state."""
        return find_home(self.project)

    def as_parameters(self) -> dict[str, Any]:
        """Return it as parameters of a flow, in plain values."""
        return {
            "project": str(self.project.resolve()),
            "params": str(self.params),
            "fleet": str(self.fleet),
            "groups": self.groups,
            "settings": self.settings,
        }

    @classmethod
    def of_parameters(cls, **parameters: Any) -> "Request":
        """Return the request that a flow's parameters stand for: the one in use, with what it has read, if it is that.

        Args:
            **parameters: What `as_parameters` returns; `groups` and `settings` may be left out.
        """
        used = _in_use.get()
        given = {"groups": (), "settings": (), **parameters}
        if used is not None and used.as_parameters() == {**given, **_tuples(given)}:
            return used
        root, params, fleet = Path(given["project"]).resolve(), Path(given["params"]), Path(given["fleet"])
        return cls(root, params, fleet, **_tuples(given))

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Let flows that are called in the block go on with what this request has read."""
        token = _in_use.set(self)
        try:
            yield
        finally:
            _in_use.reset(token)


def _tuples(parameters: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    return {name: tuple(parameters[name]) for name in ("groups", "settings")}


_in_use: ContextVar[Request | None] = ContextVar("request", default=None)


@dataclass(frozen=True)
class Timetable:
    """When a deployed fleet runs.

    Attributes:
        cron: The schedule, five fields as in crontab.
        timezone: Its time zone, such as Europe/Zurich.
        overlap: Whether a run that is due while the last one is still going is skipped or queued.
    """

    cron: str
    timezone: str = "UTC"
    overlap: Overlap = "skip"
