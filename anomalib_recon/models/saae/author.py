# SPDX-License-Identifier: Apache-2.0

"""The transformer of SAAE as the author's public code has it, which differs from the paper.

Its layers are those of a vision transformer: norm before each part and GELU. Heads are 64 wide, whatever the width of
the tokens; queries, keys and values have no bias.

Example:
    >>> import torch
    >>> from anomalib_recon.models.saae.author import AuthorTransformer
    >>> transformer = AuthorTransformer(10, (4, 4), patch_size=1, num_heads=3, depth=1, mlp_dim=20)
    >>> transformer(torch.rand(1, 10, 4, 4)).shape
    torch.Size([1, 10, 4, 4])

See Also:
    https://github.com/YangYang-SHU/SAAE-DFR: the author's code.
"""

import math

import torch
from torch import Tensor, nn

from anomalib_recon.layers import attend, divide_feature_map

HEAD_DIM = 64


class Attention(nn.Module):
    """Attention whose heads are 64 wide.

    Args:
        embed_dim (int): Width E of the tokens.
        num_heads (int): Number of heads.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.key, self.value = (
            nn.Linear(embed_dim, num_heads * HEAD_DIM, bias=False) for _ in ("query", "key", "value")
        )
        self.projection = nn.Linear(num_heads * HEAD_DIM, embed_dim)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Let tokens of shape ``(B, N, E)`` attend to a memory of shape ``(B, M, E)``; the result is ``(B, N, E)``."""
        query, key, value = (
            layer(inputs).unflatten(2, (self.num_heads, HEAD_DIM)).transpose(1, 2)
            for layer, inputs in ((self.query, tokens), (self.key, memory), (self.value, memory))
        )
        attended = attend(query, key, value)  # (B, heads, N, 64)
        return self.projection(attended.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """An encoder layer; or, with attention to a memory, a decoder layer.

    Args:
        embed_dim (int): Width E of the tokens.
        num_heads (int): Heads of each attention.
        mlp_dim (int): Inner width of the feed-forward network.
        has_memory (bool): Whether there is attention to a memory.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, has_memory: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim)
        self.self_attention = Attention(embed_dim, num_heads)
        if has_memory:  # one norm for tokens and memory, as in the author's code
            self.norm2 = nn.LayerNorm(embed_dim)
            self.attention = Attention(embed_dim, num_heads)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(embed_dim), nn.Linear(embed_dim, mlp_dim), nn.GELU(), nn.Linear(mlp_dim, embed_dim)
        )

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        """Pass on tokens of shape ``(B, N, E)``."""
        normed = self.norm1(tokens)
        tokens = tokens + self.self_attention(normed, normed)
        if memory is not None:
            tokens = tokens + self.attention(self.norm2(tokens), self.norm2(memory))
        return tokens + self.feed_forward(tokens)


class AuthorTransformer(nn.Module):
    """Transformer encoder and decoder on the patches of a latent map.

    Args:
        latent_dim (int): Channels V of the latent map; also the width E of the tokens.
        grid_size (tuple[int, int]): Height H_0 and width W_0 of the latent map.
        patch_size (int): Side p of a patch, in cells; divides the grid.
        num_heads (int): Heads of each attention.
        depth (int): Number of encoder layers, and of decoder layers.
        mlp_dim (int): Inner width of the feed-forward networks.
    """

    def __init__(
        self, latent_dim: int, grid_size: tuple[int, int], patch_size: int, num_heads: int, depth: int, mlp_dim: int
    ) -> None:
        super().__init__()
        self.patch_grid = divide_feature_map(grid_size, patch_size)
        num_patches = math.prod(self.patch_grid)
        self.patch_embedding = nn.Conv2d(latent_dim, latent_dim, kernel_size=patch_size, stride=patch_size)
        self.position_embedding = nn.Parameter(torch.randn(1, num_patches, latent_dim))
        self.query = nn.Parameter(torch.rand(1, num_patches, latent_dim))
        self.encoder = nn.ModuleList(Layer(latent_dim, num_heads, mlp_dim, has_memory=False) for _ in range(depth))
        self.decoder = nn.ModuleList(Layer(latent_dim, num_heads, mlp_dim, has_memory=True) for _ in range(depth))
        self.projection = nn.ConvTranspose2d(latent_dim, latent_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, latent: Tensor) -> Tensor:
        """Rebuild a latent map of shape ``(B, V, H_0, W_0)`` from what a learned query finds in it."""
        encoded = self.patch_embedding(latent).flatten(2).transpose(1, 2) + self.position_embedding  # (B, N, V)
        for layer in self.encoder:
            encoded = layer(encoded)
        decoded = (self.query + self.position_embedding).expand_as(encoded)
        for layer in self.decoder:
            decoded = layer(decoded, encoded)
        return self.projection(decoded.transpose(1, 2).unflatten(2, self.patch_grid))
