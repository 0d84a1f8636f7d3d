# SPDX-License-Identifier: Apache-2.0

"""The layers of ADTR's transformer (appendix A).

Example:
    >>> import torch
    >>> from anomalib_recon.models.adtr.transformer import EncoderLayer
    >>> layer = EncoderLayer(32, num_heads=4, mlp_dim=64, dropout=0.1, attention="multihead")
    >>> layer(torch.rand(2, 16, 32), position=torch.rand(1, 16, 32)).shape
    torch.Size([2, 16, 32])
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers import multihead_attention


class ConcatProjection(nn.Module):
    """What replaces an attention layer in the paper's ablation: a concatenation followed by a projection (section 4.4).

    Args:
        embed_dim (int): Width of the tokens D.
    """

    def __init__(self, embed_dim: int) -> None:
        super().__init__()
        self.projection = nn.Linear(2 * embed_dim, embed_dim)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
        """Join each token with the one at its own place; all shapes are ``(B, T, D)``."""
        del key, bias
        return self.projection(torch.cat([query, value], dim=-1))


class MultiheadAttention(nn.MultiheadAttention):
    """Multi-head attention of the standard transformer, without its attention maps.

    Args:
        embed_dim (int): Width of the tokens D.
        num_heads (int): Number of heads; divides D.
    """

    def __init__(self, embed_dim: int, num_heads: int) -> None:
        super().__init__(embed_dim, num_heads, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Let each query attend to the keys; see :func:`~anomalib_recon.layers.multihead_attention`."""
        return multihead_attention(self, query, key, value, bias)


class LoneAttention(MultiheadAttention):
    """Attention of tokens that see only themselves: the linear maps of values and output are left."""

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """Map each token; all shapes are ``(B, T, D)``."""
        del query, key, bias
        weight, offset = self.in_proj_weight.chunk(3)[2], self.in_proj_bias.chunk(3)[2]
        return self.out_proj(functional.linear(value, weight, offset))


def _attention(kind: str, embed_dim: int, num_heads: int) -> nn.Module:
    if kind == "concat":
        return ConcatProjection(embed_dim)
    return (LoneAttention if kind == "alone" else MultiheadAttention)(embed_dim, num_heads)


def _feed_forward(embed_dim: int, mlp_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(embed_dim, mlp_dim), nn.ReLU(), nn.Linear(mlp_dim, embed_dim))


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward network, each with a shortcut and layer normalisation (appendix A).

    Args:
        embed_dim (int): Width of the tokens D.
        num_heads (int): Number of heads.
        mlp_dim (int): Hidden width of the feed-forward network.
        dropout (float): Fraction of each part's output that is dropped in training.
        attention (str): ``"multihead"``, ``"concat"``, or ``"alone"`` for tokens that do not see each other.
    """

    def __init__(self, embed_dim: int, num_heads: int, mlp_dim: int, dropout: float, attention: str) -> None:
        super().__init__()
        self.self_attention = _attention(attention, embed_dim, num_heads)
        self.feed_forward = _feed_forward(embed_dim, mlp_dim)
        self.norm1, self.norm2 = nn.LayerNorm(embed_dim), nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, position: Tensor) -> Tensor:
        """Encode tokens.

        Args:
            tokens (Tensor): Tokens of shape ``(B, T, D)``.
            position (Tensor): Position embedding of shape ``(1, T, D)``.

        Returns:
            Tensor: Tokens of shape ``(B, T, D)``.
        """
        located = tokens + position
        tokens = self.norm1(tokens + self.dropout(self.self_attention(located, located, tokens)))
        return self.norm2(tokens + self.dropout(self.feed_forward(tokens)))


class DecoderLayer(nn.Module):
    """Self-attention, attention to the encoder, and feed-forward network (appendix A).

    Args:
        embed_dim (int): Width of the tokens D.
        num_heads (int): Number of heads.
        mlp_dim (int): Hidden width of the feed-forward network.
        dropout (float): Fraction of each part's output that is dropped in training.
        self_attention (str): ``"multihead"``, ``"concat"``, or ``"alone"`` for tokens that do not see each other.
        cross_attention (str): ``"multihead"`` or ``"concat"``.
    """

    def __init__(
        self, embed_dim: int, num_heads: int, mlp_dim: int, dropout: float, self_attention: str, cross_attention: str
    ) -> None:
        super().__init__()
        self.self_attention = _attention(self_attention, embed_dim, num_heads)
        self.cross_attention = _attention(cross_attention, embed_dim, num_heads)
        self.feed_forward = _feed_forward(embed_dim, mlp_dim)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(embed_dim) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, encoded: Tensor, position: Tensor, bias: Tensor | None = None) -> Tensor:
        """Decode a query.

        Args:
            query (Tensor): Query embedding of shape ``(1, T, D)``, or the output of the layer before, ``(B, T, D)``.
            encoded (Tensor): Output of the encoder, of shape ``(B, T, D)``.
            position (Tensor): Position embedding of shape ``(1, T, D)``.
            bias (Tensor | None): Added to the logits of the attention to the encoder; see
                :func:`~anomalib_recon.layers.multihead_attention`.
                Defaults to ``None``.

        Returns:
            Tensor: Tokens of shape ``(B, T, D)``.
        """
        located = query + position
        attended = self.self_attention(located, located, query).expand_as(encoded)
        query = self.norm1(query + self.dropout(attended))
        attended = self.cross_attention(query + position, encoded + position, encoded, bias)
        query = self.norm2(query + self.dropout(attended))
        return self.norm3(query + self.dropout(self.feed_forward(query)))
