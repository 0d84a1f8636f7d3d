# SPDX-License-Identifier: Apache-2.0

"""PatchAE's anomaly map and score."""

import torch
from anomalib.models.components import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers import check_not_negative


class AnomalyMapGenerator(nn.Module):
    """Bring the scores of cells or pixels to the size of the images, and smooth them.

    Args:
        sigma (float): Standard deviation of the Gaussian, in pixels; 0 stands for none.

    Raises:
        ValueError: If it is negative or not finite.
    """

    def __init__(self, sigma: float) -> None:
        super().__init__()
        check_not_negative(sigma=sigma)
        self.blur = GaussianBlur2d(sigma=sigma, channels=1) if sigma else nn.Identity()

    def forward(self, scores: Tensor, image_size: torch.Size | tuple[int, int]) -> Tensor:
        """Resize bilinearly and smooth.

        Args:
            scores (Tensor): Scores of shape ``(B, 1, h, w)``.
            image_size (torch.Size | tuple[int, int]): Height H and width W of the images.

        Returns:
            Tensor: Map of shape ``(B, 1, H, W)``.
        """
        return self.blur(functional.interpolate(scores, size=tuple(image_size), mode="bilinear", align_corners=False))
