# SPDX-License-Identifier: Apache-2.0

"""Artificial defects on normal images, after CutPaste.

Paper:
    Li et al., CutPaste: Self-Supervised Learning for Anomaly Detection and Localization, CVPR 2021,
    https://arxiv.org/abs/2104.04015.

Notes:
    ========= ==================================== ======================================================
    kind      shape                                content
    ========= ==================================== ======================================================
    ``patch`` rectangle                            another place of the image, its colours slightly changed
    ``scar``  long and thin rectangle              the same
    ``noise`` rectangle                            uniform noise in each pixel and channel
    ``blob``  ellipse with an irregular outline    one colour
    ========= ==================================== ======================================================
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers import check_fraction

NUM_CHANNELS = 3
KINDS = ("patch", "scar", "noise", "blob")
# length by breadth of a scar; CutPaste's are 10 to 25 pixels long and 2 to 16 wide
SCAR_ASPECT_RANGE = (5.0, 20.0)
# greatest relative change of each colour of a pasted patch, as in CutPaste
COLOUR_JITTER = 0.1
# the outline of a blob has waves of 2, 3, 4 and 5 periods, with amplitudes relative to its radius that sum to below 1
WAVES = (2, 3, 4, 5)
MAX_AMPLITUDE = 0.2


class ArtificialDefects(nn.Module):
    """Paste one artificial defect on some images of a batch, on their device.

    Size and aspect are drawn log-uniformly, the rest uniformly. A defect at the border is cut off by it.

    Args:
        probability (float): Probability that an image gets a defect, in [0, 1].
            Defaults to ``0.5``.
        kinds (Sequence[str]): Kinds to draw from, of ``"patch"``, ``"scar"``, ``"noise"`` and ``"blob"``.
            Defaults to all.
        size_range (tuple[float, float]): Least and greatest area, as fractions in (0, 1] of that of the image.
            Defaults to ``(0.001, 0.05)``.
        aspect_range (tuple[float, float]): Least and greatest length by breadth, but for scars.
            Defaults to ``(0.3, 3.3)``.
        angle_range (tuple[float, float]): Least and greatest angle, in degrees, of the length to the rows.
            Defaults to ``(0.0, 180.0)``.
        position_range (tuple[float, float]): Least and greatest place of the centre, as fractions in [0, 1] of height
            and width.
            Defaults to ``(0.0, 1.0)``.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> images = torch.rand(16, 3, 256, 256)
        >>> defective, masks = ArtificialDefects()(images, torch.Generator().manual_seed(0))
    """

    def __init__(
        self,
        probability: float = 0.5,
        kinds: Sequence[str] = KINDS,
        size_range: tuple[float, float] = (0.001, 0.05),
        aspect_range: tuple[float, float] = (0.3, 3.3),
        angle_range: tuple[float, float] = (0.0, 180.0),
        position_range: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        super().__init__()
        check_fraction(defect_probability=probability)
        if not kinds or not set(kinds) <= set(KINDS):
            msg = f"defect_kinds must be some of {', '.join(KINDS)}, got {', '.join(kinds) or 'none'}."
            raise ValueError(msg)
        ranges = {"size": size_range, "aspect": aspect_range, "angle": angle_range, "position": position_range}
        for name, values in ranges.items():
            if len(values) != 2:
                msg = f"defect_{name}_range must be two numbers, the lower first, got {list(values)}."
                raise ValueError(msg)
        for name, (low, high) in (("size", size_range), ("aspect", aspect_range)):
            if not 0 < low <= high:
                msg = f"defect_{name}_range must be two positive numbers, the lower first, got {[low, high]}."
                raise ValueError(msg)
        if size_range[1] > 1:
            msg = f"defect_size_range is in fractions of the image, up to 1, got {list(size_range)}."
            raise ValueError(msg)
        if not -math.inf < angle_range[0] <= angle_range[1] < math.inf:
            msg = f"defect_angle_range must be two numbers, the lower first, got {list(angle_range)}."
            raise ValueError(msg)
        if not 0 <= position_range[0] <= position_range[1] <= 1:
            msg = f"defect_position_range must be two numbers in [0, 1], the lower first, got {list(position_range)}."
            raise ValueError(msg)
        self.probability = probability
        self.kinds = tuple(kinds)
        self.size_range = size_range
        self.aspect_range = aspect_range
        self.angle_range = angle_range
        self.position_range = position_range

    def forward(self, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Paste defects.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)`` with values in [0, 1].
            generator (torch.Generator): Source of randomness, on the device of the images.

        Returns:
            tuple[Tensor, Tensor]: Images of the same shape, and boolean masks of shape ``(B, H, W)`` of the defects.
        """
        draw = _Draw(images, generator)
        chosen = draw.uniform((0, 1)) < self.probability
        kinds = torch.randint(len(self.kinds), (len(images),), generator=generator, device=images.device)
        defective, masks = images.clone(), torch.zeros_like(images[:, 0], dtype=torch.bool)
        for number, kind in enumerate(self.kinds):
            index = (chosen & (kinds == number)).nonzero().squeeze(1)
            if len(index):
                defective[index], masks[index] = self._paste(kind, images[index], generator)
        return defective, masks

    def _paste(self, kind: str, images: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Paste a defect of one kind on each image; see :meth:`forward`."""
        draw = _Draw(images, generator)
        height, width = images.shape[-2:]
        area = height * width * draw.log_uniform(self.size_range)
        aspect = draw.log_uniform(SCAR_ASPECT_RANGE if kind == "scar" else self.aspect_range)
        length, breadth = (area * aspect).sqrt(), (area / aspect).sqrt()
        along, across = self._coordinates(draw, height, width)
        if kind == "blob":
            masks = _inside_blob(draw, along / _spread(length), across / _spread(breadth))
            content = draw.uniform((0, 1), NUM_CHANNELS, 1, 1)
        else:
            masks = (along.abs() <= _spread(length) / 2) & (across.abs() <= _spread(breadth) / 2)
            if kind == "noise":
                content = draw.uniform((0, 1), NUM_CHANNELS, height, width)
            else:
                content = _other_place(draw, images, along, across, length, breadth)
        return torch.where(masks[:, None], content, images), masks

    def _coordinates(self, draw: "_Draw", height: int, width: int) -> tuple[Tensor, Tensor]:
        """Each pixel's place along and across a defect, in pixels from its centre, both ``(B, H, W)``."""
        rows, columns = (
            torch.arange(side, device=draw.device) - (draw.uniform(self.position_range, 1) * (side - 1)).round()
            for side in (height, width)
        )
        angle = _spread(draw.uniform(self.angle_range).deg2rad())
        rows, columns = rows[:, :, None], columns[:, None]
        return columns * angle.cos() + rows * angle.sin(), rows * angle.cos() - columns * angle.sin()


class _Draw:
    """Random numbers for each image of a batch.

    Args:
        images: Images of shape ``(B, 3, H, W)``.
        generator: Source of randomness, on their device.
    """

    def __init__(self, images: Tensor, generator: torch.Generator) -> None:
        self.count, self.device, self.dtype = len(images), images.device, images.dtype
        self.generator = generator

    def uniform(self, limits: tuple[float, float], *shape: int) -> Tensor:
        """Numbers between two limits, of shape ``(B, *shape)``."""
        low, high = limits
        unit = torch.rand(self.count, *shape, generator=self.generator, device=self.device, dtype=self.dtype)
        return low + (high - low) * unit

    def log_uniform(self, limits: tuple[float, float]) -> Tensor:
        """Numbers between two positive limits, uniform in their logarithm, of shape ``(B,)``."""
        low, high = limits
        return self.uniform((math.log(low), math.log(high))).exp()


def _spread(values: Tensor) -> Tensor:
    """Give numbers of images to their pixels, ``(B,) -> (B, 1, 1)``."""
    return values[:, None, None]


def _inside_blob(draw: _Draw, along: Tensor, across: Tensor) -> Tensor:
    """Tell which pixels are within a wavy ellipse, ``(B, H, W)``.

    Args:
        draw: Source of randomness.
        along: Each pixel's place along the ellipse, ``(B, H, W)``, in lengths of a rectangle of the same area.
        across: Its place across it, in breadths of that rectangle.
    """
    direction = torch.atan2(across, along)
    outline, squares = torch.ones_like(along), torch.ones_like(along[:, :1, :1])
    for periods in WAVES:
        amplitude, phase = draw.uniform((0, MAX_AMPLITUDE), 1, 1), draw.uniform((0, 2 * math.pi), 1, 1)
        outline = outline + amplitude * torch.cos(periods * direction + phase)
        squares = squares + amplitude.square() / 2
    # the area within an outline is pi times its mean square
    return math.pi * squares * (along.square() + across.square()) <= outline.square()


def _other_place(draw: _Draw, images: Tensor, along: Tensor, across: Tensor, length: Tensor, breadth: Tensor) -> Tensor:
    """Show another place of each image in the coordinates of its defect, its colours slightly changed."""

    def place(offset: Tensor, side: int, extent: Tensor) -> Tensor:  # in grid_sample's units, from -1 to 1
        margin = (extent / 2).clamp(max=(side - 1) / 2)
        centre = (margin + draw.uniform((0, 1)) * (side - 1 - 2 * margin)).round()
        return 2 * (_spread(centre) + offset) / max(1, side - 1) - 1

    height, width = images.shape[-2:]
    grid = torch.stack([place(along, width, length), place(across, height, breadth)], dim=-1)
    other = functional.grid_sample(images, grid, padding_mode="reflection", align_corners=True)
    return (other * draw.uniform((1 - COLOUR_JITTER, 1 + COLOUR_JITTER), NUM_CHANNELS, 1, 1)).clamp(0, 1)
