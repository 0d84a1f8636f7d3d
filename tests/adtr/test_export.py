# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import pytest
from anomalib.data import MVTecAD
from anomalib.deploy import ExportType
from anomalib.engine import Engine
from lightning import seed_everything
from torchvision.transforms.v2 import RandomChoice, Resize

from anomalib_recon.models import ADTR
from tests.exports import expected_from, export, images_of, run

OWN_SIZE = (64, 96)
OTHER_SIZES = [(128, 128), (200, 131), (48, 40)]


@pytest.fixture(scope="module")
def datamodule(stripes: Path) -> MVTecAD:
    """Some validation images are blurred, so that images of other sizes have no scores beyond the range."""
    blur = RandomChoice([Resize((64, 64)), Resize((48, 40))])
    return MVTecAD(
        root=stripes, category="stripes", train_batch_size=4, eval_batch_size=1, num_workers=0, val_augmentations=blur
    )


@pytest.fixture(scope="module")
def model(datamodule: MVTecAD, tmp_path_factory: pytest.TempPathFactory) -> ADTR:
    """A trained model, as loaded from its checkpoint."""
    seed_everything(0)
    model = ADTR(
        backbone="resnet18", layers=["layer1", "layer2"], pre_trained=False, image_size=OWN_SIZE,
        feature_size=(8, 12), embed_dim=32, depth=1, num_heads=2, mlp_dim=64, learning_rate=2e-3, pool_size=8,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("results")
    engine = Engine(default_root_dir=folder, max_epochs=10, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    return ADTR.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path).eval()


@pytest.fixture(scope="module")
def exported(model: ADTR, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("openvino"), ExportType.OPENVINO)


def assert_equal(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Scores and maps are equal, on their normalised scale of [0, 1], and neither all the same."""
    for name, bound in (("pred_score", 1e-3), ("anomaly_map", 1e-2)):
        assert np.ptp(expected[name]) > 0.1
        assert np.abs(result[name].reshape(expected[name].shape) - expected[name]).max() < bound


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("size", [OWN_SIZE, *OTHER_SIZES])
def test_openvino_scores_are_those_of_the_checkpoint(
    model: ADTR, exported: Path, stripes: Path, size: tuple[int, int], batch_size: int
) -> None:
    images = images_of(stripes, size)
    expected = expected_from(model, images)
    result = run(exported, images, batch_size)
    assert_equal(result, expected)
    assert np.array_equal(result["pred_label"].ravel(), expected["pred_label"].ravel())


def test_onnx_scores_at_a_fixed_input_size_are_those_of_the_checkpoint(
    model: ADTR, stripes: Path, tmp_path: Path
) -> None:
    path = export(model, tmp_path, ExportType.ONNX, input_size=OWN_SIZE)
    images = images_of(stripes, OWN_SIZE)
    assert_equal(run(path, images, 4), expected_from(model, images))
