# SPDX-License-Identifier: Apache-2.0

"""Inpainting of features, as a plain PyTorch module.

InTra covers a patch of an image and inpaints it from the patches around it. Here the patches are cells of a frozen
backbone's feature map: each cell is predicted from the cells around it, without itself. What the prediction, fitted to
normal images, misses is anomalous.

Example:
    >>> import torch
    >>> from anomalib_recon.models.feature_inpainting.torch_model import FeatureInpaintingModel
    >>> model = FeatureInpaintingModel("resnet18", pre_trained=False, image_size=(64, 64), context_dim=16).eval()
    >>> features = model.embed(torch.rand(4, 3, 64, 64))
    >>> model.fit([features])
    >>> model(torch.rand(1, 3, 64, 64)).anomaly_map.shape
    torch.Size([1, 1, 64, 64])

See Also:
    :class:`anomalib_recon.models.feature_inpainting.lightning_model.FeatureInpainting`: in anomalib.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers import (
    FeatureScale,
    Tiling,
    TopMean,
    check_image_size,
    check_whole,
    create_dense_features,
    stage_strides,
    vision_transformer_blocks,
)

from .anomaly_map import AnomalyMapGenerator
from .context_regression import ContextRegression

# strides of the stages of a CNN that are used: the first are noise, the last see half of the image
CNN_STRIDES = (4, 8, 16)
# standard deviations of a principal component that the colours of a picture span
COLOR_RANGE = 6.0


class FeatureInpaintingModel(Tiling, nn.Module):
    """A frozen backbone, and a prediction of its features from their surroundings.

    Args:
        backbone (str): CNN or vision transformer of timm, with or without the tag of its weights.
            Defaults to ``"tf_efficientnet_b4.aa_in1k"``.
        layers (Sequence[str] | None): Layers whose outputs are concatenated; see :func:`create_dense_features`.
            ``None`` stands for the stages of a CNN with strides 4 to 16, or for the blocks in the second quarter of a
            vision transformer.
            Defaults to ``None``.
        pre_trained (bool): Use timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone in timm's format, to use instead.
            Defaults to ``None``.
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
            Defaults to ``(256, 256)``.
        feature_stride (int | None): Side of a cell, in pixels. ``None`` stands for 8 with a CNN, and for the patch size
            of a vision transformer.
            Defaults to ``None``.
        context_dim (int): Principal components of the surroundings that the prediction sees.
            Defaults to ``64``.
        window_size (int): Side of the window around a cell, in cells, odd.
            Defaults to ``7``.
        hole_size (int): Side of the part of it that is not seen, in cells, odd.
            Defaults to ``1``.
        rank (int): Directions of the linear prediction that are kept; 0 leaves the mean of the place as the prediction.
            Defaults to ``128``.
        num_units (int): Rectified random combinations of them that let the prediction bend; 0 leaves it linear.
            Defaults to ``1024``.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the image's score; at 0 it is
            the maximum.
            Defaults to ``0.01``.

    Raises:
        ValueError: If an argument is out of its range or does not fit another.
        FileNotFoundError: If ``backbone_weights`` is not a file.
        ConnectionError: If the backbone's weights can be had neither from the local cache nor from the network.
    """

    place_mean: Tensor

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: tuple[int, int] = (256, 256),
        feature_stride: int | None = None,
        context_dim: int = 64,
        window_size: int = 7,
        hole_size: int = 1,
        rank: int = 128,
        num_units: int = 1024,
        top_fraction: float = 0.01,
    ) -> None:
        super().__init__()
        _check_arguments(context_dim, window_size, hole_size, rank, num_units)
        self.image_size = image_size
        self.backbone = create_dense_features(
            backbone, _default_layers(backbone) if layers is None else layers, image_size, feature_stride, pre_trained,
            backbone_weights,
        )  # fmt: skip
        num_channels, grid_size = self.backbone.num_channels, self.backbone.grid_size
        self.scale = FeatureScale(self.backbone.layer_channels, by="whiten")
        self.register_buffer("place_mean", torch.zeros(num_channels, *grid_size))
        self.regression: ContextRegression | None = None
        if rank:
            self.regression = ContextRegression(
                num_channels,
                min(context_dim, num_channels),
                window_size,
                hole_size,
                min(rank, num_channels),
                num_units,
            )
        self.anomaly_map_generator = AnomalyMapGenerator(num_channels, grid_size, image_size)
        self.score = TopMean(top_fraction)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images of shape ``(B, 3, H, W)`` with values in [0, 1]; see :meth:`compare`."""
        features = self.embed(self.tile(images))
        return self.untile(self.compare(features, self.reconstruct(features)))

    def embed(self, images: Tensor) -> Tensor:
        """Compute features, whitened: principal components of about unit variance, the largest first.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Features of shape ``(B, C, h, w)``, without gradient.

        Raises:
            ValueError: If the images are not of the size that the network was built for.
        """
        check_image_size(images, self.image_size)
        return self.scale(self.backbone(images))

    def reconstruct(self, features: Tensor) -> Tensor:
        """Predict each cell from those around it.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``.

        Returns:
            Tensor: Prediction of the same shape.
        """
        if self.regression is None:
            return self.place_mean.expand_as(features)
        return self.place_mean + self.regression(features - self.place_mean)

    def compare(self, features: Tensor, reconstruction: Tensor) -> InferenceBatch:
        """Compare features with their prediction.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their prediction, of the same shape.

        Returns:
            InferenceBatch: ``anomaly_map`` of shape ``(B, 1, H, W)``, about 1 where images are normal, and
                ``pred_score`` of shape ``(B,)``; both not negative and without an upper limit.
        """
        anomaly_map = self.anomaly_map_generator(features, reconstruction)
        return InferenceBatch(pred_score=self.score(anomaly_map), anomaly_map=anomaly_map)

    def false_colors(self, features: Tensor) -> Tensor:
        """Show features, or their prediction, by their first three principal components as red, green and blue.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``, as :meth:`embed` and :meth:`reconstruct` return them.

        Returns:
            Tensor: Pictures of shape ``(B, 3, H, W)`` with values in [0, 1]; a component of 0 is 0.5.
        """
        colors = (features[:, :3].float() / COLOR_RANGE + 0.5).clamp(0, 1)
        return functional.interpolate(colors, size=self.image_size, mode="nearest")

    @torch.no_grad()
    def fit(self, features: Iterable[Tensor]) -> None:
        """Fit all statistics to the features of normal images, in closed form.

        Args:
            features (Iterable[Tensor]): What the backbone makes of the images, in batches of shape ``(b, C, h, w)``.
                Iterated six times, and four with ``rank=0``.
        """
        self.scale.fit(features)
        total, count = torch.zeros_like(self.place_mean), 0
        for batch in features:
            total += self.scale(batch).sum(dim=0)
            count += len(batch)
        self.place_mean.copy_(total / count)
        if self.regression is not None:
            self.regression.fit(_Centred(self, features))
        scaled = (self.scale(batch) for batch in features)
        self.anomaly_map_generator.distance.fit(batch - self.reconstruct(batch) for batch in scaled)


