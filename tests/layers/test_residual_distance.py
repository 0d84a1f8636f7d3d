# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis

from anomalib_recon.layers import ResidualDistance
from anomalib_recon.layers.residual_distance import PRIOR_EXAMPLES, SHRINKAGE


def draw_residuals(count: int, rows: int = 4, columns: int = 6) -> torch.Tensor:
    """Correlated residuals of 5 channels, that vary more to the right."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(5, 5, generator=generator)
    cells = torch.randn(count, rows, columns, 5, generator=generator) @ mixing.T
    return (cells * torch.linspace(1, 3, columns)[:, None]).movedim(-1, 1)


@pytest.mark.parametrize(("rows", "side"), [(4, 2), (3, 1)])
def test_distances_are_those_of_scipy(rows: int, side: int) -> None:
    """By the mean of the residuals of a cell, and the covariance of a block of cells, mixed with that of all blocks."""
    residuals = draw_residuals(40, rows) + 3 * torch.randn(5, rows, 6, generator=torch.Generator().manual_seed(1))
    distance = ResidualDistance(5, (rows, 6))
    distance.fit(residuals.split(16))
    tested = draw_residuals(41, rows)[-1:] + 1
    result = distance(tested, torch.zeros_like(tested))
    assert result.shape == (1, 1, rows, 6)

    means = residuals.mean(dim=0)

    def moments(values: torch.Tensor) -> np.ndarray:
        vectors = values.movedim(1, -1).flatten(0, 2).double().numpy()
        return vectors.T @ vectors / len(vectors)

    weight = PRIOR_EXAMPLES / (PRIOR_EXAMPLES + 40 * side**2)
    for row, column in [(0, 0), (1, 3), (2, 5)]:
        top, left = row // side * side, column // side * side
        block = (residuals - means)[:, :, top : top + side, left : left + side]
        covariance = (1 - weight) * moments(block) + weight * moments(residuals - means)
        covariance += SHRINKAGE * np.trace(covariance) / 5 * np.eye(5)
        vector = tested[0, :, row, column].double().numpy()
        expected = mahalanobis(vector, means[:, row, column].double().numpy(), np.linalg.inv(covariance)) / np.sqrt(5)
        assert result[0, 0, row, column].item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("residual", [torch.zeros(5, 4, 6), torch.rand(5, 4, 6), 100 * torch.rand(5, 4, 6)])
def test_equal_images_leave_finite_distances(residual: torch.Tensor) -> None:
    distance = ResidualDistance(5, (4, 6))
    distance.fit(residual.expand(10, -1, -1, -1).split(3))
    torch.testing.assert_close(distance.mean, residual)
    assert bool(distance(torch.rand(2, 5, 4, 6), torch.zeros(2, 5, 4, 6)).isfinite().all())


def test_much_memory_is_told(caplog: pytest.LogCaptureFixture) -> None:
    with torch.device("meta"):
        ResidualDistance(248, (32, 32))
        assert not caplog.text
        ResidualDistance(3840, (24, 24))
    assert "3840 channels on a grid of 24 x 24 cells takes 7.9 GiB" in caplog.text
