# SPDX-License-Identifier: Apache-2.0

"""Map of the residual between features and their prediction."""

from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers import ResidualDistance


class AnomalyMapGenerator(nn.Module):
    """Mahalanobis distance of the residual, enlarged to the size of the image.

    Args:
        num_channels (int): Channels C of the features.
        grid_size (tuple[int, int]): Height h and width w of the features.
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
    """

    def __init__(self, num_channels: int, grid_size: tuple[int, int], image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size
        self.distance = ResidualDistance(num_channels, grid_size)

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Map the distance.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their prediction, of the same shape.

        Returns:
            Tensor: Maps of shape ``(B, 1, H, W)``, about 1 where images are normal.
        """
        distance = self.distance(features, reconstruction)
        return functional.interpolate(distance, size=self.image_size, mode="bilinear", align_corners=False)
