# SPDX-License-Identifier: Apache-2.0

from pathlib import Path

import numpy as np
import onnx
import pytest
from anomalib.data import MVTecAD
from anomalib.deploy import CompressionType, ExportType
from anomalib.engine import Engine
from lightning import seed_everything

from anomalib_recon.models import InTra
from tests.exports import expected_from, export, images_of, run

OWN_SIZE = (64, 64)
OTHER_SIZES = [(200, 131), (48, 40)]


@pytest.fixture(scope="module")
def datamodule(stripes: Path) -> MVTecAD:
    return MVTecAD(root=stripes, category="stripes", train_batch_size=12, eval_batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def model(datamodule: MVTecAD, tmp_path_factory: pytest.TempPathFactory) -> InTra:
    """A trained model, as loaded from its checkpoint."""
    seed_everything(0)
    model = InTra(
        image_size=OWN_SIZE, patch_size=8, window_size=5, embed_dim=32, depth=3, num_heads=2, learning_rate=2e-3,
        windows_per_image=100, windows_per_step=64, windows_per_chunk=16,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("results")
    engine = Engine(default_root_dir=folder, max_epochs=4, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    return InTra.load_from_checkpoint(engine.trainer.checkpoint_callback.best_model_path).eval()


@pytest.fixture(scope="module")
def exported(model: InTra, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("openvino"), ExportType.OPENVINO)


def largest_difference(result: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> float:
    """Largest difference of score and map over all images, on the normalised scale of [0, 1]."""
    return max(
        float(np.abs(result[name].reshape(expected[name].shape) - expected[name]).max())
        for name in ("pred_score", "anomaly_map")
    )


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("size", "bound"), [(OWN_SIZE, 1e-3), *((size, 1e-2) for size in OTHER_SIZES)])
def test_openvino_scores_are_those_of_the_checkpoint(
    model: InTra, exported: Path, stripes: Path, size: tuple[int, int], bound: float, batch_size: int
) -> None:
    images = images_of(stripes, size)
    expected = expected_from(model, images)
    result = run(exported, images, batch_size)
    assert np.ptp(expected["pred_score"]) > 0.1
    assert largest_difference(result, expected) < bound
    assert np.array_equal(result["pred_label"].ravel(), expected["pred_label"].ravel())


def test_a_model_trained_on_single_patches_is_exported_to_cover_four(
    datamodule: MVTecAD, stripes: Path, tmp_path: Path
) -> None:
    seed_everything(0)
    exact = InTra(
        image_size=OWN_SIZE, patch_size=8, window_size=5, embed_dim=16, depth=1, num_heads=2, learning_rate=2e-3,
        windows_per_image=20, windows_per_chunk=10, readout="token",
    )  # fmt: skip
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    engine.fit(exact, datamodule=datamodule)
    checkpoint = engine.trainer.checkpoint_callback.best_model_path
    model = InTra.load_from_checkpoint(checkpoint, covered_per_window=4).eval()
    assert len(model.model.places) == 16  # 2 x 2 tiles of 4 x 4 patches, at 2 x 2 offsets, for 64 patches
    path = export(model, tmp_path, ExportType.OPENVINO)
    for size in (OWN_SIZE, (48, 40)):
        images = images_of(stripes, size)
        result, expected = run(path, images, 4), expected_from(model, images)
        assert largest_difference(result, expected) < (1e-3 if size == OWN_SIZE else 1e-2)
        assert largest_difference(result, expected_from(exact.eval(), images)) > 1e-3


@pytest.mark.parametrize("compression", [CompressionType.FP16, CompressionType.INT8, CompressionType.INT8_PTQ])
def test_compressed_models_still_tell_holes_from_stripes(
    model: InTra, datamodule: MVTecAD, exported: Path, stripes: Path, tmp_path: Path, compression: CompressionType
) -> None:
    path = export(model, tmp_path, ExportType.OPENVINO, compression_type=compression, datamodule=datamodule)
    assert path.with_suffix(".bin").stat().st_size < exported.with_suffix(".bin").stat().st_size
    scores = run(path, images_of(stripes, OWN_SIZE), 4)["pred_score"].ravel()
    assert scores[4:].min() > scores[:4].max()  # 4 good images come before 6 with a hole


def count_nodes(graph: onnx.GraphProto) -> int:
    """Number of nodes, those in the bodies of loops included."""
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return len(graph.node) + sum(map(count_nodes, bodies))


def test_graph_is_as_small_for_large_images_and_many_chunks(tmp_path: Path) -> None:
    counts, chunks = [], []
    for image_size, windows_per_chunk in ((32, 3), (64, 16)):
        model = InTra(image_size, 8, 3, embed_dim=16, depth=1, num_heads=2, windows_per_chunk=windows_per_chunk)
        path = model.to_onnx(tmp_path / f"{image_size}_{windows_per_chunk}")
        counts.append(count_nodes(onnx.load(path).graph))
        chunks.append(-(-len(model.model.places) // windows_per_chunk))
    assert chunks == [6, 4]
    assert counts[0] == counts[1]


def test_torch_export_after_training_holds_no_images_and_no_paths(
    datamodule: MVTecAD, stripes: Path, tmp_path: Path
) -> None:
    seed_everything(0)
    model = InTra(
        image_size=OWN_SIZE, patch_size=8, window_size=3, embed_dim=16, depth=2, num_heads=2, windows_per_image=10,
        held_out_fraction=0.5,
    )  # fmt: skip
    engine = Engine(default_root_dir=tmp_path, max_epochs=1, accelerator="cpu", enable_progress_bar=False)
    engine.fit(model, datamodule=datamodule)
    path = engine.export(model, ExportType.TORCH, export_root=tmp_path)
    content = path.read_bytes()
    weights = sum(value.nbytes for value in model.state_dict().values())
    an_image = 3 * 64 * 64 * 4  # six of which were held out
    assert weights < len(content) < weights + 2 * an_image
    for name in (str(stripes), str(tmp_path), "000.png"):
        assert name.encode() not in content
