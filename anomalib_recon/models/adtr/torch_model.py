# SPDX-License-Identifier: Apache-2.0

"""ADTR, the network: embedding, reconstruction and comparison, as in section 3.1 of the paper.

Example:
    >>> import torch
    >>> from anomalib_recon.models.adtr.torch_model import ADTRModel
    >>> model = ADTRModel(backbone="resnet18", pre_trained=False, image_size=(64, 64)).eval()
    >>> features = model.embed(torch.rand(1, 3, 64, 64))
    >>> model.reconstruct(features).shape
    torch.Size([1, 1024, 4, 4])

Paper:
    ADTR: Anomaly Detection Transformer with Feature Reconstruction, https://arxiv.org/abs/2209.01816
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

from anomalib_recon.layers import (
    AntialiasResize,
    FeatureScale,
    FrozenBackbone,
    ResidualDistance,
    ScaleBy,
    Tiling,
    check_choice,
    check_dropout,
    check_image_size,
    check_whole,
    divide_feature_map,
    stage_strides,
)

from .ablation import PIXEL_STRIDE, Pixels, ResidualCNN
from .anomaly_map import AnomalyMapGenerator, Distance
from .transformer import DecoderLayer, EncoderLayer

DEFAULT_STRIDE = 16
# the backbone that is none
PIXELS = "pixels"
# by how much a logit falls with each token of distance from where its head looks
SLOPE = 2.0


class ADTRModel(Tiling, nn.Module):
    """A frozen backbone's features, and the transformer that rebuilds them from a learned query.

    Args:
        backbone (str): CNN of timm, with or without the tag of its weights, or ``"pixels"`` for the pixels of each
            cell as its features (table 4b).
            Defaults to ``"tf_efficientnet_b4.aa_in1k"``.
        layers (Sequence[str] | None): Stages, by their names in timm, or any modules, whose features are concatenated.
            ``None`` stands for all stages.
            Defaults to ``None``.
        pre_trained (bool): Use timm's weights of the backbone.
            Defaults to ``True``.
        backbone_weights (str | Path | None): File with weights of the backbone, to use instead.
            Defaults to ``None``.
        image_size (tuple[int, int]): Height and width of the images in pixels.
            Defaults to ``(256, 256)``.
        feature_size (int | tuple[int, int] | None): Height h and width w of the feature map: those of one of the
            backbone's stages. ``None`` stands for the stage with stride 16.
            Defaults to ``None``.
        embed_dim (int): Width of the tokens D.
            Defaults to ``256``.
        depth (int): Number of encoder layers, and of decoder layers.
            Defaults to ``4``.
        num_heads (int): Number of heads of each attention.
            Defaults to ``8``.
        mlp_dim (int): Hidden width of the feed-forward networks.
            Defaults to ``1024``.
        dropout (float): Fraction of the output of each attention and feed-forward network that is dropped in training.
            Defaults to ``0.1``.
        query (Literal["learned", "encoder"]): Decode a learned query embedding, or the encoder embedding (the paper's
            ablation "w/o Query").
            Defaults to ``"learned"``.
        attention (Literal["multihead", "concat"]): Multi-head attention, or concatenation and projection (the paper's
            ablation "w/o Attn").
            Defaults to ``"multihead"``.
        reconstruction (Literal["transformer", "cnn"]): Rebuild features with the transformer, or with residual blocks
            (the paper's baseline "CNN"), which know neither query nor attention.
            Defaults to ``"transformer"``.
        patch_size (int): Side of a token, in cells of the feature map; divides h and w.
            Defaults to ``1``.
        hole_size (int): Side of the square of tokens around its own that a query does not see, odd, so that it must
            rebuild its features from those around; self-attentions then see each token alone, and the attention to the
            encoder prefers near tokens. 0 stands for none, as in the paper.
            Defaults to ``0``.
        pool_size (int): Side of the window, in pixels, over which the map is averaged for the image's score.
            Defaults to ``16``.
        top_fraction (float): Share of the averaged map, from the highest value down, whose mean is the image's score;
            at 0 the score is the maximum.
            Defaults to ``0.0``.
        feature_scale (ScaleBy): Bring features to one scale: that of each stage or channel, or of all principal
            components.
            Defaults to ``"none"``.
        distance (Distance): Length of a difference of features: its L2 norm (eq. 3), or in units of the residuals of
            normal images at that place, which are taken when training ends.
            Defaults to ``"norm"``.

    Raises:
        ValueError: If an argument is out of its range or does not fit another.
        FileNotFoundError: If ``backbone_weights`` is not a file.
        ConnectionError: If the backbone's weights can be had neither from the local cache nor from the network.
    """

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b4.aa_in1k",
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        backbone_weights: str | Path | None = None,
        image_size: tuple[int, int] = (256, 256),
        feature_size: int | tuple[int, int] | None = None,
        embed_dim: int = 256,
        depth: int = 4,
        num_heads: int = 8,
        mlp_dim: int = 1024,
        dropout: float = 0.1,
        query: Literal["learned", "encoder"] = "learned",
        attention: Literal["multihead", "concat"] = "multihead",
        reconstruction: Literal["transformer", "cnn"] = "transformer",
        patch_size: int = 1,
        hole_size: int = 0,
        pool_size: int = 16,
        top_fraction: float = 0.0,
        feature_scale: ScaleBy = "none",
        distance: Distance = "norm",
    ) -> None:
        super().__init__()
        check_choice(("norm", "mahalanobis"), distance=distance)
        check_whole(
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_dim=mlp_dim,
            pool_size=pool_size,
            patch_size=patch_size,
        )
        _check_arguments(image_size, embed_dim, num_heads, dropout, query, attention, pool_size)
        self.image_size = image_size
        self.feature_size = find_feature_size(backbone, image_size, feature_size)
        self.patch_grid = divide_feature_map(self.feature_size, patch_size)
        self.num_tokens = math.prod(self.patch_grid)
        _check_hole(hole_size, self.patch_grid, query, attention)
        _check_reconstruction(reconstruction, query, attention, hole_size)
        self.backbone = _build_backbone(backbone, layers, pre_trained, backbone_weights)
        self.resize = AntialiasResize(self.feature_size)
        self.scale = FeatureScale(self.backbone.num_channels, feature_scale)
        num_channels = sum(self.backbone.num_channels)
        # with a hole, each token sees itself alone: through the others, what is in the hole would reach the query
        self_attention = "alone" if hole_size else attention

        self.reduce = nn.Conv2d(num_channels, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.cnn = ResidualCNN(embed_dim, depth) if reconstruction == "cnn" else None
        if self.cnn is None:
            self.position_embedding = nn.Parameter(torch.empty(1, self.num_tokens, embed_dim))
            self.encoder = nn.ModuleList(
                EncoderLayer(embed_dim, num_heads, mlp_dim, dropout, self_attention) for _ in range(depth)
            )
            self.query = nn.Parameter(torch.empty(1, self.num_tokens, embed_dim)) if query == "learned" else None
            self.decoder = nn.ModuleList(
                DecoderLayer(embed_dim, num_heads, mlp_dim, dropout, self_attention, attention) for _ in range(depth)
            )
        self.recover = nn.Conv2d(embed_dim, num_channels * patch_size**2, kernel_size=1)
        self.shuffle = nn.PixelShuffle(patch_size)
        hole_bias = _hole_bias(self.patch_grid, hole_size, num_heads) if hole_size else None
        self.register_buffer("hole_bias", hole_bias, persistent=False)
        self.anomaly_map_generator = AnomalyMapGenerator(
            image_size,
            pool_size,
            top_fraction,
            ResidualDistance(num_channels, self.feature_size) if distance == "mahalanobis" else None,
        )
        if self.cnn is None:
            self._initialize()

    def _initialize(self) -> None:
        """Draw the weights of the transformer as the standard one does, the embeddings as ViT does."""
        for layers in (self.encoder, self.decoder):
            for parameter in layers.parameters():
                if parameter.dim() > 1:
                    nn.init.xavier_uniform_(parameter)
        for embedding in (self.position_embedding, self.query):
            if embedding is not None:
                nn.init.normal_(embedding, std=0.02)

    def embed(self, images: Tensor) -> Tensor:
        """Compute features ("Embedding"), and scale them.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Features f of shape ``(B, C, h, w)``, without gradient.
        """
        return self.scale(self.extract(images))

    def extract(self, images: Tensor) -> Tensor:
        """Resize the backbone's feature maps to one size and concatenate them.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Features of shape ``(B, C, h, w)``, without gradient.

        Raises:
            ValueError: If the images are not of the size that the network was built for.
        """
        check_image_size(images, self.image_size)
        maps = self.backbone(images)
        with torch.autocast(images.device.type, enabled=False):
            return torch.cat([self.resize(features.float()) for features in maps], dim=1)

    def reconstruct(self, features: Tensor) -> Tensor:
        """Rebuild features with the transformer, or with the CNN ("Reconstruction").

        Args:
            features (Tensor): Features f of shape ``(B, C, h, w)``.

        Returns:
            Tensor: Reconstruction of the same shape.
        """
        reduced = self.reduce(features)
        rebuilt = self._transform(reduced) if self.cnn is None else self.cnn(reduced)
        return self.shuffle(self.recover(rebuilt))

    def _transform(self, reduced: Tensor) -> Tensor:
        """Pass a feature map of shape ``(B, D, rows, columns)`` through encoder and decoder; the shape stays."""
        tokens = reduced.flatten(2).transpose(1, 2)  # (B, T, D)
        for layer in self.encoder:
            tokens = layer(tokens, self.position_embedding)
        rebuilt = tokens if self.query is None else self.query
        for layer in self.decoder:
            rebuilt = layer(rebuilt, tokens, self.position_embedding, self.hole_bias)
        return rebuilt.transpose(1, 2).unflatten(2, self.patch_grid)

    def compare(self, features: Tensor, reconstruction: Tensor) -> InferenceBatch:
        """Compare features with their reconstruction ("Inference").

        Args:
            features (Tensor): Features f of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their reconstruction, of the same shape.

        Returns:
            InferenceBatch: ``pred_score`` of shape ``(B,)`` and ``anomaly_map`` of shape ``(B, 1, H, W)``, both not
                negative and without an upper limit.
        """
        anomaly_map = self.anomaly_map_generator(features, reconstruction)
        return InferenceBatch(pred_score=self.anomaly_map_generator.score(anomaly_map), anomaly_map=anomaly_map)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images of shape ``(B, 3, H, W)`` with values in [0, 1]; see :meth:`compare`."""
        features = self.embed(self.tile(images))
        return self.untile(self.compare(features, self.reconstruct(features)))


def _build_backbone(
    backbone: str, layers: Sequence[str] | None, pre_trained: bool, weights: str | Path | None
) -> FrozenBackbone | Pixels:
    if backbone != PIXELS:
        return FrozenBackbone(backbone, layers, pre_trained, weights)
    if layers is not None or weights is not None:
        msg = f"backbone='pixels' has neither layers nor weights, got layers={layers} and backbone_weights={weights}."
        raise ValueError(msg)
    return Pixels()


def _check_reconstruction(reconstruction: str, query: str, attention: str, hole_size: int) -> None:
    check_choice(("transformer", "cnn"), reconstruction=reconstruction)
    if reconstruction == "cnn" and (query, attention, hole_size) != ("learned", "multihead", 0):
        msg = (
            f"query={query!r}, attention={attention!r} and hole_size={hole_size} are of the transformer; leave them "
            "out with reconstruction='cnn'."
        )
        raise ValueError(msg)


def _check_hole(hole_size: int, grid_size: tuple[int, int], query: str, attention: str) -> None:
    is_whole = isinstance(hole_size, int) and not isinstance(hole_size, bool)
    if not is_whole or hole_size < 0 or (hole_size > 0 and hole_size % 2 == 0):
        msg = f"hole_size must be an odd number of tokens, or 0 for no hole, got {hole_size}."
        raise ValueError(msg)
    if hole_size and (query, attention) != ("learned", "multihead"):
        msg = (
            f"hole_size={hole_size} needs query='learned' and attention='multihead', got {query!r} and "
            f"{attention!r}, by which a token sees itself."
        )
        raise ValueError(msg)
    if hole_size >= max(grid_size):
        msg = f"hole_size must leave tokens to see of {grid_size[0]} x {grid_size[1]}, got {hole_size}."
        raise ValueError(msg)


def _hole_bias(grid_size: tuple[int, int], hole_size: int, num_heads: int) -> Tensor:
    """What keeps a query from what it rebuilds.

    Nothing inside of the hole is seen. Outside, each head looks first to a side of its own: its logits fall by
    ``SLOPE`` for each token of distance from the place just outside of the hole in that direction. A distance lowers
    the logits as in ALiBi (Press et al., 2022), which has slopes in place of directions.

    Returns:
        Tensor: Bias of the attention to the encoder, ``(1, heads, T, T)``.
    """
    places = torch.cartesian_prod(*(torch.arange(side) for side in grid_size))  # (T, 2)
    offsets = places - places[:, None]  # from query to key, (T, T, 2)
    reach = hole_size // 2
    angles = 2 * torch.pi * torch.arange(num_heads) / num_heads
    directions = (reach + 1) * torch.stack([angles.sin(), angles.cos()], dim=-1)  # (heads, 2)
    near = -SLOPE * (offsets - directions[:, None, None]).norm(dim=-1)  # (heads, T, T)
    is_hole = offsets.abs().amax(dim=-1) <= reach
    return near.masked_fill(is_hole, -torch.inf)[None]


def find_feature_size(
    backbone: str, image_size: tuple[int, int], feature_size: int | tuple[int, int] | None
) -> tuple[int, int]:
    """Find the size of the feature map, which is that of one of the backbone's stages.

    Args:
        backbone (str): CNN of timm, or ``"pixels"``.
        image_size (tuple[int, int]): Height and width of the images in pixels.
        feature_size (int | tuple[int, int] | None): Size as given by the user.

    Returns:
        tuple[int, int]: Height and width.

    Raises:
        ValueError: If no stage has the size, or images cannot be cut into cells of pixels.
    """
    height, width = image_size
    strides = [PIXEL_STRIDE] if backbone == PIXELS else stage_strides(backbone).values()
    if backbone == PIXELS and (height % PIXEL_STRIDE or width % PIXEL_STRIDE):
        msg = f"image_size must be multiples of {PIXEL_STRIDE} with backbone='pixels', got {image_size}."
        raise ValueError(msg)
    sizes = {stride: (math.ceil(height / stride), math.ceil(width / stride)) for stride in strides}
    if feature_size is None and DEFAULT_STRIDE in sizes:
        return sizes[DEFAULT_STRIDE]
    size = tuple(feature_size) if isinstance(feature_size, Sequence) else (feature_size, feature_size)
    if size not in sizes.values():
        listed = ", ".join(f"{rows} x {columns}" for rows, columns in sizes.values())
        msg = (
            f"feature_size must be one of {listed}, the sizes of the stages of backbone={backbone!r} for image_size="
            f"{image_size}, got {feature_size}."
        )
        raise ValueError(msg)
    return cast("tuple[int, int]", size)


def _check_arguments(
    image_size: tuple[int, int],
    embed_dim: int,
    num_heads: int,
    dropout: float,
    query: str,
    attention: str,
    pool_size: int,
) -> None:
    check_dropout(dropout=dropout)
    if embed_dim % num_heads:
        msg = f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}."
        raise ValueError(msg)
    check_choice(("learned", "encoder"), query=query)
    check_choice(("multihead", "concat"), attention=attention)
    if pool_size > min(image_size):
        msg = f"pool_size must not exceed image_size, got {pool_size} and {image_size}."
        raise ValueError(msg)
