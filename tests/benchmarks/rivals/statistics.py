"""Statistics of batch normalisations, computed anew for what a zipped network feeds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mtz_core.network.graph import INPUT, free_unused, run_node
from mtz_core.statistics.calibration import as_batches
from mtz_core.zipped.module import ZippedNetwork
from tests.benchmarks.rivals.assemble import graph_of


@torch.no_grad()
def reestimate(zipped: ZippedNetwork, calibration: Mapping[str, Tensor]) -> None:
    """Replace every task's running means and variances by those on its images, in place, in the order of its layers.

    Each normalisation sees what those before it put out with their new statistics. Variances are unbiased, as torch's.
    Memory beyond weights: the images at the width of the live values.
    """
    for task in zipped.tasks:
        graph, state = graph_of(zipped, task), dict(zipped.state_of(task))
        batches = as_batches(calibration[task], task)
        values: list[dict[str, Any]] = [{INPUT: batch} for batch in batches]
        for node in graph.nodes:
            if "running_mean" in node.arguments and node.arguments["running_mean"] is not None:
                inputs = torch.cat([part[node.arguments["input"]["value"]] for part in values])
                others = [axis for axis in range(inputs.ndim) if axis != 1]
                state[node.arguments["running_mean"]["state"]].copy_(inputs.mean(dim=others))
                state[node.arguments["running_var"]["state"]].copy_(inputs.var(dim=others))
            for part, batch in zip(values, batches, strict=True):
                part[node.name] = run_node(node, part, state, len(batch))
                free_unused(graph, part, node)
