"""Results of `match` and their files: pairings, plans, the candidates that a search tried."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import numpy as np

from mtz_core.merging.pairing import Pairing
from mtz_core.network.narrowing import Keep
from mtz_core.settings import BITS
from tasks.artifacts.paths import Workspace
from tasks.files import InvalidArtifact, read_json, write_json, write_table


@dataclass(frozen=True)
class CandidateRecord:
    """A network that was tried for a budget.

    Attributes:
        what: Name of the candidate.
        stored: Its bytes relative to the originals' bytes.
        damage: The damage expected, in nats.
        loss: For a size, the held-out distillation loss of each task, in nats; for a floor, the points that the task
            lost.
        verdict: What became of the candidate, in words.
    """

    what: str
    stored: float
    damage: float
    loss: Mapping[str, float]
    verdict: str


@dataclass(frozen=True)
class Search:
    """How a budget was spent.

    Attributes:
        limit: What kept the network from being smaller, in words.
        bytes: Stored bytes.
        stored: Stored bytes relative to the originals' bytes.
        damage: The damage expected, in nats.
        tried: All candidates, in the order in which they were tried.
    """

    limit: str
    bytes: int
    stored: float
    damage: float
    tried: Sequence[CandidateRecord]


@dataclass(frozen=True, eq=False)
class Matched:
    """What `match` found.

    Attributes:
        pairings: The pairing of each neuron group. If neurons are dropped, it numbers those that are kept.
        costs: The predicted cost of each neuron group; with a budget, damage in nats.
        curves: What sharing costs, as `(group, neurons shared, cost)`.
        descent: The predicted cost of all groups before coordinate descent, and after every pairing that it took.
        keep: With a budget, the neurons that each task keeps.
        damping: With a budget, the relative ``λ`` of the fits of some tasks.
        bits: With a budget, the number of bits to which weights are rounded, by the names of their scales.
        search: With a budget, how it was spent.
    """

    pairings: Mapping[str, Pairing]
    costs: Mapping[str, float]
    curves: Iterable[tuple[str, int, float]]
    descent: Sequence[float] = ()
    keep: Mapping[str, Keep] = field(default_factory=dict)
    damping: Mapping[str, float] = field(default_factory=dict)
    bits: Mapping[str, int] = field(default_factory=dict)
    search: Search | None = None


def write_matched(workspace: Workspace, tasks: Sequence[str], found: Matched) -> None:
    """Write the result of `match`: JSON for `merge`, and tables for plots."""
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
            "damping": dict(found.damping),
            "bits": dict(found.bits),
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


@dataclass(frozen=True, eq=False)
class Pairings:
    """What `merge` needs of the result of `match`; the fields are those of `Matched`."""

    pairings: Mapping[str, Pairing]
    descent: Sequence[float]
    keep: Mapping[str, Keep]
    damping: Mapping[str, float]
    bits: Mapping[str, int]


def read_pairings(workspace: Workspace) -> Pairings:
    """Read what `merge` needs of the result of `match`.

    Args:
        workspace: The workspace of the group.

    Returns:
        The pairings, and what else the plan says.

    Raises:
        InvalidArtifact: The file is missing or damaged.
    """
    content = read_json(workspace.pairing)
    try:
        return Pairings(
            {
                name: Pairing(tuple(content["tasks"]), np.array(group["members"], dtype=np.int64))
                for name, group in content["groups"].items()
            },
            [float(cost) for cost in content["descent"]],
            {
                task: {name: np.array(neurons, dtype=np.int64) for name, neurons in kept.items()}
                for task, kept in content["keep"].items()
            },
            {task: float(own) for task, own in content.get("damping", {}).items()},  # older plans have none
            {name: _bits(own) for name, own in content.get("bits", {}).items()},
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidArtifact(f"{workspace.pairing} does not hold a pairing: {error!r}. Run match again.") from error


def _bits(stated: object) -> int:
    """A number of bits to which weights can be rounded. Raises `ValueError` if it is none."""
    if type(stated) is not int or stated not in BITS:
        raise ValueError(f"{stated!r} bits")
    return stated


def read_plan(workspace: Workspace) -> tuple[dict[str, float], str]:
    """Read figures of the plan that `match` made.

    Args:
        workspace: The workspace of the group.

    Returns:
        The figures by name, and what limited the budget (empty without a budget).

    Raises:
        InvalidArtifact: The file is missing or damaged.
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
