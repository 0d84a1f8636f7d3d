# SPDX-License-Identifier: Apache-2.0

"""Predict the features of a cell from those of the cells around it, without itself.

Example:
    >>> import torch
    >>> from anomalib_recon.models.feature_inpainting.context_regression import ContextRegression
    >>> regression = ContextRegression(16, context_dim=4, window_size=5, hole_size=1, rank=8, num_units=32)
    >>> regression.fit([torch.randn(8, 16, 12, 12)])
    >>> regression(torch.randn(1, 16, 12, 12)).shape
    torch.Size([1, 16, 12, 12])
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

# shares of the mean variance of the inputs that are added to their variances
CONTEXT_RIDGE = 0.02
UNIT_RIDGE = 0.003
# deviation of the random thresholds of the units, in deviations of what they see
BIAS_STD = 0.5
# of each image, one cell of this many in a row and in a column: neighbours tell the same
STEP = 2


class ContextRegression(nn.Module):
    """Regression of each cell on a window around it, in which a hole is left; fitted in closed form.

    Two ridge regressions follow each other. The first is linear, one convolution with the hole in its kernel; of its
    predictions, the ``rank`` principal directions are kept. The second sees these, and rectified random combinations of
    them, which let it bend. There is no gradient and no schedule; the random numbers are always the same.

    Args:
        num_channels (int): Channels C of the features.
        context_dim (int): Leading channels c that the prediction sees.
        window_size (int): Side k of the window, in cells, odd. Beyond the border of the map features are 0.
        hole_size (int): Side of the hole in its middle, in cells, odd and smaller.
        rank (int): Directions r that are kept of the linear prediction.
        num_units (int): Random combinations m; 0 leaves the linear prediction.
    """

    def __init__(
        self, num_channels: int, context_dim: int, window_size: int, hole_size: int, rank: int, num_units: int
    ) -> None:
        super().__init__()
        self.context_dim = context_dim
        self.window_size = window_size
        is_context = torch.ones(window_size, window_size, dtype=torch.bool)
        hole = slice((window_size - hole_size) // 2, (window_size + hole_size) // 2)
        is_context[hole, hole] = False
        self.register_buffer("is_context", is_context.flatten(), persistent=False)
        self.is_context: Tensor
        self.linear = nn.Conv2d(context_dim, rank, window_size, padding=window_size // 2, bias=False)
        self.units = nn.Conv2d(rank, num_units, kernel_size=1) if num_units else None
        self.output = nn.Conv2d(rank + num_units, num_channels, kernel_size=1)
        self.requires_grad_(requires_grad=False)
        for parameter in self.parameters():  # nothing is predicted before :meth:`fit`
            parameter.zero_()

    def forward(self, features: Tensor) -> Tensor:
        """Predict features of shape ``(B, C, h, w)``; the result has the same shape."""
        return self.output(self._directions(self.linear(features[:, : self.context_dim])))

    def _directions(self, predicted: Tensor) -> Tensor:
        """What the second regression sees, ``(B, r, h, w) -> (B, r + m, h, w)``."""
        if self.units is None:
            return predicted
        return torch.cat([predicted, functional.relu(self.units(predicted))], dim=1)

    @torch.no_grad()
    def fit(self, features: Iterable[Tensor]) -> None:
        """Solve both regressions.

        Three matrices of n x n numbers in double precision are on the CPU, with n = c * (k^2 - hole_size^2).

        Args:
            features (Iterable[Tensor]): Centred features of normal images in batches of shape ``(b, C, h, w)``.
                Iterated twice.
        """
        first = NormalEquations()
        for number, batch in _numbered(features):
            first.add(self._windows(batch, number), _some_cells(batch, number))
        weight = first.solve(CONTEXT_RIDGE)  # (n, C)
        predicted = weight.T @ first.inputs @ weight / first.count  # covariance of the predictions, (C, C)
        directions = torch.linalg.eigh(predicted).eigenvectors.flip(1)[:, : self.linear.out_channels]
        self._set_linear(weight @ directions)
        if self.units is not None:
            _draw_units(self.units, (directions.T @ predicted @ directions).diagonal().clamp(min=1e-12).sqrt())

        second = NormalEquations()
        for number, batch in _numbered(features):
            seen = self._directions(self.linear(batch[:, : self.context_dim]))
            constant = torch.ones_like(seen[:, :1])
            second.add(_some_cells(torch.cat([seen, constant], dim=1), number), _some_cells(batch, number))
        solution = second.solve(UNIT_RIDGE).T.to(self.output.weight)  # (C, r + m + 1)
        self.output.weight.copy_(solution[:, :-1, None, None])
        assert self.output.bias is not None
        self.output.bias.copy_(solution[:, -1])

    def _windows(self, features: Tensor, number: int) -> Tensor:
        """Contexts of some cells, ``(b, C, h, w) -> (p, n)``."""
        padded = functional.pad(features[:, : self.context_dim], (self.window_size // 2,) * 4)
        parts = []
        for images, top, left in _kinds(padded, number):
            windows = functional.unfold(images[:, :, top:, left:], self.window_size, stride=STEP)
            windows = windows.unflatten(1, (self.context_dim, -1))[:, :, self.is_context]
            parts.append(windows.flatten(1, 2).movedim(1, -1).flatten(0, 1))
        return torch.cat(parts)

    def _set_linear(self, weight: Tensor) -> None:
        """Set the convolution by weights of shape ``(n, r)``, and leave the hole 0."""
        full = torch.zeros(self.linear.out_channels, self.context_dim, self.window_size**2)
        full[:, :, self.is_context.cpu()] = weight.T.float().unflatten(1, (self.context_dim, -1))
        self.linear.weight.copy_(full.unflatten(2, (self.window_size, -1)))


class NormalEquations:
    """Sums of a least-squares problem, in double precision on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.inputs = torch.zeros((), dtype=torch.float64)
        self.products = torch.zeros((), dtype=torch.float64)

    def add(self, inputs: Tensor, targets: Tensor) -> None:
        """Add p examples, inputs of shape ``(p, n)`` and targets of shape ``(p, C)``."""
        self.inputs = self.inputs + (inputs.T @ inputs).cpu().double()
        self.products = self.products + (inputs.T @ targets).cpu().double()
        self.count += len(inputs)

    def solve(self, ridge: float) -> Tensor:
        """Solve for weights of shape ``(n, C)``, for inputs that are brought to one scale.

        Args:
            ridge (float): Number that is added to the variance, 1, of each input.
        """
        scale = (self.inputs.diagonal() / self.count).clamp(min=1e-12).rsqrt()
        inputs = self.inputs / self.count
        inputs.mul_(scale[:, None]).mul_(scale)
        inputs.diagonal().add_(ridge)
        products = self.products / self.count * scale[:, None]
        return torch.cholesky_solve(products, torch.linalg.cholesky(inputs)) * scale[:, None]


