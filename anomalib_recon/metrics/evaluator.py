# SPDX-License-Identifier: Apache-2.0

"""An evaluator that shows score metrics the model's raw scores."""

from collections.abc import Sequence
from typing import Any

from anomalib.metrics import AnomalibMetric, Evaluator, F1Score
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback

from .score_curve import AUPRO, AUROC

POST_PROCESSED_FIELDS = {"pred_label", "pred_mask"}


class RawScoreEvaluator(Evaluator):
    """anomalib's evaluator, with raw instead of normalised scores at test time.

    Metrics of ``pred_label`` or ``pred_mask`` are updated after the post-processor, as in anomalib. All others are
    updated with the batch as the model's ``test_step`` left it. For that, a callback that runs before all others,
    and so before the post-processor, is put into the trainer for the time of a test. Validation is anomalib's,
    which does not normalise there.

    Scores outside [0, 1] need metrics that rank them as they are, such as this package's or anomalib's ``AUPRO``
    and ``F1Max``: anomalib's ``AUROC`` and ``AUPR`` apply a sigmoid to them.

    Args:
        val_metrics (AnomalibMetric | Sequence[AnomalibMetric] | None): Metrics to compute on the validation set, none
            by default.
        test_metrics (AnomalibMetric | Sequence[AnomalibMetric] | None): Metrics to compute on the test set.
            Defaults to AUROC and F1 score of images and pixels and AUPRO of pixels, under anomalib's names
            ``image_AUROC``, ``image_F1Score``, ``pixel_AUROC``, ``pixel_F1Score`` and ``pixel_AUPRO``. Those of pixels
            are left out where masks or maps are missing.
        compute_on_cpu (bool): Whether to hold the metrics' states on the CPU, if there is only one device.

    Example:
        >>> from anomalib.models import Padim
        >>> model = Padim(evaluator=RawScoreEvaluator())
    """

    def __init__(
        self,
        val_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        test_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        compute_on_cpu: bool = True,
    ) -> None:
        super().__init__(val_metrics, _default_metrics() if test_metrics is None else test_metrics, compute_on_cpu)
        self._first_callback = LambdaCallback(on_test_batch_end=self._update_score_metrics)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the score metrics before the post-processor."""
        super().setup(trainer, pl_module, stage)
        if stage == "test":
            # A new list, because Lightning is iterating over the present one.
            others = _callbacks_except(trainer, self._first_callback)
            trainer.callbacks = [self._first_callback, *others]  # type: ignore[attr-defined]

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the trainer.

        Lightning attaches a model's callbacks anew in each run, but would keep this one for a next model that comes
        with a plain ``Evaluator``.
        """
        del pl_module, stage
        trainer.callbacks = _callbacks_except(trainer, self, self._first_callback)  # type: ignore[attr-defined]

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget what an interrupted test, or one in barebones mode, has left in the metrics."""
        del trainer, pl_module
        for metric in self._test_metrics:
            metric.reset()

    def on_test_batch_end(
        self,
        trainer: Trainer | None,
        pl_module: LightningModule | None,
        outputs: Any,
        batch: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Update the metrics of labels and masks; without a trainer, as in anomalib's tiled ensemble, all metrics."""
        del pl_module, outputs, args, kwargs
        for metric in self._test_metrics:
            if trainer is None or not _is_score_metric(metric):
                metric.update(batch)

    def _update_score_metrics(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        del trainer, pl_module, outputs, args
        for metric in filter(_is_score_metric, self._test_metrics):
            metric.update(batch)

    @property
    def _test_metrics(self) -> list[Any]:
        return list(self.test_metrics)


def _callbacks_except(trainer: Trainer, *excluded: Callback) -> list[Callback]:
    return [callback for callback in trainer.callbacks if callback not in excluded]  # type: ignore[attr-defined]


def _is_score_metric(metric: AnomalibMetric) -> bool:
    return POST_PROCESSED_FIELDS.isdisjoint(metric.fields)


def _default_metrics() -> list[AnomalibMetric]:
    return [
        AUROC(fields=["pred_score", "gt_label"], prefix="image_"),
        F1Score(fields=["pred_label", "gt_label"], prefix="image_"),
        AUROC(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
        F1Score(fields=["pred_mask", "gt_mask"], prefix="pixel_", strict=False),
        AUPRO(fields=["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
    ]
