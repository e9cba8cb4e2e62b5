"""Stage `hessians`: fold one network's sampled layer inputs into layer-wise second moments."""

from __future__ import annotations

from mtz_core.statistics.moments import Moments
from tasks.artifacts.paths import Workspace
from tasks.artifacts.statistics import conv_groups_of, read_rows, read_sensitivities, sensitivities_file, write_moments
from tasks.files import InvalidArtifact
from tasks.params import Params
from tasks.progress import show_progress


def run(params: Params, workspace: Workspace, model: str) -> None:
    """Read every activations file of a model once; write the second moments together with the sensitivities.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.
        model: The model's name.

    Raises:
        InvalidArtifact: The activations or sensitivities are missing or damaged.
    """
    files = sorted(workspace.activations(model).glob("*.arrow"))
    if not files:
        raise InvalidArtifact(f"{workspace.activations(model)} has no activations. Run collect {model} first.")
    moments: dict[str, Moments] = {}
    for file in files:
        conv_groups = conv_groups_of(file)
        for rows in read_rows(file, params.hessians.batch_rows):
            moments.setdefault(file.stem, Moments(rows.shape[1] // conv_groups, conv_groups)).add(rows)
        show_progress(f"{file.stem}: {moments[file.stem].count} rows of {moments[file.stem].inputs} inputs")
    sensitivity = read_sensitivities(sensitivities_file(workspace.activations(model)))
    write_moments(workspace.hessians(model), moments, sensitivity)
