# SPDX-License-Identifier: Apache-2.0

"""Large images as tiles, by anomalib's callback and by its ensemble."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
import yaml
from anomalib.callbacks.tiler_configuration import TilerConfigurationCallback
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import ImageBatch
from anomalib.data.utils.tiler import Tiler
from torch import Tensor
from torchvision.transforms.v2 import Resize

from anomalib_recon.models import FeatureInpainting
from anomalib_recon.pre_processing import ExactResizePreProcessor
from tests.tiny_models import TINY, Trained, build, demo_data, engine_in, train

# images of two tiles
SIZE, TILE = (64, 128), 64
# a pass over tiles is what takes time
FEWER = {"InTra": {"windows_per_image": 2}, "PatchAE": {"coreset_ratio": 0.05}}


def callback(stride: int = TILE, tile_size: int = TILE) -> TilerConfigurationCallback:
    return TilerConfigurationCallback(enable=True, tile_size=tile_size, stride=stride)


def build_for_tiles(name: str, **arguments: Any) -> Any:
    pre_processor = ExactResizePreProcessor(Resize(SIZE, antialias=True))
    return build(name, **{"pre_processor": pre_processor, **FEWER.get(name, {}), **arguments})


@pytest.fixture(scope="module", params=TINY)
def tiled(request: pytest.FixtureRequest, demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp(request.param)
    return train(build_for_tiles(request.param), demo, folder, max_epochs=1, callbacks=[callback()])


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(2, 3, *SIZE, generator=torch.Generator().manual_seed(0))


def test_a_tile_is_scored_as_an_image_is(tiled: Trained, images: Tensor) -> None:
    network = tiled.model.model
    with torch.no_grad():
        predictions = network(images)
        tiler, network.tiler = network.tiler, None
        halves = [network(half) for half in images.split(TILE, dim=3)]
        network.tiler = tiler
    anomaly_map = torch.cat([half.anomaly_map for half in halves], dim=3)
    assert torch.allclose(anomaly_map, predictions.anomaly_map, rtol=1e-3, atol=1e-5)
    assert torch.allclose(halves[0].pred_score.max(halves[1].pred_score), predictions.pred_score, rtol=1e-3)
    assert predictions.anomaly_map.shape == (2, 1, *SIZE)
    assert predictions.pred_score.shape == (2,)


def test_a_checkpoint_brings_its_tiles(tiled: Trained, demo: Path, images: Tensor, tmp_path: Path) -> None:
    loaded = type(tiled.model).load_from_checkpoint(tiled.checkpoint).eval()
    with torch.no_grad():
        for expected, value in zip(tiled.model(images), loaded(images), strict=True):
            assert torch.allclose(expected.float(), value.float(), atol=1e-4)
    metrics = engine_in(tmp_path).test(loaded, datamodule=demo_data(demo), verbose=False)
    # a model of another size of images takes that of the checkpoint, and needs no callback
    for model in (build(type(loaded).__name__), build_for_tiles(type(loaded).__name__)):
        tested = engine_in(tmp_path).test(model, datamodule=demo_data(demo), ckpt_path=tiled.checkpoint, verbose=False)
        assert tested == metrics


def test_exports_have_the_tiles(tiled: Trained, images: Tensor, tmp_path: Path) -> None:
    if type(tiled.model).__name__ != "SAAE":
        pytest.skip("exports are tested for one model: all have the same tiles")
    path = tiled.model.to_openvino(tmp_path)
    pickle.dumps(tiled.model.model.tiler)  # the exporter's symbols cannot be pickled, and are not kept
    outputs = openvino.compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})(images.numpy())
    with torch.no_grad():
        expected = tiled.model(images)
    np.testing.assert_allclose(outputs["anomaly_map"], expected.anomaly_map.numpy(), atol=2e-3)
    np.testing.assert_allclose(outputs["pred_score"], expected.pred_score.numpy(), atol=2e-3)


def test_overlapping_tiles_are_averaged(images: Tensor) -> None:
    network = build("ADTR").model.eval()
    with torch.no_grad():
        parts = [network(images[..., start : start + TILE]).anomaly_map for start in (0, 32, 64)]
        network.tiler = Tiler(tile_size=TILE, stride=32)
        anomaly_map = network(images).anomaly_map
    middle = (parts[0][..., 32:] + parts[1][..., :32]) / 2
    assert torch.allclose(anomaly_map[..., 32:64], middle, rtol=1e-3, atol=1e-5)
    assert torch.allclose(anomaly_map[..., :32], parts[0][..., :32], rtol=1e-3, atol=1e-5)


def test_adtr_plus_learns_from_the_tiles_of_masks() -> None:
    model = build_for_tiles("ADTR", labels="pixel")
    model.model.tiler = Tiler(tile_size=TILE, stride=TILE)
    mask = torch.zeros(2, *SIZE, dtype=torch.bool)
    mask[1, 10:20, 70:80] = True
    batch = ImageBatch(image=torch.rand(2, 3, *SIZE), gt_mask=mask, gt_label=torch.tensor([False, True]))
    features, masks = model.training_inputs(batch)
    assert len(features) == 4
    assert torch.equal(masks, torch.stack([mask[0, :, :TILE], mask[0, :, TILE:], mask[1, :, :TILE], mask[1, :, TILE:]]))


@pytest.mark.parametrize(
    ("arguments", "callbacks", "message"),
    [
        (
            {},
            [callback(32, tile_size=32)],
            r"image_size of the model, got \(32, 32\) and \(64, 64\)",
        ),
        ({}, [], r"pre_processor resizes images to \(64, 128\), but image_size is \(64, 64\)"),
        ({"labels": "image", "top_k": 5}, [callback()], "labels='image' does not say which tile"),
    ],
)
def test_tiles_that_do_not_fit_are_refused(
    arguments: dict[str, Any], callbacks: list[Any], message: str, demo: Path, tmp_path: Path
) -> None:
    engine = engine_in(tmp_path, callbacks=callbacks)
    with pytest.raises(ValueError, match=message):
        engine.fit(build_for_tiles("ADTR", **arguments), datamodule=demo_data(demo))


def test_the_config_of_the_page_is_read(tmp_path: Path) -> None:
    page = Path(__file__).parents[1] / "docs" / "tiling.md"
    config = yaml.safe_load(page.read_text(encoding="utf-8").split("```yaml\n")[1].split("```")[0])
    config["model"]["init_args"] |= {"backbone": "resnet18", "pre_trained": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    cli = AnomalibCLI(["fit", "--data", "DemoAD", "--config", str(tmp_path / "config.yaml")], run=False)
    assert isinstance(cli.model, FeatureInpainting)
    assert cli.model.pre_processor.transform.size == [2048, 2048]
