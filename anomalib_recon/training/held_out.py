# SPDX-License-Identifier: Apache-2.0

"""Normal images that are held out of training to stop it, and to choose its best epoch (InTra, section 4.1)."""

import logging
import math
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from .images import map_images, normal_images

logger = logging.getLogger(__name__)


class HeldOutImages(Callback):
    """Leave some normal images out of training, and keep the weights with the lowest loss on them.

    The model has a method ``held_out_loss(images)``, the mean loss over images of shape ``(n, 3, H, W)``. Which images
    are held out depends on the seed alone.

    Args:
        fraction (float): Fraction of the normal training images; at least one image is held out.
        max_count (int): Most images to hold out.
        patience (int): Epochs without a lower loss after which training stops.
    """

    def __init__(self, fraction: float, max_count: int, patience: int) -> None:
        super().__init__()
        self.fraction = fraction
        self.max_count = max_count
        self.patience = patience
        self.losses: list[float] = []
        self.paths: list[str] = []
        self._best_weights: dict[str, Tensor] = {}
        self._images = torch.empty(0)
        self._swapped = ExitStack()

    def state_dict(self) -> dict[str, Any]:
        """Save what an interrupted run needs to continue as if it had not been."""
        return {"losses": self.losses, "paths": self.paths, "best_weights": self._best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` saved."""
        self.losses, self.paths = state_dict["losses"], state_dict["paths"]
        self._best_weights = state_dict["best_weights"]

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the images, or continue with those of the interrupted run, and train without them.

        Raises:
            ValueError: If no image is left to train on, there is no datamodule to take images from, or the trainer
                makes its dataloader anew in later epochs.
        """
        if trainer.ckpt_path is None:
            self.losses, self.paths, self._best_weights = [], [], {}
        elif not self._best_weights:  # a finished run, which has the weights of its best epoch
            self._best_weights = _copy_weights(pl_module)
            trainer.should_stop = self._epochs_since_best >= self.patience
        datamodule: Any = getattr(trainer, "datamodule", None)
        if datamodule is None:
            msg = f"{type(pl_module).__name__} holds out training images, which needs a datamodule; pass datamodule."
            raise ValueError(msg)
        if trainer.reload_dataloaders_every_n_epochs:  # type: ignore[attr-defined]
            msg = (
                f"{type(pl_module).__name__} holds out training images, which a new dataloader would hold again; "
                "leave out reload_dataloaders_every_n_epochs."
            )
            raise ValueError(msg)
        module: Any = pl_module
        normal = normal_images(datamodule.train_data, module)
        paths = [str(path) for path in normal.samples.image_path]
        if not self.paths or not set(self.paths) <= set(paths):
            self.paths = self._draw(paths)
        self.paths = trainer.strategy.broadcast(self.paths)
        held_out = [index for index, path in enumerate(paths) if path in self.paths]
        self._images = torch.cat(list(map_images(trainer, module, normal.subsample(held_out), _images_of)))

        train_data = datamodule.train_data
        left = [index for index, path in enumerate(train_data.samples.image_path) if str(path) not in self.paths]
        self._swapped.callback(setattr, datamodule, "train_data", train_data)
        datamodule.train_data = train_data.subsample(left)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the datamodule as it was, now that there is a dataloader without the images."""
        del trainer, pl_module
        self._swapped.close()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the images; leave the datamodule as it was also after a fit without an epoch."""
        del trainer, pl_module
        self._swapped.close()
        self._images = torch.empty(0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Do the same after an interrupted fit."""
        del exception
        self.on_fit_end(trainer, pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the weights of the best epoch; stop when the loss does not fall any more.

        Raises:
            RuntimeError: If the loss is NaN or infinite.
        """
        module: Any = pl_module
        loss = module.held_out_loss(self._images)
        if not math.isfinite(loss):
            msg = (
                f"The held-out loss is {loss} after epoch {trainer.current_epoch}; train anew with a lower "
                f"learning_rate ({module.hparams['learning_rate']}) or precision 32. The last checkpoint is from "
                "before."
            )
            raise RuntimeError(msg)
        module.log("held_out_loss", loss, prog_bar=True)
        self.losses.append(loss)
        if self._epochs_since_best == 0:
            self._best_weights = _copy_weights(pl_module)
        if self._epochs_since_best >= self.patience:
            logger.info("The held-out loss has not fallen for %d epochs.", self.patience)
            trainer.should_stop = True

    @property
    def _epochs_since_best(self) -> int:
        return len(self.losses) - 1 - self.losses.index(min(self.losses)) if self.losses else 0

    def restore_best_weights(self, module: Any) -> None:
        """Give the model the weights of the best epoch, and forget them.

        Args:
            module (Any): The model.
        """
        module.model.load_state_dict(self._best_weights)
        self._best_weights = {}

    def _draw(self, paths: list[str]) -> list[str]:
        """Draw images by a generator of its own: other random numbers, as of other weights, change nothing."""
        count = min(self.max_count, max(1, round(self.fraction * len(paths))))
        if count >= len(paths):
            msg = (
                f"The training set has {len(paths)} normal images, of which {count} would be held out "
                f"(held_out_fraction={self.fraction}): none is left to train on; add images."
            )
            raise ValueError(msg)
        generator = torch.Generator().manual_seed(torch.initial_seed())
        return [paths[index] for index in torch.randperm(len(paths), generator=generator)[:count]]


def _images_of(batch: Any) -> Tensor:
    return batch.image


def _copy_weights(module: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.model.state_dict().items()}
