# SPDX-License-Identifier: Apache-2.0

import torch
from torch import nn

from anomalib_recon.models.saae.autoencoder import DecoderLayer, EncoderLayer


def test_a_query_that_images_share_is_decoded_as_one_for_each() -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(d_model=12, nhead=3, dim_feedforward=24, dropout=0.0, batch_first=True)
    query, encoded = torch.rand(1, 6, 12), torch.rand(4, 6, 12)
    expected = layer(query.expand(4, -1, -1), encoded)
    torch.testing.assert_close(layer(query, encoded), expected)
    # without dropout, it is torch's layer
    plain = nn.TransformerDecoderLayer(12, 3, 24, dropout=0.0, batch_first=True)
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(expected, plain(query.expand(4, -1, -1), encoded))


def test_an_encoder_layer_is_that_of_torch() -> None:
    torch.manual_seed(0)
    arguments = {"d_model": 12, "nhead": 3, "dim_feedforward": 24, "dropout": 0.0, "batch_first": True}
    layer, plain = EncoderLayer(**arguments), nn.TransformerEncoderLayer(**arguments)
    plain.load_state_dict(layer.state_dict())
    tokens = torch.rand(4, 6, 12)
    torch.testing.assert_close(layer(tokens), plain(tokens))
