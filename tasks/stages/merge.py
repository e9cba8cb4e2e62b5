"""Stage `merge`: build the zipped network from the pairings."""

from __future__ import annotations

import time
from collections.abc import Mapping

from torch import Tensor

from mtz_core.merging import walk
from mtz_core.merging.compatibility import common_part
from mtz_core.merging.judging import judge
from mtz_core.network.graph import Network
from mtz_core.statistics.calibration import as_batches
from mtz_core.statistics.traced import Traced
from mtz_core.zipped.module import ZippedNetwork
from mtz_core.zipped.report import LayerReport
from tasks.artifacts.paths import Workspace
from tasks.artifacts.plans import read_pairings
from tasks.data.examples import read_images
from tasks.files import whole_folder, write_table
from tasks.models.calibration import calibration
from tasks.models.load import load_traced
from tasks.params import Params
from tasks.progress import peak_memory, show_progress

_JUDGED = 500
"""Validation examples of each model by which the zipped network is judged."""


def run(params: Params, workspace: Workspace) -> None:
    """Write the zipped network and a table of its layers.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.

    Raises:
        MtzError: A network, its calibration images or the pairings cannot be used.
    """
    networks = common_part({model: load_traced(params, workspace, model) for model in params.models})
    traced = {
        model: Traced(
            network,
            batches=calibration(params, workspace, model, network),
            output=params.models[model].declared_output,
        )
        for model, network in networks.items()
    }
    started = time.perf_counter()
    plan = read_pairings(workspace)
    merging = walk.merge(traced, plan.pairings, params.zip_config(), plan.descent, plan.keep, plan.damping, plan.bits)
    for step in merging:
        if isinstance(step, ZippedNetwork):
            zipped = step
            break
        widths = " and ".join(str(width) for width in step.neurons.values())
        gone = _dropped(networks, step).values()
        dropped = f", {' and '.join(str(count) for count in gone)} dropped" if any(gone) else ""
        errors = ", ".join(f"{task} {error:.3g}" for task, error in step.error.items())
        show_progress(
            f"{step.layer}: {step.shared} shared of {widths} neurons{dropped}, output error {errors} "
            f"({time.perf_counter() - started:.1f} s, peak {peak_memory() / 2**30:.2f} GiB)"
            + (f"; task-specific, as {step.note}" if step.note else "")
        )
        if step.few_rows:
            show_progress(
                f"warning: {step.layer} is fitted on few rows: {step.few_rows}; more collect.images would fit it better"
            )
    zipped.judged(judge(zipped, traced, _validation(params, workspace)))
    for task, judged in zipped.report.tasks.items():
        show_progress(f"{task}: {judged}")
    with whole_folder(workspace.merged) as folder:
        zipped.save(folder)
    write_table(
        workspace.plots / "layers.csv",
        ("layer", "task", "neurons", "shared", "dropped", "output_error"),
        [
            (layer.layer, task, layer.neurons[task], layer.shared, dropped, layer.error[task])
            for layer in zipped.report.layers
            for task, dropped in _dropped(networks, layer).items()
        ],
    )
    show_progress(f"stored {100 * zipped.report.stored_fraction:.1f} % of {zipped.report.original_bytes:,} bytes")


def _validation(params: Params, workspace: Workspace) -> dict[str, list[Tensor]]:
    """Return examples of every validation split, which nothing is fitted to."""
    return {
        model: as_batches(read_images(workspace.root / block.data, "validation", _JUDGED, params.collect.seed), model)
        for model, block in params.models.items()
    }


def _dropped(networks: Mapping[str, Network], layer: LayerReport) -> dict[str, int]:
    """Return how many of a layer's neurons each task has lost, in the order of the zipped network's tasks."""
    return {task: len(networks[task].graph.rows[layer.layer].group) - left for task, left in layer.neurons.items()}
