# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn
from torch.nn import functional

from anomalib_recon.layers import attend, multihead_attention


def test_attention_is_that_of_torch() -> None:
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(12, num_heads=3, batch_first=True)
    query, key, value = torch.rand(3, 2, 7, 12)
    bias = torch.randn(1, 3, 7, 7)
    mask = bias.expand(2, -1, -1, -1).flatten(0, 1)
    expected, _ = layer(query, key, value, attn_mask=mask)
    torch.testing.assert_close(multihead_attention(layer, query, key, value, bias), expected)


def test_training_in_bfloat16_attends_in_single_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    plain, seen = functional.scaled_dot_product_attention, []

    def attention(query: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        seen.append(query.dtype)
        return plain(query, *args, **kwargs)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", attention)
    parts = list(torch.randn(3, 2, 2, 9, 4, dtype=torch.bfloat16))
    expected = plain(*(part.double() for part in parts))
    with torch.autocast("cpu", torch.bfloat16):
        trained = attend(*(part.clone().requires_grad_() for part in parts))
        scored = attend(*parts)
    assert seen == [torch.float32, torch.bfloat16]
    for mixed in (trained, scored):
        assert mixed.dtype == torch.bfloat16
        torch.testing.assert_close(mixed.double(), expected, atol=1e-2, rtol=1e-2)


def test_double_precision_is_kept() -> None:
    query = torch.rand(1, 1, 4, 2, dtype=torch.double, requires_grad=True)
    assert attend(query, query, query).dtype == torch.double
