# SPDX-License-Identifier: Apache-2.0

"""A learning rate that rises and falls once in a fit."""

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

# share of a fit in which the rate rises, and the lowest factors at its start and its end
RISE = 0.1
START_FACTOR = 1 / 25
END_FACTOR = 1e-5


def one_cycle(optimizer: Optimizer, module: LightningModule) -> dict[str, Any]:
    """Have the learning rate rise to that of the optimizer and fall to nearly 0 within the fit.

    Args:
        optimizer (Optimizer): The optimizer, with the highest learning rate of each group.
        module (LightningModule): The model, in its trainer.

    Returns:
        dict[str, Any]: What ``configure_optimizers`` returns.

    Raises:
        ValueError: See :func:`check_end`.
    """
    check_end(module.trainer)

    def factor(_: int) -> float:
        # the trainer's own estimate of all steps would load the images, before a cache can stand in for them
        batches = module.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return one_cycle_factor(share_of_fit(module.trainer, batches))

    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


def check_end(trainer: Trainer) -> None:
    """Refuse a cycle of a fit of which it is not known when it ends.

    Args:
        trainer (Trainer): The trainer.

    Raises:
        ValueError: If it has neither ``max_epochs`` nor ``max_steps`` nor ``max_time``.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    by_time = any(isinstance(callback, Timer) and callback.time_remaining() is not None for callback in callbacks)
    if not by_time and max(trainer.max_epochs or -1, trainer.max_steps) < 0:
        msg = "use_one_cycle needs a fit that ends: pass max_epochs, max_steps or max_time to the trainer."
        raise ValueError(msg)


def one_cycle_factor(share: float) -> float:
    """Factor of the highest learning rate: a cosine up, then a longer one down to nearly 0.

    Args:
        share (float): Share of the fit that is over, from 0 to 1; see :func:`share_of_fit`.

    Returns:
        float: Factor from ``END_FACTOR`` to 1.
    """
    if share < RISE:
        return START_FACTOR + (1 - START_FACTOR) * (1 - math.cos(math.pi * share / RISE)) / 2
    return END_FACTOR + (1 - END_FACTOR) * (1 + math.cos(math.pi * (share - RISE) / (1 - RISE))) / 2


def share_of_fit(trainer: Trainer, batches: float) -> float:
    """Share of a fit that is over: of its time, its epochs or its steps, whichever will end it.

    Args:
        trainer (Trainer): The trainer, with ``max_time``, ``max_epochs`` or ``max_steps``.
        batches (float): Batches of this epoch that are over.

    Returns:
        float: Share from 0 to 1, the same in all processes.
    """
    share = 0.0
    if trainer.max_epochs and trainer.max_epochs > 0:
        share = (trainer.current_epoch + batches / trainer.num_training_batches) / trainer.max_epochs
    if trainer.max_steps > 0:
        share = max(share, trainer.global_step / trainer.max_steps)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Timer) and (left := callback.time_remaining()) is not None:
            of_time = callback.time_elapsed() / max(callback.time_elapsed() + left, 1e-9)
            share = max(share, trainer.strategy.broadcast(of_time))  # clocks differ, steps and epochs do not
    return min(1.0, share)
