# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import openvino
import pytest
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from anomalib.post_processing import PostProcessor
from lightning import seed_everything

from anomalib_recon.models import PatchAE
from tests.exports import expected_from, export, images_of, run

OWN_SIZE = (64, 64)
OTHER_SIZES = [(128, 128), (200, 131), (48, 40)]


@pytest.fixture(scope="module")
def datamodule(stripes: Path) -> MVTecAD:
    return MVTecAD(root=stripes, category="stripes", train_batch_size=12, eval_batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def model(datamodule: MVTecAD, tmp_path_factory: pytest.TempPathFactory) -> PatchAE:
    """A trained model, as loaded from its checkpoint."""
    seed_everything(0)
    model = PatchAE(
        backbone="resnet18", pre_trained=False, image_size=OWN_SIZE, embed_dim=16, learning_rate=1e-3,
        coreset_ratio=0.3, vectors_per_chunk=100, post_processor=PostProcessor(enable_normalization=False),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("results")
    engine = Engine(default_root_dir=folder, max_epochs=2, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    return PatchAE.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path).eval()


@pytest.fixture(scope="module")
def exported(model: PatchAE, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("openvino"), ExportType.OPENVINO)


def largest_difference(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest difference of raw score and map over all images, relative to the largest of these."""
    return max(
        float(np.abs(result[name].reshape(expected[name].shape) - expected[name]).max() / expected[name].max())
        for name in ("pred_score", "anomaly_map")
    )


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(("size", "bound"), [(OWN_SIZE, 1e-3), *((size, 1e-2) for size in OTHER_SIZES)])
def test_openvino_scores_are_those_of_the_checkpoint(
    model: PatchAE, exported: Path, stripes: Path, size: tuple[int, int], bound: float, batch_size: int
) -> None:
    images = images_of(stripes, size)
    expected = expected_from(model, images)
    result = run(exported, images, batch_size)
    assert np.ptp(expected["pred_score"]) > 0.1 * expected["pred_score"].max()
    assert largest_difference(result, expected) < bound
    # anomalib's threshold is the score of an image, whose label the last digit decides
    threshold = model.post_processor.image_threshold.item()
    clear = np.abs(expected["pred_score"].ravel() / threshold - 1) > bound
    assert clear.sum() >= 8
    assert np.array_equal(result["pred_label"].ravel()[clear], expected["pred_label"].ravel()[clear])


def test_fp16_scores_nearly_as_the_checkpoint(model: PatchAE, exported: Path, stripes: Path, tmp_path: Path) -> None:
    path = export(model, tmp_path, ExportType.OPENVINO, compression_type=CompressionType.FP16)
    assert path.with_suffix(".bin").stat().st_size < 0.6 * exported.with_suffix(".bin").stat().st_size
    images = images_of(stripes, OWN_SIZE)
    assert 0 < largest_difference(run(path, images, 4), expected_from(model, images)) < 0.01


@pytest.mark.parametrize("compression", [CompressionType.INT8, CompressionType.INT8_PTQ])
def test_8_bits_leave_the_backbone_as_it_is(
    model: PatchAE, datamodule: MVTecAD, stripes: Path, tmp_path: Path, compression: CompressionType
) -> None:
    """Rounded weights would move the features, and whitening would enlarge that."""
    path = export(model, tmp_path, ExportType.OPENVINO, compression_type=compression, datamodule=datamodule)
    images = images_of(stripes, OWN_SIZE)
    assert largest_difference(run(path, images, 4), expected_from(model, images)) < 0.02


def test_the_search_is_a_loop_over_one_copy_of_the_bank(model: PatchAE, exported: Path) -> None:
    assert len(model.model.bank.vectors) == 230  # 3 chunks of 100, the last one filled up
    graph = openvino.Core().read_model(exported)
    kinds = [node.get_type_name() for node in graph.get_ops()]
    assert kinds.count("TensorIterator") + kinds.count("Loop") == 1
    padded = 300 * 16 * 4
    sizes = [node.get_data().nbytes for node in graph.get_ops() if node.get_type_name() == "Constant"]
    weights = sum(value.numel() for name, value in model.model.named_parameters() if "decoder" not in name) * 4
    assert exported.with_suffix(".bin").stat().st_size < weights + padded + 200_000
    assert max(size for size in sizes) < weights
