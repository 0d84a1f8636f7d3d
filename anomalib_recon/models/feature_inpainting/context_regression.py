# SPDX-License-Identifier: Apache-2.0

"""Predict the features of a cell from those of the cells around it, without itself.

Example:
    >>> import torch
    >>> from anomalib_recon.models.feature_inpainting.context_regression import ContextRegression
    >>> regression = ContextRegression(num_channels=16, context_dim=4, window_size=5, hole_size=1)
    >>> regression.fit([torch.randn(8, 16, 12, 12)])
    >>> regression(torch.randn(1, 16, 12, 12)).shape
    torch.Size([1, 16, 12, 12])
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

# share of the mean variance of the context that is added to its variances
RIDGE = 0.02
# of each image, one cell of this many in a row and in a column: neighbours tell the same
STEP = 2


class ContextRegression(nn.Module):
    """Ridge regression of each cell on a window around it, in which a hole is left: one masked convolution.

    It is the conditional mean of a Gaussian, found in closed form: no gradient, no schedule, no seed. Beyond the border
    of the map the context is 0.

    Args:
        num_channels (int): Channels C of the features.
        context_dim (int): Leading channels c that the prediction sees.
        window_size (int): Side of the window, in cells, odd.
        hole_size (int): Side of the hole in its middle, in cells, odd and smaller.
    """

    weight: Tensor
    is_context: Tensor

    def __init__(self, num_channels: int, context_dim: int, window_size: int, hole_size: int) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.window_size = window_size
        is_context = torch.ones(window_size, window_size, dtype=torch.bool)
        hole = slice((window_size - hole_size) // 2, (window_size + hole_size) // 2)
        is_context[hole, hole] = False
        self.register_buffer("is_context", is_context.flatten(), persistent=False)
        self.register_buffer("weight", torch.zeros(num_channels, context_dim, window_size, window_size))

    def forward(self, features: Tensor) -> Tensor:
        """Predict features of shape ``(B, C, h, w)``; the result has the same shape."""
        return functional.conv2d(features[:, : self.context_dim], self.weight, padding=self.window_size // 2)

    def fit(self, features: Iterable[Tensor]) -> None:
        """Solve the normal equations.

        Two matrices of n x n numbers are on the CPU, with n = c * (window_size^2 - hole_size^2).

        Args:
            features (Iterable[Tensor]): Centred features of normal images in batches of shape ``(b, C, h, w)``.
        """
        num_inputs, num_outputs = self.context_dim * int(self.is_context.sum()), len(self.weight)
        inputs = torch.zeros(num_inputs, num_inputs)
        products = torch.zeros(num_inputs, num_outputs)
        for number, batch in enumerate(features):
            context, target = self._pairs(batch, offset=(number % STEP, number // STEP % STEP))
            inputs += (context.T @ context).cpu()
            products += (context.T @ target).cpu()
        inputs.diagonal().add_(RIDGE * inputs.diagonal().mean())
        solution = torch.linalg.solve(inputs.double(), products.double())  # (n, C)
        weight = torch.zeros(num_outputs, self.context_dim, self.window_size**2)
        weight[:, :, self.is_context.cpu()] = solution.T.float().unflatten(1, (self.context_dim, -1))
        self.weight = weight.unflatten(2, (self.window_size, -1)).to(self.weight)

    def _pairs(self, features: Tensor, offset: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Contexts and targets of every other cell, ``(b, C, h, w) -> (m, n), (m, C)``."""
        top, left = offset
        padding = self.window_size // 2
        context = functional.pad(features[:, : self.context_dim], [padding] * 4)[:, :, top:, left:]
        target = features[:, :, top::STEP, left::STEP]
        windows = functional.unfold(context, self.window_size, stride=STEP)  # (b, c * window_size^2, m / b)
        windows = windows.unflatten(1, (self.context_dim, -1))[:, :, self.is_context]
        return windows.flatten(1, 2).movedim(1, -1).flatten(0, 1), target.movedim(1, -1).flatten(0, 2)
