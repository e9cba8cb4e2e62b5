"""A zipped network on disk: `manifest.json` and `weights.safetensors`, each shared value once.

Loading never unpickles and never runs code from the files: the manifest names known layers and operations, and is
checked, with names, shapes, dtypes and digests, before a network is made of it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from mtz_core.errors import InvalidZippedFile
from mtz_core.graph import INPUT, LayerGraph, NeuronGroup, Node
from mtz_core.layers import LAYERS, OPERATIONS
from mtz_core.structure import LayerReport, Layout, ZippedStructure, ZipReport

FORMAT = "mtz-zipped-network"
VERSION = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


def save(structure: ZippedStructure, blocks: Mapping[str, Tensor], folder: Path) -> None:
    """Write a zipped network into a folder, which is made if needed. Each file appears whole or not at all.

    The same network gives the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = save_tensors({name: tensor.cpu().contiguous() for name, tensor in blocks.items()})
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "tasks": list(structure.tasks),
        "input_shape": list(structure.input_shape),
        "nodes": [dataclasses.asdict(node) for node in structure.graph.nodes],
        "groups": [
            dataclasses.asdict(group)
            | {"layout": [[list(owners), count] for owners, count in structure.layouts[group.name]]}
            for group in structure.graph.groups
        ],
        "columns_per_neuron": dict(structure.columns_per_neuron),
        "dtype": str(next(iter(blocks.values())).dtype),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "report": dataclasses.asdict(structure.report),
    }
    manifest["manifest_sha256"] = _digest(manifest)
    _write(folder, {WEIGHTS: weights, MANIFEST: (json.dumps(manifest, indent=1) + "\n").encode()})


def _digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest in canonical form, without its own digest."""
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files under temporary names, then give them their own: an old network stays until all are whole."""
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
    """Read a zipped network's structure and blocks.

    Raises `InvalidZippedFile` for files that are missing, damaged, of an unknown version, or that do not fit each
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
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT or manifest.get("version") != VERSION:
        raise InvalidZippedFile(f"{folder / MANIFEST} is not a zipped network of format version {VERSION}.")
    if _digest(manifest) != manifest.get("manifest_sha256"):
        raise InvalidZippedFile(f"{folder / MANIFEST} does not have the digest that it states. Fetch or make it again.")
    if hashlib.sha256(content).hexdigest() != manifest.get("weights_sha256"):
        raise InvalidZippedFile(
            f"{folder / WEIGHTS} does not have the digest that {MANIFEST} states: it is damaged or belongs to "
            "another network. Fetch or make it again."
        )
    try:
        structure = _read_structure(manifest)
    except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError, StopIteration) as error:
        raise InvalidZippedFile(f"{folder / MANIFEST} is malformed: {error!r}.") from error
    try:
        blocks = load_tensors(content)
    except SafetensorError as error:
        raise InvalidZippedFile(f"{folder / WEIGHTS} is not a safetensors file: {error}.") from error
    shapes = structure.block_shapes()
    found = {name: tuple(tensor.shape) for name, tensor in blocks.items()}
    for name in sorted(shapes.keys() | found.keys()):
        if shapes.get(name) != found.get(name):
            raise InvalidZippedFile(
                f"{folder / WEIGHTS}: tensor {name!r} should have shape {shapes.get(name)}, "
                f"but has {found.get(name)} (None: not there)."
            )
        if str(blocks[name].dtype) != manifest.get("dtype"):
            raise InvalidZippedFile(
                f"{folder / WEIGHTS}: tensor {name!r} has dtype {blocks[name].dtype}, not {manifest.get('dtype')}."
            )
    return structure, {name: blocks[name] for name in shapes}


def _read_structure(manifest: Mapping[str, Any]) -> ZippedStructure:
    """The structure that a manifest states. Raises ValueError and the like for nonsense."""
    nodes = tuple(Node(**node) for node in manifest["nodes"])
    seen = {INPUT}
    for node in nodes:
        if node.kind not in LAYERS and node.kind not in OPERATIONS:
            raise ValueError(f"unknown operation {node.kind!r}")
        if node.kind in LAYERS and node.settings.keys() != LAYERS[node.kind].settings:
            raise ValueError(f"settings of {node.name!r}")
        if node.source not in seen or node.name in seen:
            raise ValueError(f"node {node.name!r} is out of order")
        seen.add(node.name)
    tasks = tuple(manifest["tasks"])
    layouts: dict[str, Layout] = {}
    groups = []
    for entry in manifest["groups"]:
        layout = tuple((tuple(owners), int(count)) for owners, count in entry["layout"])
        if any(not set(owners) <= set(tasks) or count < 0 for owners, count in layout):
            raise ValueError(f"layout of {entry['name']!r}")
        layouts[entry["name"]] = layout
        groups.append(NeuronGroup(entry["name"], tuple(entry["writers"]), tuple(entry["readers"])))
    report = manifest["report"]
    layers = tuple(LayerReport(**layer) for layer in report["layers"])
    structure = ZippedStructure(
        tasks=tasks,
        graph=LayerGraph(nodes, tuple(groups)),
        input_shape=tuple(manifest["input_shape"]),
        layouts=layouts,
        columns_per_neuron={name: int(value) for name, value in manifest["columns_per_neuron"].items()},
        report=ZipReport(**{**report, "layers": layers}),
    )
    structure.block_shapes()  # every layer has its groups, layouts and widths
    return structure
