# SPDX-License-Identifier: Apache-2.0

"""Thresholds for each of several products that one model inspects.

Example:
    >>> from anomalib_recon.models import SAAE
    >>> from anomalib_recon.post_processing import ProductPostProcessor
    >>> model = SAAE(post_processor=ProductPostProcessor(["bolt", "nut"]))  # doctest: +SKIP
"""

from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import InferenceBatch
from anomalib.models import AnomalibModule
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from anomalib_recon.training import check_products, find_products

from .post_processor import FalsePositiveRatePostProcessor

# what there is of each product
VALUES = ("_image_threshold", "_pixel_threshold", "image_min", "image_max", "pixel_min", "pixel_max")


class ProductPostProcessor(FalsePositiveRatePostProcessor):
    """Set thresholds and normalisation for each product, at the same false-positive rates.

    One model may score the normal images of one product higher than those of another. Each product gets thresholds
    from its own normal images, as :class:`FalsePositiveRatePostProcessor` does for all. Scores are always normalised:
    the threshold of each product is 0.5.

    The product of an image is the one whose name is that of a folder in its path, in training, tests and predictions.
    An exported model does not know the path: :meth:`for_product` gives the post-processor of one product.

    Args:
        products (list[str]): Names of the folders of the products.
        pixel_fpr (float): Highest fraction of the pixels of a product's normal images to be called anomalous, in
            [0, 1).
            Defaults to ``0.005``.
        image_fpr (float): Highest fraction of a product's normal images to be called anomalous, in [0, 1).
            Defaults to ``0.05``.
        split (Literal["train", "val"]): The split with the normal images.
            Defaults to ``"train"``.
        region (list[tuple[float, float]] | Path | str | None): Where anomalies count; see :class:`RegionPostProcessor`.
            Defaults to ``None``, the whole image.
        top_fraction (float): Share of the region whose mean is the image's score; see :class:`RegionPostProcessor`.
            Defaults to ``0.0``, the maximum.

    Raises:
        ValueError: If a name is there twice, or an argument of :class:`FalsePositiveRatePostProcessor` cannot be used.
    """

    def __init__(
        self,
        products: list[str],
        pixel_fpr: float = 0.005,
        image_fpr: float = 0.05,
        split: Literal["train", "val"] = "train",
        region: list[tuple[float, float]] | Path | str | None = None,
        top_fraction: float = 0.0,
    ) -> None:
        super().__init__(pixel_fpr, image_fpr, split, region=region, top_fraction=top_fraction)
        self.products = check_products(products)
        for name in VALUES:
            self.register_buffer(name, torch.full((len(self.products),), torch.nan))

    @classmethod
    def argument_for(cls, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What ``load_from_checkpoint`` needs for a checkpoint that has thresholds of each product.

        Args:
            checkpoint (dict[str, Any]): The checkpoint.

        Returns:
            dict[str, Any]: ``post_processor``, or nothing for other checkpoints.
        """
        products = (checkpoint.get("anomalib_post_processor_config") or {}).get("products")
        return {"post_processor": cls(products)} if products else {}

    def checkpoint_config(self) -> dict[str, Any]:
        """Configuration for a checkpoint, with the names of the products."""
        return {**super().checkpoint_config(), "products": self.products}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the configuration.

        Args:
            config (dict[str, Any]): What ``checkpoint_config`` returned.

        Raises:
            ValueError: If it is for other products.
        """
        if "products" not in config:
            msg = (
                "ProductPostProcessor needs a checkpoint with thresholds of each product, and this one has thresholds "
                "for all together; leave post_processor out, or train with it."
            )
            raise ValueError(msg)
        if config["products"] != self.products:
            msg = f"products must be those of the checkpoint, {config['products']}, got {self.products}; pass them."
            raise ValueError(msg)
        super().load_checkpoint_config(config)

    def for_product(self, product: str) -> FalsePositiveRatePostProcessor:
        """The post-processor of one product, for its export.

        Args:
            product (str): Its name.

        Returns:
            FalsePositiveRatePostProcessor: A post-processor with its thresholds.

        Raises:
            ValueError: If it is not one of the products.
        """
        if product not in self.products:
            msg = f"product must be one of {self.products}, got {product!r}."
            raise ValueError(msg)
        single = FalsePositiveRatePostProcessor(
            self.pixel_fpr, self.image_fpr, self.split, top_fraction=self.top_fraction
        )
        single.region = self.region
        for name in VALUES:
            single.get_buffer(name).copy_(self.get_buffer(name)[self.products.index(product)])
        return single

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for normal images of each product before the training, not after it.

        Raises:
            ValueError: If a product has none, or an image shows none of the products.
        """
        module: Any = pl_module
        paths = self._normal_images(trainer, module).samples.image_path
        found = {self.products[index] for index in find_products(paths, self.products)}
        if missing := [name for name in self.products if name not in found]:
            msg = f"products={self.products}, but the {self.split} set has no normal image of {missing}; add some."
            raise ValueError(msg)

    def _set_thresholds(self, trainer: Trainer, module: AnomalibModule) -> None:
        dataset = self._normal_images(trainer, module)
        products = find_products(dataset.samples.image_path, self.products)
        for index in range(len(self.products)):
            own = [place for place, product in enumerate(products) if product == index]
            self._set_from(trainer, module, dataset.subsample(own), index)

    def normalize_batch(self, batch: Any) -> None:
        """Normalise scores and maps, each by the values of its product.

        Args:
            batch (Any): Batch of anomalib, with ``image_path``.
        """
        device = self.image_min.device
        index = torch.tensor(find_products(batch.image_path, self.products), device=device)

        def of_images(values: Tensor, scores: Tensor) -> Tensor:
            return values[index].reshape(-1, *[1] * (scores.dim() - 1))

        for name, kind in (("pred_score", "image"), ("anomaly_map", "pixel")):
            if (scores := getattr(batch, name)) is not None:
                values = (getattr(self, f"{kind}_{part}") for part in ("min", "max", "threshold"))
                normalized = self._normalize(scores, *(of_images(value, scores) for value in values))
                setattr(batch, name, normalized)

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        """Refuse predictions, of which nobody knows the product.

        Raises:
            ValueError: Always.
        """
        del predictions
        msg = (
            f"The product of a prediction is not known; set model.post_processor to post_processor.for_product(name), "
            f"for one of {self.products}, before an export."
        )
        raise ValueError(msg)
