# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA

from anomalib_recon.layers import FeatureCovariance, create_dense_features


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Features of images that differ in brightness and pattern; their means are far from zero."""
    torch.manual_seed(0)
    backbone = create_dense_features("resnet18", ["layer1", "layer2"], (64, 64), pre_trained=False)
    scale = torch.rand(12, 3, 1, 1)
    return backbone(scale * torch.rand(12, 3, 64, 64)) + 10


def covariance_of(features: torch.Tensor, sizes: list[int]) -> FeatureCovariance:
    covariance = FeatureCovariance(features.shape[1])
    for batch in features.split(sizes):
        covariance.update(batch)
    return covariance


def vectors_of(features: torch.Tensor) -> np.ndarray:
    return features.permute(0, 2, 3, 1).flatten(0, 2).double().numpy()


@pytest.mark.parametrize("explained_variance", [0.3, 0.8, 0.99, 0.9999])
def test_number_of_components_is_that_of_scikit_learn(features: torch.Tensor, explained_variance: float) -> None:
    expected = PCA(n_components=explained_variance, svd_solver="full").fit(vectors_of(features)).n_components_
    assert covariance_of(features, [5, 5, 2]).num_components(explained_variance) == expected


def test_more_variance_takes_more_components(features: torch.Tensor) -> None:
    covariance = covariance_of(features, [12])
    counts = [covariance.num_components(fraction) for fraction in (0.3, 0.8, 0.9999, 1.0)]
    assert 1 <= counts[0] < counts[1] < counts[2] < counts[3] == features.shape[1]


def test_mean_and_covariance_are_exact_however_far_from_zero(features: torch.Tensor) -> None:
    far = features + 1000 * torch.rand(features.shape[1], 1, 1)
    covariance, vectors = covariance_of(far, [1, 4, 7]), vectors_of(far)
    np.testing.assert_allclose(covariance.mean(), vectors.mean(axis=0), rtol=1e-7)
    expected = np.cov(vectors, rowvar=False, bias=True)
    np.testing.assert_allclose(covariance.covariance(), expected, rtol=0, atol=1e-5 * expected.max())
