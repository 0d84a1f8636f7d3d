# SPDX-License-Identifier: Apache-2.0

"""Dense features of an image: layers of a frozen vision transformer or of a frozen CNN, on one grid.

Example:
    >>> import torch
    >>> from anomalib_recon.layers import create_dense_features
    >>> backbone = create_dense_features("vit_tiny_patch16_224", image_size=(64, 64), pre_trained=False)
    >>> backbone(torch.rand(1, 3, 64, 64)).shape
    torch.Size([1, 960, 4, 4])
"""

import functools
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional

from .arguments import check_named_once, check_whole
from .backbone import BackboneNormalize, FrozenBackbone, create_backbone

# the output of a vision transformer's linear projection, before positions are added
PATCH_EMBEDDING = "patch_embed"
# of SAAE (section 4.1.2): the linear projection and f_1:4
DEFAULT_VIT_LAYERS = (PATCH_EMBEDDING, "blocks.0", "blocks.1", "blocks.2", "blocks.3")
DEFAULT_CNN_STRIDE = 8


class VisionTransformerFeatures(nn.Module):
    """Layers of a pre-trained vision transformer of timm as one feature map.

    It stays in eval mode, but for dropout that is asked for, which is active in train mode.

    The blocks after the last one needed are dropped. Position embeddings are interpolated to the image size once, here,
    as timm does it.

    Args:
        name (str): Vision transformer of timm, with or without the tag of its weights.
        layers (Sequence[str]): ``"patch_embed"`` for the output of the linear projection, ``"blocks.0"`` for that of
            the first block, and so on.
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
        pre_trained (bool): Use the weights that timm has for this model.
        weights (str | Path | None): File with weights in timm's format, to use instead.
        normalize (bool): Shift and scale images by the mean and deviation that the model was trained with.
            Defaults to ``True``.
        dropout (float): Probability of dropout behind the positions, each attention and each layer of the feed-forward
            networks, while training.
            Defaults to ``0.0``.

    Raises:
        ValueError: If there is no such layer, no block is named, or patches do not tile the image.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str],
        image_size: tuple[int, int],
        pre_trained: bool,
        weights: str | Path | None,
        normalize: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        blocks, stride = vision_transformer_blocks(name)
        unknown = [layer for layer in layers if layer not in {PATCH_EMBEDDING, *blocks}]
        if unknown or not set(layers) & set(blocks):
            msg = (
                f"layers must be {PATCH_EMBEDDING} or among {blocks[0]} to {blocks[-1]}, at least one of these, for "
                f"backbone={name!r}, got {', '.join(unknown or layers) or 'none'}."
            )
            raise ValueError(msg)
        check_named_once(layers)
        self.grid_size = divide_image(image_size, stride, f"the patch size of backbone={name!r}")
        self.has_embedding = PATCH_EMBEDDING in layers
        self.indices = [index for index, block in enumerate(blocks) if block in layers]

        rates = {"pos_drop_rate": dropout, "proj_drop_rate": dropout} if dropout else {}  # not all know them
        self.vit = create_backbone(name, pre_trained, weights, num_classes=0, **rates)
        self.vit.prune_intermediate_layers(self.indices, prune_norm=True)
        self.vit.set_input_size(image_size)
        self.vit.requires_grad_(requires_grad=False)
        self.layer_channels: list[int] = [self.vit.embed_dim] * (self.has_embedding + len(self.indices))
        self.num_channels = sum(self.layer_channels)
        self.normalize = BackboneNormalize(name) if normalize else nn.Identity()
        self.dropout = dropout
        self.eval()

    def train(self, mode: bool = True) -> "VisionTransformerFeatures":
        """Stay in eval mode, unless there is dropout."""
        return super().train(mode and self.dropout > 0)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Compute the chosen layers, from the first to the last, without class and register tokens.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Features f of shape ``(B, U, H_0, W_0)``.
        """
        embedded: list[Tensor] = []
        hook = self.vit.patch_embed.register_forward_hook(lambda *call: embedded.append(call[-1]))
        try:
            maps = self.vit.forward_intermediates(
                self.normalize(images), indices=self.indices, stop_early=True, intermediates_only=True
            )
        finally:
            hook.remove()
        if self.has_embedding:
            # tokens (B, H_0 * W_0, D), or (B, H_0, W_0, D)
            tokens = embedded[0].flatten(1, -2)
            maps = [tokens.transpose(1, 2).unflatten(2, self.grid_size), *maps]
        return torch.cat(maps, dim=1)


class RegionalFeatures(nn.Module):
    """Layers of a pre-trained CNN as one feature map, each cell of which describes a region of the image.

    Each layer's map is enlarged to the size of the image and averaged over the square regions (Shi et al., 2021, as
    SAAE has them, section 4.3).

    Args:
        name (str): CNN of timm, with or without the tag of its weights.
        layers (Sequence[str] | None): Stages, or modules; see :class:`FrozenBackbone`.
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
        stride (int): Side of a region, in pixels.
        pre_trained (bool): Use the weights that timm has for this model.
        weights (str | Path | None): File with weights in timm's format, to use instead.

    Raises:
        ValueError: If there is no such layer, or regions do not tile the image.
    """

    def __init__(
        self,
        name: str,
        layers: Sequence[str] | None,
        image_size: tuple[int, int],
        stride: int,
        pre_trained: bool,
        weights: str | Path | None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.grid_size = divide_image(image_size, stride, "feature_stride")
        self.backbone = FrozenBackbone(name, layers, pre_trained, weights)
        self.layer_channels = self.backbone.num_channels
        self.num_channels = sum(self.layer_channels)

    def forward(self, images: Tensor) -> Tensor:
        """Compute regional features.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Features f of shape ``(B, U, H_0, W_0)``, without gradient.
        """
        maps = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self._average(features.float()) for features in maps], dim=1)

    def _average(self, maps: Tensor) -> Tensor:
        """Enlarge and average maps, ``(B, C, h, w) -> (B, C, H_0, W_0)``."""
        rows, cols = (
            _region_weights(*sizes, maps.device)
            for sizes in zip(maps.shape[-2:], self.image_size, self.grid_size, strict=True)
        )
        return rows @ maps @ cols.mT


