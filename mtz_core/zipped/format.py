"""A zipped network on disk: `manifest.json` and `weights.safetensors`, each shared value stored once.

Loading never unpickles and never runs code from the files. The manifest names known layers and operators. Before a
network is made of it, it is checked together with names, shapes, dtypes and digests.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mtz_core.errors import InvalidZippedFile, UnsupportedModule
from mtz_core.network.graph import INPUT, Input, Inputs, Node
from mtz_core.network.groups import analyse
from mtz_core.network.topology import first_difference
from mtz_core.settings import BITS
from mtz_core.zipped.codes import SCALES, middle
from mtz_core.zipped.ownership import NOT_A_MEMBER
from mtz_core.zipped.report import LayerReport, TaskReport, ZipReport
from mtz_core.zipped.structure import TaskStructure, ZippedStructure, hidden_groups, own_name, scale_name

FORMAT = "mtz-zipped-network"
VERSION = 5
READ = (3, 4, 5)
"""The versions that are read.

Before version 5 no block is rounded. Before version 4 a report does not tell how well the tasks came through, and a
group is named after its first writer even if that is kept separate.
"""

PRECISIONS = ("float32", "float64", "float16", "bfloat16")
"""The types that weights can have where they are not rounded."""

MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


def save(structure: ZippedStructure, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write a zipped network into a folder.

    Each file appears whole or not at all. The same network gives the same bytes.

    Args:
        structure: The network's structure.
        tensors: Its blocks and other tensors, by name.
        folder: The folder, which is made if needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    scales = structure.scale_shapes()
    precision = next(tensor.dtype for name, tensor in tensors.items() if tensor.is_floating_point())
    tensors = {name: tensor.to(SCALES) if name in scales else tensor for name, tensor in tensors.items()}
    weights = save_tensors({name: tensor.cpu().contiguous() for name, tensor in tensors.items()})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "networks": {task: _describe(network) for task, network in structure.networks.items()},
        "apart": {axis: list(groups) for axis, groups in structure.separate.items()},
        "members": {name: rows.tolist() for name, rows in structure.members.items()},
        "precision": _dtype_name(precision),
        "bits": dict(structure.bits),
        "dtypes": {name: _dtype_name(tensor.dtype) for name, tensor in tensors.items()},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "report": dataclasses.asdict(structure.report),
    }
    manifest["manifest_sha256"] = _digest(manifest)
    _write(folder, {WEIGHTS: weights, MANIFEST: (json.dumps(manifest, separators=(",", ":")) + "\n").encode()})


def _describe(network: TaskStructure) -> dict[str, Any]:
    return {
        **_describe_inputs(network.inputs),
        "nodes": [dataclasses.asdict(node) for node in network.graph.nodes],
        "output": network.graph.output,
        "shapes": {name: list(shape) for name, shape in network.shapes.items()},
        "parameters": sorted(network.trainable),
        "non_persistent": sorted(network.non_persistent),
        "original": {"parameters": network.parameters, "bytes": network.bytes},
    }


def _describe_inputs(inputs: Inputs) -> dict[str, Any]:
    described = {
        name: {"input_shape": list(own.shape), "input_dtype": _dtype_name(own.dtype)} for name, own in inputs.items()
    }
    return described.get(INPUT, {"inputs": described})


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest in canonical form, without its own digest."""
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then rename them: an old network stays until all files are whole."""
    temporary = {name: folder / f".{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            with temporary[name].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for name, path in temporary.items():
            path.replace(folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)


def load(folder: Path) -> tuple[ZippedStructure, dict[str, Tensor]]:
    """Read a zipped network's structure and tensors.

    Args:
        folder: A folder as `save` writes it.

    Returns:
        The structure, and the tensors by name.

    Raises:
        InvalidZippedFile: If a file is missing, damaged or of an unknown version, or if the files do not fit each
            other.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        content = (folder / WEIGHTS).read_bytes()
    except OSError as error:
        raise InvalidZippedFile(
            f"{error.filename}: {error.strerror}. A zipped network is a folder with {MANIFEST} and {WEIGHTS}."
        ) from error
    except ValueError as error:
        raise InvalidZippedFile(f"{folder / MANIFEST} is not JSON: {error}. Fetch or make it again.") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") not in READ:
        raise InvalidZippedFile(
            f"{folder / MANIFEST} is not a zipped network of format version {READ[0]} to {VERSION}."
        )
    if _digest(manifest) != manifest.get("manifest_sha256"):
        raise InvalidZippedFile(f"{folder / MANIFEST} does not have the digest that it states. Fetch or make it again.")
    if hashlib.sha256(content).hexdigest() != manifest.get("weights_sha256"):
        raise InvalidZippedFile(
            f"{folder / WEIGHTS} does not have the digest that {MANIFEST} states: it is damaged or belongs to "
            "another network. Fetch or make it again."
        )
    try:
        tensors = load_tensors(content)
    except SafetensorError as error:
        raise InvalidZippedFile(f"{folder / WEIGHTS} is not a safetensors file: {error}.") from error
    try:
        structure = _read_structure(manifest, tensors)
        shapes = structure.stored_shapes()
    except UnsupportedModule as error:
        raise InvalidZippedFile(f"{folder / MANIFEST} has a network that cannot be run here: {error}") from error
    except _MALFORMED as error:
        raise InvalidZippedFile(f"{folder / MANIFEST} is malformed: {error!r}.") from error
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = manifest.get("dtypes")
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise InvalidZippedFile(
                f"{folder / WEIGHTS}: tensor {name!r} should have shape {shapes.get(name)}, "
                f"but has {found.get(name)} (None: not there)."
            )
        if not isinstance(dtypes, dict) or _dtype_name(tensors[name].dtype) != dtypes.get(name):
            raise InvalidZippedFile(
                f"{folder / WEIGHTS}: tensor {name!r} has dtype {tensors[name].dtype}, not what {MANIFEST} states."
            )
    precision = _precision(manifest, tensors)
    _check_types(structure, tensors, precision, folder / WEIGHTS)
    scales = structure.scale_shapes()
    return structure, {name: tensors[name].to(precision) if name in scales else tensors[name] for name in shapes}


