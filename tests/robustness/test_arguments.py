# SPDX-License-Identifier: Apache-2.0

"""Combinations of arguments: each builds a model that can be trained, or is refused with the name of an argument."""

import math
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from anomalib_recon.models import ADTR, SAAE, FeatureInpainting, InTra, PatchAE
from anomalib_recon.models.adtr.loss import NormalLoss
from anomalib_recon.models.adtr.torch_model import ADTRModel
from anomalib_recon.models.feature_inpainting.torch_model import FeatureInpaintingModel
from anomalib_recon.models.intra.loss import InTraLoss
from anomalib_recon.models.intra.torch_model import InTraModel
from anomalib_recon.models.intra.windows import draw_windows
from anomalib_recon.models.patch_ae.loss import HybridLoss
from anomalib_recon.models.patch_ae.torch_model import PatchAEModel
from anomalib_recon.models.saae.loss import SAAELoss
from anomalib_recon.models.saae.torch_model import SAAEModel
from tests.tiny_models import TINY

# the same examples on every run
examples = settings(
    max_examples=20, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], database=None
)


def mostly(*good: Any, bad: tuple[Any, ...]) -> st.SearchStrategy:
    """A good value in most cases, so that the combination of all has a chance to be accepted."""
    return st.integers(0, 11).flatmap(lambda draw: st.sampled_from(bad if draw == 0 else good))


NOT_A_COUNT = (0, -3, 2.5, math.nan, True, "4", None)
NOT_A_NUMBER = (math.nan, math.inf, -math.inf, "1", None, True)


def counts(*good: int) -> st.SearchStrategy:
    return mostly(*good, bad=NOT_A_COUNT)


def sizes(*good: tuple[int, int]) -> st.SearchStrategy:
    return mostly(*good, bad=((0, 64), (-64, 64), (63, 64), (1, 1)))


def choices(*good: str) -> st.SearchStrategy:
    return mostly(*good, bad=("other", "", None, 1))


def assert_trains(model: nn.Module, loss: Tensor) -> None:
    """The loss and the gradients of all trained parameters are finite."""
    assert loss.isfinite()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert gradients
    assert all(gradient.isfinite().all() for gradient in gradients)


