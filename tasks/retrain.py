"""Stage `retrain`: light retraining of the merged network by distillation from the originals."""

from __future__ import annotations

import mtz_core
from mtz_core.retrain import retrain
from tasks.data import read_images
from tasks.files import whole_folder, write_table
from tasks.models import load_network
from tasks.params import Params
from tasks.progress import say
from tasks.workspace import Workspace


def run(params: Params, workspace: Workspace) -> None:
    """Write the retrained network and its learning curve. Raises `MtzError`."""
    zipped = mtz_core.load(workspace.merged)
    settings = params.retrain
    originals = {model: load_network(params, workspace, model) for model in params.models}
    folders = {model: workspace.root / block.data for model, block in params.models.items()}
    steps = []
    for step in retrain(
        zipped,
        originals,
        training={m: read_images(folder, "train", settings.images, settings.seed) for m, folder in folders.items()},
        validation={m: read_images(folder, "validation") for m, folder in folders.items()},
        config=settings.config(),
    ):
        losses = ", ".join(f"{task} {loss:.4f}" for task, loss in step.validation_loss.items())
        say(f"iteration {step.iteration}/{settings.iterations}: validation loss {losses}{' (best)' * step.best}")
        steps.append(step)
    with whole_folder(workspace.retrained) as folder:
        zipped.save(folder)
    write_table(
        workspace.plots / "learning_curve.csv",
        ("iteration", "task", "training_loss", "validation_loss", "best"),
        [
            (step.iteration, task, step.training_loss.get(task, ""), step.validation_loss[task], step.best)
            for step in steps
            for task in zipped.tasks
        ],
    )
