# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn

from anomalib_recon.layers import attend, multihead_attention


@pytest.mark.parametrize("has_bias", [False, True])
def test_attention_is_that_of_torch(has_bias: bool) -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, num_heads=3, batch_first=True)
    query, key, value = torch.rand(3, 2, 7, 12)
    bias = torch.randn(1, 3, 7, 7) if has_bias else None
    mask = None if bias is None else bias.expand(2, -1, -1, -1).flatten(0, 1)
    expected, _ = layer(query, key, value, attn_mask=mask)
    torch.testing.assert_close(multihead_attention(layer, query, key, value, bias), expected)


def test_training_in_bfloat16_rounds_no_more_than_its_inputs() -> None:
    torch.manual_seed(0)
    parts = torch.randn(3, 2, 2, 9, 4, dtype=torch.bfloat16)
    exact = [part.double().requires_grad_() for part in parts]
    rounded = [part.clone().requires_grad_() for part in parts]
    with torch.autocast("cpu", torch.bfloat16):
        mixed = attend(*rounded)
    assert mixed.dtype == torch.bfloat16
    expected = attend(*exact)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (mixed.double() * weights.bfloat16().double()).sum().backward()
    torch.testing.assert_close(mixed.double(), expected, atol=1e-2, rtol=1e-2)
    for part, other in zip(rounded, exact, strict=True):
        torch.testing.assert_close(part.grad.double(), other.grad, atol=2e-2, rtol=2e-2)


def test_double_precision_is_kept() -> None:
    query = torch.rand(1, 1, 4, 2, dtype=torch.double, requires_grad=True)
    assert attend(query, query, query).dtype == torch.double
