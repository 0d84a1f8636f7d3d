# SPDX-License-Identifier: Apache-2.0

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2.functional import resize

from anomalib_recon.models.adtr.torch_model import ADTRModel, find_feature_size
from anomalib_recon.models.adtr.transformer import DecoderLayer, MultiheadAttention

SMALL = {
    "backbone": "test_efficientnet", "pre_trained": False, "image_size": (64, 96), "embed_dim": 16, "depth": 2,
    "num_heads": 4, "mlp_dim": 24,
}  # fmt: skip


def small_model(**arguments) -> ADTRModel:
    torch.manual_seed(0)
    model = ADTRModel(**{**SMALL, **arguments}).eval()
    for name, parameter in model.named_parameters():  # far enough from their first values that everything matters
        if parameter.requires_grad:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


def test_default_network_is_that_of_the_paper() -> None:
    model = ADTRModel(pre_trained=False)
    assert model.backbone.num_channels == [24, 32, 56, 160, 448]
    assert (model.reduce.in_channels, model.reduce.out_channels) == (720, 256)
    assert (model.recover.in_channels, model.recover.out_channels) == (256, 720)
    assert (len(model.encoder), len(model.decoder)) == (4, 4)
    heads = [layer.num_heads for layer in model.modules() if isinstance(layer, nn.MultiheadAttention)]
    assert heads == 12 * [8]

    attention, norm = 4 * (256 * 256 + 256), 2 * 256
    feed_forward = 256 * 1024 + 1024 + 1024 * 256 + 256
    layers = 4 * (attention + feed_forward + 2 * norm) + 4 * (2 * attention + feed_forward + 3 * norm)
    projections, embeddings = 720 * 256 + 256 + 256 * 720 + 720, 2 * 16 * 16 * 256
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trained == layers + projections + embeddings


@pytest.mark.parametrize(
    ("image_size", "feature_size", "expected"),
    [
        ((256, 256), None, (16, 16)),
        ((512, 512), None, (32, 32)),
        ((32, 32), 8, (8, 8)),
        ((256, 384), None, (16, 24)),
        ((250, 380), (32, 48), (32, 48)),
    ],
)
def test_feature_map_has_the_size_of_a_stage(
    image_size: tuple[int, int], feature_size: int | tuple[int, int] | None, expected: tuple[int, int]
) -> None:
    assert find_feature_size("tf_efficientnet_b4", image_size, feature_size) == expected


@pytest.mark.parametrize("image_size", [(256, 256), (250, 380)])
def test_sizes_of_stages_are_those_of_their_feature_maps(image_size: tuple[int, int]) -> None:
    model = ADTRModel(**{**SMALL, "image_size": image_size})
    for features in model.backbone(torch.rand(1, 3, *image_size)):
        size = tuple(features.shape[-2:])
        assert find_feature_size("test_efficientnet", image_size, size) == size


def test_features_are_resized_and_concatenated(images: Tensor) -> None:
    model = small_model()
    expected = [resize(features, [4, 6], antialias=True) for features in model.backbone(images)]
    assert len({features.shape[-2:] for features in model.backbone(images)}) == 5
    torch.testing.assert_close(model.embed(images), torch.cat(expected, dim=1))


