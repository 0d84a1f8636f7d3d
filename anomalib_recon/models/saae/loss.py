# SPDX-License-Identifier: Apache-2.0

"""Loss of SAAE: the distance between features and their reconstruction (eq. 2)."""

import torch
from torch import Tensor, nn

from .anomaly_map import Distance, feature_distance

# images compared at a time: on a CPU, fetching memory for the differences of a whole batch takes longer than computing
IMAGES_PER_PART = 4


class SAAELoss(nn.Module):
    """Sum of the distances over the cells of an image (eq. 2), or the mean square; mean over the images.

    Args:
        distance (Distance): ``"norm"``, as in the paper; with the others, the loss is the mean square.
    """

    def __init__(self, distance: Distance) -> None:
        super().__init__()
        self.distance = distance

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Compare features of shape ``(B, U, H_0, W_0)`` with their reconstruction; the result is a scalar."""
        parts = zip(features.split(IMAGES_PER_PART), reconstruction.split(IMAGES_PER_PART), strict=True)
        distances = torch.cat([feature_distance(*part, self.distance) for part in parts]).flatten(1)
        return (distances.sum(dim=1) if self.distance == "norm" else distances.mean(dim=1)).mean()
