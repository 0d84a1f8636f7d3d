# SPDX-License-Identifier: Apache-2.0

"""The antialiased bilinear resize of torchvision, in operations that every export format has.

ONNX and OpenVINO have no equivalent of ``torch.nn.functional.interpolate(..., antialias=True)``. But a separable resize
is a product with one matrix per axis, and the matrices follow from the sizes alone.

Example:
    >>> import torch
    >>> from anomalib_recon.layers import AntialiasResize
    >>> AntialiasResize((256, 256))(torch.rand(1, 3, 900, 700)).shape
    torch.Size([1, 3, 256, 256])
"""

from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import Transform


class AntialiasResize(Transform):
    """Resize images as torchvision's ``Resize(size, antialias=True)`` does, in an exportable way.

    The size of the input stays dynamic in an exported graph. An image that already has the target size is returned
    unchanged to the last bit.

    Args:
        size (tuple[int, int]): Height and width of the output in pixels.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def transform(self, inpt: Tensor, params: dict[str, Any]) -> Tensor:
        """Resize a batch of images.

        Args:
            inpt (Tensor): Images of shape ``(..., H, W)`` and of a floating-point type.
            params (dict[str, Any]): Not used.

        Returns:
            Tensor: Images of shape ``(..., *size)`` and of the type of the input.

        Raises:
            TypeError: If the images are not of a floating-point type.
        """
        del params
        if not inpt.is_floating_point():
            msg = f"inpt must be of a floating-point type with values in [0, 1], got {inpt.dtype}; convert it before."
            raise TypeError(msg)
        # also in a graph for that size alone: there OpenVINO may try to fuse what follows into the product, and fail
        if all(isinstance(side, int) for side in inpt.shape[-2:]) and inpt.shape[-2:] == self.size:
            return inpt
        rows, columns = (
            _triangle_weights(in_size, out_size, inpt.device).to(inpt.dtype)
            for in_size, out_size in zip(inpt.shape[-2:], self.size, strict=True)
        )
        return rows @ inpt @ columns.mT


def _triangle_weights(in_size: int, out_size: int, device: torch.device) -> Tensor:
    """Weigh every input pixel of an axis for every output pixel, as an antialiased bilinear resize does.

    The weight falls linearly with the distance of the pixel centres. It reaches zero at one output pixel's width, or at
    one input pixel's width where the image is enlarged.

    Args:
        in_size (int): Input pixels along the axis.
        out_size (int): Output pixels along the axis.
        device (torch.device): Where to compute.

    Returns:
        Tensor: Weights of shape ``(out_size, in_size)``; each row sums to one.
    """
    # In units of 1 / (2 * in_size * out_size) of the axis all distances are integers: exact, also for a runtime that
    # computes in half precision.
    in_centres = (2 * torch.arange(in_size, device=device) + 1) * out_size
    out_centres = (2 * torch.arange(out_size, device=device) + 1) * in_size
    reach = 2 * torch.sym_max(in_size, out_size)
    distances = (in_centres - out_centres.unsqueeze(1)).abs()
    weights = (reach - distances).clamp(min=0) / reach
    return weights / weights.sum(dim=1, keepdim=True)
