# SPDX-License-Identifier: Apache-2.0

"""AUROC and AUPRO from raw scores, exact and in bounded memory.

Both are areas under one kind of curve: the weight of the anomalous values against the weight of the normal
values that score above a threshold. They differ only in what an anomalous value weighs, so both keep the same
state, a table of (score, normal weight, anomalous weight) rows. Nothing is binned in advance and no score is
transformed, so scores of any offset and scale are ranked as they are.

A table with more than ``max_points`` distinct scores is compressed: neighbouring scores are merged into at most
``max_points`` groups of about equal weight. Up to ``max_points`` distinct scores the result is therefore exact.
Beyond, ``n`` values move the AUROC by at most ``8 * n / max_points**2``, whatever their order, and the AUPRO by at
most that over ``fpr_limit``: merged rows hold at most ``4 / max_points`` of either class together, they lose no
order but that against what lies between them, and there are at most ``n / max_points`` compressions. The default
guarantees an AUROC within 1e-4 up to 55 million values, such as 830 maps of 256 x 256 pixels. Measured deviations
are far smaller, because most of these errors cancel.
"""

from typing import Any

import numpy as np
import torch
from anomalib.metrics import AnomalibMetric
from anomalib.utils.cv import connected_components_cpu
from numpy.typing import NDArray
from sklearn.metrics import auc, roc_curve
from torchmetrics import Metric
from torchmetrics.utilities import rank_zero_warn
from torchmetrics.utilities.data import dim_zero_cat


