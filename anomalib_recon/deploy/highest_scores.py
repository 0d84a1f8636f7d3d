# SPDX-License-Identifier: Apache-2.0

"""Thresholds at a false-positive rate from a stream of scores."""

import math
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
from numpy.typing import NDArray


class HighestScores:
    """The highest of all scores of a set of normal images, as many as may lie above a threshold.

    Only these matter for a threshold at a small rate, so it is exact in 4 bytes for each score that may be called
    anomalous: 1.3 MB for 65 million pixels at a rate of 0.005. The number of scores is extrapolated from each batch.
    Where maps differ in size and too few scores were kept, the threshold is the highest of those that were not, so
    that the rate is lower than asked for, never higher.

    Args:
        max_rate (float): Highest rate that is asked for, in [0, 1).
        num_images (int): Number of images, over all processes together.
        share (float): Share of the scores that a rate is of; the others lie outside a region and never exceed a
            threshold.
            Defaults to ``1.0``.
    """

    def __init__(self, max_rate: float, num_images: int, share: float = 1.0) -> None:
        self.max_rate = max_rate
        self.num_images = num_images
        self.share = share
        self.count = 0
        self.lowest = math.inf
        self._highest: NDArray[np.float32] = np.empty(0, np.float32)
        self._highest_dropped = -math.inf

    def update(self, scores: NDArray[Any]) -> None:
        """Add the scores of a batch.

        Args:
            scores (NDArray[Any]): Raw scores ``(B,)`` or maps ``(B, H, W)`` or ``(B, 1, H, W)``.

        Raises:
            ValueError: If a score is NaN or infinite.
        """
        flat = scores.ravel()
        if unusable := int((~np.isfinite(flat)).sum()):
            msg = (
                f"{unusable} of {flat.size} scores of normal images are NaN or infinite, so no threshold can be set: "
                "check the model that produced them."
            )
            raise ValueError(msg)
        self.count += flat.size
        self.lowest = min(self.lowest, float(flat.min()))
        kept = np.concatenate([self._highest, flat[flat > self._highest_dropped]])
        capacity = self._allowed(self.max_rate, flat.size * self.num_images // len(scores)) + 1
        if kept.size > capacity:
            kept = np.partition(kept, kept.size - capacity - 1)
            self._highest_dropped = float(kept[kept.size - capacity - 1])
            kept = kept[-capacity:]
        self._highest = kept

    def merge(self, parts: "Sequence[HighestScores]") -> None:
        """Take what all processes hold.

        Args:
            parts (Sequence[HighestScores]): What they hold, this one included.
        """
        self.count = sum(part.count for part in parts)
        self.lowest = min(part.lowest for part in parts)
        self._highest = np.concatenate([part._highest for part in parts])
        self._highest_dropped = max(part._highest_dropped for part in parts)

    def threshold(self, rate: float) -> float:
        """Find the lowest threshold above which at most a fraction of the scores lies.

        Args:
            rate (float): The fraction, in [0, ``max_rate``]; at 0 it is the highest score.

        Returns:
            float: The threshold.
        """
        next_highest = np.sort(self._highest)[::-1][self._allowed(rate, self.count) :][:1]
        return max([self._highest_dropped, *map(float, next_highest)])

    def _allowed(self, rate: float, count: int) -> int:
        """Number of ``count`` scores that may lie above a threshold; decimal, so that 0.29 of 100 are 29."""
        return int(Decimal(str(rate)) * int(self.share * count))