def _region_weights(map_size: int, image_size: int, num_regions: int, device: torch.device) -> Tensor:
    """Weigh every cell of a map for every region, along one axis.

    Both steps are linear and separable, so that a small matrix for each axis does them without the enlarged map.

    Returns:
        Tensor: Weights of shape ``(num_regions, map_size)``; each row sums to one.
    """
    cells = torch.eye(map_size, device=device)[None]
    enlarged = functional.interpolate(cells, size=image_size, mode="linear", align_corners=False)
    return enlarged[0].unflatten(1, (num_regions, -1)).mean(dim=2).T


def create_dense_features(
    name: str,
    layers: Sequence[str] | None = None,
    image_size: tuple[int, int] = (384, 384),
    feature_stride: int | None = None,
    pre_trained: bool = True,
    weights: str | Path | None = None,
    normalize: bool = True,
    dropout: float = 0.0,
) -> VisionTransformerFeatures | RegionalFeatures:
    """Create a frozen model of timm that returns its layers as one feature map.

    Args:
        name (str): Vision transformer or CNN of timm, with or without the tag of its weights.
        layers (Sequence[str] | None): Layers to concatenate. ``None`` stands for the linear projection and the first
            four blocks of a vision transformer, and for all stages of a CNN.
            Defaults to ``None``.
        image_size (tuple[int, int]): Height and width of the images, in pixels.
            Defaults to ``(384, 384)``.
        feature_stride (int | None): Side of the region of a cell, in pixels. ``None`` stands for 8 with a CNN; with a
            vision transformer it is the patch size.
            Defaults to ``None``.
        pre_trained (bool): Use the weights that timm has for this model.
            Defaults to ``True``.
        weights (str | Path | None): File with weights in timm's format, to use instead.
            Defaults to ``None``.
        normalize (bool): Shift and scale images by the mean and deviation that the model was trained with; ``False`` is
            for vision transformers.
            Defaults to ``True``.
        dropout (float): Probability of dropout in a vision transformer, in train mode.
            Defaults to ``0.0``.

    Returns:
        VisionTransformerFeatures | RegionalFeatures: The backbone, with ``num_channels`` U,
            ``layer_channels``, which sum to it, and ``grid_size``.

    Raises:
        ValueError: If an argument does not fit another.
    """
    blocks, patch_size = vision_transformer_blocks(name)
    if not blocks and (dropout or not normalize):
        msg = (
            f"normalize={normalize} and backbone_dropout={dropout} are for vision transformers, which "
            f"backbone={name!r} is not; leave them at True and 0."
        )
        raise ValueError(msg)
    if not blocks:
        stride = DEFAULT_CNN_STRIDE if feature_stride is None else feature_stride
        check_whole(feature_stride=stride)
        return RegionalFeatures(name, layers, image_size, stride, pre_trained, weights)
    if feature_stride not in {None, patch_size}:
        msg = f"feature_stride must be {patch_size}, the patch size of backbone={name!r}, got {feature_stride}."
        raise ValueError(msg)
    return VisionTransformerFeatures(
        name, DEFAULT_VIT_LAYERS if layers is None else layers, image_size, pre_trained, weights, normalize, dropout
    )


def vision_transformer_blocks(name: str) -> tuple[list[str], int]:
    """Name the blocks of a plain vision transformer of timm, one whose blocks all have the same grid.

    Args:
        name (str): Model of timm.

    Returns:
        tuple[list[str], int]: Names of the blocks, none if it is not a vision transformer, and the patch size.
    """
    return _find_blocks(name) if isinstance(name, str) and timm.is_model(name) else ([], 0)


@functools.cache
def _find_blocks(name: str) -> tuple[list[str], int]:
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=0)
    info = getattr(model, "feature_info", None)
    if not info or not all(hasattr(model, part) for part in ("patch_embed", "blocks", "set_input_size")):
        return [], 0
    strides = {block["reduction"] for block in info}
    return ([block["module"] for block in info], strides.pop()) if len(strides) == 1 else ([], 0)


def divide_feature_map(feature_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """Count the square patches that tile a feature map.

    Args:
        feature_size (tuple[int, int]): Height and width of the feature map, in cells.
        patch_size (int): Side of a patch, in cells.

    Returns:
        tuple[int, int]: Rows and columns.

    Raises:
        ValueError: If the patches do not tile the feature map.
    """
    rows, cols = feature_size
    if rows % patch_size or cols % patch_size:
        msg = f"patch_size must divide the feature map of {rows} x {cols} cells, got {patch_size}."
        raise ValueError(msg)
    return rows // patch_size, cols // patch_size


def divide_image(image_size: tuple[int, int], side: int, meaning: str) -> tuple[int, int]:
    """Count the squares that tile an image.

    Args:
        image_size (tuple[int, int]): Height and width of the image, in pixels.
        side (int): Side of a square, in pixels.
        meaning (str): What the side is, for the error.

    Returns:
        tuple[int, int]: Rows and columns.

    Raises:
        ValueError: If the squares do not tile the image.
    """
    height, width = image_size
    if side < 1 or height % side or width % side or min(image_size) < side:
        msg = f"image_size must be a positive multiple of {meaning}, got {height} x {width} and {side}."
        raise ValueError(msg)
    return height // side, width // side