class _ScoreCurve(Metric):
    """Area under the curve of anomalous against normal weight above a threshold.

    Args:
        fpr_limit: Upper end of the area on the axis of the normal weight, in (0, 1]. The area is divided by it.
        max_points: Distinct scores up to which the result is exact; twice as many rows of 24 bytes, and one batch,
            are held at most.
        **kwargs: Passed to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: If ``fpr_limit`` is not in (0, 1] or ``max_points`` is not positive.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    table: list[torch.Tensor]

    def __init__(self, fpr_limit: float = 1.0, max_points: int = 2**21, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 < fpr_limit <= 1:
            msg = f"fpr_limit must be greater than 0 and at most 1, got {fpr_limit}."
            raise ValueError(msg)
        if max_points < 1:
            msg = f"max_points must be at least 1, got {max_points}."
            raise ValueError(msg)
        self.fpr_limit = fpr_limit
        self.max_points = max_points
        self.add_state("table", default=[], dist_reduce_fx="cat")

    def anomalous_weights(self, target: torch.Tensor) -> torch.Tensor:
        """Weigh the anomalous values.

        Args:
            target: Boolean ground truth of any shape, on the CPU.

        Returns:
            Float64 weights, one for each value of ``target`` and 0 where it is normal.
        """
        raise NotImplementedError

    def update(self, scores: torch.Tensor, target: torch.Tensor, region: torch.Tensor | None = None) -> None:
        """Add a batch.

        Args:
            scores: Raw scores ``(B,)`` or maps ``(B, H, W)`` or ``(B, 1, H, W)``, of any offset and scale.
            target: Ground truth with as many values as ``scores``, 0 for normal.
            region: Which pixels of maps count, boolean ``(H, W)``; the others must be normal. ``None`` stands for all.

        Raises:
            ValueError: If a score is not finite or the two do not hold equally many values.
        """
        if scores.numel() != target.numel():
            msg = (
                f"Scores of shape {tuple(scores.shape)} cannot be compared with a ground truth of shape "
                f"{tuple(target.shape)}: give the model's output the size of the ground truth."
            )
            raise ValueError(msg)
        # Gathering over NCCL needs CUDA states. Other accelerators may lack float64.
        device = scores.device if scores.is_cuda else torch.device("cpu")
        score = scores.detach().float().flatten().to(device).double()
        if not score.isfinite().all():
            msg = (
                f"{int((~score.isfinite()).sum())} of {score.numel()} scores are NaN or infinite and cannot be "
                "ranked: check the model that produced them."
            )
            raise ValueError(msg)
        anomalous = target.cpu().bool()
        weights = torch.stack([(~anomalous).double().flatten(), self.anomalous_weights(anomalous).flatten()], dim=1)
        rows = torch.cat([score[:, None], weights.to(device)], dim=1)
        self.table.append(rows if region is None else rows[region.to(device).expand_as(scores).flatten()])
        if sum(len(rows) for rows in self.table) > 2 * self.max_points:
            rows = torch.cat([rows.to(device) for rows in self.table])
            self.table = [torch.from_numpy(_compress(rows.cpu().numpy(), self.max_points)).to(device)]

    def compute(self) -> torch.Tensor:
        """Compute the area.

        Returns:
            Scalar in [0, 1], or NaN with a warning if all values are of one class, for which no curve exists.
        """
        rows = dim_zero_cat(self.table) if len(self.table) else torch.empty(0, 3)
        score, *weights = rows.cpu().numpy().T
        if not all(weight.any() for weight in weights):
            rank_zero_warn(f"{type(self).__name__} is NaN: it needs both normal and anomalous values.")
            return torch.tensor(float("nan"), device=self.device)
        fpr, tpr, _ = roc_curve(
            y_true=np.repeat([0, 1], len(score)), y_score=np.tile(score, 2), sample_weight=np.concatenate(weights)
        )
        below = fpr <= self.fpr_limit
        tpr_at_limit = np.interp(self.fpr_limit, fpr, tpr)
        area = auc(np.append(fpr[below], self.fpr_limit), np.append(tpr[below], tpr_at_limit)) / self.fpr_limit
        return torch.tensor(area, dtype=torch.float32, device=self.device)


class _AUROC(_ScoreCurve):
    """AUROC: every value weighs the same."""

    def anomalous_weights(self, target: torch.Tensor) -> torch.Tensor:
        return target.double()


class _AUPRO(_ScoreCurve):
    """AUPRO: every connected region weighs the same, its pixels share that weight."""

    def __init__(self, fpr_limit: float = 0.3, max_points: int = 2**21, **kwargs: Any) -> None:
        super().__init__(fpr_limit=fpr_limit, max_points=max_points, **kwargs)

    def anomalous_weights(self, target: torch.Tensor) -> torch.Tensor:
        regions = connected_components_cpu(target.reshape(-1, 1, *target.shape[-2:]).float()).long()
        weights = torch.bincount(regions.flatten()).double().reciprocal()
        weights[0] = 0  # the background is no region
        return weights[regions]


class AUROC(AnomalibMetric, _AUROC):  # type: ignore[misc]
    """Area under the ROC curve, equal to scikit-learn's on raw scores.

    Args:
        fields (Sequence[str] | None): Names of the batch's scores and ground truth, such as
            ``("anomaly_map", "gt_mask")``.
        prefix (str): Start of the logged name, such as ``"pixel_"``.
        strict (bool): Whether a batch without these fields is an error; otherwise it is skipped.
        fpr_limit (float): False-positive rate up to which the area is taken, in (0, 1].
            Defaults to ``1``.
        max_points (int): Distinct scores up to which the result is exact.
            Defaults to ``2**21``.
    """


class AUPRO(AnomalibMetric, _AUPRO):  # type: ignore[misc]
    """Area under the per-region overlap curve on raw scores, up to a limit of the false positive rate.

    The regions are anomalib's: 8-connected components of the ground truth, image by image.

    Args:
        fields (Sequence[str] | None): Names of the batch's maps and ground truth, such as
            ``("anomaly_map", "gt_mask")``.
        prefix (str): Start of the logged name, such as ``"pixel_"``.
        strict (bool): Whether a batch without these fields is an error; otherwise it is skipped.
        fpr_limit (float): False-positive rate up to which the area is taken, in (0, 1].
            Defaults to ``0.3``.
        max_points (int): Distinct scores up to which the result is exact.
            Defaults to ``2**21``.
    """


def _compress(table: NDArray[np.float64], max_points: int) -> NDArray[np.float64]:
    """Merge rows of equal score and, while there are more than ``max_points``, neighbours of about equal weight.

    Args:
        table: Rows of score, normal weight and anomalous weight, ``(N, 3)``, in any order.
        max_points: Rows to keep at most.

    Returns:
        Table of at most ``max_points`` rows, sorted by score, with the same total weights.
    """
    table = table[np.argsort(table[:, 0])]
    first = np.flatnonzero(np.diff(table[:, 0], prepend=-np.inf))
    table = _merge(table, first, table[first, 0])
    if len(table) <= max_points:
        return table
    weights = table[:, 1:] / np.maximum(table[:, 1:].sum(axis=0), 1)
    share = weights.sum(axis=1) / weights.sum()
    end = np.cumsum(share)
    # A row belongs to the group in which its middle lies, so one that is heavier than a group stays alone.
    first = np.flatnonzero(np.diff(np.floor((end - share / 2) * max_points), prepend=-1))
    last = np.append(first[1:], len(table)) - 1
    # The weighted median leaves a heavy row its score, however often light ones join it.
    median = np.searchsorted(end, (end[first] - share[first] + end[last]) / 2)
    return _merge(table, first, table[median, 0])


def _merge(table: NDArray[np.float64], first: NDArray[np.intp], scores: NDArray[np.float64]) -> NDArray[np.float64]:
    """Sum the weights of consecutive rows, from each ``first`` up to the next, and give each sum its score."""
    return np.column_stack([scores, np.add.reduceat(table[:, 1:], first)])
