"""The loss of distillation between classifiers, as it is written in the literature."""

import torch.nn.functional as F
from torch import Tensor


def distillation_loss(outputs: Tensor, targets: Tensor, temperature: float) -> Tensor:
    """``T² KL(softmax(targets / T) ‖ softmax(outputs / T))``, mean over the batch (Hinton, Vinyals, Dean 2015)."""
    return temperature**2 * F.kl_div(
        F.log_softmax(outputs / temperature, dim=1),
        F.log_softmax(targets / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
