# SPDX-License-Identifier: Apache-2.0

"""A post-processor for which anomalies count in a region of the image only.

Example:
    >>> from anomalib.models import Padim
    >>> from anomalib_recon.metrics import RawScoreEvaluator
    >>> from anomalib_recon.post_processing import RegionPostProcessor
    >>> triangle = [(0.5, 0.1), (0.9, 0.9), (0.1, 0.9)]
    >>> model = Padim(  # doctest: +SKIP
    ...     post_processor=RegionPostProcessor(triangle), evaluator=RawScoreEvaluator()
    ... )
"""

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from anomalib_recon.layers import check_fraction
from anomalib_recon.metrics import RawScoreEvaluator

from .region import RegionOfInterest, read_region

logger = logging.getLogger(__name__)


class RegionPostProcessor(PostProcessor):
    """anomalib's post-processor, with a region of interest: what lies outside does not count.

    The image's score is that of its map inside the region, whatever score the model gives. Thresholds and normalisation
    are those of scores and pixels inside. Maps are 0 outside (the lowest value inside, if scores are not normalised),
    masks False, and so are the ground truth's; an image whose defects all lie outside is normal. The same holds for
    exported models, which contain the region. Pixel metrics leave the outside out with :class:`RawScoreEvaluator`.

    The region is part of the checkpoint. A model that is loaded with a ``RegionPostProcessor`` without region, which
    all models of this package have by default, takes it from there; a region that is passed takes precedence.

    The model still sees the whole image, and what is next to the region has an effect on the map inside.

    Args:
        region (list[tuple[float, float]] | Path | str | None): File of an image, not black where anomalies count; or
            the corners of a polygon, each as fractions of width and height ``(x, y)`` in [0, 1]. Both are laid over the
            image behind the pre-processor, which is all of it, if that does not crop. ``None`` stands for the whole.
            Defaults to ``None``.
        top_fraction (float): Share of the region, from the highest value of the map down, whose mean is the image's
            score; at 0 it is the maximum. Not used without a region.
            Defaults to ``0.0``.
        enable_normalization (bool): Normalise scores.
            Defaults to ``True``.
        enable_thresholding (bool): Give out labels and masks.
            Defaults to ``True``.
        enable_threshold_matching (bool): Use the threshold of images for pixels where those have none, and vice versa.
            Defaults to ``True``.
        image_sensitivity (float): Sensitivity of image labels, in [0, 1]. Not used without normalisation.
            Defaults to ``0.5``.
        pixel_sensitivity (float): Sensitivity of masks, in [0, 1]. Not used without normalisation.
            Defaults to ``0.5``.

    Raises:
        ValueError: If the region cannot be read or is empty, or ``top_fraction`` is not in [0, 1].
    """

    region: RegionOfInterest | None

    def __init__(
        self,
        region: list[tuple[float, float]] | Path | str | None = None,
        top_fraction: float = 0.0,
        enable_normalization: bool = True,
        enable_thresholding: bool = True,
        enable_threshold_matching: bool = True,
        image_sensitivity: float = 0.5,
        pixel_sensitivity: float = 0.5,
    ) -> None:
        super().__init__(
            enable_normalization=enable_normalization,
            enable_thresholding=enable_thresholding,
            enable_threshold_matching=enable_threshold_matching,
            image_sensitivity=image_sensitivity,
            pixel_sensitivity=pixel_sensitivity,
        )
        check_fraction(top_fraction=top_fraction)
        self.top_fraction = top_fraction
        self.region = None if region is None else RegionOfInterest(read_region(region))

    @property
    def _checkpoint_config_keys(self) -> tuple[str, ...]:
        return (*super()._checkpoint_config_keys, "top_fraction")

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the configuration; a region that was passed keeps its ``top_fraction``.

        Args:
            config (dict[str, Any]): What ``checkpoint_config`` returned.

        Raises:
            ValueError: If it is that of a :class:`ProductPostProcessor`.
        """
        if "products" in config and not hasattr(self, "products"):
            msg = (
                f"post_processor must be ProductPostProcessor({config['products']}), as the checkpoint has thresholds "
                f"of each product, got {type(self).__name__}; pass it."
            )
            raise ValueError(msg)
        top_fraction = self.top_fraction
        super().load_checkpoint_config(config)
        if self.region is not None:
            self.top_fraction = top_fraction

    @property
    def normalized_image_threshold(self) -> Tensor:
        """Image threshold on the scale of the scores that are given out."""
        return super().normalized_image_threshold if self.enable_normalization else self.image_threshold

    @property
    def normalized_pixel_threshold(self) -> Tensor:
        """Pixel threshold on the scale of the maps that are given out."""
        return super().normalized_pixel_threshold if self.enable_normalization else self.pixel_threshold

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look at the region's size, and say so if pixel metrics will count the outside.

        Raises:
            ValueError: If the region vanishes at the size of the model's images.
        """
        del trainer, stage
        if self.region is None:
            return
        if size := getattr(pl_module, "input_size", None):
            self._check_region(self.region, tuple(size))
        evaluator: Any = getattr(pl_module, "evaluator", None)
        if evaluator is None or isinstance(evaluator, RawScoreEvaluator):
            return
        if of_pixels := [metric.name for metric in evaluator.test_metrics if "gt_mask" in metric.fields]:
            logger.warning(
                "%s counts pixels outside the region as normal ones that were found: pass RawScoreEvaluator().",
                ", ".join(of_pixels),
            )

    def restrict(self, batch: Any) -> None:
        """Forget what scored images have outside the region: in scores, maps and ground truth.

        Args:
            batch (Any): Scored batch of anomalib, or its predictions.

        Raises:
            ValueError: If there is no map, or none of its pixels is inside.
        """
        if self.region is None:
            return
        if batch.anomaly_map is None:
            msg = "region needs a model with an anomaly map, and this one gives only scores; crop the images instead."
            raise ValueError(msg)
        if not torch.compiler.is_exporting():
            self._check_region(self.region, tuple(batch.anomaly_map.shape[-2:]))
        batch.anomaly_map = self.region(batch.anomaly_map)
        batch.pred_score = self.region.score(batch.anomaly_map, self.top_fraction)
        self.region.restrict_truth(batch)

    @staticmethod
    def _check_region(region: RegionOfInterest, size: tuple[int, int]) -> None:
        if not region.at(size).any():
            msg = f"region must hold a pixel of the anomaly map, which has the size {size}; make it wider."
            raise ValueError(msg)

    def inside(self, batch: Any) -> Any:
        """What counts of a restricted batch for thresholds: scores and pixels, as fields of the same names."""
        if self.region is None:
            return batch
        mask = getattr(batch, "gt_mask", None)
        return SimpleNamespace(
            pred_score=batch.pred_score,
            gt_label=batch.gt_label,
            anomaly_map=self.region.pixels(batch.anomaly_map),
            gt_mask=None if mask is None else self.region.pixels(mask),
        )

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Update thresholds and normalisation with what lies inside."""
        self.restrict(outputs)
        super().on_validation_batch_end(trainer, pl_module, self.inside(outputs), *args, **kwargs)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Post-process predictions; see :class:`anomalib.post_processing.PostProcessor`."""
        return self.blank(super().forward(self.restricted(predictions)))

    def restricted(self, predictions: InferenceBatch) -> InferenceBatch:
        """Predictions without what lies outside the region; see :meth:`restrict`."""
        if self.region is None:
            return predictions
        inside = SimpleNamespace(pred_score=predictions.pred_score, anomaly_map=predictions.anomaly_map)
        self.restrict(inside)
        return InferenceBatch(pred_score=inside.pred_score, anomaly_map=inside.anomaly_map)

    def blank(self, result: Any) -> Any:
        """Post-processed predictions, with maps of 0 and masks of False outside the region."""
        return result._replace(
            anomaly_map=self._blank_map(result.anomaly_map), pred_mask=self._blank_mask(result.pred_mask)
        )

    def post_process_batch(self, batch: Any) -> None:
        """Post-process a batch in place."""
        self.restrict(batch)
        super().post_process_batch(batch)
        if self.region is not None:
            batch.anomaly_map = self._blank_map(batch.anomaly_map)
            batch.pred_mask = self._blank_mask(batch.pred_mask)

    def _blank_map(self, maps: Any) -> Any:
        """Normalised maps, 0 outside."""
        if self.region is None or not self.enable_normalization:
            return maps
        return torch.where(self.region.at(maps.shape[-2:]), maps, 0)

    def _blank_mask(self, masks: Tensor | None) -> Tensor | None:
        if self.region is None or masks is None or masks.dtype != torch.bool:  # maps, if there is no threshold yet
            return masks
        return masks & self.region.at(masks.shape[-2:])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}region.mask"
        if self.region is not None:
            state_dict[name] = self.region.mask
        elif name in state_dict:  # its own values are loaded after this
            self.region = RegionOfInterest(torch.ones_like(state_dict[name]))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
