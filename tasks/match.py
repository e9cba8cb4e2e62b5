"""Stage `match`: pair the neurons of a group's networks, layer by layer."""

from __future__ import annotations

import math

from mtz_core import matching
from tasks.artifacts import read_moments, write_matches
from tasks.models import load_traced
from tasks.params import Params
from tasks.progress import say
from tasks.workspace import Workspace


def run(params: Params, workspace: Workspace) -> None:
    """Write the pairing of every neuron group and its cost curves. Raises `MtzError`."""
    networks = {model: load_traced(params, workspace, model) for model in sorted(params.models)}
    matching.check_compatible(networks)
    moments = {model: read_moments(workspace.hessians(model)) for model in params.models}
    matches = []
    for match in matching.match(networks, moments, params.zip_config()):
        widths = " and ".join(str(network.graph.widths[match.group]) for network in networks.values())
        again = "" if math.isnan(match.total) else f"; all groups {match.total:.4g} (round {match.sweep})"
        say(f"{match.group}: {match.pairing.shared} shared of {widths} neurons, cost {match.cost:.4g}{again}")
        matches.append(match)
    write_matches(workspace, list(networks), matches)
