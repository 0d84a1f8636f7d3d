# SPDX-License-Identifier: Apache-2.0

"""The self-attention autoencoder: a transformer in the latent space of a convolutional autoencoder (section 3.2).

Example:
    >>> import torch
    >>> from anomalib_recon.models.saae.autoencoder import SelfAttentionAutoencoder
    >>> autoencoder = SelfAttentionAutoencoder(num_channels=3840, latent_dim=200, grid_size=(24, 24)).eval()
    >>> autoencoder(torch.rand(1, 3840, 24, 24)).shape
    torch.Size([1, 3840, 24, 24])
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from anomalib_recon.layers import divide_feature_map, multihead_attention

from .author import AuthorTransformer


def _unit(in_channels: int, out_channels: int) -> nn.Sequential:
    """One row of table 1: a convolution with 1 x 1 kernel, batch normalisation and ReLU."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, kernel_size=1), nn.BatchNorm2d(out_channels), nn.ReLU())


class EncoderLayer(nn.TransformerEncoderLayer):
    """torch's encoder layer without dropout."""

    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        """Encode tokens of shape ``(B, N, E)``."""
        tokens = self.norm1(tokens + multihead_attention(self.self_attn, tokens, tokens, tokens))
        return self.norm2(tokens + self.linear2(self.activation(self.linear1(tokens))))


class DecoderLayer(nn.TransformerDecoderLayer):
    """torch's decoder layer without dropout, which takes one query for all images and attends to it once."""

    def forward(self, query: Tensor, encoded: Tensor) -> Tensor:  # type: ignore[override]
        """Decode a query of shape ``(1, N, E)`` or ``(B, N, E)`` with the encoder's ``(B, N, E)``, to ``(B, N, E)``."""
        query = self.norm1(query + multihead_attention(self.self_attn, query, query, query)).expand_as(encoded)
        query = self.norm2(query + multihead_attention(self.multihead_attn, query, encoded, encoded))
        return self.norm3(query + self.linear2(self.activation(self.linear1(query))))


class LatentTransformer(nn.Module):
    """Transformer encoder and decoder on the patches of a latent map (figure 2).

    Args:
        latent_dim (int): Channels V of the latent map.
        grid_size (tuple[int, int]): Height H_0 and width W_0 of the latent map.
        patch_size (int): Side p of a patch, in cells; divides the grid.
        num_heads (int): Heads of each attention.
        depth (int): Number of encoder layers, and of decoder layers.
        mlp_dim (int): Inner width L of the feed-forward networks.
    """

    def __init__(
        self, latent_dim: int, grid_size: tuple[int, int], patch_size: int, num_heads: int, depth: int, mlp_dim: int
    ) -> None:
        super().__init__()
        # E: the paper's feed-forward networks have V inputs, which the heads may not divide
        embed_dim = math.ceil(latent_dim / num_heads) * num_heads
        self.patch_grid = divide_feature_map(grid_size, patch_size)
        # a stride of the kernel's size makes it the linear projection of the flattened patches
        self.patch_embedding = nn.Conv2d(latent_dim, embed_dim, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.empty(1, math.prod(self.patch_grid), embed_dim))
        self.query = nn.Parameter(torch.empty(1, math.prod(self.patch_grid), embed_dim))
        layer: dict[str, Any] = {
            "d_model": embed_dim,
            "nhead": num_heads,
            "dim_feedforward": mlp_dim,
            "dropout": 0.0,
            "batch_first": True,
        }
        self.encoder = nn.ModuleList(EncoderLayer(**layer) for _ in range(depth))
        self.decoder = nn.ModuleList(DecoderLayer(**layer) for _ in range(depth))
        self.projection = nn.ConvTranspose2d(embed_dim, latent_dim, kernel_size=patch_size, stride=patch_size)
        for embedding in (self.position_embedding, self.query):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, latent: Tensor) -> Tensor:
        """Rebuild a latent map from what a learned query finds in it.

        Args:
            latent (Tensor): Latent map g of shape ``(B, V, H_0, W_0)``.

        Returns:
            Tensor: Latent map of the same shape.
        """
        encoded = self.patch_embedding(latent).flatten(2).transpose(1, 2) + self.position_embedding  # (B, N, E)
        for layer in self.encoder:
            encoded = layer(encoded)
        decoded = self.query + self.position_embedding
        for layer in self.decoder:
            decoded = layer(decoded, encoded)
        return self.projection(decoded.transpose(1, 2).unflatten(2, self.patch_grid))


class SelfAttentionAutoencoder(nn.Module):
    """Compress each cell of a feature map, let all cells exchange what they know, and rebuild the map.

    Args:
        num_channels (int): Channels U of the feature map.
        latent_dim (int): Channels V of the latent map.
        grid_size (tuple[int, int]): Height H_0 and width W_0 of both maps.
        patch_size (int): Side p of the transformer's patches, in cells.
            Defaults to ``1``.
        num_heads (int): Heads of each attention.
            Defaults to ``3``.
        depth (int): Number of encoder layers, and of decoder layers.
            Defaults to ``1``.
        mlp_ratio (int): Inner width of the feed-forward networks over V.
            Defaults to ``1``.
        transformer (bool | Literal["author"]): Have a transformer between the convolutions, the paper's or the one of
            the author's code; without it this is the convolutional autoencoder of the ablation.
            Defaults to ``True``.
    """

    def __init__(
        self,
        num_channels: int,
        latent_dim: int,
        grid_size: tuple[int, int],
        patch_size: int = 1,
        num_heads: int = 3,
        depth: int = 1,
        mlp_ratio: int = 1,
        transformer: bool | Literal["author"] = True,
    ) -> None:
        super().__init__()
        self.latent_dim = latent_dim
        hidden_dim = (num_channels + 2 * latent_dim) // 2
        self.conv_encoder = nn.Sequential(
            _unit(num_channels, hidden_dim),
            _unit(hidden_dim, 2 * latent_dim),
            nn.Conv2d(2 * latent_dim, latent_dim, kernel_size=1),
        )
        self.transformer: nn.Module = nn.Identity()
        if transformer:
            kind = AuthorTransformer if transformer == "author" else LatentTransformer
            self.transformer = kind(latent_dim, grid_size, patch_size, num_heads, depth, mlp_ratio * latent_dim)
        self.conv_decoder = nn.Sequential(
            _unit(latent_dim, 2 * latent_dim),
            _unit(2 * latent_dim, hidden_dim),
            nn.Conv2d(hidden_dim, num_channels, kernel_size=1),
        )

    def forward(self, features: Tensor) -> Tensor:
        """Reconstruct feature maps of shape ``(B, U, H_0, W_0)``; the result has the same shape."""
        return self.conv_decoder(self.transformer(self.conv_encoder(features)))
