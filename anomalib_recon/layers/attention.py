# SPDX-License-Identifier: Apache-2.0

"""Multi-head attention of the standard transformer, fast in training on a CPU.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from anomalib_recon.layers import multihead_attention
    >>> tokens = torch.rand(2, 64, 32)
    >>> multihead_attention(nn.MultiheadAttention(32, num_heads=4, batch_first=True), tokens, tokens, tokens).shape
    torch.Size([2, 64, 32])
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


def attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Scaled dot-product attention; in training on a CPU in single precision.

    In bfloat16, the backward pass of torch's attention takes two to ten times as long there.

    Args:
        query (Tensor): Queries of shape ``(B, heads, T, d)``.
        key (Tensor): Keys of the same shape, with any number of tokens.
        value (Tensor): Values, one for each key.
        bias (Tensor | None): What is added to the logits, of a shape that expands to ``(B, heads, T, keys)``.
            Defaults to ``None``.

    Returns:
        Tensor: Mixed values of shape ``(B, heads, T, d)``, in the type of the query.
    """
    if not (query.requires_grad and query.device.type == "cpu"):
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    kept = torch.promote_types(query.dtype, torch.float32)
    with torch.autocast("cpu", enabled=False):
        mixed = functional.scaled_dot_product_attention(query.to(kept), key.to(kept), value.to(kept), attn_mask=bias)
    return mixed.to(query.dtype)


def multihead_attention(
    layer: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute torch's multi-head attention without attention maps and dropout, in less time.

    Args:
        layer (nn.MultiheadAttention): Weights, for queries, keys and values of one width D.
        query (Tensor): Tokens that attend, of shape ``(B, T, D)``.
        key (Tensor): Tokens that they are compared with, of the same shape.
        value (Tensor): Tokens that are mixed, of the same shape.
        bias (Tensor | None): What is added to the logits of each head, of shape ``(1, heads, T, T)``.
            Defaults to ``None``.

    Returns:
        Tensor: Tokens of shape ``(B, T, D)``.
    """
    # PyTorch's forward puts the tokens before the batch, which takes copies of all three and of the result
    parts = zip((query, key, value), layer.in_proj_weight.chunk(3), layer.in_proj_bias.chunk(3), strict=True)
    query, key, value = (
        functional.linear(*part).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in parts
    )
    mixed = attend(query, key, value, bias)  # (B, heads, T, D / heads)
    return layer.out_proj(mixed.transpose(1, 2).flatten(2))
