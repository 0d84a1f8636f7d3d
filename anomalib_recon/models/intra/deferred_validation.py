# SPDX-License-Identifier: Apache-2.0

"""Validation at the end of training only, where each validation costs as much as an epoch."""

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


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
        """Validate as the trainer would have done.

        Args:
            trainer (Trainer): The trainer that is fitting.
        """
        trainer.limit_val_batches = self._limit
        if trainer.enable_validation:
            trainer.validating = True
            trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True
