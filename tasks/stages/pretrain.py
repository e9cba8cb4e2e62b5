"""Stage `pretrain`: train one network of the example from scratch, with a seed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mtz_core.errors import InvalidConfig
from mtz_core.evaluation import error_rate, predict
from tasks.artifacts.paths import Workspace
from tasks.data.examples import read_examples
from tasks.files import whole_file
from tasks.models.factories import build_network
from tasks.params import Params
from tasks.progress import show_progress


def run(params: Params, workspace: Workspace, model: str) -> None:
    """Train a model on its training split and write its weights.

    Args:
        params: The parameters of the group.
        workspace: The workspace to read from and write to.
        model: The model's name.

    Raises:
        InvalidConfig: There are no settings for this model under `pretrain`.
        MtzError: The network cannot be built, or its data cannot be used.
    """
    if model not in params.pretrain:
        raise InvalidConfig(f"pretrain has no settings for {model!r}. Add a block pretrain.{model}.")
    settings = params.pretrain[model]
    torch.manual_seed(settings.seed)
    network = build_network(params, model).train()
    images, labels = read_examples(workspace.root / settings.data, "train")
    held_out = read_examples(workspace.root / settings.data, "validation")
    steps = max(len(images) // settings.batch_size, 1)
    optimiser = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.epochs * steps
    )
    for epoch in range(1, settings.epochs + 1):
        for index in torch.split(torch.randperm(len(images)), settings.batch_size)[:steps]:
            optimiser.zero_grad(set_to_none=True)
            F.cross_entropy(network(images[index]), labels[index]).backward()
            optimiser.step()
            schedule.step()
        network.eval()
        error = error_rate(predict(network, torch.split(held_out[0], 500)), held_out[1])
        network.train()
        show_progress(f"epoch {epoch}/{settings.epochs}: validation error {error:.2f} %")
    with whole_file(workspace.root / params.models[model].weights) as temporary:
        save_file(network.state_dict(), temporary)
