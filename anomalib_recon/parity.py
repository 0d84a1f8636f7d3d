# SPDX-License-Identifier: Apache-2.0

"""Does an exported model score as its checkpoint does? Compares them image by image.

The checkpoint scores the images as `anomalib predict` does, on the CPU. It is then exported to ONNX and OpenVINO, or
the exports named by --exports are taken, and these score the same files. Prints a table of the largest differences of
all images, and exits with 1 if a bound is broken. For any anomalib model; ONNX needs the package onnxruntime.
"""

import argparse
import importlib.util
import inspect
import logging
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anomalib.models
import numpy as np
import pandas as pd
from anomalib.data import PredictDataset
from anomalib.engine import Engine
from anomalib.models import AnomalibModule
from numpy.typing import NDArray

from anomalib_recon.data import DeepGreyPredictDataset
from anomalib_recon.deploy import ExportedModel, GreyLevels, find_images, read_image
from anomalib_recon.deploy.grey_levels import add_level_arguments, levels_from
from anomalib_recon.post_processing import ProductPostProcessor, RawScoreExport
from anomalib_recon.pre_processing import ExactResizePreProcessor
from anomalib_recon.training import load_checkpoint

Predictions = dict[Path, Mapping[str, NDArray[Any]]]
SCORES = {"pred_score": "pred_label", "anomaly_map": "pred_mask"}


@dataclass(frozen=True)
class Difference:
    """By how much an export differs from the checkpoint, at most of all images, on the scale of [0, 1].

    Attributes:
        score (float): Of the scores of images.
        map (float): Of the scores of pixels; 0 for a model without maps.
        labels (int): Images that get another label.
        pixels (float): Fraction of all pixels that get another label.
    """

    score: float
    map: float
    labels: int
    pixels: float


def load_model(name: str, checkpoint: Path, exact_resize: bool = False) -> AnomalibModule:
    """Load a model that exports raw scores, too, without weights from elsewhere.

    Args:
        name (str): Name of its class, as in ``anomalib.models``.
        checkpoint (Path): Its checkpoint.
        exact_resize (bool): Whether to let exports resize as in training, where they would not.
            Defaults to ``False``.

    Returns:
        AnomalibModule: The model.

    Raises:
        ValueError: If anomalib has no such model, or the checkpoint does not exist.
    """
    model_class: Any = getattr(anomalib.models, name, None)
    if not (inspect.isclass(model_class) and issubclass(model_class, AnomalibModule)):
        msg = f"model must be the name of a class of anomalib, such as Padim or SAAE, got {name}."
        raise ValueError(msg)
    if not checkpoint.is_file():
        msg = f"ckpt must be a checkpoint, got {checkpoint}, which is no file."
        raise ValueError(msg)
    further = ProductPostProcessor.argument_for(load_checkpoint(checkpoint, "ckpt", model_class))
    if not issubclass(model_class, RawScoreExport):
        # a name of its own: the command line finds classes by their names, and would find two
        model_class = type(f"RawScore{name}", (RawScoreExport, model_class), {})
    if "pre_trained" in inspect.signature(model_class).parameters:
        further["pre_trained"] = False
    model = model_class.load_from_checkpoint(checkpoint, map_location="cpu", **further)
    if exact_resize:
        model.pre_processor = ExactResizePreProcessor(getattr(model.pre_processor, "transform", None))
    return model


