# SPDX-License-Identifier: Apache-2.0

"""What ADTR is compared with in tables 4a and 4b of the paper: a CNN for the transformer, and pixels for features.

Example:
    >>> import torch
    >>> from anomalib_recon.models.adtr.ablation import ResidualCNN
    >>> ResidualCNN(embed_dim=32, depth=2)(torch.rand(1, 32, 4, 4)).shape
    torch.Size([1, 32, 4, 4])
"""

from timm.models.resnet import BasicBlock
from torch import Tensor, nn
from torch.nn import functional

NUM_COLORS = 3
# pixels per cell along each axis: the stride of the features that ADTR rebuilds
PIXEL_STRIDE = 16


class ResidualCNN(nn.Sequential):
    """Residual blocks of ResNet, one for each encoder and decoder layer (table 4a, "CNN").

    The paper says only that its CNN is revised from ResNet; number and width of the blocks are ours.

    Args:
        embed_dim (int): Channels D.
        depth (int): Number of encoder layers, and of decoder layers, of the transformer.
    """

    def __init__(self, embed_dim: int, depth: int) -> None:
        super().__init__(*(BasicBlock(embed_dim, embed_dim) for _ in range(2 * depth)))


class Pixels(nn.Module):
    """The pixels of each cell as its features, in place of a backbone (table 4b, "Pixels")."""

    num_channels = (NUM_COLORS * PIXEL_STRIDE**2,)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Cut images into cells.

        Args:
            images (Tensor): Images of shape ``(B, 3, H, W)``; H and W are multiples of 16.

        Returns:
            list[Tensor]: One feature map of shape ``(B, 768, H / 16, W / 16)``.
        """
        return [functional.pixel_unshuffle(images, PIXEL_STRIDE)]
