# SPDX-License-Identifier: Apache-2.0

"""The region of an image in which anomalies count."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from anomalib.data.utils import read_mask
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms.v2.functional import pil_to_tensor

from anomalib_recon.layers import top_mean

Polygon = Sequence[tuple[float, float]]

# side of the square in which a polygon is drawn, in pixels
CANVAS = 1024


class RegionOfInterest(nn.Module):
    """The part of an image in which anomalies count, at any size of the image.

    Args:
        mask (Tensor): What is inside, boolean, ``(H, W)``.
    """

    mask: Tensor

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", mask)
        # a number, for an exported graph has as many highest pixels as it was made with
        self.fraction = float(mask.float().mean())

    def at(self, size: Sequence[int]) -> Tensor:
        """What is inside, boolean, at a size ``(h, w)``, by nearest neighbour."""
        mask = self.mask.float()[None, None]
        return functional.interpolate(mask, size=tuple(size), mode="nearest-exact")[0, 0] > 0.5

    def forward(self, maps: Tensor) -> Tensor:
        """Lower maps outside to their lowest value inside.

        Args:
            maps (Tensor): Anomaly maps ``(B, ..., H, W)``.

        Returns:
            Tensor: Maps of the same shape.
        """
        inside = self.at(maps.shape[-2:])
        lowest = maps.masked_fill(~inside, torch.inf).amin(dim=(-2, -1), keepdim=True)
        return torch.where(inside, maps, lowest)

    def score(self, maps: Tensor, top_fraction: float) -> Tensor:
        """Score maps that are lowered outside.

        Args:
            maps (Tensor): Anomaly maps ``(B, ..., H, W)``.
            top_fraction (float): Share of the region, from the highest value down, whose mean is the score; at 0 the
                score is the maximum.

        Returns:
            Tensor: Scores ``(B,)``.
        """
        return top_mean(maps, top_fraction * self.fraction)

    def pixels(self, maps: Tensor) -> Tensor:
        """Values inside, of maps or masks ``(B, ..., H, W)``, as ``(B, n)``."""
        return maps[..., self.at(maps.shape[-2:])].flatten(1)

    def restrict_truth(self, batch: Any) -> None:
        """Forget what the ground truth of a batch has outside. An image whose defects all lie there is normal.

        Args:
            batch (Any): Batch of anomalib.
        """
        if getattr(batch, "gt_mask", None) is None:
            return
        before = batch.gt_mask
        after = before & self.at(before.shape[-2:])
        batch.gt_mask = after
        if batch.gt_label is not None:
            # an anomalous image without a mask stays anomalous
            is_outside = before.flatten(1).any(dim=1) & ~after.flatten(1).any(dim=1)
            batch.gt_label = batch.gt_label & ~is_outside

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.fraction = float(self.mask.float().mean())


def read_region(region: str | Path | Polygon) -> Tensor:
    """Read a mask file, or draw a polygon.

    Args:
        region (str | Path | Polygon): Image file in which all that is not black is inside; or the corners of a polygon,
            each as fractions of width and height, ``(x, y)`` in [0, 1].

    Returns:
        Tensor: What is inside, boolean, ``(H, W)``.

    Raises:
        ValueError: If it is neither, or nothing is inside.
    """
    mask = _read_file(Path(region)) if isinstance(region, str | Path) else _draw(region)
    if not mask.any():
        msg = f"region must leave some of the image inside, got {region}, which leaves none; in a mask, paint it white."
        raise ValueError(msg)
    return mask


def _read_file(path: Path) -> Tensor:
    try:
        return torch.as_tensor(read_mask(path, as_tensor=True)).bool()
    except OSError as error:
        msg = f"region must be an image file or the corners of a polygon, got {path}, which cannot be read: {error}."
        raise ValueError(msg) from error


def _draw(corners: Polygon) -> Tensor:
    points = torch.as_tensor(corners, dtype=torch.float32)
    if points.dim() != 2 or points.shape[1] != 2 or len(points) < 3 or not ((points >= 0) & (points <= 1)).all():
        msg = (
            "region must have three or more corners (x, y) as fractions of width and height in [0, 1], "
            f"got {list(corners)}; divide pixels by the size of the image."
        )
        raise ValueError(msg)
    canvas = Image.new("L", (CANVAS, CANVAS))
    # a pixel is inside if its centre is
    ImageDraw.Draw(canvas).polygon([(x * CANVAS - 0.5, y * CANVAS - 0.5) for x, y in points.tolist()], fill=1)
    return pil_to_tensor(canvas)[0].bool()
