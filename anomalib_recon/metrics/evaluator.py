# SPDX-License-Identifier: Apache-2.0

"""An evaluator that shows score metrics the model's raw scores."""

import copy
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any, Literal, cast

import torch
from anomalib import metrics as anomalib_metrics
from anomalib.data import AnomalibDataset, ImageBatch
from anomalib.data.utils import read_mask
from anomalib.metrics import AnomalibMetric, Evaluator, F1Score
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LambdaCallback
from PIL import Image
from torch import Tensor
from torch.nn import functional

from anomalib_recon.layers import check_choice
from anomalib_recon.training import check_products, find_products
from anomalib_recon.training.image_files import mask_files

from .score_curve import AUPRO, AUROC

POST_PROCESSED_FIELDS = {"pred_label", "pred_mask"}
# of a batch, with a value for each image
SELECTED_FIELDS = ("image", "image_path", "gt_label", "gt_mask", "pred_score", "anomaly_map", "pred_label", "pred_mask")
# they look at neighbours, so that no pixel can be left out
WHOLE_MAP_METRICS = (
    anomalib_metrics.AUPRO,
    anomalib_metrics.PRO,
    anomalib_metrics.PIMO,
    anomalib_metrics.AUPIMO,
)


class RawScoreEvaluator(Evaluator):
    """anomalib's evaluator, with raw instead of normalised scores at test time.

    Metrics of ``pred_label`` or ``pred_mask`` are updated after the post-processor, as in anomalib. All others are
    updated with the batch as the model's ``test_step`` left it. For that, a callback that runs before all others,
    and so before the post-processor, is put into the trainer for the time of a test. Validation is anomalib's,
    which does not normalise there.

    If the model's post-processor has a ``region``, metrics see scores that are restricted to it, and those of pixels,
    such as this package's ``AUPRO``, leave out the pixels outside.

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
        pixel_size (Literal["model", "original"]): Where maps and masks of the test set are compared: at the model's
            size, to which anomalib shrinks the masks by nearest neighbour, or at the ``"original"`` size of the mask's
            file (of a normal image, the image's). Maps are then resized bilinearly, antialiased where they shrink,
            before they are ranked; predicted masks by nearest neighbour. This takes the map for one of the whole image:
            test without crops. One image is in memory at a time. Defaults to ``"model"``.
        products (Sequence[str] | None): Names of folders. The test metrics are computed for the images in each of these
            folders, too, under names such as ``bolt_image_AUROC``. Defaults to ``None``.

    Raises:
        ValueError: If ``pixel_size`` is unknown; in a test at the original size, if an anomalous image has a mask but
            no file of it; with a region, if a metric of anomalib needs whole maps; if a name in ``products`` is there
            twice, or an image is not in exactly one of the folders.

    Example:
        >>> from anomalib.models import Padim
        >>> model = Padim(evaluator=RawScoreEvaluator())
    """

    def __init__(
        self,
        val_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        test_metrics: AnomalibMetric | Sequence[AnomalibMetric] | None = None,
        compute_on_cpu: bool = True,
        pixel_size: Literal["model", "original"] = "model",
        products: Sequence[str] | None = None,
    ) -> None:
        super().__init__(val_metrics, _default_metrics() if test_metrics is None else test_metrics, compute_on_cpu)
        self.products = [] if products is None else check_products(products)
        of_all = list(self.test_metrics)
        self.test_metrics.extend(_copy(metric, name) for name in self.products for metric in of_all)
        check_choice(("model", "original"), pixel_size=pixel_size)
        self.pixel_size = pixel_size
        self._mask_paths: dict[str, Any] = {}
        self._first_callback = LambdaCallback(on_test_batch_end=self._update_score_metrics)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put the score metrics before the post-processor.

        Raises:
            ValueError: If the post-processor has a region, and a metric needs whole maps, or an image is not of one
                product.
        """
        super().setup(trainer, pl_module, stage)
        datamodule = getattr(trainer, "datamodule", None)
        for name in ("val_data", "test_data") if self.products and stage in {"fit", "validate", "test"} else ():
            if isinstance(dataset := getattr(datamodule, name, None), AnomalibDataset):
                find_products(dataset.samples.image_path, self.products)
        if _region_of(pl_module) is not None:
            _refuse_whole_maps([*self.val_metrics, *self.test_metrics])
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
        del pl_module
        self._mask_paths = _find_mask_paths(trainer.test_dataloaders)
        for metric in self._test_metrics:
            metric.reset()

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Update the metrics of validation, after the post-processor has restricted the batch to its region."""
        del trainer, outputs, args, kwargs
        for metrics, part in self._by_product(list(self.val_metrics), batch):
            for metric in metrics:
                _update(metric, part, _region_of(pl_module))

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
        del outputs, args, kwargs
        metrics = [metric for metric in self._test_metrics if trainer is None or not _is_score_metric(metric)]
        self._update(metrics, batch, _region_of(pl_module))

    def _update_score_metrics(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *args: Any
    ) -> None:
        del trainer, outputs, args
        region = _region_of(pl_module)
        if region is not None:
            cast("Any", pl_module).post_processor.restrict(batch)
        self._update([metric for metric in self._test_metrics if _is_score_metric(metric)], batch, region)

    def _update(self, metrics: list[Any], batch: Any, region: Any) -> None:
        for own, part in self._by_product(metrics, batch):
            self._update_together(own, part, region)

    def _by_product(self, metrics: list[Any], batch: Any) -> Iterator[tuple[list[Any], Any]]:
        """Metrics of all images with a batch, and those of each product with its images."""
        yield [metric for metric in metrics if not hasattr(metric, "product")], batch
        products = find_products(batch.image_path, self.products) if self.products else []
        for index in set(products):
            own = [metric for metric in metrics if getattr(metric, "product", None) == self.products[index]]
            yield own, _select(batch, [place for place, product in enumerate(products) if product == index])

    def _update_together(self, metrics: list[Any], batch: Any, region: Any) -> None:
        resize = self.pixel_size == "original" and batch.gt_mask is not None
        of_pixels = [metric for metric in metrics if resize and "gt_mask" in metric.fields]
        for metric in metrics:
            if not resize or "gt_mask" not in metric.fields:
                _update(metric, batch, region)
        for index in range(len(batch.image)) if of_pixels else ():
            mask = self._read_mask(str(batch.image_path[index]), batch.gt_mask[index])
            item = _resize_predictions(batch, index, mask.to(batch.image.device))
            if region is not None:
                region.restrict_truth(item)
            for metric in of_pixels:
                _update(metric, item, region)

    def _read_mask(self, image_path: str, gt_mask: Tensor) -> Tensor:
        """The ground truth of an image at its original size, ``(H, W)``."""
        if mask_path := self._mask_paths.get(image_path):
            masks = [cast("Tensor", read_mask(path, as_tensor=True)) for path in mask_files(mask_path)]
            return torch.stack(masks).any(dim=0)
        if gt_mask.any():
            msg = f"pixel_size='original' needs a file with the mask of {image_path}; choose pixel_size='model'."
            raise ValueError(msg)
        with Image.open(image_path) as image:
            return torch.zeros(image.height, image.width)

    @property
    def _test_metrics(self) -> list[Any]:
        return list(self.test_metrics)


