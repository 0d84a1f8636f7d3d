# SPDX-License-Identifier: Apache-2.0

"""Thresholds at a false-positive rate from a stream of scores."""

from decimal import Decimal

import torch
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors


class HighestScores:
    """The highest of all scores of a set of normal images, as many as may lie above a threshold.

    Only these matter for a threshold at a small rate, so it is exact in 4 bytes for each score that may be called
    anomalous: 1.3 MB for 65 million pixels at a rate of 0.005. The number of scores is extrapolated from each batch.
    Where maps differ in size and too few scores were kept, the threshold is the highest of those that were not, so
    that the rate is lower than asked for, never higher.

    Args:
        max_rate: Highest rate that is asked for, in [0, 1).
        num_images: Number of images, over all processes together.
        device: Device of the scores.
    """

    def __init__(self, max_rate: float, num_images: int, device: torch.device | str = "cpu") -> None:
        self.max_rate = max_rate
        self.num_images = num_images
        self.count = 0
        self.lowest = float("inf")
        self.highest = torch.empty(0, device=device)
        self._highest_dropped = float("-inf")

    def update(self, scores: Tensor) -> None:
        """Add the scores of a batch.

        Args:
            scores: Raw scores ``(B,)`` or maps ``(B, H, W)`` or ``(B, 1, H, W)``.

        Raises:
            ValueError: If a score is NaN or infinite.
        """
        flat = scores.detach().float().flatten()
        if not flat.isfinite().all():
            msg = (
                f"{int((~flat.isfinite()).sum())} of {len(flat)} scores of normal images are NaN or infinite, so no "
                "threshold can be set: check the model that produced them."
            )
            raise ValueError(msg)
        self.count += len(flat)
        self.lowest = min(self.lowest, float(flat.min()))
        kept = torch.cat([self.highest, flat[flat > self._highest_dropped]])
        capacity = _allowed(self.max_rate, len(flat) * self.num_images // len(scores)) + 1
        if len(kept) > capacity:
            kept = kept.topk(capacity + 1).values
            self._highest_dropped = float(kept[-1])
            kept = kept[:-1]
        self.highest = kept

    def gather(self) -> None:
        """Merge what all processes hold, so that they agree."""
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        counts = gather_all_tensors(torch.tensor(self.count, device=self.highest.device))
        own = torch.tensor([self.lowest, self._highest_dropped], device=self.highest.device)
        lowest, dropped = torch.stack(gather_all_tensors(own)).unbind(dim=1)
        self.count, self.lowest, self._highest_dropped = int(sum(counts)), float(lowest.min()), float(dropped.max())
        self.highest = torch.cat(gather_all_tensors(self.highest))

    def threshold(self, rate: float) -> float:
        """Find the lowest threshold above which at most a fraction ``rate`` of all scores lies.

        Args:
            rate: False-positive rate in [0, ``max_rate``]; at 0 it is the highest score.
        """
        allowed = _allowed(rate, self.count)
        next_highest = self.highest.sort(descending=True).values[allowed : allowed + 1]
        return max([self._highest_dropped, *next_highest.tolist()])


def _allowed(rate: float, count: int) -> int:
    """Number of ``count`` scores that may lie above a threshold; decimal, so that 0.29 of 100 are 29."""
    return int(Decimal(str(rate)) * count)
