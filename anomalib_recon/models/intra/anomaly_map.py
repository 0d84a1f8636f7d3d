# SPDX-License-Identifier: Apache-2.0

"""Anomaly map of InTra: how gradients differ between an image and its reconstruction (eqs. 16-17)."""

import torch
from anomalib.models.components import GaussianBlur2d
from torch import Tensor, nn
from torch.nn import functional

from .loss import gradient_difference

# scale -> kernel size of both filters for images of REFERENCE_SIZE pixels (section 4.1)
KERNEL_SIZES = {1 / 2: 21, 1 / 4: 11}
REFERENCE_SIZE = 512
SIGMA = 2.0


def scaled_kernel_size(kernel_size: int, size: int) -> int:
    """Scale a kernel linearly from ``REFERENCE_SIZE`` to ``size`` pixels and round it to an odd number."""
    return 2 * int(kernel_size * size / REFERENCE_SIZE / 2) + 1


class BlurAverage(nn.Module):
    """``bluravg`` of eq. 16: a mean filter, then a Gaussian filter, both with the same kernel size.

    Args:
        kernel_size (tuple[int, int]): Height and width of the kernels, odd.
    """

    def __init__(self, kernel_size: tuple[int, int]) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.blur = GaussianBlur2d(sigma=SIGMA, kernel_size=kernel_size)

    def forward(self, maps: Tensor) -> Tensor:
        """Smooth maps of shape ``(B, 1, h, w)``; the border is reflected."""
        height, width = (size // 2 for size in self.kernel_size)
        padded = functional.pad(maps, (width, width, height, height), mode="reflect")
        return self.blur(functional.avg_pool2d(padded, self.kernel_size, stride=1))


class AnomalyMapGenerator(nn.Module):
    """Anomaly map from an image and its reconstruction.

    Args:
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
    """

    def __init__(self, image_size: tuple[int, int]) -> None:
        super().__init__()
        self.image_size = image_size
        self.scales = tuple(KERNEL_SIZES)
        self.smooth = nn.ModuleList(
            BlurAverage((scaled_kernel_size(kernel, image_size[0]), scaled_kernel_size(kernel, image_size[1])))
            for kernel in KERNEL_SIZES.values()
        )

    def difference(self, images: Tensor, reconstruction: Tensor) -> Tensor:
        """Smoothed difference of the gradients at half and at quarter scale: ``diff`` of section 3.5.

        Args:
            images (Tensor): Images of shape ``(B, C, H, W)`` with values in [0, 1].
            reconstruction (Tensor): Reconstructed images of the same shape.

        Returns:
            Tensor: Difference maps of shape ``(B, 1, H, W)`` with values in [0, 1).
        """
        with torch.autocast(images.device.type, enabled=False):
            images, reconstruction = images.float(), reconstruction.float()
            maps = [
                self._resize(smooth(self._gradient_difference(images, reconstruction, scale)), self.image_size)
                for scale, smooth in zip(self.scales, self.smooth, strict=True)
            ]
            return torch.stack(maps).mean(dim=0)

    def forward(self, difference: Tensor, normal_difference: Tensor) -> Tensor:
        """Deviation from the mean difference of normal images: the root of eq. 17.

        Eq. 17 squares it. The root ranks pixels and images alike and spreads the values: nearly all squares lie just
        above 0 and, once normalised, just below the threshold.

        Args:
            difference (Tensor): Difference maps of shape ``(B, 1, H, W)``.
            normal_difference (Tensor): Mean difference map of the normal training images, shape ``(1, 1, H, W)``.

        Returns:
            Tensor: Anomaly maps of shape ``(B, 1, H, W)`` with values in [0, 1).
        """
        return (difference - normal_difference).abs()

    def _gradient_difference(self, images: Tensor, reconstruction: Tensor, scale: float) -> Tensor:
        """d_g of eq. 11 at the given scale, ``(B, C, H, W) -> (B, 1, scale * H, scale * W)``."""
        size = (int(self.image_size[0] * scale), int(self.image_size[1] * scale))
        return gradient_difference(self._resize(images, size), self._resize(reconstruction, size))

    @staticmethod
    def _resize(maps: Tensor, size: tuple[int, int]) -> Tensor:
        return functional.interpolate(maps, size=size, mode="bilinear", align_corners=False)
