# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from torch import Tensor

from anomalib_recon.layers import whitening as whitening_module
from anomalib_recon.layers.whitening import SHRINKAGE, PrincipalWhitening, Whitening
from tests.devices import on_device


def draw_vectors(count: int = 4000, mean: float = 5.0) -> Tensor:
    """Vectors of 6 correlated numbers, far from the origin."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(6, 6, generator=generator)
    return torch.randn(count, 6, generator=generator) @ mixing.T + mean


def fitted(vectors: Tensor, kind: type[Whitening] = Whitening) -> Whitening:
    whitening = kind(vectors.shape[1])
    whitening.fit(vectors)
    return whitening


@pytest.mark.parametrize("vectors_per_part", [2**16, 700])
@pytest.mark.parametrize("mean", [5.0, 1e4])
@pytest.mark.parametrize("kind", [Whitening, PrincipalWhitening])
def test_the_map_is_that_of_numpy_whatever_the_mean(
    monkeypatch: pytest.MonkeyPatch, kind: type[Whitening], mean: float, vectors_per_part: int
) -> None:
    monkeypatch.setattr(whitening_module, "VECTORS_PER_PART", vectors_per_part)
    vectors = draw_vectors(mean=mean)
    whitening = fitted(vectors, kind)
    covariance = np.cov(vectors.double().numpy(), rowvar=False, bias=True)
    covariance += SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    np.testing.assert_allclose(whitening.mean.flatten(), vectors.double().numpy().mean(axis=0), rtol=1e-6)
    matrix = whitening.matrix.double().numpy()
    np.testing.assert_allclose(matrix.T @ matrix, np.linalg.inv(covariance), rtol=1e-3, atol=1e-5)
    if kind is Whitening:  # of all such maps, the symmetric one changes features least
        np.testing.assert_allclose(matrix, matrix.T, rtol=1e-4, atol=1e-5)
    else:  # components are orthogonal before they are scaled, the largest first
        variances = 1 / (matrix**2).sum(axis=1)
        np.testing.assert_allclose(variances, np.linalg.eigvalsh(covariance)[::-1], rtol=1e-3)


def test_vectors_and_maps_are_whitened_alike() -> None:
    vectors = draw_vectors()
    whitening = fitted(vectors)
    features = vectors[:40].reshape(2, 5, 4, 6).movedim(-1, 1)
    torch.testing.assert_close(
        whitening(features).movedim(1, -1).reshape(40, 6), whitening.whiten(vectors[:40]), rtol=1e-5, atol=1e-5
    )


def test_distances_are_in_units_of_the_normal_variation() -> None:
    """The Mahalanobis distance of scikit-learn, but for the shrinkage, and the same whatever the scale of features."""
    normal, other = draw_vectors().split([3990, 10])
    whitening = fitted(normal)
    distances = (whitening.whiten(other) - whitening.whiten(normal.mean(dim=0, keepdim=True))).norm(dim=1)
    covariance = EmpiricalCovariance().fit(normal.numpy()).covariance_
    shrunk = covariance + SHRINKAGE * np.trace(covariance) / 6 * np.eye(6)
    centred = other.numpy() - normal.numpy().mean(axis=0)
    expected = np.sqrt(np.einsum("nc,cd,nd->n", centred, np.linalg.inv(shrunk), centred))
    np.testing.assert_allclose(distances.numpy(), expected, rtol=1e-3)
    torch.testing.assert_close(whitening.whiten(normal).mean(dim=0), torch.zeros(6), rtol=0, atol=1e-4)
    smaller = fitted(1e-3 * normal)
    torch.testing.assert_close(smaller.whiten(1e-3 * other), whitening.whiten(other), rtol=1e-3, atol=1e-3)


def test_constant_features_are_whitened_without_failure() -> None:
    whitening = fitted(torch.full((10, 4), 3.0))
    assert bool(whitening(torch.full((1, 4, 2, 2), 3.0)).isfinite().all())


def test_before_the_fit_nothing_changes() -> None:
    vectors = draw_vectors(10)
    assert torch.equal(Whitening(6).whiten(vectors), vectors)


def test_no_double_precision_is_needed_where_the_vectors_are() -> None:
    vectors = draw_vectors()
    whitening, expected = Whitening(6), fitted(vectors)
    whitening.fit(on_device(vectors))
    assert torch.equal(whitening.mean.cpu(), expected.mean)
    assert torch.equal(whitening.matrix.cpu(), expected.matrix)
    assert torch.equal(whitening.whiten(on_device(vectors)).cpu(), expected.whiten(vectors))
