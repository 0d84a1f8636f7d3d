# SPDX-License-Identifier: Apache-2.0

"""SAAE: the self-attention autoencoder on the features of a vision transformer, as a plain PyTorch module.

Example:
    >>> import torch
    >>> from anomalib_recon.models.saae.torch_model import SAAEModel
    >>> model = SAAEModel("vit_tiny_patch16_224", pre_trained=False, image_size=(64, 64), latent_dim=20).eval()
    >>> features = model.embed(torch.rand(1, 3, 64, 64))
    >>> features.shape, model.reconstruct(features).shape
    (torch.Size([1, 960, 4, 4]), torch.Size([1, 960, 4, 4]))

Paper:
    Self-Attention Autoencoder for Anomaly Segmentation, Yang Yang, Preprints 2021.

See Also:
    :class:`anomalib_recon.models.saae.lightning_model.SAAE`: training and evaluation with anomalib.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_recon.layers import (
    FeatureScale,
    ResidualDistance,
    ScaleBy,
    Tiling,
    TopMean,
    check_choice,
    check_dropout,
    check_image_size,
    check_whole,
    create_dense_features,
    divide_feature_map,
)

from .anomaly_map import AnomalyMapGenerator, Distance
from .autoencoder import SelfAttentionAutoencoder

DEFAULT_BACKBONE = "vit_base_patch16_384.orig_in21k_ft_in1k"
DEFAULT_IMAGE_SIZE = (384, 384)


class SAAEModel(Tiling, nn.Module):
    """A frozen backbone, and the autoencoder that reconstructs its features.

    The autoencoder is built once its latent width V is known: at once if ``latent_dim`` is given, or else by
    :meth:`build_autoencoder`.

    Args:
        backbone (str): Vision transformer or CNN of timm, with or without the tag of its weights.
            Defaults to ``"vit_base_patch16_384.orig_in21k_ft_in1k"``.
        layers (Sequence[str] | None): Layers whose outputs are concatenated. Of a vision transformer ``"patch_embed"``,
            ``"blocks.0"``, ``"blocks.1"`` and so on; of a CNN timm's stages, or any modules. ``None`` stands for the
            linear projection and the first four blocks, or for all stages of a CNN.
            Defaults to ``None``.
        pre_trained (bool): Use timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone in timm's format, to use instead.
            Defaults to ``None``.
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
            Defaults to ``(384, 384)``.
        feature_stride (int | None): Side of the region that a cell of the feature map describes, in pixels. ``None``
            stands for the patch size of a vision transformer, which allows no other, and for 8 with a CNN.
            Defaults to ``None``.
        latent_dim (int | None): Latent width V.
            Defaults to ``None``.
        patch_size (int): Side p of the autoencoder's patches, in cells of the feature map.
            Defaults to ``1``.
        num_heads (int): Heads of each attention.
            Defaults to ``3``.
        depth (int): Number of encoder layers, and of decoder layers.
            Defaults to ``1``.
        mlp_ratio (int): Inner width of the feed-forward networks over V.
            Defaults to ``1``.
        transformer (bool | Literal["author"]): Have a transformer between the convolutions, that of the paper or, with
            ``"author"``, that of the author's code; without it the autoencoder is that of the ablation "w/o SAAE".
            Defaults to ``True``.
        normalize (bool): Shift and scale images by the mean and deviation that the backbone was trained with; ``False``
            is for vision transformers.
            Defaults to ``True``.
        backbone_dropout (float): Probability of dropout in a vision transformer while the autoencoder trains: a noise
            on features and target alike.
            Defaults to ``0.0``.
        align_corners (bool): Enlarge the map so that the centres of its corner cells lie on the image's corners.
            Defaults to ``False``.
        feature_scale (ScaleBy): Scale of the features; see :class:`~anomalib_recon.layers.FeatureScale`.
            Defaults to ``"none"``.
        distance (Distance): Compare feature vectors by the L2 norm of their difference, ``"norm"``, by its mean
            square, ``"mse"``, or by a distance in units of normal residuals at that place, ``"mahalanobis"``; see
            :class:`~anomalib_recon.layers.ResidualDistance`.
            Defaults to ``"norm"``.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the image's score; at 0 the
            score is the maximum.
            Defaults to ``0.0``.

    Raises:
        ValueError: If an argument is out of its range or does not fit another.
        FileNotFoundError: If ``backbone_weights`` is not a file.
        ConnectionError: If the backbone's weights can be had neither from the local cache nor from the network.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: tuple[int, int] = DEFAULT_IMAGE_SIZE,
        feature_stride: int | None = None,
        latent_dim: int | None = None,
        patch_size: int = 1,
        num_heads: int = 3,
        depth: int = 1,
        mlp_ratio: int = 1,
        transformer: bool | Literal["author"] = True,
        normalize: bool = True,
        backbone_dropout: float = 0.0,
        align_corners: bool = False,
        feature_scale: ScaleBy = "none",
        distance: Distance = "norm",
        top_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        sizes = {"patch_size": patch_size, "num_heads": num_heads, "depth": depth, "mlp_ratio": mlp_ratio}
        check_whole(**sizes, latent_dim=1 if latent_dim is None else latent_dim)
        check_choice(("norm", "mse", "mahalanobis"), distance=distance)
        check_choice((True, False, "author"), transformer=transformer)
        check_dropout(backbone_dropout=backbone_dropout)
        self.image_size = image_size
        self.backbone = create_dense_features(
            backbone, layers, image_size, feature_stride, pre_trained, backbone_weights, normalize, backbone_dropout
        )
        divide_feature_map(self.backbone.grid_size, patch_size)  # the autoencoder may be built later
        self.scale = FeatureScale(self.backbone.layer_channels, feature_scale)
        self.score = TopMean(top_fraction)
        self.anomaly_map_generator = AnomalyMapGenerator(
            image_size,
            distance,
            ResidualDistance(self.backbone.num_channels, self.backbone.grid_size)
            if distance == "mahalanobis"
            else None,
            align_corners,
        )
        self.autoencoder: SelfAttentionAutoencoder | None = None
        self._autoencoder_arguments: dict[str, Any] = {**sizes, "transformer": transformer}
        if latent_dim is not None:
            self.build_autoencoder(latent_dim)

    def build_autoencoder(self, latent_dim: int) -> None:
        """Build the autoencoder anew.

        Args:
            latent_dim (int): Latent width V.
        """
        self.autoencoder = SelfAttentionAutoencoder(
            num_channels=self.backbone.num_channels,
            latent_dim=latent_dim,
            grid_size=self.backbone.grid_size,
            **self._autoencoder_arguments,
        )

    def embed(self, images: Tensor) -> Tensor:
        """Compute the stacked feature maps f of the backbone (eq. 1), and scale them.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Features of shape ``(B, U, H_0, W_0)``, without gradient.

        Raises:
            ValueError: If the images are not of the size that the network was built for.
        """
        check_image_size(images, self.image_size)
        return self.scale(self.backbone(images))

    def reconstruct(self, features: Tensor) -> Tensor:
        """Reconstruct features (section 3.2).

        Args:
            features (Tensor): Features f of shape ``(B, U, H_0, W_0)``.

        Returns:
            Tensor: Reconstruction of the same shape.

        Raises:
            ValueError: If there is no autoencoder yet.
        """
        if self.autoencoder is None:
            msg = "latent_dim is not known before training; pass it, train the model, or load a checkpoint."
            raise ValueError(msg)
        return self.autoencoder(features)

    def compare(self, features: Tensor, reconstruction: Tensor) -> InferenceBatch:
        """Compare features with their reconstruction (section 3.3).

        Args:
            features (Tensor): Features f of shape ``(B, U, H_0, W_0)``.
            reconstruction (Tensor): Their reconstruction, of the same shape.

        Returns:
            InferenceBatch: ``anomaly_map`` of shape ``(B, 1, H, W)`` and ``pred_score`` of shape ``(B,)``, its maximum
                or the mean of its highest values; both not negative and without an upper limit.
        """
        anomaly_map = self.anomaly_map_generator(features, reconstruction)
        return InferenceBatch(pred_score=self.score(anomaly_map), anomaly_map=anomaly_map)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images of shape ``(B, 3, H, W)`` with values in [0, 1]; see :meth:`compare`."""
        features = self.embed(self.tile(images))
        return self.untile(self.compare(features, self.reconstruct(features)))
