# SPDX-License-Identifier: Apache-2.0

"""The covariance of feature vectors, in one pass.

The result is that of all feature vectors at once, but no more than one batch's vectors and two matrices of C x C
numbers are in memory.

Example:
    >>> import torch
    >>> from anomalib_recon.layers import FeatureCovariance
    >>> covariance = FeatureCovariance(num_channels=8)
    >>> covariance.update(torch.rand(2, 8, 6, 6) * torch.tensor([9.0, 9, 9, 1, 1, 1, 1, 1])[:, None, None])
    >>> covariance.num_components(0.8)
    3
"""

import torch
from torch import Tensor


class FeatureCovariance:
    """Sums over feature vectors, from which mean and covariance follow.

    Products are computed in single precision where the features are, and added on the CPU in double precision: not
    every device has it. A first mean is subtracted before, so that no digits are lost to it.

    Args:
        num_channels (int): Length C of a feature vector.
    """

    def __init__(self, num_channels: int) -> None:
        self.count = 0
        self.total = torch.zeros(num_channels, dtype=torch.float64)
        self.products = torch.zeros(num_channels, num_channels, dtype=torch.float64)
        self._origin: Tensor | None = None

    def update(self, features: Tensor) -> None:
        """Add the feature vectors of images.

        Args:
            features (Tensor): Features of shape ``(B, C, h, w)``.
        """
        vectors = features.detach().float().movedim(1, 0).flatten(1)  # (C, B * h * w)
        if self._origin is None:
            self._origin = vectors.mean(dim=1, keepdim=True)
        vectors = vectors - self._origin
        self.count += vectors.shape[1]
        self.total += vectors.sum(dim=1).cpu()
        self.products += (vectors @ vectors.T).cpu()

    def mean(self) -> Tensor:
        """Mean of all vectors, shape ``(C,)``, in double precision on the CPU."""
        assert self._origin is not None
        return self.total / self.count + self._origin[:, 0].cpu().double()

    def covariance(self) -> Tensor:
        """Covariance of all vectors, shape ``(C, C)``, in double precision on the CPU."""
        mean = self.total / self.count
        return (self.products / self.count).addr_(mean, mean, alpha=-1)

    def num_components(self, explained_variance: float) -> int:
        """Count the principal components that are needed.

        Args:
            explained_variance (float): Fraction of the variance, in (0, 1], that they must exceed.

        Returns:
            int: Smallest such number; C if no number suffices.
        """
        variances = torch.linalg.eigvalsh(self.covariance()).clamp(min=0).flip(0).cumsum(0)
        needed = int((variances <= explained_variance * variances[-1]).sum()) + 1
        return min(needed, len(variances))