def attend_by_the_paper(part: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Multi-head attention, or the concatenation in its place; all shapes are ``(B, T, D)``."""
    if not isinstance(part, nn.MultiheadAttention):
        return torch.cat([query, value], dim=-1) @ part.projection.weight.T + part.projection.bias
    weights, biases = part.in_proj_weight.chunk(3), part.in_proj_bias.chunk(3)
    heads = [
        (tokens @ weight.T + bias).unflatten(-1, (part.num_heads, -1))
        for tokens, weight, bias in zip((query, key, value), weights, biases, strict=True)
    ]
    maps = torch.einsum("bthd,bshd->bhts", *heads[:2]) / math.sqrt(heads[0].shape[-1])
    mixed = torch.einsum("bhts,bshd->bthd", maps.softmax(dim=-1), heads[2]).flatten(2)
    return mixed @ part.out_proj.weight.T + part.out_proj.bias


def reconstruct_by_the_paper(model: ADTRModel, features: Tensor) -> Tensor:
    """Appendix A: post-norm layers, with the position in the queries and keys of each attention."""

    def norm(layer: nn.LayerNorm, tokens: Tensor) -> Tensor:
        return functional.layer_norm(tokens, tokens.shape[-1:], layer.weight, layer.bias)

    def feed_forward(layer: nn.Module, tokens: Tensor) -> Tensor:
        first, _, second = layer.feed_forward
        return (tokens @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias

    place = model.position_embedding
    encoded = torch.einsum("bchw,dc->bhwd", features, model.reduce.weight[..., 0, 0]).flatten(1, 2) + model.reduce.bias
    for layer in model.encoder:
        attended = attend_by_the_paper(layer.self_attention, encoded + place, encoded + place, encoded)
        encoded = norm(layer.norm1, encoded + attended)
        encoded = norm(layer.norm2, encoded + feed_forward(layer, encoded))
    rebuilt = encoded if model.query is None else model.query.repeat(len(features), 1, 1)
    for layer in model.decoder:
        attended = attend_by_the_paper(layer.self_attention, rebuilt + place, rebuilt + place, rebuilt)
        rebuilt = norm(layer.norm1, rebuilt + attended)
        attended = attend_by_the_paper(layer.cross_attention, rebuilt + place, encoded + place, encoded)
        rebuilt = norm(layer.norm2, rebuilt + attended)
        rebuilt = norm(layer.norm3, rebuilt + feed_forward(layer, rebuilt))
    recovered = rebuilt @ model.recover.weight[..., 0, 0].T + model.recover.bias
    return recovered.unflatten(1, model.feature_size).permute(0, 3, 1, 2)


@pytest.mark.parametrize("query", ["learned", "encoder"])
@pytest.mark.parametrize("attention", ["multihead", "concat"])
@torch.no_grad()
def test_reconstruction_is_that_of_the_paper(images: Tensor, query: str, attention: str) -> None:
    model = small_model(query=query, attention=attention)
    features = model.embed(images)
    expected = reconstruct_by_the_paper(model, features)
    assert features.shape == expected.shape
    torch.testing.assert_close(model.reconstruct(features), expected, atol=1e-4, rtol=1e-4)


def test_attention_has_the_gradients_of_pytorch() -> None:
    torch.manual_seed(0)
    attention, plain = MultiheadAttention(16, 4), nn.MultiheadAttention(16, 4, batch_first=True)
    plain.load_state_dict(attention.state_dict())
    query, value = torch.rand(2, 3, 6, 16)
    for result in (attention(query, query, value), plain(query, query, value, need_weights=False)[0]):
        result.square().sum().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in attention.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attention", ["multihead", "concat"])
def test_a_query_that_images_share_is_decoded_as_one_for_each(attention: str) -> None:
    torch.manual_seed(0)
    layer = DecoderLayer(16, 4, 24, 0.5, attention, attention).train()
    (query, position), encoded = torch.rand(2, 1, 6, 16), torch.rand(3, 6, 16)
    results = []
    for same in (query, query.expand(3, -1, -1)):
        torch.manual_seed(1)
        results.append(layer(same, encoded, position))
    torch.testing.assert_close(*results)


@torch.no_grad()
def test_places_matter_through_position_and_query_alone(images: Tensor) -> None:
    model = small_model()
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))

    def permute(features: Tensor) -> Tensor:
        return features.flatten(2)[..., order].unflatten(2, (4, 6))

    features = model.embed(images)
    expected = permute((features - model.reconstruct(features)).norm(dim=1, keepdim=True))
    assert not torch.allclose(model.reconstruct(permute(features)), permute(model.reconstruct(features)), atol=1e-2)
    model.position_embedding.copy_(model.position_embedding[:, order])
    model.query.copy_(model.query[:, order])
    result = (permute(features) - model.reconstruct(permute(features))).norm(dim=1, keepdim=True)
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_the_query_learns_of_the_image_through_attention_alone(images: Tensor) -> None:
    features = small_model().embed(images)
    for query, is_blind in (("learned", True), ("encoder", False)):
        model = small_model(query=query)
        first, second = model.reconstruct(features)
        assert not torch.allclose(first, second, atol=1e-2)
        for layer in model.decoder:
            nn.init.zeros_(layer.cross_attention.out_proj.weight)
        first, second = model.reconstruct(features)
        assert torch.equal(first, second) == is_blind


@pytest.mark.parametrize("query", ["learned", "encoder"])
@pytest.mark.parametrize("attention", ["multihead", "concat"])
def test_gradient_reaches_all_of_the_transformer_and_none_of_the_backbone(
    images: Tensor, query: str, attention: str
) -> None:
    model = ADTRModel(**{**SMALL, "query": query, "attention": attention}).train()
    features = model.embed(images.requires_grad_())
    (features - model.reconstruct(features)).square().mean().backward()
    assert images.grad is None
    for name, parameter in model.named_parameters():
        if name.startswith("backbone."):
            assert parameter.grad is None, name
        elif name in {"position_embedding", "query"}:
            assert bool(parameter.grad.any(dim=2).all()), name
        else:
            assert bool(parameter.grad.any()), name


def test_dropout_is_a_matter_of_training(images: Tensor) -> None:
    model = small_model(dropout=0.5)
    features = model.embed(images)
    assert torch.equal(model.reconstruct(features), model.reconstruct(features))
    model.train()
    assert torch.equal(model.embed(images), features)
    assert not torch.allclose(model.reconstruct(features), model.reconstruct(features))


def test_scores_follow_from_the_reconstruction(images: Tensor) -> None:
    model = small_model(pool_size=5)
    with torch.no_grad():
        predictions = model(images)
        features = model.embed(images)
        norms = (features - model.reconstruct(features)).square().sum(dim=1, keepdim=True).sqrt()
    expected = functional.interpolate(norms, (64, 96), mode="bilinear")
    torch.testing.assert_close(predictions.anomaly_map, expected)
    windows = expected.unfold(2, 5, 1).unfold(3, 5, 1).mean(dim=(4, 5))
    torch.testing.assert_close(predictions.pred_score, windows.flatten(1).max(dim=1).values)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"backbone": "resnet0"}, "^backbone='resnet0' is not a model of timm"),
        ({"layers": ["blocks.9"]}, r"^layers must be among .* of backbone='test_efficientnet', got blocks\.9"),
        ({"feature_size": 7}, r"^feature_size must be one of 32 x 48, 16 x 24, 8 x 12, 4 x 6, 2 x 3, .*, got 7"),
        ({"feature_size": (6, 4)}, r"^feature_size must be one of .*, got \(6, 4\)"),
        ({"num_heads": 3}, "^embed_dim must be a multiple of num_heads, got 16 and 3"),
        ({"embed_dim": 0}, "^embed_dim must be at least 1, got 0"),
        ({"depth": 0}, "^depth must be at least 1, got 0"),
        ({"num_heads": 0}, "^num_heads must be at least 1, got 0"),
        ({"mlp_dim": 0}, "^mlp_dim must be at least 1, got 0"),
        ({"pool_size": 0}, "^pool_size must be at least 1, got 0"),
        ({"pool_size": 65}, r"^pool_size must not exceed image_size, got 65 and \(64, 96\)"),
        ({"dropout": 1.0}, "^dropout must be at least 0 and below 1, got 1.0"),
        ({"query": "none"}, "^query must be 'learned' or 'encoder', got 'none'"),
        ({"attention": "linear"}, "^attention must be 'multihead' or 'concat', got 'linear'"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ADTRModel(**{**SMALL, **arguments})
