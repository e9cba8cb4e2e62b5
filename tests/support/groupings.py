"""What a planner may have found: affinities and groups, made by hand."""

from itertools import combinations

from flows.fleet.plan import Choice
from mtz_core.grouping.affinity import Affinities, Affinity
from mtz_core.grouping.groups import Limits, choose_groups


def choice(*twins: str, loners: tuple[str, ...] = ()) -> Choice:
    """The planner's choice among models of 1,000 bytes: each word names twins, one a letter; loners fit with nobody."""
    models = sorted([*"".join(twins), *loners])
    near = Affinity(0.9, (0.01, 0.03), 400)
    far = Affinity(0.1, (5.0, 5.0), 400)
    pairs = {
        (one, other): near if any({one, other} <= set(word) for word in twins) else far
        for one, other in combinations(models, 2)
    }
    affinities = Affinities(dict.fromkeys(models, 1000), dict.fromkeys(models, frozenset()), pairs)
    return Choice(affinities, choose_groups(affinities, Limits(size=4)))
