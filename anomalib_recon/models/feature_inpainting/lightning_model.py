# SPDX-License-Identifier: Apache-2.0

"""Inpainting of features in anomalib.

Example:
    >>> from anomalib.data import MVTecAD
    >>> from anomalib.engine import Engine
    >>> from anomalib_recon.models import FeatureInpainting
    >>> model = FeatureInpainting()  # doctest: +SKIP
    >>> Engine().train(model=model, datamodule=MVTecAD(category="screw"))  # doctest: +SKIP

See Also:
    :class:`anomalib_recon.models.feature_inpainting.torch_model.FeatureInpaintingModel`: the network, usable alone.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from anomalib.data import Batch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from torch import Tensor

from anomalib_recon.models.base import ReconstructionModule
from anomalib_recon.training import FeatureCache

from .loss import ResidualLoss
from .torch_model import FeatureInpaintingModel


class FeatureInpainting(ReconstructionModule, AnomalibModule):  # type: ignore[misc]  # to_onnx as anomalib's
    """Prediction of a frozen backbone's features from their surroundings, fitted in closed form.

    Before the first epoch, one pass over the normal training images computes their features, from which all statistics
    follow. No weight is trained: the only epoch changes nothing, and the seed has no influence.

    Args:
        backbone (str): CNN or vision transformer of timm, with or without the tag of its weights.
            Defaults to ``"tf_efficientnet_b4.aa_in1k"``.
        layers (Sequence[str] | None): Layers whose outputs are concatenated. Of a vision transformer ``"patch_embed"``,
            ``"blocks.0"`` and so on; of a CNN timm's stages, or any modules. ``None`` stands for the blocks in the
            second quarter of a vision transformer, or for the stages of a CNN with strides 4 to 16.
            Defaults to ``None``.
        pre_trained (bool): Use timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone in timm's format, to use instead.
            Defaults to ``None``.
        image_size (int | tuple[int, int] | None): Height and width that images are resized to, in pixels; an int means
            a square. ``None`` takes the size of ``pre_processor``, or else 256 x 256.
            Defaults to ``None``.
        feature_stride (int | None): Side of a cell of the feature map, in pixels. ``None`` stands for 8 with a CNN, and
            for the patch size of a vision transformer, which allows no other.
            Defaults to ``None``.
        context_dim (int): Principal components of the surroundings that the prediction sees. The time to fit grows with
            its cube.
            Defaults to ``64``.
        window_size (int): Side of the window around a cell, in cells, odd.
            Defaults to ``7``.
        hole_size (int): Side of the part in its middle that is not seen, in cells, odd.
            Defaults to ``1``.
        rank (int): Directions of the linear prediction that are kept; 0 leaves the mean of the place as the prediction.
            Defaults to ``128``.
        num_units (int): Rectified random combinations of them that let the prediction bend; 0 leaves it linear.
            Defaults to ``1024``.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the image's score; at 0 it is
            the maximum.
            Defaults to ``0.01``.
        feature_cache_gib (float): Features of the training images are computed once and kept in half precision, in up
            to so many GiB of memory. If they need more, they are computed anew in each of seven passes.
            Defaults to ``4.0``.
        pre_processor (PreProcessor | bool): Pre-processor; it must leave images in [0, 1].
            Defaults to ``True``.
        post_processor (PostProcessor | bool): Post-processor.
            Defaults to ``True``.
        evaluator (Evaluator | bool): Evaluator.
            Defaults to ``True``.
        visualizer (Visualizer | bool): Visualizer.
            Defaults to ``True``.

    Raises:
        ValueError: If an argument is out of its range or does not fit another.
        FileNotFoundError: If ``backbone_weights`` is not a file.
        ConnectionError: If the backbone's weights can be had neither from the local cache nor from the network.
    """

    network = FeatureInpaintingModel
    score_arguments = ("top_fraction",)
    defaulted_arguments = ("layers", "feature_stride")
    scales_features = True
    needs_datamodule = True

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: int | tuple[int, int] | None = None,
        feature_stride: int | None = None,
        context_dim: int = 64,
        window_size: int = 7,
        hole_size: int = 1,
        rank: int = 128,
        num_units: int = 1024,
        top_fraction: float = 0.01,
        feature_cache_gib: float = 4.0,
        pre_processor: PreProcessor | bool = True,
        post_processor: PostProcessor | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer)
        self.model: FeatureInpaintingModel = self.build_network()
        self.loss = ResidualLoss()
        self.feature_cache = FeatureCache(feature_cache_gib)

    def configure_optimizers(self) -> None:
        """None: all is fitted in closed form."""

    def start_features(self, batch: Batch) -> Tensor:
        """Features of a batch of images, before they are whitened."""
        return self.model.backbone(self.tiles(batch))

    def start(self, features: Iterable[Tensor]) -> None:
        """Fit all statistics.

        Args:
            features (Iterable[Tensor]): Features of shape ``(b, C, h, w)``.
        """
        self.model.fit(features)

    def targets(self, features: Tensor) -> Tensor:
        """Whiten features of shape ``(B, C, h, w)``."""
        return self.model.scale(features)

    def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Log what the prediction misses; nothing is left to train.

        Args:
            batch (Any): Batch of B pre-processed images, or of their places in the feature cache.
            *args (Any): Not used.
            **kwargs (Any): Not used.

        Returns:
            Tensor: The same, for Lightning, which would not count a step without it.
        """
        return cast("Tensor", super().training_step(batch, *args, **kwargs)).detach().requires_grad_()

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Take the step without an optimiser: the gradient scaler of 16-mixed would look for one's weights.

        Args:
            epoch (int): Not used.
            batch_idx (int): Not used.
            optimizer (Any): Not used.
            optimizer_closure (Callable[[], Any] | None): The step.
        """
        del epoch, batch_idx, optimizer
        if optimizer_closure is not None:
            optimizer_closure()

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One epoch, on one device."""
        return {"max_epochs": 1, "num_sanity_val_steps": 0, "devices": 1}
