# SPDX-License-Identifier: Apache-2.0

"""Picture of where a network looks to paint a patch.

Example:
    >>> import torch
    >>> from anomalib_recon.models.intra.torch_model import InTraModel
    >>> from anomalib_recon.visualization import draw_attention
    >>> model = InTraModel(image_size=(64, 64), patch_size=8, embed_dim=32, depth=2, num_heads=4).eval()
    >>> image = torch.rand(3, 64, 64)
    >>> picture = draw_attention(image, model.attention_rollout(image, row=3, col=4), row=3, col=4)
"""

from anomalib.visualization.image.functional import overlay_images, visualize_anomaly_map, visualize_image
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional


def draw_attention(image: Tensor, shares: Tensor, row: int, col: int) -> Image.Image:
    """Lay the shares of the patches over an image, and frame the patch that is painted from them.

    Args:
        image (Tensor): Image of shape ``(3, H, W)`` with values in [0, 1].
        shares (Tensor): Share of each patch in the painted one, shape ``(N, M)``, such as of
            ``InTraModel.attention_rollout``. The highest is shown red, none blue.
        row (int): Row of the painted patch in the grid of N x M patches.
        col (int): Its column.

    Returns:
        Image.Image: Picture of H x W pixels.
    """
    height, width = image.shape[-2] // shares.shape[0], image.shape[-1] // shares.shape[1]
    enlarged = functional.interpolate(shares[None, None].float(), size=image.shape[-2:], mode="nearest")[0, 0]
    heat = visualize_anomaly_map((enlarged / enlarged.max()).cpu(), colormap=True)
    picture = overlay_images(visualize_image(image.cpu()), heat).convert("RGB")
    left, top = col * width, row * height
    ImageDraw.Draw(picture).rectangle((left, top, left + width - 1, top + height - 1), outline="white")
    return picture
