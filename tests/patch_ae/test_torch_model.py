# SPDX-License-Identifier: Apache-2.0

import copy

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional

from anomalib_recon.models import PatchAE
from anomalib_recon.models.patch_ae.torch_model import PatchAEModel

SMALL = {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 48), "embed_dim": 16}


def build(**arguments) -> PatchAEModel:
    torch.manual_seed(0)
    return PatchAEModel(**{**SMALL, **arguments}).eval()


def changed_patches(model: PatchAEModel, row: int, column: int) -> torch.Tensor:
    """Patches of 8 x 8 pixels that change with one feature vector, (h, w)."""
    features = torch.rand(1, 16, 8, 6)
    perturbed = features.clone()
    perturbed[:, :, row, column] += 0.5
    with torch.no_grad():
        difference = (model.reconstruct(perturbed) != model.reconstruct(features)).float()
    return functional.max_pool2d(difference.amax(dim=1), 8)[0] > 0


@pytest.mark.parametrize(("row", "column"), [(0, 0), (3, 2), (7, 5)])
def test_a_vector_changes_exactly_its_own_patch(row: int, column: int) -> None:
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[row, column] = True
    assert torch.equal(changed_patches(build(), row, column), expected)


def test_without_patch_wise_a_vector_changes_its_neighbourhood() -> None:
    expected = torch.zeros(8, 6, dtype=torch.bool)
    expected[1:6, 0:5] = True  # two convolutions of 3 x 3
    assert torch.equal(changed_patches(build(patch_wise=False), 3, 2), expected)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenetv3_small_050", "convnext_atto", "test_efficientnet"])
def test_shapes_with_any_cnn(backbone: str) -> None:
    model = build(backbone=backbone)
    images = torch.rand(2, 3, 64, 48)
    with torch.no_grad():
        features = model.embed(images)
        assert features.shape == (2, 16, 8, 6)
        assert model.reconstruct(features).shape == images.shape
        model.bank.fill(torch.rand(20, 16))
        predictions = model(images)
    assert predictions.pred_score.shape == (2,)
    assert predictions.anomaly_map.shape == (2, 1, 64, 48)
    torch.testing.assert_close(predictions.pred_score, predictions.anomaly_map.flatten(1).amax(dim=1))


def test_order_of_memory_changes_no_gradient() -> None:
    model = build(trained_stages=4)
    plain = copy.deepcopy(model)
    plain.backbone.to(memory_format=torch.contiguous_format)
    images = torch.rand(2, 3, 64, 48)
    for network in (model, plain):
        network.reconstruct(network.embed(images)).square().mean().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        gradient = expected[name].grad
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()))


def test_four_last_stages_are_concatenated_on_the_grid() -> None:
    model = build()
    images = torch.rand(2, 3, 64, 48)
    normalized = (images - torch.tensor([0.485, 0.456, 0.406])[:, None, None]) / torch.tensor([0.229, 0.224, 0.225])[
        :, None, None
    ]
    with torch.no_grad():
        stages = model.backbone(normalized)
        expected = [functional.interpolate(stage, (8, 6), mode="bilinear", antialias=True) for stage in stages]
        torch.testing.assert_close(model.extract_stages(images), torch.cat(expected, dim=1), rtol=1e-4, atol=1e-5)
    assert [stage.shape[1] for stage in stages] == [64, 128, 256, 512]


def test_stages_are_chosen_by_name() -> None:
    images = torch.rand(2, 3, 64, 48)
    # in their order in the network, whatever the order of the names
    every, chosen = (build(layers=layers).extract_stages(images) for layers in (None, ["layer3", "layer2"]))
    assert every.shape[1] == 64 + 128 + 256 + 512
    torch.testing.assert_close(chosen, every[:, 64 : 64 + 128 + 256])


def test_trained_stages_count_from_the_last_chosen_one() -> None:
    model = build(layers=["layer1", "layer2"], trained_stages=1)
    trained = {name.split(".")[0] for name, weight in model.backbone.named_parameters() if weight.requires_grad}
    assert trained == {"layer2"}
    model.train().reconstruct(model.embed(torch.rand(1, 3, 64, 48))).sum().backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())


@pytest.mark.parametrize("trained_stages", range(5))
def test_trained_stages_get_gradients_and_the_others_none(trained_stages: int) -> None:
    model = build(trained_stages=trained_stages)
    frozen = {name.split(".")[0] for name, weight in model.backbone.named_parameters() if not weight.requires_grad}
    parts = ["conv1", "bn1", "layer1", "layer2", "layer3", "layer4"]
    assert frozen == set(parts[: {4: 0, 3: 3, 2: 4, 1: 5, 0: 6}[trained_stages]])
    model.train()
    model.reconstruct(model.embed(torch.rand(1, 3, 64, 48))).sum().backward()
    assert all((weight.grad is not None) == weight.requires_grad for weight in model.parameters())


def test_scores_by_features_and_reconstruction() -> None:
    images = torch.rand(3, 3, 64, 48)
    for embed_dim, width in ((16, 16), (None, 960)):  # without a projection, vectors are those of the stages
        model = build(embed_dim=embed_dim, sigma=0)
        model.scale.fit([torch.rand(4, 960, 8, 6)])
        vectors = torch.rand(50, width)
        model.bank.fill(vectors)
        with torch.no_grad():
            codes = model.embed(images) if embed_dim else model.scale(model.extract_stages(images))
            distances = torch.cdist(codes.flatten(2).transpose(1, 2), vectors).amin(dim=2).reshape(3, 1, 8, 6)
            expected = functional.interpolate(distances, (64, 48), mode="bilinear")
            torch.testing.assert_close(model(images).anomaly_map, expected, rtol=1e-3, atol=1e-4)
    model = build(score_by="reconstruction", sigma=0)
    with torch.no_grad():
        reconstruction = model.reconstruct(model.embed(images))
        predictions = model(images)
    torch.testing.assert_close(predictions.anomaly_map[:, 0], (reconstruction - images).square().mean(dim=1))


