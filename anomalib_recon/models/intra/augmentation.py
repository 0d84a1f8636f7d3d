# SPDX-License-Identifier: Apache-2.0

"""Augmentation of InTra's training images (section 4.1)."""

import torch
from torch import Tensor


def rotate_and_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate each image by a random multiple of 90 degrees and flip it, or not; 180 degrees if it is not square.

    Args:
        images (Tensor): Images of shape ``(B, C, H, W)``.
        generator (torch.Generator): Source of randomness, on the device of the images.

    Returns:
        Tensor: Images of the same shape.
    """

    def maybe(changed: Tensor) -> Tensor:
        coin = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
        return torch.where(coin, changed, images)

    images = maybe(images.flip(-1))
    images = maybe(images.flip(-2))
    return maybe(images.transpose(-1, -2)) if images.shape[-1] == images.shape[-2] else images
