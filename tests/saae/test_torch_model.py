# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from torch import nn
from torch.nn import functional

from anomalib_recon.models.saae import SAAEModel
from anomalib_recon.models.saae.anomaly_map import Distance, feature_distance
from anomalib_recon.models.saae.autoencoder import LatentTransformer, SelfAttentionAutoencoder
from anomalib_recon.models.saae.loss import IMAGES_PER_PART, SAAELoss

SMALL = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": (64, 64)}


def convolutions(module: nn.Module) -> list[nn.Conv2d]:
    return [part for part in module.modules() if isinstance(part, nn.Conv2d)]


@pytest.mark.parametrize(("num_channels", "latent_dim"), [(3840, 215), (61, 10)])
def test_convolutions_are_those_of_table_1(num_channels: int, latent_dim: int) -> None:
    autoencoder = SelfAttentionAutoencoder(num_channels, latent_dim, grid_size=(4, 4))
    encoder, decoder = (convolutions(part) for part in (autoencoder.conv_encoder, autoencoder.conv_decoder))
    hidden = (num_channels + 2 * latent_dim) // 2
    channels = [conv.out_channels for conv in [*encoder, *decoder]]
    assert channels == [hidden, 2 * latent_dim, latent_dim, 2 * latent_dim, hidden, num_channels]
    assert {conv.kernel_size for conv in [*encoder, *decoder]} == {(1, 1)}
    kinds = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    for part in (autoencoder.conv_encoder, autoencoder.conv_decoder):
        assert [type(module) for module in part.modules() if not isinstance(module, nn.Sequential)] == kinds


@pytest.mark.parametrize(("latent_dim", "embed_dim"), [(9, 9), (10, 12), (1, 3)])
@pytest.mark.parametrize("mlp_ratio", [1, 2])
def test_widths_of_the_transformer(latent_dim: int, embed_dim: int, mlp_ratio: int) -> None:
    autoencoder = SelfAttentionAutoencoder(30, latent_dim, (4, 6), patch_size=2, mlp_ratio=mlp_ratio)
    transformer = autoencoder.transformer
    assert transformer.position_embedding.shape == (1, 6, embed_dim)
    for layer in (*transformer.encoder, *transformer.decoder):
        assert layer.linear1.weight.shape == (mlp_ratio * latent_dim, embed_dim)
        assert layer.self_attn.num_heads == 3
    assert len(transformer.encoder) == len(transformer.decoder) == 1
    assert autoencoder(torch.rand(2, 30, 4, 6)).shape == (2, 30, 4, 6)


def test_patches_of_one_cell_are_plain_tokens() -> None:
    transformer = LatentTransformer(6, (3, 4), patch_size=1, num_heads=3, depth=1, mlp_dim=6).eval()
    latent = torch.rand(2, 6, 3, 4)
    tokens = latent.flatten(2).transpose(1, 2)
    embedding, projection = transformer.patch_embedding, transformer.projection
    encoded = functional.linear(tokens, embedding.weight[:, :, 0, 0], embedding.bias) + transformer.position_embedding
    decoded = (transformer.query + transformer.position_embedding).expand(2, -1, -1)
    decoded = transformer.decoder[0](decoded, transformer.encoder[0](encoded))
    expected = functional.linear(decoded, projection.weight[:, :, 0, 0].T, projection.bias)
    torch.testing.assert_close(transformer(latent), expected.transpose(1, 2).unflatten(2, (3, 4)))


def test_patches_are_put_back_where_they_were() -> None:
    transformer = LatentTransformer(3, (4, 6), patch_size=2, num_heads=1, depth=1, mlp_dim=6)
    transformer.projection.weight = nn.Parameter(transformer.patch_embedding.weight.detach().clone())
    patches = torch.rand(1, 3, 2, 2, 2, 3)  # channels, rows and columns in a patch, rows and columns of patches
    latent = patches.permute(0, 1, 4, 2, 5, 3).reshape(1, 3, 4, 6)
    embedded = transformer.patch_embedding(latent)
    weight = transformer.patch_embedding.weight.flatten(1)  # (E, V * p * p)
    tokens = torch.einsum("ec,bcn->ben", weight, patches.reshape(1, 12, 6)) + transformer.patch_embedding.bias[:, None]
    torch.testing.assert_close(embedded.flatten(2), tokens)
    rebuilt = torch.einsum("ec,ben->bcn", weight, tokens).reshape(1, 3, 2, 2, 2, 3).permute(0, 1, 4, 2, 5, 3)
    expected = rebuilt.reshape(1, 3, 4, 6) + transformer.projection.bias[:, None, None]
    torch.testing.assert_close(transformer.projection(embedded), expected)