class _Centred:
    """Features of a backbone, whitened and without the mean of their place; can be iterated more than once."""

    def __init__(self, model: FeatureInpaintingModel, features: Iterable[Tensor]) -> None:
        self._model, self._features = model, features

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self._features:
            yield self._model.scale(batch) - self._model.place_mean


def _default_layers(backbone: str) -> list[str]:
    blocks, _ = vision_transformer_blocks(backbone)
    if blocks:
        return blocks[len(blocks) // 4 : len(blocks) // 2]
    return [stage for stage, stride in stage_strides(backbone).items() if stride in CNN_STRIDES]


def _check_arguments(context_dim: int, window_size: int, hole_size: int, rank: int, num_units: int) -> None:
    check_whole(context_dim=context_dim, window_size=window_size, hole_size=hole_size)
    for name, value, without in (("rank", rank, "the mean of the place"), ("num_units", num_units, "a linear one")):
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            msg = f"{name} must be a whole number from 0, got {value}; 0 leaves {without} as the prediction."
            raise ValueError(msg)
    for name, value in (("window_size", window_size), ("hole_size", hole_size)):
        if value % 2 == 0:
            msg = f"{name} must be odd, got {value}."
            raise ValueError(msg)
    if hole_size >= window_size:
        msg = f"hole_size must be smaller than window_size, got {hole_size} and {window_size}."
        raise ValueError(msg)
