# SPDX-License-Identifier: Apache-2.0

"""Exports score as the checkpoint does, image by image, serve threads, and cannot be read if they were broken off."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import NumpyImageBatch, PredictDataset
from anomalib.deploy import ExportType, OpenVINOInferencer
from PIL import Image

from anomalib_recon.deploy import onnx_file, openvino_file
from tests.exports import FP32, expected_from, run
from tests.tiny_models import OWN_SIZE, Trained, demo_data, demo_images, engine_in

Exported = dict[ExportType, Path]


def assert_equal(result: dict[str, np.ndarray], expected: dict[str, np.ndarray], bound: float) -> None:
    """Score, map, label and mask of each image are equal, on the normalised scale of [0, 1]."""
    for name in ("pred_score", "anomaly_map"):
        assert np.ptp(expected[name]) > 0.3
        difference = np.abs(result[name].reshape(expected[name].shape) - expected[name])
        assert difference.reshape(len(difference), -1).max(axis=1).max() < bound, name
    for name, scores in (("pred_label", "pred_score"), ("pred_mask", "anomaly_map")):
        clear = np.abs(expected[scores] - 0.5) > bound  # from the threshold, which is the score of an image
        same = result[name].reshape(expected[name].shape) == expected[name]
        assert clear.mean() > 0.8  # the threshold is the score of an image
        assert same.reshape(clear.shape)[clear].all(), name


@pytest.mark.parametrize("batch_size", [1, 2])
@pytest.mark.parametrize(("size", "bound"), [(OWN_SIZE, 1e-3), ((200, 131), 1e-2)])
@pytest.mark.parametrize("export_type", [ExportType.ONNX, ExportType.OPENVINO])
def test_graphs_score_as_the_checkpoint(
    trained: Trained,
    exported: Exported,
    demo: Path,
    export_type: ExportType,
    size: tuple[int, int],
    bound: float,
    batch_size: int,
) -> None:
    images = demo_images(demo, size)
    assert_equal(run(exported[export_type], images, batch_size), expected_from(trained.model, images), bound)


def test_a_pickled_model_scores_as_the_checkpoint(trained: Trained, exported: Exported, demo: Path) -> None:
    loaded = torch.load(exported[ExportType.TORCH], weights_only=False)["model"].eval()
    for size in (OWN_SIZE, (200, 131)):
        images = demo_images(demo, size)
        expected = expected_from(trained.model, images)
        assert_equal(expected_from(loaded, images), expected, 1e-6)


def test_an_inferencer_scores_files_as_the_engine(
    trained: Trained, exported: Exported, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the inferencer puts its cache
    folder = demo_data(demo).root / "grid" / "test"
    batches = engine_in(tmp_path).predict(trained.model, dataset=PredictDataset(folder))
    trained.model.eval()
    inferencer = OpenVINOInferencer(exported[ExportType.OPENVINO], device="CPU", config=FP32)
    for batch in batches:
        predicted = inferencer.predict(Image.open(batch.image_path[0]).convert("RGB"))
        assert predicted.pred_score.item() == pytest.approx(batch.pred_score.item(), abs=1e-2)
        np.testing.assert_allclose(predicted.anomaly_map.squeeze(), batch.anomaly_map.squeeze(), atol=1e-2)


def test_openvino_in_threads(exported: dict[ExportType, Path], demo: Path) -> None:
    """An inferencer of anomalib serves one thread: others are told that it is busy. Each thread has its own."""
    path = exported[ExportType.OPENVINO]
    images = [*demo_images(demo, OWN_SIZE).transpose(0, 2, 3, 1)] * 6
    own = threading.local()

    def predict(image: np.ndarray) -> NumpyImageBatch:
        if not hasattr(own, "inferencer"):
            own.inferencer = OpenVINOInferencer(path, config=FP32)
        return own.inferencer.predict(image)

    expected = [predict(image) for image in images]
    assert np.ptp([single.pred_score for single in expected]) > 0.1
    with ThreadPoolExecutor(4) as pool:
        for result, single in zip(pool.map(predict, images), expected, strict=True):
            # another image's would be off by far more; sums are shared out, and aligned in memory, in other ways
            np.testing.assert_allclose(result.pred_score, single.pred_score, atol=1e-4)
            np.testing.assert_allclose(result.anomaly_map, single.anomaly_map, atol=1e-4)


def read(path: Path) -> None:
    if path.suffix == ".pt":
        torch.load(path, weights_only=False)
    else:
        openvino.Core().compile_model(path, "CPU")


@pytest.mark.parametrize(
    ("export_type", "suffixes"), [(ExportType.TORCH, [".pt"]), (ExportType.OPENVINO, [".xml", ".bin"])]
)
def test_an_export_that_was_broken_off_cannot_be_read(
    exported: dict[ExportType, Path], tmp_path: Path, export_type: ExportType, suffixes: list[str]
) -> None:
    folder = Path(shutil.copytree(exported[export_type].parent, tmp_path / "export"))
    path = (folder / "model").with_suffix(suffixes[0])
    for file in (path.with_suffix(suffix) for suffix in suffixes):
        content = file.read_bytes()
        for kept in (0.0, 0.3, 0.9, 0.999):
            file.write_bytes(content[: int(kept * len(content))])
            with pytest.raises((RuntimeError, EOFError, OSError)):
                read(path)
        file.write_bytes(content)
    read(path)


@pytest.mark.parametrize(("method", "module"), [("to_onnx", onnx_file), ("to_openvino", openvino_file)])
def test_an_interrupted_export_leaves_the_one_before(
    trained: Trained, demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, module: Any
) -> None:
    export = getattr(trained.model, method)
    path = export(tmp_path)
    before = {file.name: file.read_bytes() for file in path.parent.iterdir()}

    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "save_whole", interrupt)
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path)
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["weights"]
