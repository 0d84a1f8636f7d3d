# SPDX-License-Identifier: Apache-2.0

"""Scores of the training images: over their order they show a drift, and the highest are images to look at.

A defect among the training images is the most common mistake: the model learns it as normal.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from anomalib.data import AnomalibDataset
from anomalib.models import AnomalibModule
from matplotlib.figure import Figure
from torch.utils.data import DataLoader

from anomalib_recon.deploy import GreyLevels
from anomalib_recon.training import evaluation, normal_images

from .plots import DEFECTIVE, GOOD, GREY, clean, png, thumbnail
from .scores import Scores

NUM_ODDEST = 10
PER_ROW = 5


def score_training_images(model: AnomalibModule, dataset: AnomalibDataset, batch_size: int) -> Scores:
    """Score the normal training images of a trained model, without augmentation.

    Args:
        model (AnomalibModule): The model.
        dataset (AnomalibDataset): Training set.
        batch_size (int): Images at a time.

    Returns:
        Scores: Raw scores, in the order of the files' names.
    """
    normal = normal_images(dataset, model)
    scores: dict[str, float] = {}
    with evaluation(model):
        for batch in DataLoader(normal, batch_size, collate_fn=normal.collate_fn):
            images = batch.image.to(model.device)
            predictions = model.model(model.pre_processor(images) if model.pre_processor else images)
            found = predictions.pred_score
            found = predictions.anomaly_map.flatten(1).amax(dim=1) if found is None else found
            scores |= zip(map(str, batch.image_path), found.flatten().tolist(), strict=True)
    paths = sorted(scores)
    return Scores(paths, np.zeros(len(paths), dtype=np.bool_), np.array([scores[path] for path in paths]))


def oddest(scores: Scores) -> list[int]:
    """Places of the images with the highest scores, the highest first."""
    return np.argsort(-scores.scores, kind="stable")[:NUM_ODDEST].tolist()


def short_names(paths: Sequence[str]) -> list[str]:
    """Folder and file of each path: names that tell images of several folders apart."""
    return [Path(*Path(path).parts[-2:]).as_posix() for path in paths]


def training_picture(scores: Scores, levels: GreyLevels | None = None) -> bytes:
    """Scores over the order of the files, and thumbnails of the ten oddest images.

    Args:
        scores (Scores): What :func:`score_training_images` gave.
        levels (GreyLevels | None): Those of the datamodule, for images with more than 8 bits of grey.
            Defaults to ``None``.

    Returns:
        bytes: PNG file.
    """
    chosen, names = oddest(scores), short_names(scores.paths)
    rows = -(-len(chosen) // PER_ROW)
    figure = Figure(figsize=(7.2, 2.2 + 1.75 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, PER_ROW, height_ratios=[1.3, *[1] * rows])
    panel = figure.add_subplot(grid[0, :])
    panel.plot(scores.scores, ".", color=GOOD, markersize=5)
    panel.plot(chosen, scores.scores[chosen], "o", color=DEFECTIVE, markersize=5)
    for rank, index in enumerate(chosen, start=1):
        label = {"textcoords": "offset points", "xytext": (0, 4), "ha": "center", "fontsize": 7}
        panel.annotate(str(rank), (index, scores.scores[index]), **label)  # type: ignore[arg-type]
    panel.set_xlabel("training images, in the order of their names", fontsize=8, color=GREY)
    panel.set_ylabel("raw score", fontsize=8, color=GREY)
    panel.margins(y=0.15)
    clean(panel)
    for rank, index in enumerate(chosen):
        panel = figure.add_subplot(grid[1 + rank // PER_ROW, rank % PER_ROW])
        panel.set_axis_off()
        panel.imshow(thumbnail(scores.paths[index], levels))
        panel.set_title(f"{rank + 1}: {names[index]}", fontsize=7)
    return png(figure)
