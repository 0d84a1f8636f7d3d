# SPDX-License-Identifier: Apache-2.0

r"""One picture of a whole test: the worst misses, the worst false alarms, and all scores beside the threshold.

Example:
    .. code-block:: bash

        anomalib test --model ADTR --ckpt_path CKPT --data MVTecAD \
            --model.visualizer anomalib_recon.visualization.ContactSheetVisualizer
"""

import heapq
import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from anomalib.data import ImageBatch, ImageItem
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from anomalib_recon.deploy.grey_levels import is_deep
from anomalib_recon.files import write_whole

from .visualizer import ReconstructionVisualizer

CASES = 10  # of each kind
COLUMNS = 5
SIDE = 192  # of a thumbnail, in pixels
GOOD, DEFECTIVE, GREY = "#4c78a8", "#e4572e", "#667085"


@dataclass(order=True)
class Case:
    """A test image that the model was wrong about."""

    excess: float
    """Distance of its score from the threshold, by which cases are ordered."""
    path: str
    score: float = field(compare=False)
    image: NDArray[np.uint8] = field(compare=False, repr=False)
    """Thumbnail of shape ``(h, w, 3)``."""
    anomaly_map: NDArray[np.float32] | None = field(compare=False, repr=False)
    """Thumbnail of shape ``(h, w)``."""


class ContactSheetVisualizer(ReconstructionVisualizer):
    """Visualizer that also draws a contact sheet of each test, ``contact_sheet.png`` in the folder of its results.

    It shows the distribution of the scores of good and of defective images with the threshold, up to ten defective
    images missed by the widest margin, and up to ten good images called anomalous by the widest margin, each beside its
    anomaly map. The colours of all maps have one scale, in whose middle the threshold is.

    In a run of several processes, the sheet is of what the first of them has tested.

    Args:
        **kwargs (Any): The arguments of :class:`ReconstructionVisualizer`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.reset()

    def reset(self) -> None:
        """Forget all images."""
        self.scores: list[float] = []
        self.labels: list[bool] = []
        self._misses: list[Case] = []
        self._false_alarms: list[Case] = []

    @property
    def misses(self) -> list[Case]:
        """Defective images that were called normal, the worst first."""
        return sorted(self._misses, reverse=True)

    @property
    def false_alarms(self) -> list[Case]:
        """Good images that were called anomalous, the worst first."""
        return sorted(self._false_alarms, reverse=True)

    def on_test_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Begin a new sheet."""
        super().on_test_start(trainer, pl_module)
        self.reset()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: ImageBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Save the pictures of a batch, and note what the model was wrong about."""
        super().on_test_batch_end(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)
        if not trainer.testing or batch.pred_score is None or batch.gt_label is None:
            return
        threshold = _threshold(pl_module, "image")
        for item in batch:
            self._note(item, threshold)

    def _note(self, item: ImageItem, threshold: float) -> None:
        score, is_defective = float(cast("Tensor", item.pred_score)), bool(item.gt_label)
        self.scores.append(score)
        self.labels.append(is_defective)
        if (score > threshold) == is_defective:
            return
        cases = self._misses if is_defective else self._false_alarms
        excess = abs(score - threshold)
        if len(cases) < CASES or excess > cases[0].excess:
            case = Case(excess, str(item.image_path), score, *_thumbnails(item))
            (heapq.heappush if len(cases) < CASES else heapq.heappushpop)(cases, case)

    def on_test_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Draw the sheet."""
        if not self.scores:
            return
        path = Path(trainer.default_root_dir) / "contact_sheet.png"
        figure = draw_contact_sheet(self, _threshold(pl_module, "image"), _threshold(pl_module, "pixel"))
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=100)
        write_whole(path, content.getvalue())
        rank_zero_info(f"Contact sheet: {path}")


def _threshold(module: Any, kind: Literal["image", "pixel"]) -> float:
    """Threshold of a model's scores as they are given out."""
    threshold = float(getattr(module.post_processor, f"normalized_{kind}_threshold"))
    return 0.5 if math.isnan(threshold) else threshold  # with which anomalib compares scores that have none


