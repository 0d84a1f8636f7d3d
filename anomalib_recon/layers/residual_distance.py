# SPDX-License-Identifier: Apache-2.0

"""How far a residual is from those of normal images at its place.

Example:
    >>> import torch
    >>> from anomalib_recon.layers import ResidualDistance
    >>> distance = ResidualDistance(num_channels=8, grid_size=(4, 6))
    >>> distance.fit([torch.randn(50, 8, 4, 6)])
    >>> distance(torch.randn(2, 8, 4, 6), torch.zeros(2, 8, 4, 6)).shape
    torch.Size([2, 1, 4, 6])
"""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# cells that share a covariance: a square with this side
BLOCK_SIZE = 2
# blocks whose covariances are factored at a time
BLOCKS_PER_PART = 16
# memory of the covariances, in GiB, of which the log says what to do
MUCH_MEMORY = 2.0
# examples that the covariance of all places counts for in that of a block
PRIOR_EXAMPLES = 500
# share of the mean variance of the residual that is added to all variances
SHRINKAGE = 0.01
# least mean variance: of few or equal training images, nothing is left
MIN_VARIANCE = 1e-6


def to_unit_covariance(covariances: Tensor) -> Tensor:
    """Maps of residuals to unit covariance, after all variances have been raised a little.

    Args:
        covariances (Tensor): Covariances of shape ``(n, C, C)``; their diagonals are changed.

    Returns:
        Tensor: Lower triangular matrices of the same shape.
    """
    variances = covariances.diagonal(dim1=1, dim2=2)
    variances += SHRINKAGE * variances.mean(dim=1, keepdim=True).clamp(min=MIN_VARIANCE)
    factors = torch.linalg.cholesky(covariances)
    identity = torch.eye(covariances.shape[1], device=covariances.device)
    return torch.linalg.solve_triangular(factors, identity.expand_as(factors), upper=False)


class ResidualDistance(nn.Module):
    """Mahalanobis distance of a residual, by mean and covariance of the normal residuals at that place.

    Each cell has a mean of its own. A block of 2 x 2 cells shares a covariance, if 2 divides the grid. It is mixed with
    the covariance of all blocks, the more, the fewer training images there are. It takes 4 bytes for each block and
    pair of channels, in checkpoints and exports, too, and twice as much while it is fitted.

    Args:
        num_channels (int): Channels C of the features.
        grid_size (tuple[int, int]): Height h and width w of the features.
    """

    mean: Tensor
    whitening: Tensor

    def __init__(self, num_channels: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.block_size = 1 if any(side % BLOCK_SIZE for side in grid_size) else BLOCK_SIZE
        self.blocks = (grid_size[0] // self.block_size, grid_size[1] // self.block_size)
        memory = 4 * self.blocks[0] * self.blocks[1] * num_channels**2 / 2**30
        if memory > MUCH_MEMORY:
            logger.warning(
                "The Mahalanobis distance of %d channels on a grid of %d x %d cells takes %.1f GiB, in checkpoints and "
                "exports, too; choose fewer layers, a smaller backbone or larger cells.",
                num_channels, *grid_size, memory,
            )  # fmt: skip
        self.register_buffer("mean", torch.zeros(num_channels, *grid_size))
        # for each block the map W of a residual r to unit covariance, (blocks, C, C)
        self.register_buffer("whitening", torch.eye(num_channels).repeat(self.blocks[0] * self.blocks[1], 1, 1))

    @torch.no_grad()
    def fit(self, residuals: Iterable[Tensor]) -> None:
        """Set means and covariances, in one pass.

        Args:
            residuals (Iterable[Tensor]): Residuals of normal images in batches of shape ``(b, C, h, w)``.
        """
        products, total, num_images = torch.zeros_like(self.whitening), torch.zeros_like(self.mean), 0
        offset: Tensor | None = None  # near the mean: of large and nearly equal residuals, squares lose their digits
        for residual in residuals:
            offset = residual.float().mean(dim=0) if offset is None else offset
            shifted = residual.float() - offset
            examples = self._to_blocks(shifted)
            products += examples.mT @ examples
            total += shifted.sum(dim=0)
            num_images += len(residual)
        self.mean = total / num_images + (0 if offset is None else offset)
        means = self._to_blocks(total[None] / num_images)
        cells = means.shape[1]  # of a block
        # in place and in parts, as there may be gigabytes
        products.div_(num_images * cells).baddbmm_(means.mT, means, alpha=-1 / cells)
        common = products.mean(dim=0)
        weight = PRIOR_EXAMPLES / (PRIOR_EXAMPLES + num_images * cells)
        for part in products.split(BLOCKS_PER_PART):
            part.copy_(to_unit_covariance((1 - weight) * part + weight * common))
        self.whitening = products

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Compute the distance, over the root of the number of channels.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``.
            reconstruction (Tensor): What they are compared with, of the same shape.

        Returns:
            Tensor: Distances of shape ``(B, 1, h, w)``, about 1 where images are normal.
        """
        with torch.autocast(features.device.type, enabled=False):
            examples = self._to_blocks(features.float() - reconstruction.float() - self.mean)
            return self._from_blocks((examples @ self.whitening.mT).square().mean(dim=2).sqrt())

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
