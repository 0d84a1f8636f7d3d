# SPDX-License-Identifier: Apache-2.0

"""The losses of ADTR and ADTR+ (sections 3.1 and 3.3).

Example:
    >>> import torch
    >>> from anomalib_recon.models.adtr.loss import PixelLoss
    >>> features, reconstruction = torch.rand(2, 8, 4, 4), torch.rand(2, 8, 4, 4)
    >>> PixelLoss(alpha=0.003)(features, reconstruction, masks=torch.ones(2, 4, 4)).shape
    torch.Size([])
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

# below this the push of eqs. 7 and 9 no longer grows, so that a perfect reconstruction has a finite loss
MIN_DIFFERENCE = 1e-12


class NormalLoss(nn.Module):
    """L_norm, for normal images alone (eq. 1)."""

    def forward(self, features: Tensor, reconstruction: Tensor) -> Tensor:
        """Compute the squared norm of the difference per cell, averaged over the batch.

        Args:
            features (Tensor): Features f of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their reconstruction, of the same shape.

        Returns:
            Tensor: Loss of shape ``()``.
        """
        with torch.autocast(features.device.type, enabled=False):
            return (features.float() - reconstruction.float()).square().sum(dim=1).mean()


class PixelLoss(nn.Module):
    """L_px, for anomalies with masks (eq. 7).

    It pulls the reconstruction of normal cells towards their features, and pushes that of anomalous cells away.

    Args:
        alpha (float): Weight of the push.
    """

    def __init__(self, alpha: float) -> None:
        super().__init__()
        self.alpha = alpha

    def forward(self, features: Tensor, reconstruction: Tensor, masks: Tensor) -> Tensor:
        """Compute the loss, averaged over the batch. An image without an anomaly has no push.

        Args:
            features (Tensor): Features f of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their reconstruction, of the same shape.
            masks (Tensor): Pixel labels of shape ``(B, H, W)``, 0 or 1. A cell is anomalous if one of its pixels is.

        Returns:
            Tensor: Loss of shape ``()``.
        """
        difference = pseudo_huber(features, reconstruction)
        labels = functional.adaptive_max_pool2d(masks[:, None].float(), difference.shape[-2:]).squeeze(1)
        pull = ((1 - labels) * difference).mean(dim=(1, 2))
        push = -log_one_minus_exp((labels * difference).mean(dim=(1, 2)))
        return (pull + self.alpha * torch.where(labels.amax(dim=(1, 2)) > 0, push, 0.0)).mean()


class ImageLoss(nn.Module):
    """L_img, for anomalies without masks (eqs. 8 and 9): pull or push the k cells that differ most.

    Args:
        alpha (float): Weight of the push.
        top_k (int): Number of cells k.
    """

    def __init__(self, alpha: float, top_k: int) -> None:
        super().__init__()
        self.alpha = alpha
        self.top_k = top_k

    def forward(self, features: Tensor, reconstruction: Tensor, labels: Tensor) -> Tensor:
        """Compute the loss, averaged over the batch.

        Args:
            features (Tensor): Features f of shape ``(B, C, h, w)``.
            reconstruction (Tensor): Their reconstruction, of the same shape.
            labels (Tensor): Image labels of shape ``(B,)``, 0 or 1.

        Returns:
            Tensor: Loss of shape ``()``.
        """
        scores = pseudo_huber(features, reconstruction).flatten(1).topk(self.top_k, dim=1).values.mean(dim=1)
        return torch.where(labels.bool(), -self.alpha * log_one_minus_exp(scores), scores).mean()


def pseudo_huber(features: Tensor, reconstruction: Tensor) -> Tensor:
    """Compute the pseudo-Huber difference map phi (eq. 6).

    Args:
        features (Tensor): Features f of shape ``(B, C, h, w)``.
        reconstruction (Tensor): Their reconstruction, of the same shape.

    Returns:
        Tensor: phi of shape ``(B, h, w)``, not negative.
    """
    with torch.autocast(features.device.type, enabled=False):
        squared = (features.float() - reconstruction.float()).abs().mean(dim=1).square()
        # the same as sqrt(squared + 1) - 1, which in fp32 is zero for all small differences
        return squared / ((squared + 1).sqrt() + 1)


def log_one_minus_exp(values: Tensor) -> Tensor:
    """Compute log(1 - exp(-x)) without the loss of digits near 0 and far from it.

    Args:
        values (Tensor): x, of any shape, not negative; below ``MIN_DIFFERENCE`` the result stays the same.

    Returns:
        Tensor: Values of the same shape, not positive, and finite.
    """
    border = math.log(2)
    near = (-torch.expm1(-values.clamp(MIN_DIFFERENCE, border))).log()
    far = torch.log1p(-(-values.clamp(min=border)).exp())
    return torch.where(values < border, near, far)
