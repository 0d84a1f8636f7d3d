# SPDX-License-Identifier: Apache-2.0

"""The windows of InTra: drawn in training (section 3.4), centred at the covered patches in inference (section 3.5).

Windows are given by ``places`` of shape ``(n, L * L)``, their patches as row-major indices in the grid of N x M
patches, and by ``covered`` of shape ``(n, c)``, their covered patches as indices in the window.

Example:
    >>> from anomalib_recon.models.intra.windows import centred_windows
    >>> places, covered = centred_windows(grid_size=(8, 8), window_size=7, num_covered=1)
    >>> places.shape, covered.shape
    (torch.Size([64, 49]), torch.Size([64, 1]))
"""

import math

import torch
from torch import Tensor


def draw_windows(
    grid_size: tuple[int, int], window_size: int, count: int, generator: torch.Generator, num_covered: int = 1
) -> tuple[Tensor, Tensor]:
    """Draw windows anywhere in the grid, each with a random patch covered (section 3.4), or several.

    Args:
        grid_size (tuple[int, int]): Rows N and columns M of patches.
        window_size (int): Side L of a window, in patches.
        count (int): Number of windows n.
        generator (torch.Generator): Source of randomness, on the device of the result.
        num_covered (int): Patches c that are covered in each window, all sets of so many being equally likely.
            Defaults to ``1``.

    Returns:
        tuple[Tensor, Tensor]: ``places`` and ``covered``.
    """
    num_places = window_size**2
    rows, cols, covered = (
        torch.randint(high, (count,), generator=generator, device=generator.device)
        for high in (grid_size[0] - window_size + 1, grid_size[1] - window_size + 1, num_places)
    )
    covered = covered[:, None]
    if num_covered > 1:  # the first one and so many of the others
        order = torch.rand(count, num_places - 1, generator=generator, device=generator.device).argsort(dim=1)
        others = (covered + 1 + order[:, : num_covered - 1]) % num_places
        covered = torch.cat([covered, others], dim=1)
    return _places(rows, cols, window_size, grid_size[1]), covered


def centred_windows(grid_size: tuple[int, int], window_size: int, num_covered: int) -> tuple[Tensor, Tensor]:
    """Windows that cover each patch of the grid once, c at a time.

    The covered patches of a window are as far apart as it allows, and as central as the border allows: for c = 1 these
    are the windows of eqs. 13-15. Where the grid ends, a window covers its first patch again.

    Args:
        grid_size (tuple[int, int]): Rows N and columns M of patches.
        window_size (int): Side L of a window, in patches.
        num_covered (int): Patches c that are covered in each window, a square.

    Returns:
        tuple[Tensor, Tensor]: ``places`` and ``covered``.
    """
    side = math.isqrt(num_covered)  # covered patches in a row
    spacing = window_size // side  # from each to the next
    margin = (window_size - (side - 1) * spacing) // 2

    def place(length: int) -> tuple[Tensor, Tensor]:
        position = torch.arange(length)
        first = position[position % (side * spacing) < spacing]
        start = (first - margin).clamp(0, length - window_size)  # r of eq. 13, s of eq. 14, counted from 0
        covered = first[:, None] + spacing * torch.arange(side)
        return start, torch.where(covered < length, covered, first[:, None]) - start[:, None]

    (top, rows), (left, cols) = map(place, grid_size)
    places = _places(top.repeat_interleave(len(left)), left.repeat(len(top)), window_size, grid_size[1])
    return places, _row_major(rows.repeat_interleave(len(left), 0), cols.repeat(len(top), 1), window_size)


def _places(rows: Tensor, cols: Tensor, window_size: int, num_cols: int) -> Tensor:
    """Patches of the windows whose upper left ones are at ``rows``, ``cols``: ``(n,) -> (n, L * L)``."""
    side = torch.arange(window_size, device=rows.device)
    return _row_major(rows[:, None] + side, cols[:, None] + side, num_cols)


def _row_major(rows: Tensor, cols: Tensor, width: int) -> Tensor:
    """Indices of the places in some rows and columns of grids so wide: two of ``(n, s)`` to ``(n, s * s)``."""
    return (rows[:, :, None] * width + cols[:, None, :]).flatten(1)
