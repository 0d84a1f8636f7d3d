# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from anomalib_recon.models.saae.latent_size import FeatureCovariance
from sklearn.decomposition import PCA

from anomalib_recon.models.saae import SAAEModel


@pytest.fixture(scope="module")
def features() -> torch.Tensor:
    """Features of images that differ in brightness and pattern; their means are far from zero."""
    torch.manual_seed(0)
    model = SAAEModel("resnet18", ["layer1", "layer2"], pre_trained=False, image_size=(64, 64))
    scale = torch.rand(12, 3, 1, 1)
    return model.extract_features(scale * torch.rand(12, 3, 64, 64)) + 10


@pytest.mark.parametrize("explained_variance", [0.3, 0.8, 0.99, 0.9999])
def test_number_of_components_is_that_of_scikit_learn(features: torch.Tensor, explained_variance: float) -> None:
    covariance = FeatureCovariance(features.shape[1])
    for batch in features.split([5, 5, 2]):
        covariance.update(batch)
    vectors = features.permute(0, 2, 3, 1).reshape(-1, features.shape[1]).double().numpy()
    expected = PCA(n_components=explained_variance, svd_solver="full").fit(vectors).n_components_
    assert covariance.num_components(explained_variance) == expected


def test_more_variance_takes_more_components(features: torch.Tensor) -> None:
    covariance = FeatureCovariance(features.shape[1])
    covariance.update(features)
    counts = [covariance.num_components(fraction) for fraction in (0.3, 0.8, 0.9999, 1.0)]
    assert 1 <= counts[0] < counts[1] < counts[2] < counts[3] == features.shape[1]


def test_shares_of_two_processes_add_up(features: torch.Tensor) -> None:
    whole, first, second = (FeatureCovariance(features.shape[1]) for _ in range(3))
    whole.update(features)
    first.update(features[:7])
    second.update(features[7:])
    others = iter((second.count, second.total, second.products))
    first.reduce(lambda tensor: tensor + next(others))
    torch.testing.assert_close(first.products, whole.products)
    assert first.num_components(0.8) == whole.num_components(0.8)
