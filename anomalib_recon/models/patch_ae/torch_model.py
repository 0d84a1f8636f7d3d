# SPDX-License-Identifier: Apache-2.0

"""PatchAE, the network: an encoder to one vector for each patch, a decoder of single vectors, and the normal bank.

Example:
    >>> import torch
    >>> from anomalib_recon.models.patch_ae.torch_model import PatchAEModel
    >>> model = PatchAEModel(backbone="resnet18", pre_trained=False, image_size=(64, 64)).eval()
    >>> codes = model.embed(torch.rand(1, 3, 64, 64))
    >>> codes.shape
    torch.Size([1, 512, 8, 8])
    >>> model.reconstruct(codes).shape
    torch.Size([1, 3, 64, 64])

Paper:
    Patch-wise Auto-Encoder for Visual Anomaly Detection, https://arxiv.org/abs/2308.00429
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_recon.layers import (
    AntialiasResize,
    BackboneNormalize,
    FeatureScale,
    ScaleBy,
    Tiling,
    TopMean,
    Whitening,
    check_choice,
    check_image_size,
    check_named_once,
    check_whole,
    create_backbone,
    stage_strides,
)

from .anomaly_map import AnomalyMapGenerator
from .normal_bank import NormalBank

NUM_CHANNELS = 3
DEFAULT_NUM_STAGES = 4
# side of the images that are used to find out which weights a stage depends on
PROBE_SIZE = 64


class PatchAEModel(Tiling, nn.Module):
    """Auto-encoder of patches whose features are compared with those of normal images.

    The backbone stays in eval mode: the statistics of its batch normalisation are those of its weights. Its stages are
    standardised by the statistics of normal images (``scale``).

    Args:
        backbone (str): CNN of timm, with or without the tag of its weights.
            Defaults to ``"wide_resnet101_2"``.
        layers (Sequence[str] | None): Stages whose features are concatenated, by their names in timm. ``None`` stands
            for the last four.
            Defaults to ``None``.
        pre_trained (bool): Start from timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone, to start from instead.
            Defaults to ``None``.
        image_size (tuple[int, int]): Height H and width W of the images in pixels, multiples of ``patch_size``.
            Defaults to ``(256, 256)``.
        patch_size (int): Side of a patch in pixels; the grid has h = H / patch_size rows and w = W / patch_size
            columns.
            Defaults to ``8``.
        embed_dim (int | None): Width D of the vectors. ``None`` leaves the projection out: the vectors are those of the
            concatenated stages.
            Defaults to ``512``.
        trained_stages (int): Number of these stages that are trained, counted from the last one. With all of them, what
            comes before them is trained, too; with 0 the backbone stays as it is.
            Defaults to ``1``.
        patch_wise (bool): Decode each vector alone. Otherwise the decoder has 3 x 3 convolutions in place of the
            1 x 1 (ablation).
            Defaults to ``True``.
        feature_scale (ScaleBy): Bring the stages to one scale; see :class:`~anomalib_recon.layers.FeatureScale`.
            Defaults to ``"channel"``.
        score_by (Literal["features", "reconstruction"]): Distance of the vectors to the normal ones, or error of the
            reconstruction, without a bank (ablation).
            Defaults to ``"features"``.
        sigma (float): Standard deviation of the Gaussian that smooths the map, in pixels; 0 stands for none.
            Defaults to ``4.0``.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the image's score; at 0 the
            score is the maximum.
            Defaults to ``0.0``.
        vectors_per_chunk (int): Vectors of the bank that are compared with those of an image at a time. Bounds memory,
            changes no result.
            Defaults to ``4096``.

    Raises:
        ValueError: If an argument is out of its range or does not fit another.
        FileNotFoundError: If ``backbone_weights`` is not a file.
        ConnectionError: If the backbone's weights can be had neither from the local cache nor from the network.
    """

    def __init__(
        self,
        backbone: str = "wide_resnet101_2",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: tuple[int, int] = (256, 256),
        patch_size: int = 8,
        embed_dim: int | None = 512,
        trained_stages: int = 1,
        patch_wise: bool = True,
        feature_scale: ScaleBy = "channel",
        score_by: Literal["features", "reconstruction"] = "features",
        sigma: float = 4.0,
        top_fraction: float = 0.0,
        vectors_per_chunk: int = 4096,
    ) -> None:
        super().__init__()
        check_whole(patch_size=patch_size, embed_dim=1 if embed_dim is None else embed_dim)
        stages = _find_stages(backbone, layers)
        _check_arguments(image_size, patch_size, trained_stages, len(stages), score_by)
        self.image_size = image_size
        self.score_by = score_by
        self.normalize = BackboneNormalize(backbone)
        # in this order of memory its convolutions are faster, in training and in inference
        self.backbone = create_backbone(
            backbone, pre_trained, backbone_weights, features_only=True, out_indices=stages
        ).to(memory_format=torch.channels_last)
        if trained_stages < len(stages):
            _freeze(self.backbone, stage=len(stages) - trained_stages - 1)
        rows, columns = (side // patch_size for side in image_size)
        self.num_patches = rows * columns
        self.resize = AntialiasResize((rows, columns))
        num_channels = sum(self.backbone.feature_info.channels())
        self.scale = FeatureScale(self.backbone.feature_info.channels(), by=feature_scale)
        self.project = nn.Sequential()
        if embed_dim is not None:
            self.project = nn.Sequential(
                nn.Conv2d(num_channels, embed_dim, kernel_size=1),
                nn.GELU(),
                nn.Conv2d(embed_dim, embed_dim, kernel_size=1),
            )
        embed_dim = embed_dim or num_channels
        kernel_size, padding = (1, 0) if patch_wise else (3, 1)
        self.decoder = nn.Sequential(
            nn.GELU(),
            nn.Conv2d(embed_dim, embed_dim, kernel_size, padding=padding),
            nn.GELU(),
            nn.Conv2d(embed_dim, NUM_CHANNELS * patch_size**2, kernel_size, padding=padding),
            nn.PixelShuffle(patch_size),
        )
        self.whitening = Whitening(embed_dim)
        self.bank = NormalBank(vectors_per_chunk)
        self.anomaly_map_generator = AnomalyMapGenerator(sigma)
        self.top_mean = TopMean(top_fraction)
        if 4 * sigma + 0.5 >= min(image_size):  # the filter reaches so far, and reflects what is inside
            msg = f"sigma must be below a quarter of image_size, got {sigma} and {image_size[0]} x {image_size[1]}."
            raise ValueError(msg)
        self.train()

    def train(self, mode: bool = True) -> "PatchAEModel":
        """Train all but the backbone's batch normalisation, which keeps its statistics, and its dropout."""
        super().train(mode)
        self.backbone.eval()
        return self

    def extract_stages(self, images: Tensor) -> Tensor:
        """Resize the feature maps of the stages to the grid and concatenate them.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Features of shape ``(B, C, h, w)``.

        Raises:
            ValueError: If the images are not of the size that the network was built for.
        """
        check_image_size(images, self.image_size)
        stages = self.backbone(self.normalize(images))
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self.resize(stage.float()) for stage in stages], dim=1)

    def embed(self, images: Tensor) -> Tensor:
        """Encode each patch of images in one vector, its code.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Codes of shape ``(B, D, h, w)``.
        """
        return self.project(self.scale(self.extract_stages(images)))

    def reconstruct(self, codes: Tensor) -> Tensor:
        """Rebuild each patch from its code.

        Args:
            codes (Tensor): Codes of shape ``(B, D, h, w)``.

        Returns:
            Tensor: Images of shape ``(B, 3, H, W)``, not limited to [0, 1].
        """
        return self.decoder(codes)

    def compare(self, codes: Tensor) -> InferenceBatch:
        """Compare codes with those of normal images, the bank.

        Args:
            codes (Tensor): Codes of shape ``(B, D, h, w)``.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B,)`` and ``anomaly_map`` of shape ``(B, 1, H, W)``; both not
                negative and without an upper limit.

        Raises:
            RuntimeError: If there are no normal features to compare with.
        """
        with torch.autocast(codes.device.type, enabled=False):
            return self._map(self.bank(self.whitening(codes.float())))

    def compare_pixels(self, images: Tensor, reconstruction: Tensor) -> InferenceBatch:
        """Compare images of shape ``(B, 3, H, W)`` with their reconstruction (ablation); see :meth:`compare`."""
        with torch.autocast(images.device.type, enabled=False):
            return self._map((images - reconstruction.float()).square().mean(dim=1, keepdim=True))

    def _map(self, scores: Tensor) -> InferenceBatch:
        anomaly_map = self.anomaly_map_generator(scores, self.image_size)
        return InferenceBatch(pred_score=self.top_mean(anomaly_map), anomaly_map=anomaly_map)

    def picture(self, reconstruction: Tensor) -> Tensor:
        """Limit reconstructed images to [0, 1]."""
        return reconstruction.float().clamp(0, 1)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images of shape ``(B, 3, H, W)`` with values in [0, 1]; see :meth:`compare`."""
        images = self.tile(images)
        codes = self.embed(images)
        if self.score_by == "features":
            return self.untile(self.compare(codes))
        return self.untile(self.compare_pixels(images, self.reconstruct(codes)))


def _find_stages(backbone: str, layers: Sequence[str] | None) -> tuple[int, ...]:
    """Places of the chosen stages among those of the backbone."""
    names = list(stage_strides(backbone))
    if layers is None and len(names) < DEFAULT_NUM_STAGES:
        msg = f"backbone={backbone!r} has {len(names)} stages; choose a CNN with {DEFAULT_NUM_STAGES}, or pass layers."
        raise ValueError(msg)
    chosen = names[-DEFAULT_NUM_STAGES:] if layers is None else list(layers)
    unknown = [name for name in chosen if name not in names]
    if unknown or not chosen:
        msg = (
            f"layers must be among {', '.join(names)}, the stages of backbone={backbone!r}, got "
            f"{', '.join(unknown) or 'none'}."
        )
        raise ValueError(msg)
    check_named_once(chosen)
    return tuple(index for index, name in enumerate(names) if name in chosen)


def _freeze(backbone: Any, stage: int) -> None:
    """Freeze the weights that a stage depends on: its own and those before it."""
    weights = list(backbone.parameters())
    with torch.enable_grad():  # a model may be built where gradients are off
        features = backbone.eval()(torch.zeros(1, NUM_CHANNELS, PROBE_SIZE, PROBE_SIZE))[stage]
        gradients = torch.autograd.grad(features.sum(), weights, allow_unused=True)
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_(gradient is None)


def _check_arguments(
    image_size: tuple[int, int], patch_size: int, trained_stages: int, num_stages: int, score_by: str
) -> None:
    if any(side < 1 or side % patch_size for side in image_size):
        msg = f"image_size must be a multiple of patch_size, got {image_size[0]} x {image_size[1]} and {patch_size}."
        raise ValueError(msg)
    if image_size == (patch_size, patch_size):
        msg = f"image_size must hold more than one patch, got {image_size[0]} x {image_size[1]} and {patch_size}."
        raise ValueError(msg)
    if trained_stages not in range(num_stages + 1):
        msg = f"trained_stages must be from 0 to {num_stages}, the number of stages, got {trained_stages}."
        raise ValueError(msg)
    check_choice(("features", "reconstruction"), score_by=score_by)
