"""Statistics of a model and their files: activations, sensitivities and second moments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor

from mtz_core.network.graph import Network
from mtz_core.statistics.moments import Moments
from mtz_core.statistics.sensitivity import Sensitivities
from mtz_core.statistics.traced import Traced
from tasks.artifacts.paths import Workspace
from tasks.artifacts.tensors import read_tensors
from tasks.files import InvalidArtifact, whole_file

ROWS = "rows"
"""Name of the column in an activations file."""

_SENSITIVITY = "/sensitivity"
"""Ending of the names of sensitivities, beside the moments of a model."""


class RowsWriter:
    """A writer of one layer's rows to an Arrow IPC file: one fixed-shape tensor column, uncompressed.

    Args:
        path: The file to write.
        layer: The layer's name.
        inputs: Number of inputs of the layer, or of each of its convolution groups.
        groups: Number of convolution groups; 1 for any other layer.
    """

    def __init__(self, path: Path, layer: str, inputs: int, groups: int = 1) -> None:
        self._type = pa.fixed_shape_tensor(pa.float32(), (groups * inputs,))
        metadata = {"layer": layer, "inputs": str(inputs), "groups": str(groups)}
        schema = pa.schema([pa.field(ROWS, self._type)], metadata=metadata)
        self._schema = schema
        self._writer = pa.ipc.new_file(path, schema)

    def append(self, rows: Float[Tensor, "n inputs"]) -> None:
        """Write a batch of rows."""
        values = np.ascontiguousarray(rows.to(torch.float32).numpy())
        column = pa.FixedShapeTensorArray.from_numpy_ndarray(values)
        self._writer.write_batch(pa.record_batch([column], schema=self._schema))

    def close(self) -> None:
        """Write the footer, without which the file cannot be read."""
        self._writer.close()


def layer_file(folder: Path, layer: str) -> Path:
    """Return the activations file of a layer; layer names may contain dots but no slashes."""
    return folder / f"{layer}.arrow"


def sensitivities_file(folder: Path) -> Path:
    """Return the file of sensitivities in a folder of activations."""
    return folder / "sensitivities.safetensors"


def conv_groups_of(path: Path) -> int:
    """Return the number of convolution groups that share the rows of an activations file.

    Args:
        path: The activations file.

    Returns:
        The number of groups; 1 for a layer that is no grouped convolution.

    Raises:
        InvalidArtifact: The file cannot be read.
    """
    try:
        with pa.memory_map(str(path)) as source:
            return int(pa.ipc.open_file(source).schema.metadata[b"groups"])
    except (OSError, pa.ArrowInvalid, KeyError, TypeError) as error:
        raise InvalidArtifact(f"{path} cannot be read: {error}. Run collect again.") from error


def read_rows(path: Path, batch_rows: int) -> Iterator[Float[Tensor, "n inputs"]]:
    """Read the rows of an activations file, memory-mapped.

    How the rows are batched depends on `batch_rows` alone, not on the batches in the file.

    Args:
        path: The activations file.
        batch_rows: The most rows in a batch.

    Yields:
        Batches of rows.

    Raises:
        InvalidArtifact: The file cannot be read.
    """
    try:
        with pa.memory_map(str(path)) as source:
            pending: list[Tensor] = []
            count = 0
            reader = pa.ipc.open_file(source)
            for index in range(reader.num_record_batches):
                values = reader.get_batch(index).column(0).to_numpy_ndarray()
                for part in torch.split(torch.from_numpy(values.copy()), batch_rows):
                    if count + len(part) > batch_rows:
                        yield torch.cat(pending)
                        pending, count = [], 0
                    pending.append(part)
                    count += len(part)
            if pending:
                yield torch.cat(pending)
    except (OSError, pa.ArrowInvalid) as error:
        raise InvalidArtifact(f"{path} cannot be read: {error}. Run collect again.") from error


def write_sensitivities(path: Path, sensitivity: Sensitivities) -> None:
    """Write the sensitivities of a model's loss to the rows of its layers."""
    save_file(_named(sensitivity), path)


def read_sensitivities(path: Path) -> Sensitivities:
    """Read the sensitivities that `write_sensitivities` or `write_moments` wrote.

    Args:
        path: The file.

    Returns:
        The sensitivities by layer.

    Raises:
        InvalidArtifact: The file cannot be read, or holds no sensitivities.
    """
    sensitivity = {name.removesuffix(_SENSITIVITY): rows for name, rows in read_tensors(path, _SENSITIVITY).items()}
    if not sensitivity:
        raise InvalidArtifact(f"{path} does not hold sensitivities of layers. Run collect and hessians again.")
    return sensitivity


def _named(sensitivity: Sensitivities) -> dict[str, Tensor]:
    return {f"{layer}{_SENSITIVITY}": rows for layer, rows in sensitivity.items()}


def write_moments(path: Path, moments: Mapping[str, Moments], sensitivity: Sensitivities) -> None:
    """Write the statistics of one model: sensitivities and second moments.

    Per layer, the second moments are the mean outer product of the rows, or the rows themselves while there are fewer
    rows than inputs.

    Args:
        path: The file.
        moments: The second moments by layer.
        sensitivity: The sensitivities by layer.
    """
    tensors = _named(sensitivity)
    for layer, layer_moments in moments.items():
        if layer_moments.gram is None:
            tensors[f"{layer}/rows"] = layer_moments.rows
        else:
            tensors[f"{layer}/moment"] = (layer_moments.gram / layer_moments.count).to(torch.float32)
            tensors[f"{layer}/count"] = torch.tensor(layer_moments.count)
    with whole_file(path) as temporary:
        save_file(tensors, temporary)


def read_moments(path: Path) -> dict[str, Moments]:
    """Read the second moments that `write_moments` wrote.

    Args:
        path: The file.

    Returns:
        The moments by layer.

    Raises:
        InvalidArtifact: The file cannot be read, or holds no moments.
    """
    moments: dict[str, Moments] = {}
    tensors = read_tensors(path)
    if any(name.endswith("/moment") and f"{name.removesuffix('moment')}count" not in tensors for name in tensors):
        raise InvalidArtifact(f"{path} does not hold moments of layers. Run hessians again.")
    for name, tensor in tensors.items():
        layer, kind = name.rsplit("/", 1)
        if kind == "rows":
            moments[layer] = Moments.from_rows(tensor)
        elif kind == "moment":
            count = int(tensors[f"{layer}/count"])
            moments[layer] = Moments.from_gram(tensor.to(torch.float64) * count, count)
    return moments


def read_traced(workspace: Workspace, model: str, network: Network) -> Traced:
    """Join a traced network and the statistics that `write_moments` wrote for it.

    Args:
        workspace: The workspace of the statistics.
        model: The name of the model.
        network: Its traced network.

    Returns:
        The network with its statistics, without calibration data.

    Raises:
        InvalidArtifact: The file of statistics is missing or damaged.
    """
    file = workspace.hessians(model)
    return Traced(network, read_moments(file), read_sensitivities(file))
