"""Stage `merge`: make the zipped network of paired networks."""

from __future__ import annotations

import time

from mtz_core import zipping
from mtz_core.activations import as_batches
from mtz_core.zipped import ZippedNetwork
from tasks.artifacts import read_pairings
from tasks.files import whole_folder, write_table
from tasks.models import calibration, load_traced
from tasks.params import Params
from tasks.progress import peak_memory, say
from tasks.workspace import Workspace


def run(params: Params, workspace: Workspace) -> None:
    """Write the zipped network and a table of its layers. Raises `MtzError`."""
    networks = {model: load_traced(params, workspace, model) for model in params.models}
    batches = {model: as_batches(calibration(params, workspace, model), model) for model in params.models}
    started = time.perf_counter()
    pairings, descent = read_pairings(workspace)
    for step in zipping.merge(networks, pairings, batches, params.zip_config(), descent):
        if isinstance(step, ZippedNetwork):
            zipped = step
            break
        widths = " and ".join(str(width) for width in step.neurons.values())
        errors = ", ".join(f"{task} {error:.3g}" for task, error in step.error.items())
        say(
            f"{step.layer}: {step.shared} shared of {widths} neurons, output error {errors} "
            f"({time.perf_counter() - started:.1f} s, peak {peak_memory() / 2**30:.2f} GiB)"
            + (f"; task-specific, as {step.note}" if step.note else "")
        )
    with whole_folder(workspace.merged) as folder:
        zipped.save(folder)
    tasks = list(params.models)
    write_table(
        workspace.plots / "layers.csv",
        ("layer", "task", "neurons", "shared", "output_error"),
        [
            (layer.layer, task, layer.neurons[task], layer.shared, layer.error[task])
            for layer in zipped.report.layers
            for task in tasks
        ],
    )
    say(f"stored {100 * zipped.report.stored_fraction:.1f} % of {zipped.report.original_parameters:,} parameters")
