# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning import seed_everything

from anomalib_recon.models import SAAE
from tests.exports import BF16, expected_from, export, images_of, quantised_convolutions, run

MODELS = {
    "vit": {"backbone": "vit_tiny_patch16_224"},
    "cnn": {
        "backbone": "vgg19",
        "layers": ["features.3", "features.8", "features.11"],
        "num_heads": 2,
        "patch_size": 2,
    },
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, stripes: Path, tmp_path_factory: pytest.TempPathFactory) -> SAAE:
    """A trained model, as loaded from its checkpoint. Its scores are raw: none is clamped to [0, 1]."""
    seed_everything(0)
    model = SAAE(
        **MODELS[request.param],
        image_size=(64, 80),
        pre_trained=False,
        explained_variance=0.95,
        learning_rate=2e-3,
        post_processor=PostProcessor(enable_normalization=False),
    )
    datamodule = MVTecAD(root=stripes, category="stripes", train_batch_size=6, eval_batch_size=4, num_workers=0)
    folder = tmp_path_factory.mktemp("results")
    engine = Engine(default_root_dir=folder, max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    return SAAE.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path).eval()


@pytest.fixture(scope="module")
def exported(model: SAAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("openvino"), ExportType.OPENVINO)


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("size", [(64, 80), (128, 128), (200, 131)])
def test_openvino_scores_are_those_of_the_checkpoint(
    model: SAAE, exported: Path, stripes: Path, size: tuple[int, int], batch_size: int
) -> None:
    images = images_of(stripes, size)
    expected = expected_from(model, images)
    result = run(exported, images, batch_size)
    assert np.ptp(expected["pred_score"]) > 1e-3 * expected["pred_score"].mean()
    for name in ("pred_score", "anomaly_map"):
        np.testing.assert_allclose(result[name].reshape(expected[name].shape), expected[name], rtol=1e-4)
    assert np.array_equal(result["pred_label"].ravel(), expected["pred_label"].ravel())


def test_with_a_backbone_int8_ptq_stores_weights_in_8_bits(
    model: SAAE, exported: Path, stripes: Path, tmp_path: Path
) -> None:
    if model.hparams["backbone"] != MODELS["vit"]["backbone"]:
        pytest.skip("weights are compressed alike, whatever the backbone")
    datamodule = MVTecAD(root=stripes, category="stripes", eval_batch_size=1, num_workers=0)
    int8, ptq = (
        export(model, tmp_path / name, ExportType.OPENVINO, compression_type=name, datamodule=datamodule)
        for name in (CompressionType.INT8, CompressionType.INT8_PTQ)
    )
    assert not any(quantised_convolutions(ptq))
    sizes = [path.with_suffix(".bin").stat().st_size for path in (int8, ptq, exported)]
    assert sizes[0] == sizes[1] < 0.5 * sizes[2]
    images = images_of(stripes, (64, 80))
    expected = expected_from(model, images)["pred_score"].ravel()
    np.testing.assert_allclose(run(ptq, images, 4, BF16)["pred_score"].ravel(), expected, rtol=0.02)
