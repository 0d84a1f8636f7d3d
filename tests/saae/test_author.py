# SPDX-License-Identifier: Apache-2.0

"""What the author's public code has and the paper has not."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn import functional

from anomalib_recon.layers import create_dense_features
from anomalib_recon.models import SAAE
from anomalib_recon.models.saae import SAAEModel
from anomalib_recon.models.saae.author import HEAD_DIM, AuthorTransformer
from anomalib_recon.training import FeatureBatch
from tests.exports import expected_from, export, images_of, run

VIT = "vit_tiny_patch16_224"
SMALL = {"backbone": VIT, "pre_trained": False, "image_size": (64, 64), "latent_dim": 6}


def _as_in_torch(attention: nn.Module, theirs: nn.MultiheadAttention) -> None:
    weights = [layer.weight for layer in (attention.query, attention.key, attention.value)]
    theirs.in_proj_weight = nn.Parameter(torch.cat(weights).detach())
    nn.init.zeros_(theirs.in_proj_bias)
    theirs.out_proj = attention.projection


def test_layers_are_torchs_with_norm_first_gelu_and_no_bias() -> None:
    width, heads = 2 * HEAD_DIM, 2  # torch's heads are then as wide
    transformer = AuthorTransformer(width, (2, 3), patch_size=1, num_heads=heads, depth=1, mlp_dim=20).eval()
    arguments = {"d_model": width, "nhead": heads, "dim_feedforward": 20, "dropout": 0.0, "activation": "gelu"}
    encoder = nn.TransformerEncoderLayer(**arguments, batch_first=True, norm_first=True).eval()
    decoder = nn.TransformerDecoderLayer(**arguments, batch_first=True, norm_first=True).eval()
    for layer, theirs in ((transformer.encoder[0], encoder), (transformer.decoder[0], decoder)):
        _as_in_torch(layer.self_attention, theirs.self_attn)
        theirs.norm1, theirs.linear1, theirs.linear2 = layer.norm1, layer.feed_forward[1], layer.feed_forward[3]
    encoder.norm2 = transformer.encoder[0].feed_forward[0]
    _as_in_torch(transformer.decoder[0].attention, decoder.multihead_attn)
    decoder.norm2, decoder.norm3 = transformer.decoder[0].norm2, transformer.decoder[0].feed_forward[0]

    latent = torch.rand(2, width, 2, 3)
    tokens = transformer.patch_embedding(latent).flatten(2).mT + transformer.position_embedding
    query = (transformer.query + transformer.position_embedding).expand(2, -1, -1)
    decoded = decoder(query, decoder.norm2(encoder(tokens)))  # their layer does not norm the memory
    expected = transformer.projection(decoded.mT.unflatten(2, (2, 3)))
    torch.testing.assert_close(transformer(latent), expected)


def test_tokens_are_exactly_as_wide_as_the_latent_map() -> None:
    transformer = SAAEModel(**{**SMALL, "latent_dim": 10}, transformer="author").autoencoder.transformer
    assert transformer.position_embedding.shape == (1, 16, 10)
    assert transformer.encoder[0].self_attention.query.weight.shape == (3 * 64, 10)
    assert float(transformer.query.min()) >= 0


def test_images_are_not_normalised() -> None:
    torch.manual_seed(0)
    plain, normalised = (
        create_dense_features(VIT, None, (64, 64), pre_trained=False, normalize=flag) for flag in (False, True)
    )
    normalised.load_state_dict(plain.state_dict(), strict=False)
    images = torch.rand(2, 3, 64, 64)
    torch.testing.assert_close(normalised(images), plain((images - 0.5) / 0.5))


def test_dropout_is_active_in_training_alone() -> None:
    model = SAAEModel(**SMALL, backbone_dropout=0.5)
    images = torch.rand(1, 3, 64, 64)
    model.train()
    first, second = model.embed(images), model.embed(images)
    assert torch.equal(first[:, :192], second[:, :192])  # of the linear projection
    assert not torch.equal(first, second)
    model.eval()
    assert torch.equal(model.embed(images), model.embed(images))


def test_corners_of_the_map_are_aligned() -> None:
    model = SAAEModel(**SMALL, distance="mse", align_corners=True).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = model.embed(images)
        cells = (features - model.reconstruct(features)).square().mean(dim=1, keepdim=True)
        anomaly_map = model(images).anomaly_map
    torch.testing.assert_close(anomaly_map[..., ::63, ::63], cells[..., ::3, ::3])
    torch.testing.assert_close(
        anomaly_map, functional.interpolate(cells, (64, 64), mode="bilinear", align_corners=True)
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"transformer": "authors"}, "transformer must be True, False or 'author', got 'authors'"),
        ({"backbone_dropout": 1.0}, "backbone_dropout must be at least 0 and below 1, got 1.0"),
        ({"backbone": "resnet18", "backbone_dropout": 0.1}, "backbone_dropout=0.1 are for vision transformers"),
        ({"backbone": "resnet18", "normalize": False}, "normalize=False .* leave them at True and 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SAAEModel(**{**SMALL, **arguments})


class _Watch(Callback):
    def __init__(self) -> None:
        self.cached: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self.cached.append(isinstance(batch, FeatureBatch))


def train(stripes: Path, folder: Path, dropout: float) -> tuple[SAAE, list[bool]]:
    """Train as the author's code does; the results are the model of the checkpoint, and which batches were cached."""
    seed_everything(0)
    model = SAAE(
        VIT, pre_trained=False, image_size=64, explained_variance=0.95, mlp_ratio=2, transformer="author",
        normalize=False, backbone_dropout=dropout, align_corners=True, distance="mse", learning_rate=2e-3,
        visualizer=False, post_processor=PostProcessor(enable_normalization=False),
    )  # fmt: skip
    watch = _Watch()
    engine = Engine(
        default_root_dir=folder, max_epochs=2, accelerator="cpu", enable_progress_bar=False, callbacks=[watch]
    )
    engine.fit(model, datamodule=MVTecAD(root=stripes, category="stripes", train_batch_size=6, num_workers=0))
    return SAAE.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path).eval(), watch.cached


def test_features_are_cached_without_dropout(stripes: Path, tmp_path: Path) -> None:
    assert train(stripes, tmp_path, dropout=0)[1] == 4 * [True]


def test_it_trains_and_its_export_scores_alike(stripes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    model, cached = train(stripes, tmp_path, dropout=0.1)
    assert cached == 4 * [False]
    assert "Features are computed anew in each epoch: backbone_dropout=0.1 changes features." in caplog.messages
    images = images_of(stripes, (64, 64))
    expected = expected_from(model, images)
    result = run(export(model, tmp_path, ExportType.OPENVINO), images, 1)
    assert np.ptp(expected["pred_score"]) > 1e-3 * expected["pred_score"].mean()
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(result[name].reshape(expected[name].shape), expected[name], rtol=1e-4)