def test_codes_are_compared_after_whitening() -> None:
    model = build(sigma=0)
    codes, normal = torch.rand(3, 16, 8, 6), torch.rand(100, 16) * torch.linspace(0.1, 10, 16)
    model.whitening.fit(normal)
    model.bank.fill(model.whitening.whiten(normal[:1]))
    shifted = codes - normal[0][:, None, None]
    distances = torch.einsum("dc,bchw->bdhw", model.whitening.matrix, shifted).norm(dim=1, keepdim=True)
    expected = functional.interpolate(distances, (64, 48), mode="bilinear")
    torch.testing.assert_close(model.compare(codes).anomaly_map, expected, rtol=1e-4, atol=1e-4)


def test_stages_are_scaled_before_the_projection() -> None:
    model = build()
    images = torch.rand(4, 3, 64, 48)
    with torch.no_grad():
        stages = model.extract_stages(images)
        raw = stages.double().numpy()
        model.scale.fit(stages.split(3))
        codes = model.train().embed(images)
    # one hundredth of a stage's mean variance is added to that of each channel
    means, variances = raw.mean((0, 2, 3)), raw.var((0, 2, 3))
    parts = np.split(variances, np.cumsum([64, 128, 256]))
    stds = np.sqrt(np.concatenate([part + 0.01 * part.mean() for part in parts]))
    scaled = (raw - means[:, None, None]) / stds[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(codes, model.project(torch.from_numpy(scaled).float()), rtol=1e-4, atol=1e-4)
    assert np.abs(raw.mean((0, 2, 3))).max() > 0.1


def test_the_score_is_the_mean_of_the_highest_share_of_the_map() -> None:
    model = build(top_fraction=0.05)
    model.bank.fill(torch.rand(20, 16))
    with torch.no_grad():
        predictions = model(torch.rand(2, 3, 64, 48))
    values = np.sort(predictions.anomaly_map.flatten(1).numpy(), axis=1)
    np.testing.assert_allclose(predictions.pred_score, values[:, -154:].mean(axis=1), rtol=1e-6)  # of 3072


def test_sigma_is_that_of_a_gaussian_on_the_map() -> None:
    images = torch.rand(1, 3, 64, 48, generator=torch.Generator().manual_seed(0))
    maps = []
    for sigma in (0, 4):
        model = build(sigma=sigma)
        model.bank.fill(torch.zeros(1, 16))
        with torch.no_grad():
            maps.append(model(images).anomaly_map[0, 0].numpy())
    rough, smooth = maps
    np.testing.assert_allclose(smooth, gaussian_filter(rough, 4, mode="mirror"), rtol=1e-4)
    assert np.abs(smooth - rough).max() > 0.01 * rough.max()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_size": (64, 60)}, "image_size must be a multiple of patch_size, got 64 x 60 and 8"),
        ({"image_size": (8, 8)}, "image_size must hold more than one patch, got 8 x 8 and 8"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
        ({"embed_dim": 0}, "embed_dim must be at least 1, got 0"),
        ({"trained_stages": 5}, "trained_stages must be from 0 to 4, the number of stages, got 5"),
        (
            {"layers": ["layer1"], "trained_stages": 2},
            "trained_stages must be from 0 to 1, the number of stages, got 2",
        ),
        ({"layers": ["layer9"]}, "layers must be among act1, .*layer4, the stages of backbone='resnet18', got layer9"),
        ({"layers": []}, "layers must be among .* got none"),
        ({"layers": ["layer1", "layer1"]}, "layers must name each layer once, got layer1, layer1"),
        ({"feature_scale": "stages"}, "feature_scale must be 'none', 'stage', 'channel' or 'whiten', got 'stages'"),
        ({"score_by": "error"}, "score_by must be 'features' or 'reconstruction', got 'error'"),
        ({"sigma": -1.0}, "sigma must not be negative, got -1.0"),
        ({"vectors_per_chunk": 0}, "vectors_per_chunk must be at least 1, got 0"),
        ({"backbone": "resnet"}, "backbone='resnet' is not a model of timm"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**arguments)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"alpha": 2.0}, "alpha must be from 0 to 1, got 2.0"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0"),
        (
            {"backbone_learning_rate": 0.0},
            "backbone_learning_rate must be positive, got 0.0; to keep",
        ),
        ({"coreset_ratio": 0.0}, "coreset_ratio must be above 0 and at most 1, got 0.0"),
        ({"defect_probability": -1.0}, "defect_probability must be from 0 to 1, got -1.0"),
        (
            {"pre_processor": PatchAE.configure_pre_processor((32, 32))},
            "image_size must be the size that pre_processor",
        ),
    ],
)
def test_wrong_arguments_of_the_module_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PatchAE(**{**SMALL, **arguments})


def test_image_size_follows_the_pre_processor_if_patches_fit_in_it() -> None:
    arguments = {**SMALL, "image_size": None}
    for size, expected in (((40, 48), (40, 48)), ((10, 10), (256, 256))):
        model = PatchAE(**arguments, pre_processor=PatchAE.configure_pre_processor(size))
        assert model.model.image_size == model.hparams["image_size"] == expected


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 64, 48\), got \(1, 3, 64, 64\); resize"):
        build().embed(torch.rand(1, 3, 64, 64))