def assert_scores(model: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        scored = model.eval()(images)
    assert scored.pred_score.shape == (len(images),)
    assert scored.anomaly_map.shape == (len(images), 1, *images.shape[-2:])
    assert scored.pred_score.isfinite().all()
    assert scored.anomaly_map.isfinite().all()


def build(model_class: type[nn.Module], arguments: dict[str, Any]) -> nn.Module | None:
    """Build a model, or nothing if an argument is refused by its name."""
    torch.manual_seed(0)
    try:
        return model_class(**arguments)
    except ValueError as error:
        assert any(argument in str(error) for argument in arguments), error  # noqa: PT017
        assert "\n" not in str(error)  # noqa: PT017
        return None


@examples
@given(
    st.fixed_dictionaries(
        {
            "image_size": sizes((48, 48), (64, 40), (16, 64)),
            "patch_size": counts(8, 16),
            "window_size": counts(2, 3, 5),
            "embed_dim": counts(8, 12, 16),
            "depth": counts(1, 2, 3),
            "num_heads": counts(1, 2, 4),
            "attention": choices("mfsa", "msa"),
            "long_residuals": st.booleans(),
            "position": choices("global", "local"),
            "readout": choices("mean", "token"),
            "sigmoid": st.booleans(),
            "windows_per_chunk": counts(1, 7, 100),
        }
    )
)
def test_intra(arguments: dict[str, Any]) -> None:
    model = build(InTraModel, arguments)
    if model is None:
        return
    images = torch.rand(2, 3, *arguments["image_size"])
    patches = model.embed(images)
    places, covered = draw_windows(model.grid_size, model.window_size, 2, torch.Generator().manual_seed(0))
    windows = patches[torch.arange(2)[:, None], places]
    inpainted = model.inpaint(windows, places, covered)
    original = windows.gather(1, covered[:, :, None].expand_as(inpainted))
    assert_trains(model, InTraLoss()(model.pixels(original), model.pixels(inpainted)))
    assert_scores(model, images)


@examples
@given(
    st.fixed_dictionaries(
        {
            "backbone": choices("resnet18"),
            "image_size": sizes((64, 64), (32, 96), (33, 65)),
            "feature_size": mostly(None, 8, (2, 6), (4, 12), bad=(0, -8, 7, 2.5, (8,), "8")),
            "embed_dim": counts(8, 16),
            "depth": counts(1, 2),
            "num_heads": counts(1, 2, 3),
            "mlp_dim": counts(1, 16),
            "dropout": mostly(0.0, 0.5, bad=(*NOT_A_NUMBER, -0.1, 1.0)),
            "query": choices("learned", "encoder"),
            "attention": choices("multihead", "concat"),
            "pool_size": counts(1, 16, 33),
        }
    )
)
def test_adtr(arguments: dict[str, Any]) -> None:
    model = build(ADTRModel, {**arguments, "pre_trained": False})
    if model is None:
        return
    images = torch.rand(2, 3, *arguments["image_size"])
    features = model.train().embed(images)
    assert_trains(model, NormalLoss()(features, model.reconstruct(features)))
    assert_scores(model, images)


@settings(examples, max_examples=10)  # a vision transformer takes long to build
@given(
    st.fixed_dictionaries(
        {
            "backbone": choices("resnet18", "vit_tiny_patch16_224"),
            "image_size": sizes((64, 64), (32, 96)),
            "feature_stride": mostly(None, 8, 16, bad=(0, -8, 7, 2.5, "8")),
            "latent_dim": counts(1, 5, 16),
            "patch_size": counts(1, 2),
            "num_heads": counts(1, 2, 3),
            "depth": counts(1, 2),
            "mlp_ratio": counts(1, 2),
            "transformer": st.booleans(),
            "distance": choices("norm", "mse"),
        }
    )
)
def test_saae(arguments: dict[str, Any]) -> None:
    model = build(SAAEModel, {**arguments, "pre_trained": False})
    if model is None or arguments["latent_dim"] is None:
        return
    images = torch.rand(2, 3, *arguments["image_size"])
    features = model.train().embed(images)
    assert_trains(model, SAAELoss(arguments["distance"])(features, model.reconstruct(features)))
    assert_scores(model, images)


@examples
@given(
    st.fixed_dictionaries(
        {
            "backbone": choices("resnet18"),
            "image_size": sizes((64, 64), (32, 96)),
            "patch_size": counts(8, 16, 32),
            "embed_dim": mostly(1, 16, None, bad=NOT_A_COUNT[:-1]),
            "layers": mostly(None, ["act1", "layer1", "layer2", "layer3"], bad=([], ["layer9"])),
            "feature_scale": choices("none", "stage", "channel", "whiten"),
            "trained_stages": mostly(0, 1, 4, bad=(-1, 5, 2.5, "4", None)),
            "patch_wise": st.booleans(),
            "score_by": choices("features", "reconstruction"),
            "sigma": mostly(0.0, 0.05, 4.0, bad=(*NOT_A_NUMBER, -1.0, 20.0)),
            "vectors_per_chunk": counts(1, 3, 100),
        }
    )
)
def test_patch_ae(arguments: dict[str, Any]) -> None:
    model = build(PatchAEModel, {**arguments, "pre_trained": False})
    if model is None:
        return
    images = torch.rand(2, 3, *arguments["image_size"])
    loss = HybridLoss(0.5, arguments["patch_size"])
    codes = model.embed(images)
    assert_trains(model, loss(images, model.reconstruct(codes)))
    model.bank.fill(codes.movedim(1, -1).flatten(0, 2)[:7].detach())
    assert_scores(model, images)


@examples
@given(
    st.fixed_dictionaries(
        {
            "backbone": choices("resnet18", "vit_tiny_patch16_224"),
            "layers": mostly(None, ["layer2"], bad=([], ["layer9"], ["layer1", "layer1"])),
            "image_size": sizes((64, 64), (32, 96)),
            "feature_stride": mostly(None, 8, 16, bad=(0, -8, 7, 2.5, "8")),
            "context_dim": counts(1, 8, 1000),
            "window_size": mostly(3, 5, bad=(*NOT_A_COUNT, 4)),
            "hole_size": mostly(1, 3, bad=(*NOT_A_COUNT, 2)),
            "rank": mostly(0, 1, 8, 1000, bad=NOT_A_COUNT[1:]),
            "num_units": mostly(0, 16, bad=NOT_A_COUNT[1:]),
            "top_fraction": mostly(0.0, 0.01, 1.0, bad=(*NOT_A_NUMBER, -0.1, 1.1)),
        }
    )
)
def test_feature_inpainting(arguments: dict[str, Any]) -> None:
    model = build(FeatureInpaintingModel, {**arguments, "pre_trained": False})
    if model is None:
        return
    images = torch.rand(2, 3, *arguments["image_size"])
    model.fit([model.backbone(images), model.backbone(images.flip(0))])
    assert_scores(model, images)


NOT_A_CHOICE = ("other", "", None, 1)
NOT_A_SIZE = ((0, 64), (-64, 64), (1, 1))
# one wrong argument at a time, which a combination may hide behind another
WRONG: dict[type[nn.Module], tuple[dict[str, Any], dict[str, tuple[Any, ...]]]] = {
    InTraModel: (
        {"image_size": (64, 64), "patch_size": 8, "window_size": 3, "embed_dim": 16, "depth": 1, "num_heads": 2},
        {
            "image_size": NOT_A_SIZE, "attention": NOT_A_CHOICE, "position": NOT_A_CHOICE, "readout": NOT_A_CHOICE,
            **dict.fromkeys(
                ("patch_size", "window_size", "embed_dim", "depth", "num_heads", "windows_per_chunk"), NOT_A_COUNT
            ),
        },
    ),
    ADTRModel: (
        {
            "backbone": "resnet18", "pre_trained": False, "image_size": (64, 64), "embed_dim": 8, "depth": 1,
            "num_heads": 1, "mlp_dim": 8,
        },
        {
            "image_size": NOT_A_SIZE, "query": NOT_A_CHOICE, "attention": NOT_A_CHOICE, "backbone": NOT_A_CHOICE,
            "feature_size": (0, -8, 7, 2.5, (8,), "8", True), "dropout": (*NOT_A_NUMBER, -0.1, 1.0),
            "top_fraction": (*NOT_A_NUMBER, -0.1, 1.1),
            **dict.fromkeys(("embed_dim", "depth", "num_heads", "mlp_dim", "pool_size"), NOT_A_COUNT),
        },
    ),
    SAAEModel: (
        {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 64), "latent_dim": 5},
        {
            "image_size": NOT_A_SIZE, "distance": NOT_A_CHOICE, "backbone": NOT_A_CHOICE,
            "feature_stride": (*NOT_A_COUNT[:-1], 7), "latent_dim": NOT_A_COUNT[:-1],
            **dict.fromkeys(("patch_size", "num_heads", "depth", "mlp_ratio"), NOT_A_COUNT),
        },
    ),
    FeatureInpaintingModel: (
        {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 64), "window_size": 5},
        {
            "image_size": NOT_A_SIZE, "backbone": NOT_A_CHOICE, "feature_stride": (*NOT_A_COUNT[:-1], 7),
            "layers": ([], ["layer9"], ["layer1", "layer1"]), "top_fraction": (*NOT_A_NUMBER, -0.1, 1.1),
            "rank": NOT_A_COUNT[1:], "num_units": NOT_A_COUNT[1:],
            "context_dim": NOT_A_COUNT, "window_size": (*NOT_A_COUNT, 4), "hole_size": (*NOT_A_COUNT, 2, 5),
        },
    ),
    PatchAEModel: (
        {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 64), "embed_dim": 8},
        {
            "image_size": NOT_A_SIZE, "score_by": NOT_A_CHOICE, "backbone": NOT_A_CHOICE,
            "sigma": (*NOT_A_NUMBER, -1.0, 16.0), "top_fraction": (*NOT_A_NUMBER, -0.1, 1.1),
            "trained_stages": (-1, 5, 2.5, "4", None),
            "layers": ([], ["layer9"], ["layer1", "layer1.0"]), "feature_scale": NOT_A_CHOICE,
            "embed_dim": NOT_A_COUNT[:-1], **dict.fromkeys(("patch_size", "vectors_per_chunk"), NOT_A_COUNT),
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_class", "argument"),
    [(model_class, argument) for model_class, (_, wrong) in WRONG.items() for argument in wrong],
)
def test_each_wrong_argument_is_named(model_class: type[nn.Module], argument: str) -> None:
    good, wrong = WRONG[model_class]
    for value in wrong[argument]:
        with pytest.raises(ValueError, match=rf"^[^\n]*\b{argument}\b[^\n]*$"):
            model_class(**{**good, argument: value})


