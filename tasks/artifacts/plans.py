"""What `match` found, and its files: pairings, plans, the networks that a search tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from mtz_core.merging.pairing import Pairing
from mtz_core.network.narrowing import Keep
from tasks.artifacts.paths import Workspace
from tasks.files import InvalidArtifact, read_json, write_json, write_table


@dataclass(frozen=True)
class CandidateRecord:
    """A network that was tried for a budget: bytes relative to the originals', the damage expected, what was measured.

    `damage` is in nats; `loss` of each task is its held-out distillation loss in nats, or for a floor the points that
    it lost. `verdict` says in words what became of it.
    """

    what: str
    stored: float
    damage: float
    loss: Mapping[str, float]
    verdict: str


@dataclass(frozen=True)
class Search:
    """How a budget was spent: `stored` bytes relative to the originals', the damage expected in nats, all attempts.

    `limit` says in words what kept the network from being smaller.
    """

    limit: str
    bytes: int
    stored: float
    damage: float
    tried: Sequence[CandidateRecord]


@dataclass(frozen=True, eq=False)
class Matched:
    """What `match` found: pairings and their predicted cost by neuron group, how that fell, and what else was possible.

    `curves` are ``(group, neurons shared, cost)``. With a budget, `keep` are the neurons that each task keeps, which
    the pairings then number, costs are damage in nats, and `search` tells how it was spent.
    """

    pairings: Mapping[str, Pairing]
    costs: Mapping[str, float]
    curves: Iterable[tuple[str, int, float]]
    descent: Sequence[float] = ()
    keep: Mapping[str, Keep] = field(default_factory=dict)
    search: Search | None = None


def write_matched(workspace: Workspace, tasks: Sequence[str], found: Matched) -> None:
    """What was found, as JSON for `merge` and as tables for plots: what sharing costs, what a search has tried."""
    search = found.search
    write_json(
        workspace.pairing,
        {
            "tasks": list(tasks),
            "groups": {
                name: {
                    "shared": pairing.shared,
                    "kept": dict(zip(tasks, (pairing.members >= 0).sum(axis=0).tolist(), strict=True)),
                    "cost": found.costs[name],
                    "members": pairing.members.tolist(),
                }
                for name, pairing in found.pairings.items()
            },
            "descent": list(found.descent),
            "keep": {t: {name: own.tolist() for name, own in kept.items()} for t, kept in found.keep.items()},
            "search": None if search is None else asdict(search),
        },
    )
    write_table(workspace.curves, ("layer", "shared", "cost"), found.curves)
    write_table(
        workspace.search,
        ("what", "stored", "damage", "task", "loss", "verdict"),
        [
            (one.what, one.stored, one.damage, task, loss, one.verdict)
            for one in (search.tried if search is not None else ())
            for task, loss in one.loss.items()
        ],
    )


def read_pairings(workspace: Workspace) -> tuple[dict[str, Pairing], list[float], dict[str, Keep]]:
    """The pairing of every neuron group, how the total cost fell, and what each task keeps where neurons are dropped.

    Raises `InvalidArtifact`.
    """
    content = read_json(workspace.pairing)
    try:
        pairings = {
            name: Pairing(tuple(content["tasks"]), np.array(group["members"], dtype=np.int64))
            for name, group in content["groups"].items()
        }
        keep: dict[str, Keep] = {
            task: {name: np.array(neurons, dtype=np.int64) for name, neurons in kept.items()}
            for task, kept in content["keep"].items()
        }
        return pairings, [float(cost) for cost in content["descent"]], keep
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArtifact(f"{workspace.pairing} does not hold a pairing: {error!r}. Run match again.") from error


def read_plan(workspace: Workspace) -> tuple[dict[str, float], str]:
    """Figures of what `match` decided, by name, and what limited a budget (nothing where there was none).

    Raises `InvalidArtifact`.
    """
    content = read_json(workspace.pairing)
    try:
        figures = {
            f"{name}/{figure}": value
            for name, group in content["groups"].items()
            for figure, value in {
                "shared": group["shared"],
                "cost": group["cost"],
                **{f"kept/{task}": kept for task, kept in group["kept"].items()},
            }.items()
        }
        search = content["search"]
        if search is None:
            return figures, ""
        return {**figures, **{name: search[name] for name in ("stored", "bytes", "damage")}}, search["limit"]
    except (KeyError, TypeError, AttributeError) as error:
        raise InvalidArtifact(f"{workspace.pairing} does not hold a plan: {error!r}. Run match again.") from error
