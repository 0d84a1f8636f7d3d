# SPDX-License-Identifier: Apache-2.0

"""Speed, size and accuracy of a model in each format of anomalib's export to OpenVINO, beside torch."""

import copy
import logging
import time
from collections.abc import Iterator, Mapping
from functools import cache, partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any, cast

import openvino
import torch
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import read_image
from anomalib.deploy import CompressionType, ExportType
from anomalib.models import AnomalibModule
from anomalib.post_processing import PostProcessor
from torch import Tensor
from torch.utils.data import DataLoader

from anomalib_recon.experiments.training import Trained, read_json, write_json
from anomalib_recon.metrics import AUROC
from anomalib_recon.training import normal_images

from .scores import (
    Infer,
    Scores,
    compile_openvino,
    fixed_batch,
    median_milliseconds,
    openvino_inference,
    openvino_megabytes,
)

logger = logging.getLogger(__name__)

# compression of the file, and for each name of a format OpenVINO's arithmetic: bf16 is its default where the CPU can
FORMATS: dict[CompressionType | None, dict[str, str]] = {
    None: {"fp32": "f32", "bf16": "bf16"},
    CompressionType.FP16: {"fp16": "f32"},
    CompressionType.INT8: {"int8 weights": "f32", "int8 weights, bf16": "bf16"},
    CompressionType.INT8_PTQ: {"int8 PTQ": "f32", "int8 PTQ, bf16": "bf16"},
}
# even, because an exported PatchCore takes two images at a time
CALIBRATION_IMAGES = 64
TORCH_BATCH = 8
# images whose throughput is measured, after as many to warm up
THROUGHPUT_IMAGES = 16


def measure_formats(trained: Trained, scores: Scores, folder: Path) -> dict[str, dict[str, Any]]:
    """Export a model in every format, and measure each on the CPU.

    Leaves ``formats.json``, written anew after each export, with ``milliseconds`` of an image, ``speed_up`` over torch
    (timed in turns), ``images_per_second``, ``mb`` of the file, ``image_AUROC`` and ``pixel_AUROC`` of raw scores,
    under the format's name. What is in the file is not done again. The model gives raw scores from then on.

    Args:
        trained (Trained): The model, tested.
        scores (Scores): Its scores, for the paths of the test images.
        folder (Path): Folder of the run.

    Returns:
        dict[str, dict[str, Any]]: The content of the file. A format that fails has no figures.
    """
    model = trained.model.cpu().eval()
    cast("PostProcessor", model.post_processor).enable_normalization = False  # clamped scores have ties
    file = folder / "formats.json"
    rows = read_json(file) or {}
    if "torch" not in rows:
        rows["torch"] = _measure_torch(trained, scores)
        write_json(file, rows)
    trace = cache(partial(model.to_onnx, folder / "formats"))
    model.to_onnx = lambda *_: trace()  # type: ignore[method-assign]  # anomalib would trace it for each compression
    for compression, arithmetics in FORMATS.items():
        if arithmetics.keys() <= rows.keys():
            continue
        try:
            exported = _export(trained, compression, folder / "formats" / next(iter(arithmetics)))
            measured = {
                name: _measure_openvino(exported, arithmetic, trained, scores)
                for name, arithmetic in arithmetics.items()
            }
        except Exception:  # the other formats are still to be compared
            logger.exception("%s cannot be measured; the table goes without.", " and ".join(arithmetics))
            measured = {name: {} for name in arithmetics}
        rows |= measured
        write_json(file, rows)
    return rows


def _export(trained: Trained, compression: CompressionType | None, folder: Path) -> Path:
    exported = trained.engine.export(
        trained.model,
        ExportType.OPENVINO,
        export_root=folder,
        compression_type=compression,
        datamodule=_calibration(trained),
    )
    assert exported is not None
    return exported


def _calibration(trained: Trained) -> AnomalibDataModule:
    """Data whose validation images, from which anomalib calibrates, are normal training images."""
    calibration = copy.copy(trained.datamodule)
    normal = normal_images(calibration.train_data, trained.model)
    calibration.val_data = normal.subsample(range(min(len(normal) // 2 * 2, CALIBRATION_IMAGES)))
    calibration.eval_batch_size = 2
    return calibration


def _torch_inference(model: AnomalibModule) -> Infer:
    @torch.inference_mode()
    def infer(images: Tensor) -> Mapping[str, Tensor]:
        return model(images)._asdict()

    return infer


def _measure_torch(trained: Trained, scores: Scores) -> dict[str, Any]:
    infer = _torch_inference(trained.model)
    [milliseconds] = median_milliseconds([infer], scores.paths)
    batch = next(_images(scores)).expand(TORCH_BATCH, -1, -1, -1)
    infer(batch)
    start = time.perf_counter()
    for _ in range(THROUGHPUT_IMAGES // TORCH_BATCH):
        infer(batch)
    return {
        "milliseconds": milliseconds,
        "speed_up": 1.0,
        "images_per_second": THROUGHPUT_IMAGES / (time.perf_counter() - start),
        "mb": None,
        **_auroc(infer, trained),
    }


def _measure_openvino(exported: Path, arithmetic: str, trained: Trained, scores: Scores) -> dict[str, Any]:
    compiled = compile_openvino(exported, arithmetic)
    infer = openvino_inference(compiled)
    torch_milliseconds, milliseconds = median_milliseconds([_torch_inference(trained.model), infer], scores.paths)
    milliseconds /= fixed_batch(compiled)
    return {
        "milliseconds": milliseconds,
        "speed_up": torch_milliseconds / milliseconds,
        "images_per_second": _throughput(exported, arithmetic, scores),
        "mb": openvino_megabytes(exported),
        **_auroc(infer, trained),
    }


def _throughput(exported: Path, arithmetic: str, scores: Scores) -> float:
    """Images per second, one at a time in each of the parallel requests that OpenVINO finds best."""
    compiled = compile_openvino(exported, arithmetic, PERFORMANCE_HINT="THROUGHPUT")
    batch_size = fixed_batch(compiled)
    queue = openvino.AsyncInferQueue(compiled)
    images = list(islice(_images(scores), THROUGHPUT_IMAGES))
    for _ in ("warm up", "measure"):
        start = time.perf_counter()
        for image in images:
            queue.start_async(image.expand(batch_size, -1, -1, -1).numpy())
        queue.wait_all()
    return batch_size * len(images) / (time.perf_counter() - start)


def _images(scores: Scores) -> Iterator[Tensor]:
    """The test images of their own size, ``(1, 3, H, W)``, again and again."""
    for path in cycle(scores.paths):
        image = read_image(path, as_tensor=True)
        assert isinstance(image, Tensor)
        yield image[None]


def _auroc(infer: Infer, trained: Trained) -> dict[str, float]:
    dataset = trained.datamodule.test_data
    transform: Any = getattr(trained.model.pre_processor, "transform", None)
    metrics = [
        AUROC(["pred_score", "gt_label"], prefix="image_"),
        AUROC(["anomaly_map", "gt_mask"], prefix="pixel_", strict=False),
    ]
    for batch in DataLoader(dataset, batch_size=1, collate_fn=dataset.collate_fn):
        outputs = infer(batch.image)
        if transform and batch.gt_mask is not None:  # some crop images and masks
            _, batch.gt_mask = transform(batch.image, batch.gt_mask)
        batch.update(pred_score=outputs["pred_score"].flatten(), anomaly_map=outputs.get("anomaly_map"))
        for metric in metrics:
            metric.update(batch)
    return {metric.name: metric.compute().item() for metric in metrics if metric.update_called}
