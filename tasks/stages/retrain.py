"""Stage `retrain`: light retraining of the merged network, by distillation from the originals or with labels.

Each time the network is evaluated on validation data, the whole state is written to a checkpoint, so that a run that
was killed continues from there.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from mtz_core.retraining import Retraining, RetrainState, RetrainStep, Targets
from mtz_core.zipped.module import load
from tasks.artifacts.paths import Workspace
from tasks.code import code_digest
from tasks.data.examples import files_of
from tasks.files import sha256, whole_file, whole_folder, write_table
from tasks.models.load import load_network, read_split
from tasks.models.shards import weight_files
from tasks.params import Params
from tasks.progress import show_progress


def run(params: Params, workspace: Workspace) -> None:
    """Write the retrained network and its learning curve.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.

    Raises:
        MtzError: A network or its data cannot be used.
    """
    zipped = load(workspace.merged)
    settings = params.retrain
    originals = {model: load_network(params, workspace, model) for model in params.models}
    training, training_labels = read_split(params, workspace, "train", settings.images)
    validation, validation_labels = read_split(params, workspace, "validation", None)
    labels = Targets(training_labels, validation_labels) if settings.labels else None
    retraining = Retraining(zipped, originals, training, validation, settings.config(), labels=labels)
    for model, own in training_labels.items():
        outputs = zipped.structure.networks[model].graph.outputs
        if distilled := [name for name in outputs if name not in own]:
            show_progress(f"{model}: distilled, as without class numbers: {', '.join(distilled)}")
    checkpoint = workspace.root / "checkpoints" / "retrain.safetensors"
    digest = _digest(params, workspace)
    _resume(retraining, checkpoint, digest)
    for step in retraining.steps():
        losses = ", ".join(f"{task} {loss:.4f}" for task, loss in step.validation_loss.items())
        show_progress(
            f"iteration {step.iteration}/{settings.iterations}: validation loss {losses}{' (best)' * step.best}"
        )
        _write(checkpoint, digest, retraining.state())
    with whole_folder(workspace.retrained) as folder:
        zipped.save(folder)
    write_table(
        workspace.plots / "learning_curve.csv",
        ("iteration", "task", "training_loss", "validation_loss", "best"),
        [
            (step.iteration, task, step.training_loss.get(task, ""), step.validation_loss[task], step.best)
            for step in retraining.curve
            for task in zipped.tasks
        ],
    )
    checkpoint.unlink()


def _digest(params: Params, workspace: Workspace) -> str:
    """Return one digest of everything that decides what light retraining does: files, settings, code."""
    settings = params.model_dump()
    files = sorted(workspace.merged.iterdir())
    for block in params.models.values():
        files += weight_files(workspace.root / block.weights)
        files += [file for split in ("train", "validation") for file in files_of(workspace.root / block.data, split)]
    content = {
        "files": [sha256(file) for file in files],
        "settings": {name: settings[name] for name in ("models", "runtime", "retrain")},
        "code": code_digest(__name__, *(block.network.partition(":")[0] for block in params.models.values())),
        "torch": torch.__version__,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write(checkpoint: Path, digest: str, state: RetrainState) -> None:
    """Write a state, with the digest of what it belongs to, to one file that is replaced as a whole."""
    metadata = {"digest": digest, "curve": json.dumps([asdict(step) for step in state.curve])}
    with whole_file(checkpoint) as temporary:
        save_file(dict(state.tensors), temporary, metadata)


def _resume(retraining: Retraining, checkpoint: Path, digest: str) -> None:
    """Continue from a checkpoint if there is one that belongs to this run."""
    if not checkpoint.exists():
        return
    try:
        with safe_open(checkpoint, framework="pt") as file:
            metadata = file.metadata()
            if metadata["digest"] != digest:
                show_progress(
                    "the checkpoint of an earlier run is ignored: network, data, settings or code have changed since"
                )
                return
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        show_progress(f"the checkpoint of an earlier run is ignored: it cannot be read ({error})")
        return
    curve = tuple(RetrainStep(**step) for step in json.loads(metadata["curve"]))
    retraining.resume(RetrainState(tensors, curve))
    show_progress(f"resumed from the checkpoint of iteration {curve[-1].iteration}")
