# SPDX-License-Identifier: Apache-2.0

"""Anomaly map of SAAE: how far each cell of a feature map is from its reconstruction (eq. 3)."""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers import ResidualDistance

Distance = Literal["norm", "mse", "mahalanobis"]


def feature_distance(features: Tensor, reconstruction: Tensor, distance: Distance) -> Tensor:
    """Compare the feature vectors of each cell.

    Args:
        features (Tensor): Features f of shape ``(B, U, H_0, W_0)``.
        reconstruction (Tensor): Their reconstruction, of the same shape.
        distance (Distance): ``"norm"`` for the L2 norm of the difference, or else its mean square.

    Returns:
        Tensor: Distances A of shape ``(B, 1, H_0, W_0)``, not negative, in fp32.
    """
    with torch.autocast(features.device.type, enabled=False):
        difference = reconstruction.float() - features.float()
        if distance == "norm":  # its gradient is 0, not infinite, where the difference is 0
            return torch.linalg.vector_norm(difference, dim=1, keepdim=True)
        return difference.square().mean(dim=1, keepdim=True)


class AnomalyMapGenerator(nn.Module):
    """Distances (eq. 3), enlarged to the size of the image.

    Args:
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
        distance (Distance): ``"norm"``, as in the paper, or ``"mse"``.
        mahalanobis (ResidualDistance | None): What measures the difference, instead.
            Defaults to ``None``.
        align_corners (bool): Enlarge so that the centres of the corner cells lie on the image's corners.
            Defaults to ``False``.
    """

    def __init__(
        self,
        image_size: tuple[int, int],
        distance: Distance,
        mahalanobis: ResidualDistance | None = None,
        align_corners: bool = False,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.distance: Distance = distance
        self.mahalanobis = mahalanobis
        self.align_corners = align_corners

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Map the distances between features of shape ``(B, U, H_0, W_0)`` and their reconstruction.

        Returns:
            Tensor: Anomaly maps of shape ``(B, 1, H, W)``, not negative and without an upper limit.
        """
        if self.mahalanobis is not None:
            distances = self.mahalanobis(features, reconstruction)
        else:
            distances = feature_distance(features, reconstruction, self.distance)
        return functional.interpolate(
            distances, size=self.image_size, mode="bilinear", align_corners=self.align_corners
        )
