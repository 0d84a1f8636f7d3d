# SPDX-License-Identifier: Apache-2.0

"""What every model watches while it is trained, tested and used."""

import logging
from collections.abc import Iterable
from typing import Any, cast

import torch
from anomalib.data import AnomalibDataset, PredictDataset
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .image_files import check_image_modes, levels_of
from .images import check_training_files

logger = logging.getLogger(__name__)

# backward passes after which the losses are looked at: a look at each would stop a GPU at each
STEPS_PER_LOOK = 50


class FiniteLoss(Callback):
    """Stop a training whose loss is NaN or infinite, before a checkpoint is spoilt."""

    def __init__(self) -> None:
        super().__init__()
        self._num_losses = 0
        self._total = torch.zeros(())

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse weights in half precision, in which small steps are lost, and in double, before anything is computed.

        Raises:
            ValueError: If the trainer has such a precision.
        """
        del pl_module, stage
        if trainer.precision not in {"32-true", "16-mixed", "bf16-mixed"}:
            msg = f"precision={trainer.precision!r} changes the weights themselves; pass bf16-mixed or 32."
            raise ValueError(msg)

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

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Look at the losses before a checkpoint that is saved amid an epoch is written.

        Raises:
            RuntimeError: If one is not finite.
        """
        del checkpoint
        self._look(trainer, pl_module)

    def _look(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._total.isfinite():
            rate = pl_module.hparams.get("learning_rate")
            lower = f"a lower learning_rate ({rate}) or " if rate else ""
            msg = (
                f"The loss is {float(self._total)} in epoch {trainer.current_epoch}; train anew with {lower}"
                "precision 32. The last checkpoint is from before."
            )
            raise RuntimeError(msg)
        self._total = torch.zeros_like(self._total)

    # before weights are validated, after which they may be saved, and before an epoch is saved
    on_validation_start = on_train_epoch_end = _look


class ReadableImages(Callback):
    """Look at all images before the first is used."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Decode the training and validation images and look at their labels, before a long training.

        Raises:
            ValueError: If an image cannot be used, the model cannot be trained on this set, or tiles do not fit.
        """
        if stage != "fit":  # a checkpoint may still bring tiles
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        module: Any = pl_module
        module.check_tiles()
        if datamodule is not None:
            check_training_files(datamodule, module)
            module.grey_levels = levels_of(datamodule.train_data)
            module.check_training_set(datamodule.train_data)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the levels of the images with those of the run that goes on, if one does.

        Raises:
            ValueError: If they differ.
        """
        _check_levels(getattr(getattr(trainer, "datamodule", None), "train_data", None), pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compare the sizes of tiles and network before a validation of its own, and look at its images.

        Raises:
            ValueError: If an image cannot be used, the levels are not those of the training, or tiles do not fit.
        """
        if trainer.state.fn == "validate":
            cast("Any", pl_module).check_tiles()
            _check_loaders(trainer.val_dataloaders, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model, and at the headers of the test images.

        Raises:
            ValueError: If one cannot be used, their levels are not those of the training, or tiles do not fit.
        """
        _check_model(pl_module)
        _check_loaders(trainer.test_dataloaders, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at the model, and at the headers of the images to predict.

        Raises:
            ValueError: If one cannot be used, their levels are not those of the training, or tiles do not fit.
        """
        _check_model(pl_module)
        _check_loaders(trainer.predict_dataloaders, pl_module)


def _check_model(module: Any) -> None:
    """Compare the sizes of tiles and network, and say so if there is no threshold for labels."""
    module.check_tiles()
    threshold = getattr(module.post_processor, "image_threshold", None)
    has_labels = getattr(module.post_processor, "enable_thresholding", False)
    if has_labels and isinstance(threshold, Tensor) and bool(threshold.isnan().all()):
        logger.warning(
            "The model has no thresholds, so its labels mean nothing. Either its training has not ended "
            "(continue it by `anomalib fit --ckpt_path`), or it had no validation images."
        )


def _check_loaders(loaders: Any, module: Any) -> None:
    for loader in loaders if isinstance(loaders, Iterable) and not hasattr(loaders, "dataset") else [loaders]:
        dataset = getattr(loader, "dataset", None)
        deep_grey = levels_of(dataset) is not None
        if isinstance(dataset, AnomalibDataset):
            check_image_modes(dataset.samples.image_path, deep_grey)
        elif isinstance(dataset, PredictDataset):
            check_image_modes(dataset.image_filenames, deep_grey)
        _check_levels(dataset, module)


def _check_levels(dataset: Any, module: Any) -> None:
    """Refuse images that are read by other levels than those that the model was trained on, if it has any."""
    trained, given = module.grey_levels, levels_of(dataset)
    if trained and not given and isinstance(dataset, AnomalibDataset | PredictDataset):
        msg = (
            f"The model was trained on images of black_level={trained.black_level:.10g} and "
            f"white_level={trained.white_level:.10g}; read these by DeepGreyFolder or DeepGreyPredictDataset, too."
        )
        raise ValueError(msg)
    if trained and given and given != trained:
        msg = (
            f"The images are read with black_level={given.black_level:.10g} and white_level={given.white_level:.10g}, "
            f"but the model was trained with {trained.black_level:.10g} and {trained.white_level:.10g}; pass those."
        )
        raise ValueError(msg)
