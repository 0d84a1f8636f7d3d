# SPDX-License-Identifier: Apache-2.0

"""The latent width V: how many principal components hold most of the features' variance (section 4.1).

The answer is that of a principal component analysis of all feature vectors at once, but no more than one image's
vectors and two matrices of U x U numbers are in memory.

Example:
    >>> import torch
    >>> from anomalib_recon.models.saae.latent_size import FeatureCovariance
    >>> covariance = FeatureCovariance(num_channels=8)
    >>> covariance.update(torch.rand(2, 8, 6, 6) * torch.tensor([9.0, 9, 9, 1, 1, 1, 1, 1])[:, None, None])
    >>> covariance.num_components(0.8)
    3
"""

from collections.abc import Callable

import torch
from torch import Tensor


class FeatureCovariance:
    """Sums over feature vectors, from which their covariance follows.

    Args:
        num_channels (int): Length U of a feature vector.
        device (torch.device | str): Where to sum. One without double precision, such as MPS, is replaced by the CPU.
            Defaults to ``"cpu"``.
    """

    def __init__(self, num_channels: int, device: torch.device | str = "cpu") -> None:
        device = torch.device("cpu") if torch.device(device).type == "mps" else torch.device(device)
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(num_channels, dtype=torch.float64, device=device)
        self.products = torch.zeros(num_channels, num_channels, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add the feature vectors of images.

        Args:
            features (Tensor): Features of shape ``(B, U, H_0, W_0)``.
        """
        for image in features:
            vectors = image.flatten(1).to(self.products)  # (U, H_0 * W_0)
            self.count += vectors.shape[1]
            self.total += vectors.sum(dim=1)
            self.products.addmm_(vectors, vectors.T)

    def reduce(self, add: Callable[[Tensor], Tensor]) -> None:
        """Join the sums of several processes.

        Args:
            add (Callable[[Tensor], Tensor]): Adds a tensor to those of the other processes.
        """
        self.count, self.total, self.products = map(add, (self.count, self.total, self.products))

    def num_components(self, explained_variance: float) -> int:
        """Count the principal components that are needed.

        Args:
            explained_variance (float): Fraction of the variance that they must hold more of, in (0, 1].

        Returns:
            int: Smallest such number; U if no number suffices.
        """
        mean = self.total / self.count
        covariance = (self.products / self.count).addr_(mean, mean, alpha=-1)
        variances = torch.linalg.eigvalsh(covariance).clamp(min=0).flip(0).cumsum(0)
        needed = int((variances <= explained_variance * variances[-1]).sum()) + 1
        return min(needed, len(variances))
