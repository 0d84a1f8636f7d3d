# SPDX-License-Identifier: Apache-2.0

"""Whitening: features in units of their normal variation.

Two maps do it: one changes features as little as possible, the other sorts them by how much they vary.

Example:
    >>> import torch
    >>> from anomalib_recon.layers import Whitening
    >>> whitening = Whitening(num_channels=8)
    >>> whitening.fit(torch.randn(1000, 8) * torch.arange(1.0, 9.0))
    >>> whitening(torch.rand(2, 8, 4, 4)).shape
    torch.Size([2, 8, 4, 4])
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from .covariance import FeatureCovariance

# Share of the mean variance that is added to every variance: directions in which normal features hardly vary at all
# must not outweigh all others by their noise.
SHRINKAGE = 0.01
# least variance, for features that are constant
MIN_VARIANCE = 1e-12
VECTORS_PER_PART = 2**16


class Whitening(nn.Module):
    """Affine map to features of unit variance, as near as such can be to the given ones; before it is set, they stay.

    A Euclidean distance of whitened features is a Mahalanobis distance of the features, and as they are centred, matrix
    products find the nearest ones with all digits.

    Args:
        num_channels (int): Length C of a feature vector.
    """

    mean: Tensor
    matrix: Tensor

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_channels, 1, 1))
        self.register_buffer("matrix", torch.eye(num_channels))

    def set(self, sums: FeatureCovariance) -> None:
        """Set the map by mean and covariance of normal features.

        Args:
            sums (FeatureCovariance): Sums over the features.
        """
        covariance = sums.covariance()
        covariance.diagonal().add_((SHRINKAGE * covariance.diagonal().mean()).clamp(min=MIN_VARIANCE))
        variances, directions = torch.linalg.eigh(covariance)
        self.mean = sums.mean().to(self.mean)[:, None, None]
        self.matrix = self._combine(directions / variances.sqrt(), directions).contiguous().to(self.matrix)

    @staticmethod
    def _combine(scaled: Tensor, directions: Tensor) -> Tensor:
        """Map of the principal directions, in columns, with or without scale: here, back to the features they are of.

        Unlike the directions themselves, it does not depend on their sign, nor on how alike their variances are.
        """
        return scaled @ directions.T

    def fit(self, vectors: Tensor) -> None:
        """Set the map by normal features.

        Two matrices of C x C numbers in double precision are on the CPU, and a few in single precision beside the
        vectors.

        Args:
            vectors (Tensor): Normal features of shape ``(M, C)``, at least two.
        """
        sums = FeatureCovariance(vectors.shape[1])
        for part in vectors.split(VECTORS_PER_PART):
            sums.update(part.T[None, :, :, None])
        self.set(sums)
        self.mean, self.matrix = self.mean.to(vectors), self.matrix.to(vectors)

    def whiten(self, vectors: Tensor) -> Tensor:
        """Whiten vectors of shape ``(M, C)``."""
        return functional.linear(vectors - self.mean.flatten(), self.matrix)

    def forward(self, features: Tensor) -> Tensor:
        """Whiten features.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``.

        Returns:
            Tensor: Features of the same shape.
        """
        return functional.conv2d(features - self.mean, self.matrix[:, :, None, None])


class PrincipalWhitening(Whitening):
    """Affine map to principal components of unit variance, the largest first; before it is set, features stay.

    Args:
        num_channels (int): Length C of a feature vector.
    """

    @staticmethod
    def _combine(scaled: Tensor, directions: Tensor) -> Tensor:
        """Map of the principal directions; those of the largest variance are the last."""
        del directions
        return scaled.flip(1).T
