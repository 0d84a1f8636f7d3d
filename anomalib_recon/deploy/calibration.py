# SPDX-License-Identifier: Apache-2.0

"""Other thresholds for an exported model, from normal images, without torch."""

import filecmp
import math
import shutil
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import onnx_file
from .grey_levels import GreyLevels
from .images import read_image
from .metadata import RAW_MAP, RAW_SCORE, Scale, Thresholds
from .model import ExportedModel


def find_thresholds(
    model: ExportedModel,
    paths: Sequence[Path],
    image_fpr: float = 0.05,
    pixel_fpr: float = 0.005,
    levels: GreyLevels | None = None,
) -> Thresholds:
    """Find the lowest thresholds at which at most a fraction of normal images and of their pixels is anomalous.

    Of a model with a region of interest, pixels are those inside, counted by the share of the image that they are.

    The scale of the scores is that of :class:`anomalib_recon.post_processing.FalsePositiveRatePostProcessor`: their
    lowest becomes 0, the threshold 0.5, and what is twice as far from the lowest 1.

    Args:
        model (ExportedModel): The model.
        paths (Sequence[Path]): Files of normal images that the model was not trained on.
        image_fpr (float): Highest fraction of images, at least 0 and below 1. Defaults to ``0.05``.
        pixel_fpr (float): Highest fraction of pixels, at least 0 and below 1. Defaults to ``0.005``.
        levels (GreyLevels | None): Those of the training, for images with more than 8 bits of grey.
            Defaults to ``None``, which means those that the model's file names.

    Returns:
        Thresholds: Thresholds on raw scores.

    Raises:
        ValueError: If a rate is out of its range, there are no images, the model has no thresholds that could be
            replaced, or a score is NaN or infinite.
    """
    for name, rate in (("image_fpr", image_fpr), ("pixel_fpr", pixel_fpr)):
        if not 0 <= rate < 1:
            msg = f"{name} must be at least 0 and below 1, got {rate}; 0.05 calls 5 % of what is normal anomalous."
            raise ValueError(msg)
    if not paths:
        msg = "paths must name at least one normal image, got none."
        raise ValueError(msg)
    normalized = model.thresholds.normalized
    images, pixels = _Highest(image_fpr, len(paths)), _Highest(pixel_fpr, len(paths), model.region_share)
    levels = levels or model.levels
    for path in paths:
        outputs = model(read_image(path, levels)[None])
        images.update(outputs[RAW_SCORE])
        if RAW_MAP in outputs:
            pixels.update(outputs[RAW_MAP])
    return Thresholds(images.scale(normalized), pixels.scale(normalized) if pixels.count else None, normalized)


def set_thresholds(path: Path, thresholds: Thresholds, output: Path | None = None) -> None:
    """Give an exported model other thresholds. Its outputs keep their names, order and shapes.

    Args:
        path (Path): The ``.xml`` or ``.onnx`` file.
        thresholds (Thresholds): Thresholds on raw scores.
        output (Path | None): File to write, of the same ending. Defaults to ``None``, which means ``path``.

    Raises:
        ValueError: If ``output`` has another ending, its folder has the weights of another model under the name of
            this one's, or the model has no thresholds that could be replaced.
    """
    output = output or path
    if output.suffix != path.suffix:
        msg = f"output must end in {path.suffix} as the model does, got {output}."
        raise ValueError(msg)
    output.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".xml":
        from . import openvino_file  # noqa: PLC0415  # an ONNX model is changed without openvino

        model = openvino_file.read_model(path)
        Thresholds.from_metadata(openvino_file.read_metadata(model))
        openvino_file.write_thresholds(model, thresholds)
        openvino_file.save_whole(model, output)
        return
    content = path.read_bytes()
    Thresholds.from_metadata(onnx_file.read_metadata(content))
    content = onnx_file.write_thresholds(content, thresholds)
    weights = path.with_name(f"{path.name}.data")
    if weights.exists():
        _copy_weights(weights, output.with_name(weights.name))
    onnx_file.save_whole(content, output)


def _copy_weights(weights: Path, target: Path) -> None:
    """Put the weights of an ONNX model, whose name is in its graph, beside a copy of it."""
    if not target.exists():
        temporary = target.with_name(f"{target.name}.part")
        shutil.copyfile(weights, temporary)
        temporary.replace(target)
    elif not filecmp.cmp(weights, target, shallow=False):
        msg = (
            f"output must be in a folder without the weights of another model, but {target} differs from {weights}, "
            "and the model looks for its weights by that name; choose an empty folder."
        )
        raise ValueError(msg)


class _Highest:
    """The highest scores, as many as may lie above a threshold; in numpy what ``HighestScores`` is in torch.

    A rate may be that of a share of the scores, of which the others are none of the highest.
    """

    def __init__(self, rate: float, num_images: int, share: float = 1.0) -> None:
        self.rate = rate
        self.share = share
        self.num_images = num_images
        self.count = 0
        self._lowest = math.inf
        self._kept: NDArray[np.float32] = np.empty(0, np.float32)
        self._highest_dropped = -math.inf

    def update(self, scores: NDArray[Any]) -> None:
        """Add the scores of an image or of its pixels."""
        flat = scores.ravel()
        if not np.isfinite(flat).all():
            msg = "A score of a normal image is NaN or infinite, so no threshold can be set: check the exported model."
            raise ValueError(msg)
        self.count += flat.size
        self._lowest = min(self._lowest, float(flat.min()))
        kept = np.concatenate([self._kept, flat[flat > self._highest_dropped]])
        capacity = self._allowed(flat.size * self.num_images) + 1
        if kept.size > capacity:
            kept = np.partition(kept, kept.size - capacity - 1)
            self._highest_dropped = float(kept[kept.size - capacity - 1])
            kept = kept[-capacity:]
        self._kept = kept

    def scale(self, normalized: bool) -> Scale:
        """Scale of the scores with the lowest threshold that keeps the rate."""
        next_highest = np.sort(self._kept)[::-1][self._allowed(self.count) :][:1]
        threshold = max([self._highest_dropped, *map(float, next_highest)])
        return Scale.of_normal_scores(self._lowest, threshold, normalized=normalized)

    def _allowed(self, count: int) -> int:
        return int(Decimal(str(self.rate)) * int(self.share * count))