_MALFORMED = (
    KeyError,
    TypeError,
    ValueError,
    ArithmeticError,
    AttributeError,
    LookupError,
    StopIteration,
    RuntimeError,
)


def _read_structure(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ZippedStructure:
    """Read the structure that a manifest states.

    Args:
        manifest: The manifest.
        tensors: The stored tensors, by name.

    Returns:
        The structure.

    Raises:
        ValueError: If parts of the manifest contradict each other. Malformed ones also raise other errors, see
            `_MALFORMED`.
    """
    precision = _precision(manifest, tensors)
    networks = {task: _read_network(task, entry, tensors, precision) for task, entry in manifest["networks"].items()}
    tasks = tuple(networks)
    if not tasks:
        raise ValueError("no networks")
    first = networks[tasks[0]].graph
    for task in tasks[1:]:
        difference = first_difference(first, networks[task].graph)
        if difference is not None:
            raise ValueError(f"{tasks[0]} has {difference[0]} where {task} has {difference[1]}")
    members = {}
    stated = _renamed(manifest["members"], networks.values()) if manifest["version"] < 4 else manifest["members"]
    if stated.keys() != {*hidden_groups(network.graph for network in networks.values())}:
        raise ValueError("members of other neuron groups")
    for name, rows in stated.items():
        table = np.array(rows, dtype=np.int64).reshape(-1, len(tasks))
        for t, task in enumerate(tasks):
            own = np.sort(table[:, t][table[:, t] != NOT_A_MEMBER])
            if not np.array_equal(own, np.arange(networks[task].graph.hidden_widths.get(name, 0))):
                raise ValueError(f"members of {name!r} are not the neurons of {task!r}")
        if len(table) and not bool((table >= 0).any(axis=1).all()):
            raise ValueError(f"a member of {name!r} belongs to nobody")
        members[name] = table
    report = manifest["report"]
    layers = tuple(LayerReport(**layer) for layer in report["layers"])
    separate = {axis: tuple(groups) for axis, groups in manifest["apart"].items()}
    judged = {task: TaskReport(**entry) for task, entry in report.get("tasks", {}).items()}
    if not judged.keys() <= networks.keys() or not all(entry.declared for entry in judged.values()):
        raise ValueError("a report on tasks that are not there")
    report_read = ZipReport(**{**report, "layers": layers, "descent": tuple(report["descent"]), "tasks": judged})
    return _read_bits(ZippedStructure(tasks, networks, members, report_read, separate), manifest)


def _renamed(members: Mapping[str, Any], networks: Iterable[TaskStructure]) -> dict[str, Any]:
    """Members of groups by the names that these have since version 4, if a group's first writer is kept separate."""
    names = {group.writers[0]: group.name for network in networks for group in network.graph.hidden_groups}
    return {name if name in names.values() else names.get(name, name): rows for name, rows in members.items()}


def _precision(manifest: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> torch.dtype:
    """The type of the weights that are not rounded. Raises `ValueError` if it is none."""
    if manifest["version"] < 5:
        return next(tensor.dtype for name, tensor in tensors.items() if "/weight/" in name)
    if manifest["precision"] not in PRECISIONS:
        raise ValueError(f"precision {manifest['precision']!r}")
    found: torch.dtype = getattr(torch, manifest["precision"])
    return found


def _read_bits(structure: ZippedStructure, manifest: Mapping[str, Any]) -> ZippedStructure:
    """The structure with the bits of rounded blocks. Raises `ValueError` if there are no such blocks, or bits."""
    stated = manifest["bits"] if manifest["version"] >= 5 else {}
    shapes = structure.block_shapes()
    for name, bits in stated.items():
        if "/weight/" not in name or name not in shapes or type(bits) is not int or bits not in BITS:
            raise ValueError(f"{name!r} in {bits!r} bits")
    return dataclasses.replace(structure, bits=dict(stated))


def _check_types(structure: ZippedStructure, tensors: Mapping[str, Tensor], precision: torch.dtype, file: Path) -> None:
    """Check that rounded blocks are codes, that others are of the weights' type, and that scales are usable.

    Raises:
        InvalidZippedFile: If a tensor is not what it should be.
    """
    for name in structure.block_shapes():
        expected = torch.uint8 if name in structure.bits else precision
        if tensors[name].dtype != expected:
            raise InvalidZippedFile(
                f"{file}: tensor {name!r} should hold {_dtype_name(expected)}, but holds "
                f"{_dtype_name(tensors[name].dtype)}."
            )
    for block, bits in structure.bits.items():
        layer, _, rows, _ = block.rsplit("/", 3)
        name = scale_name(layer, tuple(rows.split("+")))
        largest = tensors[name].to(precision) * middle(bits)
        if tensors[name].dtype != SCALES or not bool((largest.isfinite() & (largest >= 0)).all()):
            raise InvalidZippedFile(
                f"{file}: tensor {name!r} holds no scales: {_dtype_name(SCALES)}, 0 or more, all levels finite."
            )


def _read_network(
    task: str, entry: Mapping[str, Any], tensors: Mapping[str, Tensor], precision: torch.dtype
) -> TaskStructure:
    """Read one task's structure. The graph is analysed anew: a file cannot state neuron groups that its operators lack.

    Args:
        task: The task.
        entry: The task's part of the manifest.
        tensors: The stored tensors, by name.
        precision: The type of the weights.

    Returns:
        The task's structure.

    Raises:
        ValueError: If the nodes are out of order, or if a trainable tensor is missing or not floating point.
    """
    nodes = tuple(Node(**node) for node in entry["nodes"])
    stated = entry.get("inputs", {INPUT: entry})
    if not stated or not all(name == INPUT or name.startswith(f"{INPUT}:") for name in stated):
        raise ValueError(f"{task!r} has no inputs, or inputs of other names")
    seen = {*stated}
    for node in nodes:
        if not set(node.sources) <= seen or node.name in seen:
            raise ValueError(f"node {node.name!r} is out of order")
        seen.add(node.name)
    shapes = {name: tuple(shape) for name, shape in entry["shapes"].items()}
    trainable = frozenset(entry["parameters"])
    matrices = {name for node in nodes if node.is_layer for name in (node.weight, node.bias) if name is not None}
    state = {
        name: torch.empty(shape, dtype=precision, device="meta") if name in matrices else tensors[own_name(name, task)]
        for name, shape in shapes.items()
    }
    for name in sorted(trainable):
        if name not in state or not state[name].is_floating_point():
            raise ValueError(f"{name!r} is no parameter of {task!r}")
    inputs = {name: _read_input(own, precision) for name, own in stated.items()}
    graph = analyse(nodes, entry["output"], state, trainable, inputs).graph
    original = entry["original"]
    sizes = int(original["parameters"]), int(original["bytes"])
    return TaskStructure(graph, shapes, trainable, inputs, *sizes, frozenset(entry.get("non_persistent", ())))


def _read_input(entry: Mapping[str, Any], precision: torch.dtype) -> Input:
    """Read an input. The network may have been turned to another precision since it was traced."""
    dtype = getattr(torch, entry["input_dtype"])
    return Input(tuple(entry["input_shape"]), precision if dtype.is_floating_point else dtype)