@pytest.mark.parametrize("value", [*NOT_A_NUMBER, -1.0])
@pytest.mark.parametrize(
    ("model_class", "argument"),
    [
        (InTra, "learning_rate"), (InTra, "held_out_fraction"), (InTra, "gms_weight"), (InTra, "ssim_weight"),
        (ADTR, "learning_rate"), (ADTR, "weight_decay"), (ADTR, "alpha"), (ADTR, "confetti"),
        (SAAE, "learning_rate"), (SAAE, "explained_variance"),
        (PatchAE, "learning_rate"), (PatchAE, "coreset_ratio"), (PatchAE, "alpha"), (PatchAE, "sigma"),
        (ADTR, "feature_cache_gib"), (SAAE, "feature_cache_gib"), (FeatureInpainting, "feature_cache_gib"),
    ],
)  # fmt: skip
def test_numbers_of_the_lightning_models(model_class: type[nn.Module], argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument}\b.*got {value!r}"):
        model_class(**{**TINY[model_class.__name__], argument: value})


@pytest.mark.parametrize("value", [0, -1, 2.5, math.nan, True, "4"])
@pytest.mark.parametrize(
    ("model_class", "argument"),
    [
        (InTra, "windows_per_image"), (InTra, "windows_per_step"), (InTra, "max_held_out"), (InTra, "patience"),
        (InTra, "window_size"), (InTra, "patch_size"),
        (ADTR, "lr_drop_epoch"), (PatchAE, "coreset_candidates"),
    ],
)  # fmt: skip
def test_counts_of_the_lightning_models(model_class: type[nn.Module], argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{argument} must be .* got {value!r}"):
        model_class(**{**TINY[model_class.__name__], argument: value})


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("defect_probability", math.nan), ("defect_kinds", ["hole"]), ("defect_kinds", []),
        ("defect_size_range", (math.nan, 0.1)), ("defect_size_range", (0.1, 2.0)), ("defect_aspect_range", (0.0, 1.0)),
        ("defect_angle_range", (math.nan, 90.0)), ("defect_angle_range", (0.0, math.inf)),
        ("defect_position_range", (0.0, math.nan)), ("defect_position_range", (0.0, 0.5, 1.0)),
        ("defect_size_range", (0.1,)),
    ],
)  # fmt: skip
def test_defects_of_patch_ae(argument: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{argument}"):
        PatchAE(**TINY["PatchAE"], **{argument: value})


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
@pytest.mark.parametrize("model_class", [ADTR, PatchAE, FeatureInpainting])
def test_a_backbone_that_does_not_fit_is_named(model_class: type[nn.Module], backbone: str) -> None:
    if model_class is FeatureInpainting and backbone.startswith("vit"):
        pytest.skip("it takes plain vision transformers")
    with pytest.raises(ValueError, match=f"backbone must be a CNN, .* got '{backbone}'"):
        model_class(backbone=backbone, pre_trained=False, image_size=64)


def test_top_k_counts_the_cells_of_the_feature_map() -> None:
    arguments = {**TINY["ADTR"], "feature_size": 8, "patch_size": 2, "labels": "image"}
    ADTR(**arguments, top_k=64)
    with pytest.raises(ValueError, match="top_k must be from 1 to the 64 cells of the feature map, got 65"):
        ADTR(**arguments, top_k=65)
