# SPDX-License-Identifier: Apache-2.0

"""ADTR's anomaly map and score (section 3.1, "Inference")."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers import ResidualDistance, TopMean

Distance = Literal["norm", "mahalanobis"]


class AnomalyMapGenerator(nn.Module):
    """Turn the difference of features and reconstruction into a map and a score.

    Args:
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
        pool_size (int): Side of the window, in pixels, over which the map is averaged for the score.
        top_fraction (float): Share of the averaged map, from the highest value down, whose mean is the score; at 0 it
            is the maximum.
            Defaults to ``0.0``.
        mahalanobis (ResidualDistance | None): What measures the difference, instead of the L2 norm.
            Defaults to ``None``.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        pool_size: int,
        top_fraction: float = 0.0,
        mahalanobis: ResidualDistance | None = None,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.pool_size = pool_size
        self.top_mean = TopMean(top_fraction)
        self.mahalanobis = mahalanobis

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Compute s(u), the length of the feature difference vector (eqs. 2 and 3), at the size of the images.

        Args:
            features (Tensor): Features f of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their reconstruction, of the same shape.

        Returns:
            Tensor: Map of shape ``(B, 1, H, W)``, not negative.
        """
        if self.mahalanobis is not None:
            lengths = self.mahalanobis(features, reconstruction)
        else:
            with torch.autocast(features.device.type, enabled=False):
                lengths = torch.linalg.vector_norm(features.float() - reconstruction.float(), dim=1, keepdim=True)
        return functional.interpolate(lengths, size=self.image_size, mode="bilinear", align_corners=False)

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Take the maximum of the averagely pooled map, or the mean of its highest values.

        Args:
            anomaly_map (Tensor): Map of shape ``(B, 1, H, W)``.

        Returns:
            Tensor: Scores of shape ``(B,)``.
        """
        # a pool along each axis in turn takes pool_size / 2 times fewer additions than one along both
        rows = functional.avg_pool2d(anomaly_map, (self.pool_size, 1), stride=1)
        return self.top_mean(functional.avg_pool2d(rows, (1, self.pool_size), stride=1))
