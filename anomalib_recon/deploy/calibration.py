# SPDX-License-Identifier: Apache-2.0

"""Other thresholds for an exported model, from normal images, without torch."""

import filecmp
import shutil
from collections.abc import Sequence
from pathlib import Path

from . import onnx_file
from .grey_levels import GreyLevels
from .highest_scores import HighestScores
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
            replaced, an image cannot be read, or a score is NaN or infinite.
    """
    for name, rate in (("image_fpr", image_fpr), ("pixel_fpr", pixel_fpr)):
        if not 0 <= rate < 1:
            msg = f"{name} must be at least 0 and below 1, got {rate}; 0.05 calls 5 % of what is normal anomalous."
            raise ValueError(msg)
    if not paths:
        msg = "paths must name at least one normal image, got none."
        raise ValueError(msg)
    normalized = model.thresholds.normalized
    images = HighestScores(image_fpr, len(paths))
    pixels = HighestScores(pixel_fpr, len(paths), model.region_share)
    levels = levels or model.levels
    for path in paths:
        try:
            image = read_image(path, levels)
        except OSError as error:
            msg = f"The image {path} cannot be read ({error}); replace or remove it."
            raise ValueError(msg) from error
        outputs = model(image[None])
        images.update(outputs[RAW_SCORE])
        if RAW_MAP in outputs and model.thresholds.pixel:
            pixels.update(outputs[RAW_MAP])

    def scale(scores: HighestScores) -> Scale:
        return Scale.of_normal_scores(scores.lowest, scores.threshold(scores.max_rate), normalized=normalized)

    return Thresholds(scale(images), scale(pixels) if pixels.count else None, normalized)


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
    output = check_output(path, output)
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
    weights = _weights_of(path)
    if weights.exists():
        _copy_weights(weights, output.with_name(weights.name))
    onnx_file.save_whole(content, output)


def check_output(path: Path, output: Path | None = None) -> Path:
    """Find out whether a model with other thresholds can be written to a file.

    Args:
        path (Path): The ``.xml`` or ``.onnx`` file of the model.
        output (Path | None): File to write. Defaults to ``None``, which means ``path``.

    Returns:
        Path: The file to write.

    Raises:
        ValueError: If ``output`` has another ending, or its folder has the weights of another model under the name of
            this one's.
    """
    output = output or path
    if output.suffix != path.suffix:
        msg = f"output must end in {path.suffix} as the model does, got {output}."
        raise ValueError(msg)
    weights = _weights_of(path)
    target = output.with_name(weights.name)
    has_both = weights.exists() and target.exists()
    if has_both and not target.samefile(weights) and not filecmp.cmp(weights, target, shallow=False):
        msg = (
            f"output must be in a folder without the weights of another model, but {target} differs from {weights}, "
            "and the model looks for its weights by that name; choose an empty folder."
        )
        raise ValueError(msg)
    return output


def _weights_of(path: Path) -> Path:
    """The file beside an ONNX model that has its weights, if there is one; its name is in the graph."""
    return path.with_name(f"{path.name}.data")


def _copy_weights(weights: Path, target: Path) -> None:
    if not target.exists():
        temporary = target.with_name(f"{target.name}.part")
        shutil.copyfile(weights, temporary)
        temporary.replace(target)
