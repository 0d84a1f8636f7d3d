# SPDX-License-Identifier: Apache-2.0

"""Map and score of the residual between features and their prediction."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

# share of the mean variance of the residual that is added to that of each channel
SHRINKAGE = 0.01


class AnomalyMapGenerator(nn.Module):
    """Residuals in units of their normal variation, channel by channel.

    Args:
        num_channels (int): Channels C of the features.
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the score.
    """

    variance: Tensor

    def __init__(self, num_channels: int, image_size: tuple[int, int], top_fraction: float) -> None:
        super().__init__()
        self.image_size = image_size
        self.top_fraction = top_fraction
        self.register_buffer("variance", torch.ones(num_channels, 1, 1))

    def fit(self, residuals: Iterable[Tensor]) -> None:
        """Set the normal variation.

        Args:
            residuals (Iterable[Tensor]): Residuals of normal images in batches of shape ``(b, C, h, w)``.
        """
        sums = [(residual.square().mean(dim=(0, 2, 3)).double().cpu(), len(residual)) for residual in residuals]
        variance = sum(mean * count for mean, count in sums) / sum(count for _, count in sums)
        self.variance = (variance + SHRINKAGE * variance.mean()).to(self.variance)[:, None, None]

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Map the root mean square of the residual, in deviations.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their prediction, of the same shape.

        Returns:
            Tensor: Maps of shape ``(B, 1, H, W)``, about 1 where images are normal.
        """
        with torch.autocast(features.device.type, enabled=False):
            squared = (features.float() - reconstruction.float()).square() / self.variance
            distance = squared.mean(dim=1, keepdim=True).sqrt()
        return functional.interpolate(distance, size=self.image_size, mode="bilinear", align_corners=False)

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the highest values of maps of shape ``(B, 1, H, W)``, of shape ``(B,)``."""
        count = max(1, round(self.top_fraction * self.image_size[0] * self.image_size[1]))
        return anomaly_map.flatten(1).topk(count, dim=1).values.mean(dim=1)
