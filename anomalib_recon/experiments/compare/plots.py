# SPDX-License-Identifier: Apache-2.0

"""Pictures of a comparison, as PNG files in memory."""

import io
from collections.abc import Mapping, Sequence
from itertools import cycle

import numpy as np
import pandas as pd
import torch
from anomalib.data.utils import read_image
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter
from numpy.typing import NDArray
from sklearn.metrics import roc_curve
from torch.nn.functional import interpolate

from anomalib_recon.deploy import GreyLevels
from anomalib_recon.deploy import read_image as read_levels
from anomalib_recon.visualization.contact_sheet import DEFECTIVE, GOOD, GREY

from .scores import PICTURE_SIZE, Scores

COLOURS = colormaps["tab10"].colors  # type: ignore[attr-defined]
MARKERS = "osD^vPX*"
CASES_PER_KIND = 2


def png(figure: Figure) -> bytes:
    """A figure as a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    return buffer.getvalue()


def thumbnail(path: str, levels: GreyLevels | None = None) -> NDArray[np.float32]:
    """A small square picture of an image.

    Args:
        path (str): File of the image.
        levels (GreyLevels | None): Those of the datamodule, for images with more than 8 bits of grey.
            Defaults to ``None``.

    Returns:
        NDArray[np.float32]: Picture of shape ``(PICTURE_SIZE, PICTURE_SIZE, 3)`` with values in [0, 1].
    """
    image = read_image(path, as_tensor=True) if levels is None else torch.from_numpy(read_levels(path, levels))
    assert isinstance(image, torch.Tensor)
    [picture] = interpolate(image[None], (PICTURE_SIZE, PICTURE_SIZE), mode="bilinear", antialias=True)
    return picture.permute(1, 2, 0).clip(0, 1).numpy()


def clean(axis: Axes) -> None:
    """Leave out what a panel does not need."""
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8, colors=GREY)


def histograms(scores: Mapping[str, Scores], thresholds: Mapping[str, float]) -> bytes:
    """Distribution of the scores of good and of defective images, with the threshold, a panel for each model."""
    columns = min(3, len(scores))
    rows = -(-len(scores) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.3 * rows + 0.3), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for panel in panels[len(scores) :]:
        panel.remove()
    for panel, (model, values) in zip(panels, scores.items(), strict=False):
        edges = np.histogram_bin_edges(values.scores, bins=24)
        for label, is_defective, colour in (("good", False, GOOD), ("defective", True, DEFECTIVE)):
            chosen = values.scores[values.labels == is_defective]
            panel.hist(chosen, edges, color=colour, alpha=0.6, label=label)
        panel.axvline(thresholds[model], color="black", linestyle="--", linewidth=1, label="threshold")
        panel.set_title(model, fontsize=10)
        panel.set_xlabel("raw score", fontsize=8, color=GREY)
        clean(panel)
    panels[0].set_ylabel("images", fontsize=8, color=GREY)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8, frameon=False
    )
    return png(figure)


def roc_curves(scores: Mapping[str, Scores]) -> bytes:
    """ROC curves of the images, all models in one panel."""
    figure = Figure(figsize=(5, 3.8), layout="constrained")
    axis = figure.subplots()
    axis.plot([0, 1], [0, 1], color="#d0d5dd", linewidth=1)
    for colour, (model, values) in zip(cycle(COLOURS), scores.items(), strict=False):
        false_positive_rate, true_positive_rate, _ = roc_curve(values.labels, values.scores, drop_intermediate=False)
        axis.plot(false_positive_rate, true_positive_rate, color=colour, label=model)
    axis.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    axis.set_xlabel("good images called defective", fontsize=9)
    axis.set_ylabel("defective images found", fontsize=9)
    axis.legend(fontsize=8, frameon=False, loc="lower right")
    clean(axis)
    return png(figure)


def speed_against_accuracy(results: pd.DataFrame) -> bytes:
    """Image AUROC over the time for one image: a colour for each model, a marker for each data set.

    Args:
        results (pd.DataFrame): With ``model``, ``data``, ``image_AUROC``, ``openvino_ms`` and ``torch_ms``.

    Returns:
        bytes: PNG file. The time is that of OpenVINO, or of torch where there is no export (hollow markers).
    """
    figure = Figure(figsize=(7.2, 3.4), layout="constrained")
    axis = figure.subplots()
    datasets = list(results["data"].unique())
    for colour, (model, rows) in zip(cycle(COLOURS), results.groupby("model", sort=False), strict=False):
        for row in rows.itertuples():
            is_exported = pd.notna(row.openvino_ms)
            axis.scatter(
                row.openvino_ms if is_exported else row.torch_ms,
                row.image_AUROC,
                s=55,
                marker=MARKERS[datasets.index(row.data) % len(MARKERS)],
                edgecolors=[colour],
                facecolors=[colour] if is_exported else "none",
            )
        axis.scatter([], [], color=[colour], label=model)
    for index, name in enumerate(datasets if len(datasets) > 1 else ()):
        axis.scatter([], [], color=GREY, marker=MARKERS[index % len(MARKERS)], label=name)
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
    axis.xaxis.set_minor_formatter(LogFormatter(labelOnlyBase=False, minor_thresholds=(1.5, 0.5)))
    if results["image_AUROC"].isna().all():  # no test image is defective: there is nothing to show
        axis.set_xlim(1, 1000)
    axis.set_ylim(np.nanmin([*(results["image_AUROC"] - 0.02), 0.9]), 1.005)
    axis.grid(color="#eaecf0", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("milliseconds per image", fontsize=9)
    axis.set_ylabel("image AUROC", fontsize=9)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    clean(axis)
    axis.tick_params(axis="x", which="minor", labelsize=8, labelcolor=GREY)
    return png(figure)


def chosen_cases(scores: Scores) -> list[tuple[str, int]]:
    """Indices of the clearest and the hardest images, by their scores, each with what it is."""
    order = np.argsort(scores.scores, kind="stable")
    good = [index for index in order if not scores.labels[index]]
    defective = [index for index in order if scores.labels[index]]
    kinds: Sequence[tuple[str, Sequence[int]]] = (
        ("defective, highest scores", defective[::-1]),
        ("defective, lowest scores", defective),
        ("good, highest scores", good[::-1]),
        ("good, lowest scores", good),
    )
    return [(kind, index) for kind, indices in kinds for index in indices[:CASES_PER_KIND]]


def cases(
    scores: Scores,
    chosen: Sequence[tuple[str, int]],
    maps: torch.Tensor,
    masks: torch.Tensor,
    threshold: float,
    levels: GreyLevels | None = None,
) -> bytes:
    """Contact sheet of the best and worst cases of a model: image, ground truth and anomaly map with score.

    Args:
        scores (Scores): Scores of the test images.
        chosen (Sequence[tuple[str, int]]): What :func:`chosen_cases` returned, N cases.
        maps (torch.Tensor): Their raw anomaly maps, (N, H, W).
        masks (torch.Tensor): Their ground truth masks, (N, H, W).
        threshold (float): Image threshold.
        levels (GreyLevels | None): Those of the datamodule, for images with more than 8 bits of grey.
            Defaults to ``None``.

    Returns:
        bytes: PNG file. All maps share one scale, from the lowest to the highest value of those shown.
    """
    low, high = maps.min().item(), maps.max().item()
    figure = Figure(figsize=(1.35 * len(chosen), 4.5), layout="constrained")
    panels = figure.subplots(3, len(chosen), squeeze=False)
    for column, (kind, index) in enumerate(chosen):
        panels[0, column].imshow(thumbnail(scores.paths[index], levels))
        panels[1, column].imshow(masks[column], cmap="gray", vmin=0, vmax=1)
        panels[2, column].imshow(maps[column], cmap="inferno", vmin=low, vmax=high)
        is_right = (scores.scores[index] > threshold) == scores.labels[index]
        verdict = f"{scores.scores[index]:.3g} {'right' if is_right else 'wrong'}"
        panels[2, column].set_xlabel(verdict, fontsize=8, color="black" if is_right else DEFECTIVE)
        if column == 0 or chosen[column - 1][0] != kind:
            panels[0, column].set_title(kind.replace(", ", ",\n"), fontsize=8, loc="left")
    for row, name in zip(panels, ("image", "ground truth", "anomaly map"), strict=True):
        row[0].set_ylabel(name, fontsize=8)
    for panel in panels.flatten():
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    return png(figure)