def _thumbnails(item: ImageItem) -> tuple[NDArray[np.uint8], NDArray[np.float32] | None]:
    """Image and anomaly map of an item, scaled to fit a square."""
    image = _picture(item)
    image.thumbnail((SIDE, SIDE))
    if item.anomaly_map is None:
        return np.asarray(image), None
    anomaly_map = Image.fromarray(item.anomaly_map.float().squeeze().cpu().numpy())
    return np.asarray(image), np.asarray(anomaly_map.resize(image.size, Image.Resampling.BILINEAR))


def _picture(item: ImageItem) -> Image.Image:
    """The image from its file, as in anomalib's pictures: a built-in model has normalised what it has seen.

    Of a file with more than 8 bits of grey, and without a file, what the model has seen.
    """
    if item.image_path and not is_deep(item.image_path):
        return Image.open(item.image_path).convert("RGB")
    pixels = cast("Tensor", item.image).float().clamp(0, 1).mul(255).byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(pixels)


def draw_contact_sheet(sheet: ContactSheetVisualizer, image_threshold: float, pixel_threshold: float) -> Figure:
    """Draw what a test has shown.

    Args:
        sheet (ContactSheetVisualizer): What it has seen.
        image_threshold (float): Threshold of the scores.
        pixel_threshold (float): Threshold of the anomaly maps.

    Returns:
        Figure: The sheet.
    """
    parts = (
        ("Defective images that were missed, the worst first", sheet.misses, "None was missed."),
        ("Good images that were called anomalous, the worst first", sheet.false_alarms, "No false alarm."),
    )
    rows = [max(1, math.ceil(len(cases) / COLUMNS)) for _, cases, _ in parts]
    heights = [2.2, *(0.5 + 1.5 * count for count in rows)]
    figure = Figure(figsize=(3.2 * COLUMNS, sum(heights)), layout="constrained")
    top, *others = cast("Any", figure.subfigures(3, 1, height_ratios=heights))
    _draw_scores(top.subplots(), sheet.scores, sheet.labels, image_threshold)
    for subfigure, (title, cases, nothing), count in zip(others, parts, rows, strict=True):
        subfigure.suptitle(title, fontsize=11, x=0.01, horizontalalignment="left")
        if cases:
            _draw_cases(subfigure, cases, count, pixel_threshold)
        else:
            subfigure.text(0.01, 0.4, nothing, fontsize=10, color=GREY)
    return figure


def _draw_scores(axis: Axes, scores: Iterable[float], labels: Iterable[bool], threshold: float) -> None:
    values, is_defective = np.array(scores), np.array(labels)
    edges = np.histogram_bin_edges(np.append(values, threshold), bins=40)
    for name, chosen, colour in (("good", ~is_defective, GOOD), ("defective", is_defective, DEFECTIVE)):
        wrong = int(((values > threshold) != is_defective)[chosen].sum())
        label = f"{name}: {int(chosen.sum())} images, {wrong} wrong"
        axis.hist(values[chosen], edges.tolist(), color=colour, alpha=0.6, label=label)
    axis.axvline(threshold, color="black", linestyle="--", linewidth=1, label=f"threshold {threshold:.3g}")
    axis.set_xlabel("score", fontsize=9, color=GREY)
    axis.set_title("Number of images by score", fontsize=11, loc="left")
    axis.legend(fontsize=9, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)


def _draw_cases(figure: SubFigure, cases: list[Case], rows: int, threshold: float) -> None:
    axes = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
    for axis in axes:
        axis.set_axis_off()
    maps = [case.anomaly_map for case in cases if case.anomaly_map is not None]
    lowest = min([0.0, 2 * threshold, *(float(values.min()) for values in maps)])
    highest = max([2 * threshold - lowest, *(float(values.max()) for values in maps)])
    for axis, case in zip(axes, cases, strict=False):
        height, width = case.image.shape[:2]
        axis.imshow(case.image, extent=(0, width, height, 0))
        if case.anomaly_map is not None:
            # two halves of one scale: the threshold is in the middle of the colours, however high maps rise
            colours = np.interp(case.anomaly_map, [lowest, threshold, highest], [0, 0.5, 1])
            axis.imshow(colours, cmap="coolwarm", vmin=0, vmax=1, extent=(width, 2 * width, height, 0))
        axis.set(xlim=(0, 2 * width), ylim=(height, 0))
        path = Path(case.path)
        axis.set_title(f"{path.parent.name}/{path.name}  {case.score:.3f}", fontsize=8)