def test_decoder_has_the_positions_of_the_encoder() -> None:
    transformer = LatentTransformer(6, (2, 2), patch_size=1, num_heads=3, depth=1, mlp_dim=6).eval()
    seen = {}
    transformer.encoder[0].register_forward_pre_hook(lambda _, args: seen.update(encoder=args[0]))
    transformer.decoder[0].register_forward_pre_hook(lambda _, args: seen.update(decoder=args[0]))
    latent = torch.rand(1, 6, 2, 2)
    transformer(latent)
    before = dict(seen)
    step = torch.rand_like(transformer.position_embedding)
    with torch.no_grad():
        transformer.position_embedding += step
    transformer(latent)
    for part in ("encoder", "decoder"):
        torch.testing.assert_close(seen[part] - before[part], step)


def test_every_cell_reaches_every_other_only_through_the_transformer() -> None:
    features, changed = torch.rand(2, 1, 20, 4, 4)
    changed[:, :, 1:] = features[:, :, 1:]  # another first row
    changed[:, :, 0, 1:] = features[:, :, 0, 1:]  # of which only the first cell differs
    for transformer in (True, False):
        torch.manual_seed(0)
        autoencoder = SelfAttentionAutoencoder(20, 6, (4, 4), transformer=transformer).eval()
        with torch.no_grad():
            difference = (autoencoder(features) - autoencoder(changed)).abs().amax(dim=1)[0]
        assert difference[0, 0] > 0
        assert (difference.flatten()[1:] > 0).all() == transformer
        assert (difference.flatten()[1:] == 0).all() != transformer


def test_loss_is_the_sum_of_the_norms() -> None:
    features, reconstruction = torch.rand(2, 3, 5, 4, 6)
    norms = [
        sum(float((features[b, :, i, j] - reconstruction[b, :, i, j]).norm()) for i in range(4) for j in range(6))
        for b in range(3)
    ]
    assert float(SAAELoss("norm")(features, reconstruction)) == pytest.approx(sum(norms) / 3, rel=1e-5)
    expected = float(functional.mse_loss(features, reconstruction))
    assert float(SAAELoss("mse")(features, reconstruction)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("distance", ["norm", "mse"])
def test_loss_in_parts_has_the_gradient_of_the_whole_batch(distance: Distance) -> None:
    features, reconstruction = torch.randn(2, 2 * IMAGES_PER_PART + 1, 5, 4, 6)
    in_parts, at_once = (reconstruction.clone().requires_grad_() for _ in range(2))
    loss = SAAELoss(distance)(features, in_parts)
    difference = at_once - features
    expected = difference.square().mean() if distance == "mse" else difference.norm(dim=1).sum() / len(features)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(in_parts.grad, at_once.grad)


def test_loss_of_a_perfect_reconstruction_has_a_finite_gradient() -> None:
    features = torch.rand(1, 5, 2, 2)
    reconstruction = features.clone().requires_grad_()
    SAAELoss("norm")(features, reconstruction).backward()
    assert bool(reconstruction.grad.isfinite().all())


def test_half_precision_features_are_compared_in_single_precision() -> None:
    features = torch.full((1, 3840, 1, 1), 100.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        distance = feature_distance(features, (features + 1).bfloat16(), "norm")
    assert distance.dtype == torch.float32
    assert float(distance) == pytest.approx(3840**0.5)


@pytest.mark.parametrize("distance", ["norm", "mse"])
def test_map_is_the_enlarged_distance_and_score_its_maximum(distance: str) -> None:
    model = SAAEModel(**SMALL, latent_dim=6, distance=distance).eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        result = model(images)
        features = model.embed(images)
        squares = (features - model.reconstruct(features)).square()
    cells = squares.sum(1).sqrt() if distance == "norm" else squares.mean(1)
    expected = functional.interpolate(cells[:, None], size=(64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(result.anomaly_map, expected)
    torch.testing.assert_close(result.pred_score, expected.flatten(1).max(dim=1).values)


def test_images_of_another_size_are_refused() -> None:
    model = SAAEModel(**SMALL, latent_dim=6)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 64, 64\), got \(1, 3, 32, 64\); resize"):
        model(torch.rand(1, 3, 32, 64))


def test_without_a_latent_width_there_is_no_autoencoder() -> None:
    with pytest.raises(ValueError, match="latent_dim is not known before training; pass it"):
        SAAEModel(**SMALL)(torch.rand(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"latent_dim": 0}, "latent_dim must be at least 1, got 0"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"patch_size": 3}, "patch_size must divide the feature map of 8 x 8 cells, got 3"),
        ({"distance": "l1"}, "distance must be 'norm', 'mse' or 'mahalanobis', got 'l1'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SAAEModel(**{**SMALL, "latent_dim": 6, **arguments})
