# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import checkpoint_filter_fn
from torch.nn import functional

from anomalib_recon.config_files import read_config
from anomalib_recon.layers import FrozenBackbone, create_dense_features
from anomalib_recon.models.saae import SAAEModel

VIT = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"


@pytest.fixture(scope="module")
def whole_vit() -> timm.models.VisionTransformer:
    """A whole vision transformer with random weights and positions that differ."""
    torch.manual_seed(0)
    model = timm.create_model(VIT, pretrained=False).eval()
    torch.nn.init.normal_(model.pos_embed)
    return model


@pytest.fixture(scope="module")
def weights(whole_vit: timm.models.VisionTransformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(whole_vit.state_dict(), path)
    return path


@pytest.mark.parametrize("image_size", [(224, 224), (64, 96)])
def test_features_are_those_of_the_whole_backbone(
    whole_vit: timm.models.VisionTransformer, weights: Path, image_size: tuple[int, int]
) -> None:
    backbone = create_dense_features(VIT, image_size=image_size, weights=weights)
    expected = timm.create_model(VIT, pretrained=False, img_size=image_size).eval()
    expected.load_state_dict(checkpoint_filter_fn(whole_vit.state_dict(), expected))
    images = torch.rand(2, 3, *image_size)
    normalized = (images - 0.5) / 0.5  # mean and standard deviation of these weights
    with torch.no_grad():
        embedding = expected.patch_embed.proj(normalized)  # the linear projection, without positions
        blocks = expected.forward_intermediates(normalized, intermediates_only=True)
    torch.testing.assert_close(backbone(images), torch.cat([embedding, *blocks[:4]], dim=1))


def test_blocks_after_the_last_one_used_are_neither_kept_nor_run(weights: Path) -> None:
    backbone = create_dense_features(VIT, ["blocks.1", "blocks.2"], image_size=(64, 64), weights=weights)
    calls = []
    for index, block in enumerate(backbone.vit.blocks):
        block.register_forward_hook(lambda *_, index=index: calls.append(index))
    features = backbone(torch.rand(1, 3, 64, 64))
    assert calls == [0, 1, 2]
    assert features.shape == (1, 2 * 192, 4, 4)
    assert not [name for name in backbone.state_dict() if "blocks.3" in name or "norm." in name.split("blocks")[0]]


@pytest.mark.parametrize(
    ("name", "image_size", "expected"),
    [
        ("deit_tiny_distilled_patch16_224", (64, 96), (5 * 192, 4, 6)),
        ("vit_small_patch14_reg4_dinov2", (56, 70), (5 * 384, 4, 5)),
        ("vit_small_patch16_dinov3_qkvb", (64, 96), (5 * 384, 4, 6)),
        ("resnet18", (64, 96), (64 + 64 + 128 + 256 + 512, 8, 12)),
        ("efficientnet_b4", (64, 64), (24 + 32 + 56 + 160 + 448, 8, 8)),
    ],
)
def test_any_backbone_yields_one_feature_map(
    name: str, image_size: tuple[int, int], expected: tuple[int, int, int]
) -> None:
    backbone = create_dense_features(name, image_size=image_size, pre_trained=False)
    images = torch.rand(2, 3, *image_size)
    features = backbone.train()(images)
    assert features.shape == (2, *expected)
    assert (backbone.num_channels, *backbone.grid_size) == expected
    assert not features.requires_grad
    torch.testing.assert_close(backbone.eval()(images), features)


def test_default_backbone_has_the_channels_of_the_paper() -> None:
    model = SAAEModel(pre_trained=False)
    assert model.backbone.num_channels == 3840
    assert model.backbone.grid_size == (24, 24)
    assert len(model.backbone.vit.blocks) == 4


def test_vgg19_has_the_features_of_the_ablation() -> None:
    config = read_config("model/saae_vgg19.yaml")["model"]["init_args"]
    image_size, stride = (config["image_size"], config["image_size"]), config["feature_stride"]
    backbone = create_dense_features(config["backbone"], config["layers"], image_size, stride, pre_trained=False)
    assert (backbone.num_channels, *backbone.grid_size) == (3456, 64, 64)
    assert backbone(torch.rand(1, 3, 256, 256)).shape == (1, 3456, 64, 64)
    assert max(int(name.split(".")[-2]) for name in backbone.state_dict()) == 25  # the last convolution that is used


def test_modules_and_stages_give_the_same_features() -> None:
    torch.manual_seed(0)
    stages = FrozenBackbone("resnet18", ["layer1", "layer2"], pre_trained=False)
    modules = FrozenBackbone("resnet18", ["layer1", "layer2.1"], pre_trained=False)
    weights = {name.replace("extractor.", "extractor.graph_module."): x for name, x in stages.state_dict().items()}
    modules.load_state_dict(weights)
    images = torch.rand(1, 3, 64, 64)
    torch.testing.assert_close(modules(images), stages(images))
    assert modules.num_channels == stages.num_channels == [64, 128]


def test_features_of_a_module_are_taken_before_an_activation_in_place() -> None:
    backbone = FrozenBackbone("resnet18", ["bn1", "act1"], pre_trained=False)
    normalized, activated = backbone(torch.rand(1, 3, 64, 64))
    assert float(normalized.min()) < 0
    torch.testing.assert_close(activated, normalized.relu())


def test_regional_features_average_the_enlarged_maps() -> None:
    backbone = create_dense_features("resnet18", ["layer1", "layer3"], (64, 96), 8, pre_trained=False)
    images = torch.rand(2, 3, 64, 96)
    expected = [
        functional.avg_pool2d(functional.interpolate(maps, size=(64, 96), mode="bilinear", align_corners=False), 8)
        for maps in backbone.backbone(images)
    ]
    torch.testing.assert_close(backbone(images), torch.cat(expected, dim=1))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "resnet19"}, "backbone='resnet19' is not a model of timm"),
        ({"layers": ["blocks.0", "block.1"]}, "layers must be patch_embed or among blocks.0 to .* got block.1"),
        ({"layers": ["patch_embed"]}, "at least one of these, for .* got patch_embed"),
        ({"layers": []}, "got none"),
        ({"layers": ["blocks.1", "blocks.1"]}, "layers must name each layer once, got blocks.1, blocks.1"),
        ({"name": "resnet18", "layers": ["layer9"]}, "layers must be among .*, or be modules of .*, got layer9"),
        ({"name": "resnet18", "layers": []}, "layers must be among .* got none"),
        ({"image_size": (72, 64)}, "image_size must be a positive multiple of the patch size .* got 72 x 64 and 16"),
        ({"feature_stride": 8}, "feature_stride must be 16, the patch size of backbone="),
        ({"name": "resnet18", "feature_stride": 12}, "image_size must be a positive multiple of feature_stride"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_dense_features(**{"name": VIT, "image_size": (64, 64), "pre_trained": False, **arguments})


def test_a_file_with_other_weights_is_refused(weights: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks \d+ of the \d+ tensors of deit_small_patch16_224"):
        create_dense_features("deit_small_patch16_224", image_size=(64, 64), weights=weights)
