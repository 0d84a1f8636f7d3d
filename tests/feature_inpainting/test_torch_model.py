# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from torch import Tensor

from anomalib_recon.layers import ResidualDistance
from anomalib_recon.models import FeatureInpainting
from anomalib_recon.models.feature_inpainting import FeatureInpaintingModel
from tests.exports import expected_from, export, images_of, run
from tests.tiny_models import TINY, engine_in

SMALL = {"backbone": "resnet18", "layers": ["layer1", "layer2"], "pre_trained": False, "image_size": (64, 80)}


def draw_images(count: int, seed: int = 0) -> Tensor:
    """Blurred noise on a gradient, the same on all."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.nn.functional.avg_pool2d(torch.rand(count, 3, 68, 84, generator=generator), 5, stride=1)
    return (noise + torch.linspace(0, 0.4, 80)).clamp(0, 1)


def fitted(**arguments) -> FeatureInpaintingModel:
    torch.manual_seed(0)
    sizes = {"context_dim": 16, "window_size": 5, "rank": 32, "num_units": 64}
    model = FeatureInpaintingModel(**{**SMALL, **sizes, **arguments}).eval()
    with torch.no_grad():
        features = model.backbone(draw_images(24))
    model.fit(features.split(8))
    return model


@pytest.mark.parametrize("rank", [32, 0])
def test_residuals_have_no_mean_and_those_of_other_normal_images_a_distance_of_one(rank: int) -> None:
    model = fitted(rank=rank)
    with torch.no_grad():
        features = model.embed(draw_images(24))
        residual = features - model.reconstruct(features)
        anomaly_map = model(draw_images(24, seed=1)).anomaly_map
    assert features.shape[1:] == (192, 8, 10)
    assert anomaly_map.shape == (24, 1, 64, 80)
    assert float(residual.mean(dim=0).abs().mean()) < 0.2 * float(residual.abs().mean())
    assert float(anomaly_map.mean()) == pytest.approx(1, abs=0.2)


def test_a_changed_part_of_an_image_is_found_where_it_is() -> None:
    model = fitted()
    image = draw_images(1, seed=1)
    changed = image.clone()
    changed[:, :, 24:40, 32:48] = changed[:, :, 24:40, 32:48].flip(3) * 0.4
    with torch.no_grad():
        normal, anomalous = model(image), model(changed)
    assert float(anomalous.pred_score) > 1.5 * float(normal.pred_score)
    row, column = divmod(int(anomalous.anomaly_map.argmax()), 80)
    assert 20 <= row < 44
    assert 28 <= column < 52


def test_colours_are_the_first_components() -> None:
    model = FeatureInpaintingModel(**SMALL)
    features = torch.zeros(1, 192, 8, 10)
    features[0, :, 0, 0] = 5.0
    features[0, :3, 0, 0] = torch.tensor([0.0, 1.5, -9.0])
    picture = model.false_colors(features)
    assert picture.shape == (1, 3, *model.image_size)
    assert picture[0, :, 0, 0].tolist() == [0.5, 0.75, 0.0]
    assert (picture[0, :, -1] == 0.5).all()


def test_rank_zero_predicts_the_mean_of_the_place() -> None:
    model = fitted(rank=0)
    with torch.no_grad():
        normal, tested = model.embed(draw_images(24)), model.embed(draw_images(2, seed=1))
        result = model(draw_images(2, seed=1))
    torch.testing.assert_close(model.reconstruct(tested), normal.mean(dim=0).expand_as(tested), atol=1e-4, rtol=0)
    distance = ResidualDistance(192, (8, 10))
    distance.fit(normal.split(5))
    expected = distance(tested, torch.zeros_like(tested))
    expected = torch.nn.functional.interpolate(expected, (64, 80), mode="bilinear", align_corners=False)
    torch.testing.assert_close(result.anomaly_map, expected, atol=1e-3, rtol=1e-3)


def test_without_a_prediction_training_and_export_work(stripes: Path, tmp_path: Path) -> None:
    model = FeatureInpainting(**{**TINY["FeatureInpainting"], "rank": 0})
    assert not any("regression" in name for name in model.state_dict())
    datamodule = MVTecAD(root=stripes, category="stripes", train_batch_size=6, eval_batch_size=4, num_workers=0)
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    loaded = FeatureInpainting.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path).eval()
    images = images_of(stripes, (64, 64))
    expected = expected_from(loaded, images)
    result = run(export(loaded, tmp_path, ExportType.OPENVINO), images, 3)
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(result[name], expected[name], atol=1e-3)


def test_8_bits_store_the_distance_and_not_the_backbone(stripes: Path, tmp_path: Path) -> None:
    model = FeatureInpainting(**TINY["FeatureInpainting"])
    datamodule = MVTecAD(root=stripes, category="stripes", train_batch_size=6, eval_batch_size=4, num_workers=0)
    engine_in(tmp_path, max_epochs=1).fit(model, datamodule=datamodule)
    images = images_of(stripes, (64, 64))
    expected = expected_from(model.eval(), images)
    fp32 = export(model, tmp_path / "fp32", ExportType.OPENVINO)
    int8 = export(model, tmp_path / "int8", ExportType.OPENVINO, compression_type=CompressionType.INT8)
    saved = fp32.with_suffix(".bin").stat().st_size - int8.with_suffix(".bin").stat().st_size
    distance = model.model.anomaly_map_generator.distance.whitening
    assert saved > 0.7 * 4 * distance.numel()
    np.testing.assert_allclose(run(int8, images, 5)["pred_score"], expected["pred_score"], atol=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_size": 4}, "window_size must be odd, got 4"),
        ({"hole_size": 2}, "hole_size must be odd, got 2"),
        ({"window_size": 3, "hole_size": 3}, "hole_size must be smaller than window_size, got 3 and 3"),
        ({"rank": -1}, "rank must be a whole number from 0, got -1; 0 leaves the mean of the place"),
        ({"num_units": -1}, "num_units must be a whole number from 0, got -1; 0 leaves a linear one"),
        ({"context_dim": 0}, "context_dim must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FeatureInpaintingModel(**{**SMALL, **arguments})
