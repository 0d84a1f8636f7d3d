# SPDX-License-Identifier: Apache-2.0

"""Exports that also hold raw scores, raw maps and their thresholds, for any anomalib model.

Example:
    >>> from anomalib.models import Padim
    >>> from anomalib_recon.post_processing import RawScoreExport
    >>> class MyPadim(RawScoreExport, Padim):
    ...     pass
    >>> MyPadim().to_openvino("exported")  # doctest: +SKIP
"""

import math
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from anomalib.data import InferenceBatch
from anomalib.post_processing import PostProcessor
from torch import Tensor, nn

from anomalib_recon.deploy import GreyLevels, onnx_file, openvino_file
from anomalib_recon.deploy.metadata import RAW_MAP, RAW_SCORE, REGION_SHARE, Scale, Thresholds

from .region_post_processor import RegionPostProcessor

RAW_NAMES = (RAW_SCORE, RAW_MAP)
# no other constant of a graph is likely to be equal
PLACEHOLDER = 8191.25


class RawScoreExport:
    """Mixin of anomalib models whose exports give raw scores, too, and name their thresholds.

    Put it before the model's class. An exported graph has anomalib's outputs, under their names and in their order: its
    readers refuse graphs with more. What the scores were before normalisation and thresholds are the tensors
    ``raw_score`` and ``raw_map`` inside the graph, which a reader adds as outputs by these names
    (:class:`anomalib_recon.deploy.ExportedModel` does). Thresholds and bounds of normalisation are metadata of
    the file: ``rt_info`` in OpenVINO, ``metadata_props`` in ONNX. :func:`anomalib_recon.deploy.set_thresholds` changes
    them. The levels of images with more than 8 bits of grey are metadata, too.

    A model whose post-processor has no thresholds yet, or computes them for each image, is exported with raw scores and
    without thresholds in its metadata.
    """

    post_processor: Any
    grey_levels: GreyLevels | None = None

    def to_onnx(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        **kwargs: Any,
    ) -> Path:
        """Export to ONNX.

        Args:
            export_root (Path | str): Folder for the export.
            model_file_name (str): Name of the file, without ending.
            input_size (tuple[int, int] | None): Height and width of the input; dynamic if ``None``.
            **kwargs (Any): Arguments of ``torch.onnx.export``.

        Returns:
            Path: The exported file.
        """
        root = Path(export_root)
        root.mkdir(parents=True, exist_ok=True)
        # elsewhere until it is complete: without its thresholds, it would call everything normal
        with tempfile.TemporaryDirectory(dir=root) as folder:
            with _exported_post_processor(self):
                path = super().to_onnx(folder, model_file_name, input_size, **kwargs)  # type: ignore[misc]
            _complete_onnx(path, _metadata(self), find_thresholds(self.post_processor))
            target = root / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            for file in (path.with_name(f"{path.name}.data"), path):
                if file.exists():
                    file.replace(target.with_name(file.name))
        return target

    def to_openvino(
        self,
        export_root: Path | str,
        model_file_name: str = "model",
        input_size: tuple[int, int] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Path:
        """Export to OpenVINO.

        Args:
            export_root (Path | str): Folder for the export.
            model_file_name (str): Name of the file, without ending.
            input_size (tuple[int, int] | None): Height and width of the input; dynamic if ``None``.
            *args (Any): As in anomalib.
            **kwargs (Any): As in anomalib.

        Returns:
            Path: The exported ``.xml`` file.
        """
        root = Path(export_root)
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as folder:  # elsewhere until it is complete
            with _raw_outputs_in_onnx(self):  # as outputs, they survive conversion and compression
                path = super().to_openvino(folder, model_file_name, input_size, *args, **kwargs)  # type: ignore[misc]
            model = openvino_file.read_model(path)
            openvino_file.hide_raw_outputs(model)
            if metadata := _metadata(self):
                openvino_file.write_metadata(model, metadata)
            target = root / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            openvino_file.save_whole(model, target)
        return target


def _metadata(module: RawScoreExport) -> dict[str, str]:
    """What an export says: thresholds, the share of the image that is inside a region, levels of deep grey images."""
    metadata = module.grey_levels.to_metadata() if module.grey_levels else {}
    if thresholds := find_thresholds(module.post_processor):
        metadata |= thresholds.to_metadata()
        if region := getattr(module.post_processor, "region", None):
            metadata[REGION_SHARE] = repr(region.fraction)
    return metadata


def find_thresholds(post_processor: nn.Module | None) -> Thresholds | None:
    """Read the thresholds of a post-processor.

    Args:
        post_processor (nn.Module | None): Post-processor of a model.

    Returns:
        Thresholds | None: Thresholds, or ``None`` if it has not set them or has none that hold for all images.
    """
    known = (PostProcessor.forward, RegionPostProcessor.forward)
    if not isinstance(post_processor, PostProcessor) or type(post_processor).forward not in known:
        return None
    if not post_processor.enable_thresholding:
        return None
    normalized = post_processor.enable_normalization
    image, pixel = (_find_scale(post_processor, kind) for kind in ("image", "pixel"))
    return Thresholds(image, pixel, normalized) if image else None


def _find_scale(post_processor: PostProcessor, kind: str) -> Scale | None:
    names = (f"{kind}_threshold", f"{kind}_min", f"{kind}_max", f"normalized_{kind}_threshold")
    threshold, lowest, highest, limit = (float(getattr(post_processor, name)) for name in names)
    if math.isnan(limit):
        return None
    if math.isnan(lowest) or math.isnan(highest):
        if post_processor.enable_normalization:
            return None
        lowest = highest = limit  # anomalib fits no bounds then, and needs none
    return Scale((lowest + highest) / 2 if math.isnan(threshold) else threshold, lowest, highest, limit)


class _ExportedBatch(NamedTuple):
    pred_score: Tensor | None
    pred_label: Tensor | None
    anomaly_map: Tensor | None
    pred_mask: Tensor | None
    raw_score: Tensor | None
    raw_map: Tensor | None


class _ExportedPostProcessor(nn.Module):
    """Post-processor that hands on raw scores beside the others."""

    def __init__(self, post_processor: nn.Module | None) -> None:
        super().__init__()
        thresholds = find_thresholds(post_processor)
        # the constants of the graph are named by it
        self.thresholding: Any = _Thresholding(thresholds) if thresholds else post_processor
        has_region = thresholds and isinstance(post_processor, RegionPostProcessor) and post_processor.region
        self.region_post_processor: Any = post_processor if has_region else None

    def forward(self, predictions: InferenceBatch) -> _ExportedBatch:
        score, anomaly_map = predictions.pred_score, predictions.anomaly_map
        if score is None:
            score = cast("Tensor", anomaly_map).amax(dim=(-2, -1))
        predictions = InferenceBatch(pred_score=score, anomaly_map=anomaly_map)
        if self.region_post_processor is None:
            processed = self.thresholding(predictions) if self.thresholding else predictions
        else:
            predictions = self.region_post_processor.restricted(predictions)
            score, anomaly_map = predictions.pred_score, predictions.anomaly_map
            processed = self.region_post_processor.blank(self.thresholding(predictions))
        return _ExportedBatch(**processed._asdict(), raw_score=score, raw_map=anomaly_map)


class _Thresholding(nn.Module):
    """What anomalib's post-processor computes, with thresholds that stay constants of their own in the graph.

    Their values are filled in afterwards: the exporter joins constants that are equal.
    """

    def __init__(self, thresholds: Thresholds) -> None:
        super().__init__()
        self.normalized = thresholds.normalized
        self.has_pixel_threshold = thresholds.pixel is not None
        for index, name in enumerate(thresholds.constants()):
            self.register_buffer(name, torch.tensor(PLACEHOLDER + index))

    def forward(self, predictions: InferenceBatch) -> InferenceBatch:
        score, label = self._threshold("image", cast("Tensor", predictions.pred_score))
        anomaly_map, mask = None, None
        if predictions.anomaly_map is not None:
            anomaly_map = predictions.anomaly_map
            if self.has_pixel_threshold:
                anomaly_map, mask = self._threshold("pixel", anomaly_map)
        return InferenceBatch(pred_score=score, pred_label=label, anomaly_map=anomaly_map, pred_mask=mask)

    def _threshold(self, kind: str, raw: Tensor) -> tuple[Tensor, Tensor]:
        scores = raw
        if self.normalized:
            scores = (raw - getattr(self, f"{kind}_threshold")) / getattr(self, f"{kind}_range") + 0.5
            scores = scores.clamp(min=0, max=1)
        return scores, scores > getattr(self, f"{kind}_limit")


@contextmanager
def _exported_post_processor(module: Any) -> Iterator[None]:
    post_processor = module.post_processor
    module.post_processor = _ExportedPostProcessor(post_processor).to(module.device)
    try:
        yield
    finally:
        module.post_processor = post_processor


@contextmanager
def _raw_outputs_in_onnx(module: Any) -> Iterator[None]:
    """Have ``to_onnx`` return a file with raw outputs, beside the one that it writes."""
    to_onnx = module.to_onnx
    kept = vars(module).get("to_onnx")

    def to_onnx_with_raw_outputs(*args: Any, **kwargs: Any) -> Path:
        path = to_onnx(*args, **kwargs)
        raw = path.with_stem(f"{path.stem}_raw")
        raw.write_bytes(onnx_file.with_raw_outputs(path.read_bytes()))
        return raw

    module.to_onnx = to_onnx_with_raw_outputs
    try:
        yield
    finally:
        del module.to_onnx
        if kept:
            module.to_onnx = kept


def _complete_onnx(path: Path, metadata: dict[str, str], thresholds: Thresholds | None) -> None:
    """Keep raw score and map as tensors inside the graph, and fill in the thresholds and the metadata."""
    import onnx  # noqa: PLC0415  # comes with anomalib's extra for exports

    model = onnx.load(path, load_external_data=False)
    outputs = {output.name: output for output in model.graph.output}
    for name in RAW_NAMES:
        if name in outputs:
            model.graph.value_info.append(outputs[name])
            model.graph.output.remove(outputs[name])
    content = model.SerializeToString()
    if thresholds:
        content = onnx_file.write_thresholds(content, thresholds)
    if metadata:
        content = onnx_file.write_metadata(content, metadata)
    onnx_file.save_whole(content, path)
