# SPDX-License-Identifier: Apache-2.0

"""Score of an image: the mean of the highest values of its anomaly map.

Example:
    >>> import torch
    >>> from anomalib_recon.layers import TopMean
    >>> TopMean(0.01)(torch.rand(2, 1, 64, 64)).shape
    torch.Size([2])
"""

from torch import Tensor, nn

from .arguments import check_fraction


def top_mean(maps: Tensor, fraction: float) -> Tensor:
    """Mean of a share of maps, from the highest value down; at 0 the maximum, ``(B, ..., H, W) -> (B,)``."""
    values = maps.flatten(1)
    count = max(1, round(fraction * values.shape[1]))
    return values.topk(count, dim=1).values.mean(dim=1)


class TopMean(nn.Module):
    """Mean of a share of a map, from the highest value down.

    Args:
        top_fraction (float): The share, in [0, 1]; at 0 the score is the maximum.

    Raises:
        ValueError: If ``top_fraction`` is out of its range.
    """

    def __init__(self, top_fraction: float) -> None:
        super().__init__()
        check_fraction(top_fraction=top_fraction)
        self.top_fraction = top_fraction

    def forward(self, anomaly_map: Tensor) -> Tensor:
        """Score maps of shape ``(B, 1, H, W)``.

        Returns:
            Tensor: Scores of shape ``(B,)``.
        """
        return top_mean(anomaly_map, self.top_fraction)
