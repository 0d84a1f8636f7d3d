# SPDX-License-Identifier: Apache-2.0

"""InTra with paintings compared in units of normal residuals."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.deploy import CompressionType, ExportType
from torch.nn import functional

from anomalib_recon.models import InTra
from anomalib_recon.models.intra.loss import gradient_magnitude_similarity
from anomalib_recon.models.intra.torch_model import InTraModel
from tests.exports import expected_from, export, images_of, is_last_product_in_floating_point, run
from tests.intra.test_training import SCHEDULE, SMALL, data, train

SIZES = {"image_size": (48, 40), "patch_size": 8, "window_size": 5, "embed_dim": 16, "depth": 1, "num_heads": 2}
ARGUMENTS = {"distance": "mahalanobis", "top_fraction": 0.02}


@pytest.fixture(scope="module")
def trained(stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[InTra, Path, dict[str, float]]:
    """A trained model, its checkpoint and its test metrics."""
    model = InTra(**SMALL, **SCHEDULE, **ARGUMENTS, visualizer=False)
    _, engine = train(stripes, tmp_path_factory.mktemp("results"), model=model)
    [metrics] = engine.test(model, datamodule=data(stripes), verbose=False)
    return model.eval(), Path(engine.best_model_path), metrics


@torch.no_grad()
def test_distances_lie_at_the_places_of_their_patches() -> None:
    torch.manual_seed(0)
    model = InTraModel(
        image_size=(48, 40), patch_size=8, window_size=5, embed_dim=16, depth=1, num_heads=2, **ARGUMENTS
    )
    normal = torch.rand(300, 30, 192)
    model.mahalanobis.fit([model.residual(normal, normal + 0.1 * torch.randn_like(normal))])
    painted = torch.rand(1, 30, 192)
    patches = painted.clone()
    patches[0, 2 * 5 + 3] += 1  # row 2, column 3 of 6 x 5 patches
    predictions = model.compare(patches, painted)
    [[anomaly_map]] = predictions.anomaly_map
    row, column = divmod(int(anomaly_map.argmax()), 40)
    assert 16 <= row < 24
    assert 24 <= column < 32
    highest = anomaly_map.flatten().sort(descending=True).values[: round(0.02 * 48 * 40)]
    torch.testing.assert_close(predictions.pred_score, highest.mean()[None])


@torch.no_grad()
def test_pixels_and_gradients_of_a_patch_are_compared() -> None:
    model = InTraModel(**SIZES, **ARGUMENTS)
    images, painted = torch.rand(2, 1, 3, 48, 40)
    residual = model.residual(model.embed(images), model.embed(painted))
    assert residual.shape == (1, 192 + 16 + 4, 6, 5)
    pixels = (images - painted)[0, :, 16:24, 24:32].permute(1, 2, 0)  # row 2, column 3 of 6 x 5 patches
    torch.testing.assert_close(residual[0, :192, 2, 3], pixels.flatten())
    halves = [functional.interpolate(part, scale_factor=0.5, mode="bilinear") for part in (images, painted)]
    of_gradients = 1 - gradient_magnitude_similarity(*halves).mean(dim=1)[0]
    torch.testing.assert_close(residual[0, 192:208, 2, 3], of_gradients[8:12, 12:16].flatten())


@torch.no_grad()
def test_residuals_of_the_training_images_are_measured(
    trained: tuple[InTra, Path, dict[str, float]], stripes: Path
) -> None:
    model, _, metrics = trained
    datamodule = data(stripes)
    datamodule.setup("fit")
    images = model.pre_processor.transform(torch.stack([item.image for item in datamodule.train_data]))
    patches = model.model.embed(images)
    residuals = model.model.residual(patches, model.model.reconstruct(patches))
    torch.testing.assert_close(model.model.mahalanobis.mean, residuals.mean(dim=0), atol=1e-5, rtol=1e-4)
    distances = model.model.mahalanobis(residuals, torch.zeros_like(residuals))
    assert 0.3 < distances.square().mean() < 1.1
    assert metrics["pixel_AUROC"] > 0.9


def test_checkpoint_and_export_hold_the_distance(
    trained: tuple[InTra, Path, dict[str, float]], stripes: Path, tmp_path: Path
) -> None:
    _, checkpoint, _ = trained
    model = InTra.load_from_checkpoint(checkpoint).eval()
    images = images_of(stripes, (64, 64))
    expected = expected_from(model, images)
    result = run(export(model, tmp_path, ExportType.OPENVINO), images, 2)
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(result[name].reshape(expected[name].shape), expected[name], atol=1e-3)
    path = export(
        model,
        tmp_path / "ptq",
        ExportType.OPENVINO,
        compression_type=CompressionType.INT8_PTQ,
        datamodule=data(stripes),
    )
    assert is_last_product_in_floating_point(path)
    with pytest.raises(ValueError, match=r"distance"):
        InTra(**SMALL).on_load_checkpoint(torch.load(checkpoint, weights_only=True))
