# SPDX-License-Identifier: Apache-2.0

"""Exports of all types: they score as the model does, serve threads, and cannot be read if they were broken off."""

import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import NumpyImageBatch
from anomalib.deploy import ExportType, OpenVINOInferencer
from anomalib.models import AnomalibModule

from tests.exports import FP32, expected_from, images_of, run

from .conftest import engine_in

Trained = tuple[AnomalibModule, str]
Exported = Callable[[AnomalibModule, str, ExportType], Path]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Export a trained model, each type once."""

    @cache
    def export(model: AnomalibModule, checkpoint: str, export_type: ExportType) -> Path:
        folder = tmp_path_factory.mktemp("exported")
        path = engine_in(folder).export(model, export_type, export_root=folder, ckpt_path=checkpoint)
        model.eval()
        return path

    return export


def test_torch(trained: Trained, exported: Exported, stripes: Path) -> None:
    loaded = torch.load(exported(*trained, ExportType.TORCH), weights_only=False)["model"].eval()
    images = torch.from_numpy(images_of(stripes, (64, 64)))
    with torch.no_grad():
        torch.testing.assert_close(loaded(images).pred_score, trained[0](images).pred_score)


def test_openvino(trained: Trained, exported: Exported, stripes: Path) -> None:
    """anomalib makes it from the export to ONNX."""
    images = images_of(stripes, (64, 64))
    result = run(exported(*trained, ExportType.OPENVINO), images, batch_size=4)
    expected = expected_from(trained[0], images)
    np.testing.assert_allclose(result["pred_score"].flatten(), expected["pred_score"], atol=1e-3)


def test_openvino_in_threads(trained: Trained, exported: Exported, stripes: Path) -> None:
    """An inferencer of anomalib serves one thread: others are told that it is busy. Each thread has its own."""
    path = exported(*trained, ExportType.OPENVINO)
    images = [*images_of(stripes, (64, 64)).transpose(0, 2, 3, 1)] * 8
    own = threading.local()

    def predict(image: np.ndarray) -> NumpyImageBatch:
        if not hasattr(own, "inferencer"):
            own.inferencer = OpenVINOInferencer(path, config=FP32)
        return own.inferencer.predict(image)

    expected = [predict(image) for image in images]
    assert np.ptp([single.pred_score for single in expected]) > 0
    with ThreadPoolExecutor(4) as pool:
        for result, single in zip(pool.map(predict, images), expected, strict=True):
            np.testing.assert_allclose(result.pred_score, single.pred_score, atol=1e-6)
            np.testing.assert_allclose(result.anomaly_map, single.anomaly_map, atol=1e-6)


def read(path: Path) -> None:
    if path.suffix == ".pt":
        torch.load(path, weights_only=False)
    else:
        openvino.Core().compile_model(path, "CPU")


@pytest.mark.parametrize(
    ("export_type", "suffixes"), [(ExportType.TORCH, [".pt"]), (ExportType.OPENVINO, [".xml", ".bin"])]
)
def test_an_export_that_was_broken_off_cannot_be_read(
    trained: Trained, exported: Exported, tmp_path: Path, export_type: ExportType, suffixes: list[str]
) -> None:
    folder = Path(shutil.copytree(exported(*trained, export_type).parent, tmp_path / "export"))
    path = (folder / "model").with_suffix(suffixes[0])
    for file in (path.with_suffix(suffix) for suffix in suffixes):
        content = file.read_bytes()
        for kept in (0.0, 0.3, 0.9, 0.999):
            file.write_bytes(content[: int(kept * len(content))])
            with pytest.raises((RuntimeError, EOFError, OSError)):
                read(path)
        file.write_bytes(content)
    read(path)
