# SPDX-License-Identifier: Apache-2.0

"""Features in units of their normal variation.

Example:
    >>> import torch
    >>> from anomalib_recon.layers import FeatureScale
    >>> scale = FeatureScale([3, 5], by="stage")
    >>> scale.fit([torch.randn(4, 8, 6, 6) * 100])
    >>> scale(torch.rand(2, 8, 6, 6)).shape
    torch.Size([2, 8, 6, 6])
"""

from collections.abc import Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .arguments import check_choice
from .covariance import FeatureCovariance
from .whitening import PrincipalWhitening

ScaleBy = Literal["none", "stage", "channel", "whiten"]

# share of a stage's mean variance that is added to that of each channel: one that is nearly constant is not blown up
SHRINKAGE = 0.01
# least variance, for features that are constant
MIN_VARIANCE = 1e-12


class FeatureScale(nn.Module):
    """Subtract the mean of each channel and divide by a standard deviation. Before :meth:`fit` nothing is changed.

    Args:
        num_channels (Sequence[int]): Channels of each stage, C in all.
        by (ScaleBy): Divide by the standard deviation of each channel, ``"channel"``, or by one for all channels of a
            stage, ``"stage"``, so that all stages count alike and relations between channels stay. ``"whiten"`` turns
            that into principal components of unit variance, the largest first. ``"none"`` changes nothing.

    Raises:
        ValueError: If ``by`` is none of these.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, num_channels: Sequence[int], by: ScaleBy) -> None:
        super().__init__()
        check_choice(("none", "stage", "channel", "whiten"), feature_scale=by)
        self.num_channels = list(num_channels)
        self.by = by
        is_fitted = by != "none"  # otherwise a checkpoint needs neither
        self.register_buffer("mean", torch.zeros(sum(num_channels), 1, 1), persistent=is_fitted)
        self.register_buffer("std", torch.ones(sum(num_channels), 1, 1), persistent=is_fitted)
        self.whitening = PrincipalWhitening(sum(num_channels)) if by == "whiten" else None

    def fit(self, features: Iterable[Tensor]) -> None:
        """Set mean and standard deviation, exactly, in one pass; ``"whiten"`` needs a second one.

        Args:
            features (Iterable[Tensor]): Features of normal images in batches of shape ``(b, C, h, w)``.
        """
        if self.by == "none":
            return
        count, total, squares, origin = 0, torch.zeros(()).double(), torch.zeros(()).double(), torch.zeros(())
        for batch in features:
            values = batch.detach().float().movedim(1, 0).flatten(1)  # (C, n)
            if count == 0:
                origin = values.mean(dim=1, keepdim=True)  # subtracted so that no digits are lost to the mean
            values = values - origin
            count += values.shape[1]
            total = total + values.sum(dim=1).cpu().double()
            squares = squares + values.square().sum(dim=1).cpu().double()
        mean = total / count
        variance = (squares / count - mean.square()).clamp(min=0)
        stages = [self._stage_variance(stage) for stage in variance.split(self.num_channels)]
        self.mean = (mean.to(self.mean) + origin[:, 0].to(self.mean))[:, None, None]
        self.std = torch.cat(stages).sqrt().to(self.std)[:, None, None]
        if self.whitening is not None:
            sums = FeatureCovariance(len(mean))
            for batch in features:
                sums.update(self.standardize(batch))
            self.whitening.set(sums)

    def _stage_variance(self, variance: Tensor) -> Tensor:
        """The variance to divide by, of the channels of a stage, ``(C_i,) -> (C_i,)``."""
        mean = variance.mean().clamp(min=MIN_VARIANCE)
        return variance + SHRINKAGE * mean if self.by == "channel" else mean.expand_as(variance)

    def standardize(self, features: Tensor) -> Tensor:
        """Subtract the mean and divide by the standard deviation, without whitening, ``(B, C, h, w)``."""
        return features if self.by == "none" else (features - self.mean) / self.std

    def forward(self, features: Tensor) -> Tensor:
        """Scale features of shape ``(B, C, h, w)``."""
        if self.whitening is None:
            return self.standardize(features)
        with torch.autocast(features.device.type, enabled=False):
            return self.whitening(self.standardize(features.float()))
