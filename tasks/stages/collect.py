"""Stage `collect`: sample the layer inputs of one network, and its sensitivities, on calibration images."""

from __future__ import annotations

from contextlib import ExitStack, closing

from mtz_core.statistics.calibration import stream_rows
from mtz_core.statistics.sensitivity import sensitivities
from tasks.artifacts.paths import Workspace
from tasks.artifacts.statistics import RowsWriter, layer_file, sensitivities_file, write_sensitivities
from tasks.files import whole_folder
from tasks.models.calibration import calibration
from tasks.models.load import check_tokens, load_traced
from tasks.models.outputs import check_splits, loss_of_outputs
from tasks.params import Params
from tasks.progress import show_progress


def run(params: Params, workspace: Workspace, model: str) -> None:
    """Write an Arrow file of sampled input rows for each layer, streamed batch by batch, and the sensitivities.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.
        model: The model's name.

    Raises:
        MtzError: The network or its data cannot be used.
    """
    network = load_traced(params, workspace, model)
    check_tokens(params, workspace, model, network)
    check_splits(params, workspace, model, network)
    if network.unused:
        show_progress(f"{params.models[model].weights}: {network.left_out}")
    batches = calibration(params, workspace, model, network)
    loss = loss_of_outputs(params, model, network, batches)
    if loss.guessed:
        show_progress(f"outputs are taken for {loss.kind}, as {loss.guessed}; models.{model}.output declares them")
    if not loss.tells:
        show_progress("the network puts out the same for all calibration examples, so nothing tells what it loses")
    with whole_folder(workspace.activations(model)) as folder, ExitStack() as stack:
        writers = {
            node.name: stack.enter_context(
                closing(
                    RowsWriter(
                        layer_file(folder, node.name),
                        node.name,
                        network.columns(node),
                        node.layer.conv_groups(node.arguments),
                    )
                )
            )
            for node in network.graph.layers
        }
        for number, rows in enumerate(stream_rows(network, batches, params.collect_config()), start=1):
            for layer, values in rows.items():
                writers[layer].append(values)
            if number % 10 == 0 or number == len(batches):
                done = sum(len(batch) for batch in batches[:number])
                show_progress(f"{done} of {sum(map(len, batches))} images")
        sensitivity = sensitivities(network, batches, params.collect.seed, loss)
        write_sensitivities(sensitivities_file(folder), sensitivity)
