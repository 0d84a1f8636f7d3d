# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from torch import Tensor
from torch.nn import functional

from anomalib_recon.models.feature_inpainting.context_regression import (
    CONTEXT_RIDGE,
    STEP,
    UNIT_RIDGE,
    ContextRegression,
    NormalEquations,
)

NUM_CHANNELS = 6


def draw_features(num_images: int = 40, seed: int = 0) -> Tensor:
    """Smooth noise, in which cells tell of their neighbours, with channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(num_images, NUM_CHANNELS, 14, 16, generator=generator)
    smooth = functional.avg_pool2d(noise, 3, stride=1) + 0.1 * noise[:, :, 1:-1, 1:-1]
    return smooth * torch.linspace(2, 0.5, NUM_CHANNELS)[:, None, None]


def fitted(features: Tensor, **arguments) -> ContextRegression:
    sizes = {"context_dim": 4, "window_size": 5, "hole_size": 1, "rank": NUM_CHANNELS, "num_units": 0}
    regression = ContextRegression(NUM_CHANNELS, **{**sizes, **arguments})
    regression.fit([features])
    return regression


def missed(regression: ContextRegression, features: Tensor) -> float:
    return float((features - regression(features)).square().mean() / features.square().mean())


@pytest.mark.parametrize("hole_size", [1, 3])
def test_a_cell_is_predicted_from_all_of_its_window_but_the_hole(hole_size: int) -> None:
    regression = fitted(draw_features(), hole_size=hole_size, num_units=32)
    features = draw_features(1, seed=1)
    rows, columns = torch.meshgrid(torch.arange(12), torch.arange(14), indexing="ij")
    for row, column in ((0, 0), (5, 7)):
        other = features.clone()
        other[:, :, row, column] += 1
        changed = (regression(features) - regression(other)).abs().amax(dim=1)[0] > 0
        distance = (rows - row).abs().maximum((columns - column).abs())
        assert torch.equal(changed, (distance > hole_size // 2) & (distance <= 2))


@pytest.mark.parametrize("hole_size", [1, 3])
def test_predictions_are_those_of_two_ridge_regressions(hole_size: int) -> None:
    """The linear one on the window, with inputs of unit variance, and one on its predictions."""
    features, tested = draw_features(), draw_features(2, seed=1)
    regression = fitted(features, hole_size=hole_size)

    def contexts(batch: Tensor) -> np.ndarray:
        """Of each cell, by loops over its neighbours, ``(b, h, w, n)``."""
        padded = functional.pad(batch[:, :4], (2, 2, 2, 2)).double()
        sides = [(top, left) for top in range(5) for left in range(5)]
        around = [(top, left) for top, left in sides if max(abs(top - 2), abs(left - 2)) > hole_size // 2]
        height, width = batch.shape[2:]
        shifted = [padded[:, :, top : top + height, left : left + width] for top, left in around]
        return torch.cat(shifted, dim=1).movedim(1, -1).numpy()

    def solve(inputs: np.ndarray, targets: np.ndarray, ridge: float) -> np.ndarray:
        deviation = np.sqrt((inputs**2).mean(axis=0))
        solution = Ridge(ridge * len(inputs), fit_intercept=False, solver="cholesky").fit(inputs / deviation, targets)
        return solution.coef_.T / deviation[:, None]

    def cells(values: np.ndarray) -> np.ndarray:
        """Every other cell, other ones for each image, (b, h, w, n) -> (p, n)."""
        parts = [image[n % STEP :: STEP, n // STEP % STEP :: STEP] for n, image in enumerate(values)]
        return np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])

    inputs, targets = cells(contexts(features)), cells(features.movedim(1, -1).double().numpy())
    weight = solve(inputs, targets, CONTEXT_RIDGE)
    # the second sees the principal directions of the first's predictions
    first = inputs @ weight
    directions = np.linalg.eigh(first.T @ first)[1]
    seen = np.column_stack([first @ directions, np.ones(len(first))])
    second = solve(seen, targets, UNIT_RIDGE)
    expected = contexts(tested) @ weight @ directions @ second[:-1] + second[-1]
    assert np.ptp(expected) > 1
    np.testing.assert_allclose(regression(tested).movedim(1, -1), expected, atol=1e-4)


def test_what_the_surroundings_tell_is_found_on_other_images() -> None:
    noise = torch.randn(40, NUM_CHANNELS, 12, 14, generator=torch.Generator().manual_seed(2))
    assert missed(fitted(draw_features()), draw_features(10, seed=1)) < 0.4
    assert missed(fitted(noise), noise) > 0.95  # of independent cells, nothing


def test_units_let_the_prediction_bend() -> None:
    """A cell that is the size of its left neighbour is no linear function of it."""

    def draw(seed: int) -> Tensor:
        noise = torch.randn(60, NUM_CHANNELS, 12, 14, generator=torch.Generator().manual_seed(seed))
        noise[:, 0, :, 1::2] = noise[:, 0, :, ::2].abs() + 0.5 * noise[:, 0, :, ::2]
        return noise - noise.mean(dim=0)

    def missed_first(num_units: int) -> float:
        sizes = {"context_dim": 1, "window_size": 3, "rank": 2, "num_units": num_units}
        regression = ContextRegression(NUM_CHANNELS, hole_size=1, **sizes)
        batches = [draw(seed) for seed in range(4)]  # of each, other cells are taken
        regression.fit(batches)
        tested = draw(9)
        return float((tested - regression(tested))[:, 0, :, 1::2].square().mean())

    assert missed_first(256) < 0.9 * missed_first(0)


def test_a_fit_depends_on_neither_seed_nor_an_earlier_fit() -> None:
    features = draw_features()
    torch.manual_seed(0)
    once = fitted(features, num_units=16)
    torch.manual_seed(1)
    again = fitted(draw_features(seed=3), num_units=16)
    again.fit([features])
    for name, value in once.state_dict().items():
        assert torch.equal(again.state_dict()[name], value)


def test_the_size_of_batches_has_no_influence() -> None:
    features, tested = draw_features(), draw_features(2, seed=1)
    whole = fitted(features, num_units=16)(tested)
    for size in (1, 6, 16):
        regression = ContextRegression(
            NUM_CHANNELS, context_dim=4, window_size=5, hole_size=1, rank=NUM_CHANNELS, num_units=16
        )
        regression.fit(features.split(size))
        torch.testing.assert_close(regression(tested), whole, atol=1e-3, rtol=0)


def test_a_lower_rank_keeps_the_directions_that_are_predicted_best() -> None:
    features, tested = draw_features(), draw_features(10, seed=1)
    of_rank = [missed(fitted(features, rank=rank), tested) for rank in (1, 3, 6)]
    assert of_rank == sorted(of_rank, reverse=True)
    assert of_rank[0] > 1.2 * of_rank[2]


def test_sums_over_many_cells_keep_double_precision() -> None:
    equations = NormalEquations()
    for value in (4096.0, 1e-2, 1e-2):
        equations.add(torch.full((1, 1), value), torch.ones(1, 1))
    assert float(equations.inputs) == pytest.approx(4096.0**2 + 2e-4, abs=1e-6)
