# SPDX-License-Identifier: Apache-2.0

"""Validation at the end of training only, where each validation costs as much as an epoch."""

from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn


class DeferredValidation(Callback):
    """Keep the trainer from validating in ``fit`` until :meth:`validate` is called."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put validation off, that of the sanity check included."""
        del pl_module
        self._limit: Any = trainer.limit_val_batches
        trainer.limit_val_batches = 0

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was."""
        del pl_module, exception
        if trainer.state.fn == "fit" and hasattr(self, "_limit"):
            trainer.limit_val_batches = self._limit

    def validate(self, trainer: Trainer) -> None:
        """Validate as the trainer would have done, and leave the random numbers to a training that goes on.

        Args:
            trainer (Trainer): The trainer that is fitting.
        """
        trainer.limit_val_batches = self._limit
        if trainer.enable_validation:
            trainer.validating = True
            with isolate_rng():
                trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True


class ValidationAtEnd(DeferredValidation):
    """Validate once, when training ends, for the thresholds.

    Args:
        prepare (Callable[[], None] | None): The last of a model's training, called before that validation, whether
            there are images for it or not.
            Defaults to ``None``.
    """

    def __init__(self, prepare: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._prepare = prepare

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put validation off."""
        super().on_fit_start(trainer, pl_module)
        self._trained = self._validated = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate after the last epoch, before it is saved."""
        del pl_module
        self._trained = True
        if trainer.fit_loop.done:
            self.validate(trainer)
            self._validated = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Validate after a training that something has stopped since, and save it anew."""
        del pl_module
        if self._validated or not self._trained:
            return
        self.validate(trainer)
        save_anew(trainer)

    def validate(self, trainer: Trainer) -> None:
        """Validate as the trainer would have done, after what the model has left to do.

        Args:
            trainer (Trainer): The trainer that is fitting.
        """
        _average_statistics(trainer)
        if self._prepare:
            self._prepare()
        super().validate(trainer)


def _average_statistics(trainer: Trainer) -> None:
    """Give all processes the same running statistics: after its last step, each has those of its own images."""
    for part in trainer.lightning_module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.training:
            for statistic in (cast("Tensor", part.running_mean), cast("Tensor", part.running_var)):
                statistic.copy_(cast("Tensor", trainer.strategy.reduce(statistic, reduce_op="mean")))


def save_anew(trainer: Trainer) -> None:
    """Save the checkpoint again whose training something has stopped before its last epoch ended.

    Args:
        trainer (Trainer): The trainer that has fitted.
    """
    for callback in trainer.checkpoint_callbacks:
        if path := getattr(callback, "best_model_path", ""):
            trainer.save_checkpoint(path)
