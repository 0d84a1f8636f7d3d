# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from anomalib_recon.layers import TopMean


@pytest.mark.parametrize(("fraction", "count"), [(0, 1), (0.001, 1), (0.05, 10), (1, 192)])
def test_score_is_the_mean_of_the_highest_values(fraction: float, count: int) -> None:
    maps = torch.rand(3, 1, 12, 16)
    expected = [np.sort(values.numpy().ravel())[-count:].mean() for values in maps]
    np.testing.assert_allclose(TopMean(fraction)(maps), expected, rtol=1e-6)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_share_is_from_0_to_1(fraction: float) -> None:
    with pytest.raises(ValueError, match="top_fraction must be"):
        TopMean(fraction)
