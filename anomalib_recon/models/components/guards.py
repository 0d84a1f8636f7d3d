# SPDX-License-Identifier: Apache-2.0

"""What every model watches while it is trained, tested and used."""

from collections.abc import Iterable
from typing import Any

from anomalib.data import AnomalibDataset, PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from anomalib_recon.data.image_files import check_image_files

from .checkpoints import RandomState
from .training_images import check_files


def guards() -> list[Callback]:
    """Callbacks of all models: no step on a broken loss, no score of a broken image, no other end when resumed.

    Returns:
        list[Callback]: New callbacks.
    """
    return [FiniteLoss(), ReadableImages(), RandomState()]


class FiniteLoss(Callback):
    """Stop a training whose loss is NaN or infinite, before weights and checkpoint are spoilt."""

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Look at the loss of a step.

        Args:
            trainer (Trainer): The trainer that is fitting.
            pl_module (LightningModule): The model.
            loss (Tensor): Loss, a scalar.

        Raises:
            RuntimeError: If it is not finite.
        """
        if not loss.isfinite():
            msg = (
                f"The loss is {float(loss)} in epoch {trainer.current_epoch}; lower learning_rate "
                f"({pl_module.hparams['learning_rate']}) or use precision 32. The last checkpoint is from before."
            )
            raise RuntimeError(msg)


class ReadableImages(Callback):
    """Look at the images of a test or a prediction before the first is scored."""

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the test images.

        Raises:
            ValueError: If one cannot be used.
        """
        del pl_module
        _check_loaders(trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the images to predict.

        Raises:
            ValueError: If one cannot be used.
        """
        del pl_module
        _check_loaders(trainer.predict_dataloaders)


def _check_loaders(loaders: Any) -> None:
    for loader in loaders if isinstance(loaders, Iterable) and not hasattr(loaders, "dataset") else [loaders]:
        dataset = getattr(loader, "dataset", None)
        if isinstance(dataset, AnomalibDataset):
            check_files(dataset)
        elif isinstance(dataset, PredictDataset):
            check_image_files(dataset.image_filenames)