def predict(model: AnomalibModule, folder: Path, levels: GreyLevels | None = None) -> Predictions:
    """Score images as ``anomalib predict`` does.

    Args:
        model (AnomalibModule): The model.
        folder (Path): Folder of images.
        levels (GreyLevels | None): Those of the training, for images with more than 8 bits of grey.
            Defaults to ``None``.

    Returns:
        Predictions: Scores, labels, maps and masks of each file.
    """
    model.visualizer = None
    dataset = (
        DeepGreyPredictDataset(folder, levels.black_level, levels.white_level) if levels else PredictDataset(folder)
    )
    with tempfile.TemporaryDirectory() as root:
        engine = Engine(default_root_dir=root, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
        batches: Any = engine.predict(model, dataset=dataset)
    names = [*SCORES, *SCORES.values()]
    return {
        Path(path): {name: getattr(item, name).numpy() for name in names if getattr(item, name) is not None}
        for batch in batches
        for path, item in zip(batch.image_path, batch, strict=True)
    }


def export(model: AnomalibModule, folder: Path) -> list[Path]:
    """Export a model to OpenVINO, and to ONNX if ONNX Runtime is installed.

    Args:
        model (AnomalibModule): The model.
        folder (Path): Folder for the exports.

    Returns:
        list[Path]: The files.
    """
    paths = [model.to_openvino(folder)]
    if importlib.util.find_spec("onnxruntime"):
        paths.append(model.to_onnx(folder))
    return paths


def find_difference(expected: Predictions, exported: ExportedModel, levels: GreyLevels | None = None) -> Difference:
    """Compare an export with what the checkpoint predicts.

    Scores beyond [0, 1], which are not normalised, are divided by the range of the checkpoint's. A score that is NaN or
    infinite differs infinitely.

    Args:
        expected (Predictions): What the checkpoint predicts.
        exported (ExportedModel): The export.
        levels (GreyLevels | None): Those of the training, for images with more than 8 bits of grey.
            Defaults to ``None``.

    Returns:
        Difference: The difference.
    """
    largest = dict.fromkeys(SCORES, 0.0)
    lowest, highest = dict.fromkeys(SCORES, 0.0), dict.fromkeys(SCORES, 1.0)
    changed, counted = dict.fromkeys(SCORES, 0), dict.fromkeys(SCORES, 0)
    for path, prediction in expected.items():
        outputs = exported(read_image(path, levels)[None])
        for scores, labels in SCORES.items():
            if scores not in prediction:
                continue
            reference = prediction[scores]
            difference = np.nan_to_num(np.abs(outputs[scores].reshape(reference.shape) - reference), nan=np.inf)
            largest[scores] = max(largest[scores], float(difference.max()))
            lowest[scores] = min(lowest[scores], float(reference.min()))
            highest[scores] = max(highest[scores], float(reference.max()))
            if labels in prediction:
                changed[scores] += int((outputs[labels].reshape(reference.shape) != prediction[labels]).sum())
                counted[scores] += reference.size
    score, anomaly_map = (largest[scores] / (highest[scores] - lowest[scores]) for scores in SCORES)
    return Difference(
        score, anomaly_map, changed["pred_score"], changed["anomaly_map"] / max(counted["anomaly_map"], 1)
    )


def build_parser() -> argparse.ArgumentParser:
    """Parser of the command."""
    parser = argparse.ArgumentParser("python -m anomalib_recon.parity", description=__doc__, allow_abbrev=False)
    parser.add_argument("--model", required=True, help="name of the model's class, such as Padim or SAAE")
    parser.add_argument("--ckpt", type=Path, required=True, help="checkpoint of the model")
    parser.add_argument("--data", type=Path, required=True, help="folder of images")
    parser.add_argument("--exact_resize", action="store_true", help="export with ExactResizePreProcessor")
    parser.add_argument("--exports", type=Path, nargs="+", help=".xml and .onnx files (default: exported anew)")
    parser.add_argument(
        "--score_bound", type=float, default=0.01, help="largest difference of a score, of a range of 1 (default: 0.01)"
    )
    parser.add_argument(
        "--map_bound", type=float, default=0.01, help="largest difference of a pixel, of a range of 1 (default: 0.01)"
    )
    add_level_arguments(parser)
    return parser


def main(args: Sequence[str] | None = None) -> int:
    """Compare, and print the table.

    Args:
        args (Sequence[str] | None): Command-line arguments; those of the process by default.

    Returns:
        int: 1 if a bound is broken, or else 0.

    Raises:
        ValueError: If an argument cannot work.
    """
    options = build_parser().parse_args(args)
    count = len(find_images(options.data))
    model = load_model(options.model, options.ckpt, options.exact_resize)
    levels = levels_from(options) or getattr(model, "grey_levels", None)
    with tempfile.TemporaryDirectory() as folder:
        paths = options.exports or export(model, Path(folder))
        exports = [ExportedModel(path) for path in paths]
        expected = predict(model, options.data, levels)
        differences = [find_difference(expected, exported, levels) for exported in exports]
    rows = [
        {
            "export": "OpenVINO" if path.suffix == ".xml" else "ONNX",
            "score differs by": difference.score,
            "map differs by": difference.map,
            "other labels": difference.labels,
            "other pixels": f"{difference.pixels:.2%}",
            "within bounds": "yes" if _holds(difference, options) else "NO",
        }
        for path, difference in zip(paths, differences, strict=True)
    ]
    print(
        f"{options.model}, {count} images, bounds {options.score_bound:g} for scores and {options.map_bound:g} for maps"
    )
    print(pd.DataFrame(rows).to_markdown(index=False, floatfmt=".1e"))
    return 0 if all(_holds(difference, options) for difference in differences) else 1


def _holds(difference: Difference, options: argparse.Namespace) -> bool:
    return bool(difference.score <= options.score_bound and difference.map <= options.map_bound)


if __name__ == "__main__":
    logging.disable(logging.INFO)
    try:
        sys.exit(main(sys.argv[1:]))
    except ValueError as error:
        build_parser().error(str(error))
