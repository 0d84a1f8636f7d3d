# SPDX-License-Identifier: Apache-2.0

"""Images that InTra trains on: the normal ones, those held out of them, and their augmentation (section 4.1)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_held_out(paths: Sequence[str], fraction: float, max_count: int) -> list[str]:
    """Draw images to hold out of training; at least one.

    Args:
        paths (Sequence[str]): Normal training images.
        fraction (float): Fraction to hold out.
        max_count (int): Most images to hold out.

    Returns:
        list[str]: Paths of the held-out images.

    Raises:
        ValueError: If none would be left to train on.
    """
    count = min(max_count, max(1, round(fraction * len(paths))))
    if count >= len(paths):
        msg = (
            f"The training set has {len(paths)} normal images, of which {count} would be held out "
            f"(held_out_fraction={fraction}): none is left to train on; add images."
        )
        raise ValueError(msg)
    return [paths[index] for index in torch.randperm(len(paths))[:count]]


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
