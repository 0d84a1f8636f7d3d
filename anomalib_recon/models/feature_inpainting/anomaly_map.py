# SPDX-License-Identifier: Apache-2.0

"""Map and score of the residual between features and their prediction."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

# examples that the covariance of all places counts for in that of a block
PRIOR_EXAMPLES = 2000
# share of the mean variance of the residual that is added to all variances
SHRINKAGE = 0.01
# least mean variance, where 1 is that of the features: of few or equal training images, nothing is left
MIN_VARIANCE = 1e-6


class AnomalyMapGenerator(nn.Module):
    """Mahalanobis distance of the residual, by a covariance of the normal residuals at that place.

    A block of cells shares a covariance. It is mixed with the covariance of all blocks, the more, the fewer training
    images there are.

    Args:
        num_channels (int): Channels C of the features.
        grid_size (tuple[int, int]): Height h and width w of the features.
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
        block_size (int): Side of a block, in cells; divides the grid.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the score.
    """

    whitening: Tensor

    def __init__(
        self,
        num_channels: int,
        grid_size: tuple[int, int],
        image_size: tuple[int, int],
        block_size: int,
        top_fraction: float,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.block_size = block_size
        self.blocks = (grid_size[0] // block_size, grid_size[1] // block_size)
        self.top_fraction = top_fraction
        # for each block the map W of a residual r to unit covariance, (blocks, C, C)
        self.register_buffer("whitening", torch.eye(num_channels).repeat(self.blocks[0] * self.blocks[1], 1, 1))

    def fit(self, residuals: Iterable[Tensor]) -> None:
        """Set the covariances.

        Args:
            residuals (Iterable[Tensor]): Residuals of normal images in batches of shape ``(b, C, h, w)``.
        """
        products, count = torch.zeros_like(self.whitening), 0
        for residual in residuals:
            examples = self._to_blocks(residual)
            products += examples.mT @ examples
            count += examples.shape[1]
        weight = PRIOR_EXAMPLES / (PRIOR_EXAMPLES + count)
        covariance = (1 - weight) * products / count + weight * products.mean(dim=0) / count
        variance = covariance.diagonal(dim1=1, dim2=2)
        variance += SHRINKAGE * variance.mean(dim=1, keepdim=True).clamp(min=MIN_VARIANCE)
        identity = torch.eye(covariance.shape[-1], device=covariance.device).expand_as(covariance)
        self.whitening = torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), identity, upper=False)

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Map the distance, over the root of the number of channels.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their prediction, of the same shape.

        Returns:
            Tensor: Maps of shape ``(B, 1, H, W)``, about 1 where images are normal.
        """
        with torch.autocast(features.device.type, enabled=False):
            examples = self._to_blocks(features.float() - reconstruction.float())
            whitened = examples @ self.whitening.mT
            distance = self._from_blocks(whitened.square().mean(dim=2).sqrt())
        return functional.interpolate(distance, size=self.image_size, mode="bilinear", align_corners=False)

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the highest values of maps of shape ``(B, 1, H, W)``, of shape ``(B,)``."""
        count = max(1, round(self.top_fraction * self.image_size[0] * self.image_size[1]))
        return anomaly_map.flatten(1).topk(count, dim=1).values.mean(dim=1)

    def _to_blocks(self, residual: Tensor) -> Tensor:
        """Sort cells by blocks, ``(B, C, h, w) -> (blocks, B * size * size, C)``."""
        size, (rows, columns) = self.block_size, self.blocks
        cells = residual.reshape(-1, residual.shape[1], rows, size, columns, size)
        return cells.permute(2, 4, 0, 3, 5, 1).reshape(rows * columns, -1, residual.shape[1])

    def _from_blocks(self, values: Tensor) -> Tensor:
        """Put values of cells at their places, ``(blocks, B * size * size) -> (B, 1, h, w)``."""
        size, (rows, columns) = self.block_size, self.blocks
        cells = values.reshape(rows, columns, -1, size, size).permute(2, 0, 3, 1, 4)
        return cells.reshape(-1, 1, rows * size, columns * size)
