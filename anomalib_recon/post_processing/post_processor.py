# SPDX-License-Identifier: Apache-2.0

"""Thresholds that need no anomalous image.

Example:
    >>> from anomalib.models import Padim
    >>> from anomalib_recon.post_processing import FalsePositiveRatePostProcessor
    >>> model = Padim(post_processor=FalsePositiveRatePostProcessor(pixel_fpr=0.005))  # doctest: +SKIP

    On the command line::

        anomalib train --model Padim --data MVTecAD \
            --model.post_processor anomalib_recon.post_processing.FalsePositiveRatePostProcessor \
            --model.post_processor.pixel_fpr 0.005

Paper:
    Self-attention autoencoder for anomaly segmentation, section 3.3, which follows DFR, https://arxiv.org/abs/2012.07122
"""

from pathlib import Path
from types import EllipsisType
from typing import Any, Literal, cast

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataset
from anomalib.models import AnomalibModule
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from anomalib_recon.deploy.highest_scores import HighestScores
from anomalib_recon.layers import check_choice, check_finite
from anomalib_recon.training import checkpoint_files, lacks_validation_images, normal_images, score_images

from .region_post_processor import RegionPostProcessor


class FalsePositiveRatePostProcessor(RegionPostProcessor):
    """Set the thresholds so that at most a chosen fraction of the normal pixels and images is called anomalous.

    When a training has ended, the normal images are scored once more, as in a test. Each threshold is the lowest for
    which at most the chosen fraction of their scores is higher, which is when anomalib calls a pixel or an image
    anomalous. It is exact. The thresholds are put into the checkpoints of the run, too; a checkpoint of earlier
    weights, such as the best by a monitored metric, gets those of its own weights. A run that is interrupted has no
    thresholds before it is resumed and has ended.

    A model has seen the images it was trained on, and scores other normal images higher: on these, more than the
    chosen fraction is called anomalous. The fewer training images there are and the better a model remembers them
    (PatchCore stores them), the more. ``split="val"`` with ``val_split_mode="from_train"`` in the datamodule takes
    images that the model has not been trained on.

    Scores are normalised from the same images: their lowest becomes 0, the threshold 0.5, and what is twice as far
    from the lowest 1, as is all that is higher. Anomalous images in a validation set change nothing: neither the
    thresholds nor the normalisation look at them.

    In a checkpoint the thresholds are anomalib's own: a model that is loaded with a plain ``PostProcessor`` gives the
    same labels. The rates are in it for the record. They act at the end of ``fit`` only, with the values of the
    constructor. So ``fit`` from the checkpoint of a finished training, of which no epoch is left, sets thresholds at
    other rates and saves a new checkpoint.

    Args:
        pixel_fpr (float): Highest fraction of the pixels of normal images to be called anomalous, in [0, 1); at 0 the
            threshold is their highest score.
            Defaults to ``0.005``, the example of SAAE's section 3.3.
        image_fpr (float): Highest fraction of the normal images to be called anomalous, in [0, 1).
            Defaults to ``0.05``, one image of 20: a rate that a few dozen images resolve.
        split (Literal["train", "val"]): The split with the normal images, ``"train"`` or ``"val"``; anomalous images in
            it are left out.
            Defaults to ``"train"``.
        enable_normalization (bool): Normalise scores. Otherwise they stay raw, as do the thresholds.
            Defaults to ``True``.
        region (list[tuple[float, float]] | Path | str | None): Where anomalies count; see :class:`RegionPostProcessor`.
            Rates are then those of the pixels inside.
            Defaults to ``None``, the whole image.
        top_fraction (float): Share of the region whose mean is the image's score; see :class:`RegionPostProcessor`.
            Defaults to ``0.0``, the maximum.

    Raises:
        ValueError: If a rate is out of its range, the split is unknown, or the region cannot be used.
    """

    def __init__(
        self,
        pixel_fpr: float = 0.005,
        image_fpr: float = 0.05,
        split: Literal["train", "val"] = "train",
        enable_normalization: bool = True,
        region: list[tuple[float, float]] | Path | str | None = None,
        top_fraction: float = 0.0,
    ) -> None:
        super().__init__(region, top_fraction, enable_normalization=enable_normalization)
        check_finite(pixel_fpr=pixel_fpr, image_fpr=image_fpr)
        for name, rate in (("pixel_fpr", pixel_fpr), ("image_fpr", image_fpr)):
            if not 0 <= rate < 1:
                msg = (
                    f"{name} must be at least 0 and below 1, got {rate}; 0.005 calls 0.5 % of what is normal anomalous."
                )
                raise ValueError(msg)
        check_choice(("train", "val"), split=split)
        self.pixel_fpr = pixel_fpr
        self.image_fpr = image_fpr
        self.split = split
        self._constructed = super().checkpoint_config()

    def checkpoint_config(self) -> dict[str, Any]:
        """Configuration for a checkpoint, with the rates for the record."""
        rates = {"pixel_fpr": self.pixel_fpr, "image_fpr": self.image_fpr, "split": self.split}
        return {**super().checkpoint_config(), **rates}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse models without training, and spare those without validation images a validation.

        Raises:
            ValueError: If the model has no training.
        """
        super().setup(trainer, pl_module, stage)
        self._limit_val_batches = trainer.limit_val_batches
        if stage == "fit" and lacks_validation_images(trainer):
            trainer.limit_val_batches = 0
        learning_type = cast("AnomalibModule", pl_module).learning_type
        if learning_type in {LearningType.ZERO_SHOT, LearningType.FEW_SHOT}:
            msg = (
                f"{type(self).__name__} sets thresholds at the end of a training, which {type(pl_module).__name__} "
                f"({learning_type.value}) has not; leave post_processor out."
            )
            raise ValueError(msg)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the values of the constructor, in place of those of a checkpoint that is resumed."""
        del trainer, pl_module
        self.load_checkpoint_config({**self.checkpoint_config(), **self._constructed})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for normal images before the training, not after it.

        Raises:
            ValueError: If there is none.
        """
        self._normal_images(trainer, cast("AnomalibModule", pl_module))

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Restrict the validation images to the region; the parent would compute its thresholds from them, too."""
        del trainer, pl_module, args, kwargs
        self.restrict(outputs)

    def on_validation_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        """Leave the thresholds alone, which the parent would set."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer as it was, if it has been changed: an error may come before :meth:`setup`."""
        del pl_module, exception
        if hasattr(self, "_limit_val_batches"):
            trainer.limit_val_batches = self._limit_val_batches

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the thresholds of the model and of the run's checkpoints.

        This hook comes after all in which a model may do the last of its training. Lightning has moved the model to
        the CPU by then.
        """
        trainer.limit_val_batches = self._limit_val_batches
        module = cast("AnomalibModule", pl_module)
        module.to(trainer.strategy.root_device)
        self._set_thresholds(trainer, module)
        paths = _checkpoints(trainer)
        if not paths and trainer.ckpt_path and isinstance(trainer.checkpoint_callback, ModelCheckpoint):
            _save_resumed(trainer, trainer.checkpoint_callback)
        final = {name: value.to("cpu", copy=True) for name, value in module.state_dict().items()}
        for path in paths:
            checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu")
            # each process may have running statistics of its own, and all score or none
            if not trainer.strategy.broadcast(_same_weights(checkpoint["state_dict"], final)):
                module.load_state_dict(checkpoint["state_dict"])
                self._set_thresholds(trainer, module)
            checkpoint["state_dict"].update(self.state_dict(prefix="post_processor."))
            checkpoint["anomalib_post_processor_config"] = self.checkpoint_config()
            if "callbacks" in checkpoint:  # not with save_weights_only
                checkpoint["callbacks"][self.state_key] = self.state_dict()
            trainer.strategy.save_checkpoint(checkpoint, path)
            module.load_state_dict(final)
        trainer.strategy.barrier()
        module.cpu()

    def _set_thresholds(self, trainer: Trainer, module: AnomalibModule) -> None:
        """Set thresholds and normalisation from the scores of the normal images."""
        self._set_from(trainer, module, self._normal_images(trainer, module))

    def _set_from(
        self, trainer: Trainer, module: AnomalibModule, dataset: AnomalibDataset, place: int | EllipsisType = ...
    ) -> None:
        """Set thresholds and normalisation, or one place in them, from the scores of images."""
        images = HighestScores(self.image_fpr, len(dataset))
        pixels = HighestScores(self.pixel_fpr, len(dataset))
        for batch in score_images(trainer, module, dataset):
            self.restrict(batch)
            inside = self.inside(batch)
            for scores, new in ((images, inside.pred_score), (pixels, inside.anomaly_map)):
                if new is not None:
                    scores.update(new.detach().float().cpu().numpy())
        self._set("image", images, self.image_fpr, place)
        self._set("pixel", pixels, self.pixel_fpr, place)

    def _set(
        self, kind: Literal["image", "pixel"], scores: HighestScores, rate: float, place: int | EllipsisType
    ) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, scores)
            scores.merge(parts)
        if scores.count == 0:  # a model without maps
            return
        if 0 < rate * scores.count < 1:
            rank_zero_warn(
                f"{kind}_fpr {rate} cannot be resolved with {scores.count} normal {kind}s; the threshold is their "
                "highest score."
            )
        threshold = scores.threshold(rate)
        getattr(self, f"_{kind}_threshold")[place] = threshold
        getattr(self, f"{kind}_min")[place] = scores.lowest
        getattr(self, f"{kind}_max")[place] = 2 * threshold - scores.lowest

    def _normal_images(self, trainer: Trainer, module: AnomalibModule) -> AnomalibDataset:
        dataset = getattr(trainer.datamodule, f"{self.split}_data", None)  # type: ignore[attr-defined]
        if not isinstance(dataset, AnomalibDataset):
            msg = (
                f"split={self.split!r} needs a datamodule of anomalib with a {self.split} set; for images held out of "
                "training choose val_split_mode='from_train'."
            )
            raise ValueError(msg)
        return normal_images(dataset, module)


def _checkpoints(trainer: Trainer) -> list[Path]:
    """Checkpoints of this run, without that from which it was resumed."""
    paths = {
        path
        for callback in trainer.checkpoint_callbacks
        if isinstance(callback, ModelCheckpoint)
        for path in checkpoint_files(callback)
        if Path(cast("str", callback.dirpath)).resolve() in path.parents
    }
    return sorted(paths)


def _save_resumed(trainer: Trainer, callback: ModelCheckpoint) -> None:
    """Save a model of which no epoch was left to train, so that nothing has been saved."""
    progress = {"epoch": torch.tensor(trainer.current_epoch), "step": torch.tensor(trainer.global_step)}
    callback.best_model_path = callback.format_checkpoint_name(progress)
    trainer.save_checkpoint(callback.best_model_path)


def _same_weights(state: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(
        torch.equal(state[name], value) for name, value in other.items() if not name.startswith("post_processor.")
    )