def _draw_units(units: nn.Conv2d, std: Tensor) -> None:
    """Draw the random combinations of directions with the given deviations, shape ``(r,)``."""
    generator = torch.Generator().manual_seed(0)
    num_units, rank = units.out_channels, len(std)
    weight = torch.randn(num_units, rank, generator=generator) / (std.float() * rank**0.5)
    units.weight.copy_(weight[:, :, None, None])
    assert units.bias is not None
    units.bias.copy_(BIAS_STD * torch.randn(num_units, generator=generator))


def _numbered(features: Iterable[Tensor]) -> Iterator[tuple[int, Tensor]]:
    """Batches of features, each with the number of its first image among all."""
    number = 0
    for batch in features:
        yield number, batch
        number += len(batch)


def _some_cells(features: Tensor, number: int) -> Tensor:
    """Every other cell of features, other ones for each image, ``(b, C, h, w) -> (p, C)``.

    Which ones depends on the number of the image among all, so that the size of batches has no influence.
    """
    parts = (images[:, :, top::STEP, left::STEP] for images, top, left in _kinds(features, number))
    return torch.cat([part.movedim(1, -1).flatten(0, 2) for part in parts])


def _kinds(features: Tensor, number: int) -> Iterator[tuple[Tensor, int, int]]:
    """Images of a batch by the cells that are taken of them, with the first row and column of these."""
    for kind in range(STEP**2):
        yield features[(kind - number) % STEP**2 :: STEP**2], kind % STEP, kind // STEP
