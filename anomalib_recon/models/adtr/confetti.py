# SPDX-License-Identifier: Apache-2.0

"""Synthetic anomalies: coloured rectangles on normal images (section 4.1), after FCDD.

Paper:
    Liznerski et al., Explainable Deep One-Class Classification, ICLR 2021, https://arxiv.org/abs/2007.01760.

Notes:
    FCDD disturbs half of the images, each with about three squares of 8 to 54 pixels on images of 240 x 240, and
    takes the pixels that changed for the mask. The defaults keep these numbers. FCDD also rotates and blurs its
    squares and adds them to the image; here, axis-aligned rectangles of one colour cover it. FCDD subtracts squares
    that would hardly show; here, a colour is drawn that differs from the pixel at the rectangle's centre.
"""

import torch
from torch import Tensor, nn

# least difference, in every channel, of a rectangle's colour from the pixel at its centre
MIN_CONTRAST = 0.1


class ConfettiNoise(nn.Module):
    """Paste coloured rectangles at random places on some images of a batch.

    Args:
        probability (float): Probability that an image gets confetti, in [0, 1]. Defaults to ``0.5``.
        max_rectangles (int): Most rectangles on an image, from 1; their number is uniform. Defaults to ``5``.
        size_range (tuple[float, float]): Least and greatest height and width of a rectangle, as fractions in (0, 1]
            of those of the image; both are uniform. Defaults to ``(1 / 30, 0.225)``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> noisy_images, masks = ConfettiNoise()(torch.rand(16, 3, 256, 256), torch.Generator().manual_seed(0))
    """

    def __init__(
        self,
        probability: float = 0.5,
        max_rectangles: int = 5,
        size_range: tuple[float, float] = (1 / 30, 0.225),
    ) -> None:
        super().__init__()
        if not 0 <= probability <= 1:
            msg = f"probability={probability} is not in [0, 1]."
            raise ValueError(msg)
        if max_rectangles < 1:
            msg = f"max_rectangles={max_rectangles} is less than 1; for no confetti choose probability=0."
            raise ValueError(msg)
        least, greatest = size_range
        if not 0 < least <= greatest <= 1:
            msg = f"size_range={size_range} is not a range in (0, 1]."
            raise ValueError(msg)
        self.probability = probability
        self.max_rectangles = max_rectangles
        self.size_range = (least, greatest)

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Paste confetti.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].
            generator (torch.Generator): Source of randomness, on the CPU, so that a seed gives the same confetti
                on all devices.

        Returns:
            tuple[Tensor, Tensor]: Images of the same shape, and boolean masks of shape ``(B, H, W)`` of the pixels
            that changed. There is one at least in an image with confetti, none in the others.
        """
        batch_size, _, height, width = images.shape
        shape = (batch_size, self.max_rectangles)
        top, bottom = self._draw_extents(shape, height, generator)
        left, right = self._draw_extents(shape, width, generator)
        contrasts = torch.empty(*shape, 3).uniform_(MIN_CONTRAST, 1 - MIN_CONTRAST, generator=generator)
        numbers = torch.randint(1, self.max_rectangles + 1, (batch_size, 1), generator=generator)
        numbers[torch.rand(batch_size, generator=generator) >= self.probability] = 0
        shown = torch.arange(self.max_rectangles) < numbers  # (B, n)

        # a slice between index tensors comes last: (B, n, 3)
        centres = images[torch.arange(batch_size)[:, None], :, (top + bottom) // 2, (left + right) // 2]
        colours = (centres + contrasts.to(images)) % 1

        rows, columns = torch.arange(height), torch.arange(width)
        in_rows = (shown[..., None] & (rows >= top[..., None]) & (rows < bottom[..., None])).to(images.device)
        in_columns = ((columns >= left[..., None]) & (columns < right[..., None])).to(images.device)
        noisy_images = images
        for index in range(self.max_rectangles):
            inside = in_rows[:, index, :, None] & in_columns[:, index, None, :]  # (B, H, W)
            noisy_images = torch.where(inside[:, None], colours[:, index, :, None, None], noisy_images)
        return noisy_images, (noisy_images != images).any(dim=1)

    def _draw_extents(self, shape: tuple[int, int], side: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw first and last + 1 pixels of rectangles along a side of ``side`` pixels, each of the given shape."""
        lengths = (torch.empty(shape).uniform_(*self.size_range, generator=generator) * side).round().clamp(1, side)
        start = (torch.rand(shape, generator=generator) * (side - lengths + 1)).floor()
        return start.long(), (start + lengths).long()
