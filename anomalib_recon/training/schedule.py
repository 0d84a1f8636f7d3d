# SPDX-License-Identifier: Apache-2.0

"""A learning rate that rises and falls once in a fit."""

from typing import Any

from lightning.pytorch import LightningModule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR


def one_cycle(optimizer: Optimizer, module: LightningModule) -> dict[str, Any]:
    """Have the learning rate rise to that of the optimizer and fall to nearly 0 within the steps of the fit.

    Args:
        optimizer (Optimizer): The optimizer, with the highest learning rate of each group.
        module (LightningModule): The model, in its trainer.

    Returns:
        dict[str, Any]: What ``configure_optimizers`` returns.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    steps = int(module.trainer.estimated_stepping_batches)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {"scheduler": OneCycleLR(optimizer, rates, total_steps=steps), "interval": "step"},
    }
