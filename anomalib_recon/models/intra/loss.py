# SPDX-License-Identifier: Apache-2.0

"""Loss of InTra: pixels, gradients and structure of the inpainted patch (eqs. 11-12)."""

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.functional.image import structural_similarity_index_measure

from anomalib_recon.layers import check_not_negative

# Xue et al. (2014), https://arxiv.org/abs/1308.3052, use 170 for values in [0, 255]
GMS_CONSTANT = 170 / 255**2
# the window of SSIM reaches 5 pixels over the border, which are reflected from inside the patch
MIN_PATCH_SIZE = 6


def gradient_magnitude_similarity(images: Tensor, others: Tensor) -> Tensor:
    """Compare the gradient magnitudes of two batches of images (GMS, Xue et al.).

    Args:
        images (Tensor): Images of shape ``(B, C, H, W)`` with values in [0, 1].
        others (Tensor): Images of the same shape.

    Returns:
        Tensor: Similarity of shape ``(B, C, H, W)`` with values in (0, 1]; 1 where the gradients are equally strong.
    """
    squared, other_squared = _squared_gradient(images), _squared_gradient(others)
    # the root has no gradient where a magnitude is 0
    product = (squared * other_squared + torch.finfo(images.dtype).tiny).sqrt()
    return (2 * product + GMS_CONSTANT) / (squared + other_squared + GMS_CONSTANT)


def gradient_difference(images: Tensor, others: Tensor) -> Tensor:
    """How the gradients of two batches of images differ, d_g of eq. 11.

    Args:
        images (Tensor): Images of shape ``(B, C, H, W)`` with values in [0, 1].
        others (Tensor): Images of the same shape.

    Returns:
        Tensor: Maps of shape ``(B, 1, H, W)`` with values in [0, 1).
    """
    return 1 - gradient_magnitude_similarity(images, others).mean(dim=1, keepdim=True)


def _squared_gradient(images: Tensor) -> Tensor:
    """Squared gradient magnitude by Prewitt filters, ``(B, C, H, W) -> (B, C, H, W)``; the border is replicated."""
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    rows = (padded[:, :, :-2] + padded[:, :, 1:-1] + padded[:, :, 2:]) / 3
    cols = (padded[:, :, :, :-2] + padded[:, :, :, 1:-1] + padded[:, :, :, 2:]) / 3
    horizontal = rows[:, :, :, 2:] - rows[:, :, :, :-2]
    vertical = cols[:, :, 2:] - cols[:, :, :-2]
    return horizontal.square() + vertical.square()


class InTraLoss(nn.Module):
    """Mean squared error + gms_weight * mean(1 - GMS) + ssim_weight * mean(1 - SSIM) (eq. 12).

    Args:
        gms_weight (float): alpha.
        ssim_weight (float): beta.

    Raises:
        ValueError: If a weight is negative or not a finite number.
    """

    def __init__(self, gms_weight: float = 0.01, ssim_weight: float = 0.01) -> None:
        super().__init__()
        check_not_negative(gms_weight=gms_weight, ssim_weight=ssim_weight)
        self.gms_weight = gms_weight
        self.ssim_weight = ssim_weight

    def forward(self, patches: Tensor, inpainted: Tensor) -> Tensor:
        """Compare covered patches with the inpainted ones.

        Args:
            patches (Tensor): Covered patches of shape ``(n, C, K, K)``, with values in [0, 1].
            inpainted (Tensor): Inpainted patches of the same shape.

        Returns:
            Tensor: Loss, a scalar.
        """
        # variances of SSIM are differences of nearly equal numbers: not for half precision
        with torch.autocast(inpainted.device.type, enabled=False):
            inpainted, patches = inpainted.float(), patches.float()
            loss = functional.mse_loss(inpainted, patches)
            if self.gms_weight:
                loss = loss + self.gms_weight * (1 - gradient_magnitude_similarity(inpainted, patches)).mean()
            if self.ssim_weight:  # it takes longer than a small network
                _, similarity = structural_similarity_index_measure(
                    inpainted, patches, data_range=1.0, return_full_image=True
                )
                loss = loss + self.ssim_weight * (1 - similarity).mean()
            return loss
