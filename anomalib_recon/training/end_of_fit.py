# SPDX-License-Identifier: Apache-2.0

"""The end of a fit: what a model has left to do when its weights are trained, and its validation."""

import copy
import logging
from typing import Any, cast

from anomalib.data import AnomalibDataModule
from anomalib.data.utils import ValSplitMode
from anomalib.metrics import Evaluator
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from .held_out import HeldOutImages

logger = logging.getLogger(__name__)


class EndOfFit(Callback):
    """Call the model's ``finish()`` and validate, once, when training ends.

    Validation sets the thresholds, and may cost as much as an epoch. It runs during training, too, if somebody asks
    for it: a callback that monitors a metric of images or pixels, ``val_metrics`` of the evaluator, or
    ``check_val_every_n_epoch``. ``finish()`` is then called before each validation.

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
        self._is_watched = len(validated) > 0 or trainer.check_val_every_n_epoch != 1
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
            evaluator.val_metrics = nn.ModuleList(m for m in evaluator.val_metrics if m not in self._added)
        self._added = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put validation off, that of the sanity check included, unless it is watched."""
        del pl_module
        self._limit: Any = trainer.limit_val_batches
        if not self._is_watched:
            trainer.limit_val_batches = 0

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Prepare the model for a validation during training."""
        if trainer.state.fn == "fit" and self._is_watched and not self._finished:
            self._finish(trainer, pl_module)
            self._finished = True

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Weights change from here on."""
        del trainer, pl_module
        self._finished = False

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish after the last epoch, before it is saved."""
        self._trained = True
        if trainer.fit_loop.done:
            self._end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finish a training that something has stopped since, and save it anew."""
        if self._ended or not self._trained:
            return
        self._end(trainer, pl_module)
        for callback in trainer.checkpoint_callbacks:
            # of a watched training, what a metric has chosen is complete, and may be another epoch
            is_complete = self._is_watched and getattr(callback, "monitor", None)
            if (path := getattr(callback, "best_model_path", "")) and not is_complete:
                trainer.save_checkpoint(path)

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
        self._finish(trainer, module)
        self._finished = True
        trainer.limit_val_batches = self._limit
        if trainer.enable_validation:
            trainer.validating = True
            with isolate_rng():
                trainer.fit_loop.epoch_loop.val_loop.run()
            trainer.training = True

    @staticmethod
    def _finish(trainer: Trainer, module: LightningModule) -> None:
        _average_statistics(trainer)
        cast("Any", module).finish()


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


def _average_statistics(trainer: Trainer) -> None:
    """Give all processes the same running statistics: after its last step, each has those of its own images."""
    for part in trainer.lightning_module.modules():
        if isinstance(part, nn.BatchNorm2d) and part.training:
            for statistic in (cast("Tensor", part.running_mean), cast("Tensor", part.running_var)):
                statistic.copy_(cast("Tensor", trainer.strategy.reduce(statistic, reduce_op="mean")))
