"""Checks of a budget before any work: a size that no plan can reach, validation data that a floor cannot use."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from mtz_core.batches import tensors_of
from mtz_core.errors import InvalidConfig
from mtz_core.evaluation import check_labels
from mtz_core.merging.compatibility import shared_counts
from mtz_core.merging.pairing import Pairing
from mtz_core.network.graph import Network, given_name, inputs_of
from mtz_core.network.narrowing import LEAST
from mtz_core.planning.search import Validation
from mtz_core.planning.sizes import Sizes, owner_sets
from mtz_core.settings import BITS, Budget
from mtz_core.zipped.ownership import NOT_A_MEMBER
from mtz_core.zipped.structure import hidden_groups
from tasks.artifacts.paths import Workspace
from tasks.data.examples import InvalidData, read_labelled
from tasks.models.metrics import find_metrics, names_of
from tasks.models.outputs import outputs_for
from tasks.params import Params


def check_budget(params: Params, workspace: Workspace, networks: Mapping[str, Network]) -> dict[str, Validation]:
    """Check that a budget is possible.

    Args:
        params: The parameters of the group.
        workspace: The workspace with the data.
        networks: The traced network of each model.

    Returns:
        The validation data of each model if the budget is a floor; empty otherwise.

    Raises:
        InvalidConfig: The size cannot be reached, whatever the weights are, or a floor is for something that is not
            measured.
        InvalidData: The validation data is missing, or its images have another shape than the training images.
        InvalidCalibration: The labels do not fit the images or the network.
    """
    budget = params.zip_config().budget
    if budget is None:
        return {}
    if budget.size is not None:
        _check_size(params, networks, budget)
        return {}
    measured = [name for model, own in networks.items() for name in names_of(params, model, own.graph.outputs)]
    try:
        budget.floors(measured)
    except InvalidConfig as error:
        raise InvalidConfig(f"match.{error}") from error
    return {model: _validation(params, workspace, model, network) for model, network in networks.items()}


def _check_size(params: Params, networks: Mapping[str, Network], budget: Budget) -> None:
    """Compare the size with the fewest bytes: least neurons, as many of them shared as possible, of least bits."""
    graphs = [network.graph for network in networks.values()]
    most = shared_counts(networks, params.zip_config())
    units = {}
    for group in hidden_groups(graphs):
        widths = np.array([graph.hidden_widths.get(group, 0) for graph in graphs])
        kept = widths.clip(max=LEAST) if "drop" in budget.moves else widths
        if "share" in budget.moves and most[group]:
            neurons = np.arange(kept.max())[:, None]
            units[group] = np.where(neurons < kept, neurons, NOT_A_MEMBER)  # neuron i of all that have so many
        else:
            units[group] = Pairing.from_tuples(
                tuple(networks), kept.tolist(), np.zeros((0, len(kept)), np.int64)
            ).members
    sizes = Sizes(networks, owner_sets(units.values()))
    bits = sizes.bits_of(min(BITS)) if "round" in budget.moves else None
    stored = sizes.stored({group: sizes.count(own) for group, own in units.items()}, bits)
    least = stored / sum(network.bytes for network in networks.values())
    if budget.size is not None and least > budget.size:
        raise InvalidConfig(
            f"match.budget.size: {budget.size:g} is impossible with moves {' and '.join(budget.moves)}: these networks "
            f"cannot be stored in less than {least:.3f} of their bytes. Allow more."
        )


def _validation(params: Params, workspace: Workspace, model: str, network: Network) -> Validation:
    settings = params.models[model]
    images, labels = read_labelled(workspace.root / settings.data, "validation")
    outputs = network.graph.outputs
    metrics = {output: metric for output, (_, metric) in find_metrics(params, model, outputs, labels).items()}
    shapes = [
        {given_name(name): list(own.shape) for name, own in inputs.items()}
        for inputs in (inputs_of(images), network.inputs)
    ]
    if shapes[0] != shapes[1]:
        said = [", ".join(f"{name} {shape}".strip() for name, shape in own.items()) for own in shapes]
        raise InvalidData(
            f"models.{model}.data: validation images have shape {said[0]}, training images {said[1]}. Bring them to "
            "one."
        )
    known = {} if labels is None else tensors_of(labels)
    for output, own in outputs_for(model, "validation", network, images[:2]).items():
        if output in known:
            title = f"{model}.{output}" if output else model
            check_labels(metrics[output], known[output], (len(images), *own.shape[1:]), title)
    return Validation(images, labels, metrics)