def _region_of(module: LightningModule | None) -> Any:
    """The region of interest of a model's post-processor, if there is one."""
    return getattr(getattr(module, "post_processor", None), "region", None)


def _refuse_whole_maps(metrics: Sequence[Any]) -> None:
    for metric in metrics:
        if isinstance(metric, WHOLE_MAP_METRICS):
            msg = (
                f"{metric.name} of anomalib needs whole maps and cannot leave out what is outside region; use "
                "anomalib_recon.metrics.AUPRO, or leave it out."
            )
            raise ValueError(msg)


def _copy(metric: Any, product: str) -> Any:
    """A metric of one product."""
    own = copy.deepcopy(metric)
    own.product = product
    own.name = f"{product}_{metric.name}"
    return own


def _select(batch: Any, places: list[int]) -> SimpleNamespace:
    """What metrics need of some images of a batch."""
    values = {name: getattr(batch, name) for name in SELECTED_FIELDS}
    return SimpleNamespace(
        **{
            name: value[places] if isinstance(value, Tensor) else value and [value[place] for place in places]
            for name, value in values.items()
        }
    )


def _update(metric: Any, batch: Any, region: Any) -> None:
    """Update a metric with a batch; one of pixels with those inside a region."""
    if region is None or "gt_mask" not in metric.fields or batch.gt_mask is None:
        metric.update(batch)
    elif isinstance(metric, AUROC | AUPRO):  # connected regions are found in whole masks
        metric.update(batch, region=region.at(batch.gt_mask.shape[-2:]))
    else:
        values = {name: getattr(batch, name, None) for name in metric.fields}
        inside = {name: None if value is None else region.pixels(value) for name, value in values.items()}
        metric.update(SimpleNamespace(**inside))


def _callbacks_except(trainer: Trainer, *excluded: Callback) -> list[Callback]:
    return [callback for callback in trainer.callbacks if callback not in excluded]  # type: ignore[attr-defined]


def _find_mask_paths(loaders: Any) -> dict[str, str]:
    """Paths of masks by those of images. A batch does not know them if its first image is normal."""
    datasets = [loader.dataset for loader in (loaders if isinstance(loaders, list) else [loaders])]
    samples = [dataset.samples for dataset in datasets if isinstance(dataset, AnomalibDataset)]
    return {str(image): mask for part in samples for image, mask in zip(part.image_path, part.mask_path, strict=True)}


def _resize_predictions(batch: Any, index: int, mask: Tensor) -> ImageBatch:
    """Resize anomaly map and predicted mask of an image to the size of a mask, ``(H, W)``."""
    resized = ImageBatch(image=batch.image[index : index + 1], gt_mask=mask)
    if batch.anomaly_map is not None:
        maps = batch.anomaly_map[index][None, None].as_subclass(Tensor).float()
        resized.anomaly_map = functional.interpolate(maps, size=mask.shape, mode="bilinear", antialias=True)
    if batch.pred_mask is not None:
        masks = batch.pred_mask[index][None, None].as_subclass(Tensor).float()
        resized.pred_mask = functional.interpolate(masks, size=mask.shape, mode="nearest-exact").bool()
    return resized


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
