# SPDX-License-Identifier: Apache-2.0

"""What every model watches while it is trained, tested and used."""

from collections.abc import Iterable
from typing import Any

import torch
from anomalib.data import AnomalibDataset, PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .image_files import check_image_modes, reads_deep_grey
from .images import check_training_files

# optimiser steps after which the losses are looked at: a look at each would stop a GPU at each
STEPS_PER_LOOK = 50


class FiniteLoss(Callback):
    """Stop a training whose loss is NaN or infinite, before a checkpoint is spoilt."""

    def __init__(self) -> None:
        super().__init__()
        self._num_losses = 0
        self._total = torch.zeros(())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start afresh."""
        del trainer
        self._num_losses = 0
        self._total = torch.zeros((), device=pl_module.device)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Add the loss of a step: a sum is finite if all its losses are.

        Args:
            trainer (Trainer): The trainer that is fitting.
            pl_module (LightningModule): The model.
            loss (Tensor): Loss, a scalar.

        Raises:
            RuntimeError: If one of the last losses is not finite.
        """
        self._total = self._total + loss.detach()
        self._num_losses += 1
        if self._num_losses % STEPS_PER_LOOK == 1:
            self._look(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the losses before their weights are validated, after which they may be saved.

        Raises:
            RuntimeError: If one is not finite.
        """
        self._look(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the losses before the epoch is saved.

        Raises:
            RuntimeError: If one is not finite.
        """
        self._look(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the losses before a checkpoint that is saved amid an epoch is written.

        Raises:
            RuntimeError: If one is not finite.
        """
        del checkpoint
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, module: LightningModule) -> None:
        if not self._total.isfinite():
            msg = (
                f"The loss is {float(self._total)} in epoch {trainer.current_epoch}; lower learning_rate "
                f"({module.hparams.get('learning_rate')}) or use precision 32. The last checkpoint is from before."
            )
            raise RuntimeError(msg)
        self._total = torch.zeros_like(self._total)


class ReadableImages(Callback):
    """Look at all images before the first is used."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decode the training and validation images and look at their labels, before a long training.

        Raises:
            ValueError: If an image cannot be used, the model cannot be trained on this set, or tiles do not fit.
        """
        datamodule: Any = getattr(trainer, "datamodule", None)
        module: Any = pl_module
        module.check_tiles()
        if stage == "fit" and datamodule is not None:
            check_training_files(datamodule, module)
            module.check_training_set(datamodule.train_data)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the headers of the test images.

        Raises:
            ValueError: If one cannot be used.
        """
        del pl_module
        _check_loaders(trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the headers of the images to predict.

        Raises:
            ValueError: If one cannot be used.
        """
        del pl_module
        _check_loaders(trainer.predict_dataloaders)


def _check_loaders(loaders: Any) -> None:
    for loader in loaders if isinstance(loaders, Iterable) and not hasattr(loaders, "dataset") else [loaders]:
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, AnomalibDataset):
            check_image_modes(dataset.samples.image_path, reads_deep_grey(dataset))
        elif isinstance(dataset, PredictDataset):
            check_image_modes(dataset.image_filenames, reads_deep_grey(dataset))
