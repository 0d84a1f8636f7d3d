# SPDX-License-Identifier: Apache-2.0

"""PatchAE's loss: a balance of pixels and of pixels normalised within their patch.

Example:
    >>> import torch
    >>> from anomalib_recon.models.patch_ae.loss import HybridLoss
    >>> HybridLoss(alpha=0.5, patch_size=8)(torch.rand(2, 3, 64, 64), torch.rand(2, 3, 64, 64)).shape
    torch.Size([])
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers import check_fraction

# Added to the variance of a patch, the square of 2.5 grey levels of 255: the noise of a flat patch, which no vector can
# reproduce, is not blown up to the contrast of a structure. (MAE adds 1e-6.)
FLAT_VARIANCE = 1e-4


class HybridLoss(nn.Module):
    """Squared difference of pixels, and of pixels normalised by mean and variance of their patch.

    Image and reconstruction are each normalised by their own mean and variance, over all pixels and channels of a
    patch.

    Args:
        alpha (float): Weight of the normalised term, in [0, 1]; that of the plain one is ``1 - alpha``.
        patch_size (int): Side of a patch in pixels.

    Raises:
        ValueError: If ``alpha`` is not in [0, 1].
    """

    def __init__(self, alpha: float, patch_size: int) -> None:
        super().__init__()
        check_fraction(alpha=alpha)
        self.alpha = alpha
        self.patch_size = patch_size

    def forward(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Compute the loss, averaged over all pixels.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].
            reconstruction (Tensor): Reconstruction of the same shape.

        Returns:
            Tensor: Loss of shape ``()``.
        """
        with torch.autocast(images.device.type, enabled=False):
            reconstruction = reconstruction.float()
            pixels = functional.mse_loss(reconstruction, images)
            normalized = functional.mse_loss(self._normalize(reconstruction), self._normalize(images))
            return (1 - self.alpha) * pixels + self.alpha * normalized

    def _normalize(self, images: Tensor) -> Tensor:
        """Normalise patches, ``(B, 3, H, W) -> (B, 3 * K * K, h, w)``."""
        patches = functional.pixel_unshuffle(images, self.patch_size)
        centred = patches - patches.mean(dim=1, keepdim=True)
        return centred / (centred.square().mean(dim=1, keepdim=True) + FLAT_VARIANCE).sqrt()
