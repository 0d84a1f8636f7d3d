# SPDX-License-Identifier: Apache-2.0

"""Exports serve threads, and cannot be read if they were broken off."""

import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import openvino
import pytest
import torch
from anomalib.data import NumpyImageBatch
from anomalib.deploy import ExportType, OpenVINOInferencer

from tests.exports import FP32
from tests.tiny_models import OWN_SIZE, demo_images


def test_openvino_in_threads(exported: dict[ExportType, Path], demo: Path) -> None:
    """An inferencer of anomalib serves one thread: others are told that it is busy. Each thread has its own."""
    path = exported[ExportType.OPENVINO]
    images = [*demo_images(demo, OWN_SIZE).transpose(0, 2, 3, 1)] * 6
    own = threading.local()

    def predict(image: np.ndarray) -> NumpyImageBatch:
        if not hasattr(own, "inferencer"):
            # one core each, so that a sum is not shared out otherwise from call to call
            own.inferencer = OpenVINOInferencer(path, config={**FP32, "INFERENCE_NUM_THREADS": 1})
        return own.inferencer.predict(image)

    expected = [predict(image) for image in images]
    assert np.ptp([single.pred_score for single in expected]) > 0
    with ThreadPoolExecutor(4) as pool:
        for result, single in zip(pool.map(predict, images), expected, strict=True):
            np.testing.assert_array_equal(result.pred_score, single.pred_score)
            np.testing.assert_array_equal(result.anomaly_map, single.anomaly_map)


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
