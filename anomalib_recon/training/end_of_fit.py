# SPDX-License-Identifier: Apache-2.0

"""The end of a fit: what a model has left to do when its weights are trained, and its validation."""

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from anomalib.metrics import Evaluator
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from .checkpoints import checkpoint_files
from .held_out import HeldOutImages
from .images import lacks_validation_images

logger = logging.getLogger(__name__)


class EndOfFit(Callback):
    """Call the model's ``finish()`` and validate, once, when training ends.

    Validation sets the thresholds, and may cost as much as an epoch. It runs during training, too, if somebody asks
    for it: a callback that monitors a metric of images or pixels, ``val_metrics`` of the evaluator,
    ``check_val_every_n_epoch`` or ``val_check_interval``. ``finish()`` is then called before each validation.

    The model's ``finish()`` computes what scoring needs beyond the trained weights.

    Args:
        held_out (HeldOutImages | None): Held-out images whose best weights are restored before that.
            Defaults to ``None``.
    """

    def __init__(self, held_out: HeldOutImages | None = None) -> None:
        super().__init__()
        self._held_out = held_out
        self._added: list[Any] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out who watches the validation, and give them the metrics that they monitor."""
        self._trained = self._finished = self._ended = False
        if stage != "fit":
            return
        evaluator = getattr(pl_module, "evaluator", None)
        self._added = [copy.deepcopy(metric) for metric in _monitored_test_metrics(trainer, evaluator)]
        validated = getattr(evaluator, "val_metrics", nn.ModuleList())
        validated.extend(self._added)
        self._is_watched = len(validated) > 0 or not _is_default(trainer)
        if self._added and _validates_on_test_images(trainer):
            logger.warning(
                "The validation set holds test images (val_split_mode), so what monitors %s chooses on test images.",
                ", ".join(metric.name for metric in self._added),
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Take the metrics back that were monitored in this fit."""
        del trainer, stage
        evaluator: Any = getattr(pl_module, "evaluator", None)
        if self._added and evaluator:
            # metrics compare by a metric of both, which is always true
            evaluator.val_metrics = nn.ModuleList(
                metric for metric in evaluator.val_metrics if not any(metric is added for added in self._added)
            )
        self._added = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put validation off, that of the sanity check included, unless it is watched.

        Raises:
            ValueError: If checkpoints wait for validations, and there is nothing to validate on.
        """
        del pl_module
        self._limit: Any = trainer.limit_val_batches
        self._lacks_images = lacks_validation_images(trainer)
        if (self._lacks_images or not self._limit) and not _saves_after_epochs(trainer):
            msg = (
                f"check_val_every_n_epoch={trainer.check_val_every_n_epoch} and val_check_interval have Lightning save "
                "after validations, and there are no validation images; leave both out."
            )
            raise ValueError(msg)
        if self._lacks_images and self._limit:
            logger.warning(
                "There are no validation images (val_split_mode), so the model gets no thresholds: pass "
                "--data.val_split_mode from_train, or the post-processor FalsePositiveRatePostProcessor."
            )
        if self._lacks_images or not self._is_watched:
            trainer.limit_val_batches = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the model for a validation during training."""
        if trainer.state.fn == "fit" and self._is_watched and not self._finished:
            self._finish(trainer, pl_module)
            self._finished = True

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Weights change from here on."""
        del trainer, pl_module, batch, batch_idx
        self._finished = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish after the last epoch, before it is saved."""
        self._trained = True
        progress = trainer.fit_loop.epoch_progress.current
        completed = progress.completed
        is_done = trainer.fit_loop.done  # counts this epoch as completed, which would change its number in checkpoints
        progress.completed = completed
        if is_done:
            self._end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a training that something has stopped since, and complete the checkpoints saved before the end."""
        if not self._trained:
            return
        if not self._ended:
            self._end(trainer, pl_module)
        # of a watched training, what a metric has chosen was finished before its validation
        paths = {
            path
            for callback in trainer.checkpoint_callbacks
            if isinstance(callback, ModelCheckpoint) and not (self._is_watched and callback.monitor)
            for path in checkpoint_files(callback)
        }
        resumed = {Path(trainer.ckpt_path).resolve()} if trainer.ckpt_path else set()
        final = {name: value.detach().to("cpu", copy=True) for name, value in pl_module.state_dict().items()}
        for path in sorted(paths - resumed):
            self._complete(path, trainer, pl_module, final)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the trainer as it was, also after a fit without an epoch."""
        del pl_module
        trainer.limit_val_batches = self._limit

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Leave the trainer and the evaluator as they were."""
        del exception
        if trainer.state.fn == "fit" and hasattr(self, "_limit"):
            trainer.limit_val_batches = self._limit
        self.teardown(trainer, pl_module, "fit")

    def _end(self, trainer: Trainer, module: LightningModule) -> None:
        self._ended = True
        if self._held_out:
            self._held_out.restore_best_weights(module)
        elif self._finished:  # by the validation of this epoch
            return
        self._validate(trainer, module)

    def _validate(self, trainer: Trainer, module: LightningModule) -> None:
        """Finish the model, and validate it."""
        self._finish(trainer, module)
        self._finished = True
        if self._lacks_images:
            return
        trainer.limit_val_batches = self._limit
        if trainer.enable_validation:
            trainer.validating = True
            with isolate_rng():
                trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    def _complete(self, path: Path, trainer: Trainer, module: LightningModule, final: dict[str, Tensor]) -> None:
        """Save a checkpoint anew, if it is not of the finished model: with the weights that it has, finished."""
        checkpoint = trainer.strategy.checkpoint_io.load_checkpoint(path, map_location="cpu")
        is_complete = all(_is_equal(value, final[name]) for name, value in checkpoint["state_dict"].items())
        if trainer.strategy.broadcast(is_complete):
            return
        if checkpoint["global_step"] == trainer.global_step:
            trainer.save_checkpoint(path, weights_only="optimizer_states" not in checkpoint)
            return
        module.load_state_dict(checkpoint["state_dict"])
        with _no_saving(trainer):  # these weights would be taken for the last ones
            self._validate(trainer, module)
        checkpoint["state_dict"] = module.state_dict()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, nn.Module) and callback.state_key in checkpoint.get("callbacks", {}):
                checkpoint["callbacks"][callback.state_key] = callback.state_dict()  # the post-processor's thresholds
        trainer.strategy.save_checkpoint(checkpoint, path)
        module.load_state_dict(final)

    @staticmethod
    def _finish(trainer: Trainer, module: LightningModule) -> None:
        _average_statistics(trainer)
        cast("Any", module).finish()


def _is_default(trainer: Trainer) -> bool:
    """Whether nobody has said when to validate: the integer 1 means each step, and a time is not kept by that name."""
    interval = getattr(trainer, "val_check_interval", None)
    return trainer.check_val_every_n_epoch == 1 and isinstance(interval, float) and interval == 1.0


def _saves_after_epochs(trainer: Trainer) -> bool:
    """Whether Lightning saves checkpoints after epochs, and not after validations."""
    return trainer.check_val_every_n_epoch == 1 and hasattr(trainer, "val_check_interval")


@contextmanager
def _no_saving(trainer: Trainer) -> Iterator[None]:
    """Run a validation of which callbacks that save or stop learn nothing."""
    trainer_: Any = trainer
    callbacks = trainer_.callbacks
    trainer_.callbacks = [callback for callback in callbacks if not isinstance(callback, Checkpoint | EarlyStopping)]
    try:
        yield
    finally:
        trainer_.callbacks = callbacks


def _monitored_test_metrics(trainer: Trainer, evaluator: Evaluator | None) -> list[Any]:
    """Metrics that the evaluator has for tests, not for validation, and that a callback monitors."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    monitors = {callback.monitor for callback in callbacks if isinstance(callback, EarlyStopping | ModelCheckpoint)}
    wanted = monitors - {metric.name for metric in getattr(evaluator, "val_metrics", ())}
    return [metric for metric in getattr(evaluator, "test_metrics", ()) if metric.name in wanted]


def _validates_on_test_images(trainer: Trainer) -> bool:
    datamodule = getattr(trainer, "datamodule", None)
    return isinstance(datamodule, AnomalibDataModule) and datamodule.val_split_mode in {
        ValSplitMode.SAME_AS_TEST,
        ValSplitMode.FROM_TEST,
    }


def _is_equal(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors are equal; of thresholds that were not set, NaN is equal to NaN."""
    same_shape = first.shape == second.shape
    return same_shape and bool(((first == second) | (first.isnan() & second.isnan())).all())


def _average_statistics(trainer: Trainer) -> None:
    """Give all processes the same running statistics: after its last step, each has those of its own images."""
    for part in trainer.lightning_module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.weight.requires_grad:  # not of a frozen backbone
            for statistic in (cast("Tensor", part.running_mean), cast("Tensor", part.running_var)):
                statistic.copy_(cast("Tensor", trainer.strategy.reduce(statistic, reduce_op="mean")))
