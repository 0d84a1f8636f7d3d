# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_recon.layers import FeatureScale
from anomalib_recon.layers.feature_scale import SHRINKAGE, ScaleBy
from tests.devices import on_device

STAGES = [3, 5]


def draw_features(mean: float = 0.0) -> Tensor:
    """Features of 12 images, (12, 8, 6, 5), whose channels differ in mean and spread."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(-2, 2, 8)[:, None, None]
    offsets = torch.linspace(-1, 1, 8)[:, None, None]
    return mean + offsets + spread * torch.randn(12, 8, 6, 5, generator=generator)


def expected_statistics(features: Tensor, by: ScaleBy) -> tuple[np.ndarray, np.ndarray]:
    """Mean and the standard deviation to divide by, both (8,), in float64."""
    values = features.double().numpy()
    variances = []
    for stage in np.split(values, [STAGES[0]], axis=1):
        variance = stage.var(axis=(0, 2, 3))
        variances.append(
            variance + SHRINKAGE * variance.mean() if by == "channel" else np.full(len(variance), variance.mean())
        )
    return values.mean(axis=(0, 2, 3)), np.sqrt(np.concatenate(variances))


@pytest.mark.parametrize("by", ["stage", "channel"])
@pytest.mark.parametrize("mean", [0.0, 1e3, -1e5])
def test_statistics_are_those_of_numpy_whatever_the_mean(by: ScaleBy, mean: float) -> None:
    features = draw_features(mean)
    scale = FeatureScale(STAGES, by)
    scale.fit(iter(features.split([5, 5, 2])))  # of which one pass can be made
    expected_mean, expected_std = expected_statistics(features, by)
    np.testing.assert_allclose(scale.mean.flatten(), expected_mean, rtol=1e-6, atol=1e-5)
    np.testing.assert_allclose(scale.std.flatten(), expected_std, rtol=1e-5)
    assert scale.mean.dtype == scale.std.dtype == torch.float32


def test_the_size_of_batches_changes_nothing() -> None:
    features = draw_features(10.0)
    whole, parts = FeatureScale(STAGES, "channel"), FeatureScale(STAGES, "channel")
    whole.fit([features])
    parts.fit(features.split(1))
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(parts.std, whole.std, rtol=1e-5, atol=0)


@pytest.mark.parametrize("by", ["stage", "channel"])
def test_scaled_features_are_centred_and_vary_by_one(by: ScaleBy) -> None:
    features = draw_features(100.0)
    scale = FeatureScale(STAGES, by)
    scale.fit([features])
    scaled = scale(features).double().numpy()
    np.testing.assert_allclose(scaled.mean(axis=(0, 2, 3)), 0, atol=1e-2)
    for raw, stage in zip(np.split(features.double().numpy(), [3], axis=1), np.split(scaled, [3], axis=1), strict=True):
        variance, shrunk = raw.var(axis=(0, 2, 3)), stage.var(axis=(0, 2, 3))
        if by == "stage":
            assert shrunk.mean() == pytest.approx(1, rel=1e-4)
            np.testing.assert_allclose(shrunk / shrunk[0], variance / variance[0], rtol=1e-3)
        else:
            np.testing.assert_allclose(shrunk, variance / (variance + SHRINKAGE * variance.mean()), rtol=1e-3)


@pytest.mark.parametrize("by", ["stage", "channel"])
@pytest.mark.parametrize("value", [0.0, 3.0, 1e4])
def test_constant_features_stay_finite(by: ScaleBy, value: float) -> None:
    features = torch.full((4, 8, 6, 5), value)
    features[:, :3] = draw_features()[:4, :3]  # only those of the second stage are constant
    scale = FeatureScale(STAGES, by)
    scale.fit(features.split(2))
    assert torch.equal(scale(features)[:, 3:], torch.zeros(4, 5, 6, 5))
    assert scale(features + 1).isfinite().all()


def test_a_nearly_constant_channel_is_not_blown_up() -> None:
    features = draw_features()
    features[:, 1] = 0.5 + 1e-6 * features[:, 1]
    scale = FeatureScale(STAGES, "channel")
    scale.fit([features])
    assert float(scale(features)[:, 1].std()) < 1e-4


def test_before_the_fit_and_without_a_scale_nothing_changes() -> None:
    features = draw_features(5.0)
    for by in ("stage", "channel", "whiten"):
        torch.testing.assert_close(FeatureScale(STAGES, by)(features), features)
    scale = FeatureScale(STAGES, "none")
    scale.fit([features])
    assert torch.equal(scale(features), features)


def test_whitened_features_are_uncorrelated_components_of_scaled_stages() -> None:
    features = draw_features(5.0)
    scale, stages = FeatureScale(STAGES, "whiten"), FeatureScale(STAGES, "stage")
    scale.fit(features.split([5, 5, 2]))
    stages.fit([features])
    vectors = scale(features).movedim(1, -1).flatten(0, 2).double()
    torch.testing.assert_close(scale.standardize(features), stages(features))
    variances = np.linalg.eigvalsh(np.cov(stages(features).movedim(1, -1).flatten(0, 2).double().numpy().T, bias=True))
    expected = variances[::-1] / (variances[::-1] + SHRINKAGE * variances.mean())
    np.testing.assert_allclose(np.cov(vectors.numpy().T, bias=True), np.diag(expected), atol=1e-4)


def test_statistics_come_with_a_state_dict() -> None:
    features = draw_features(5.0)
    scale, loaded = FeatureScale(STAGES, "channel"), FeatureScale(STAGES, "channel")
    scale.fit([features])
    loaded.load_state_dict(scale.state_dict())
    assert torch.equal(loaded(features), scale(features))


@pytest.mark.parametrize("by", ["stage", "channel"])
def test_no_double_precision_is_needed_where_the_features_are(by: ScaleBy) -> None:
    features = draw_features(3.0)
    scale, expected = FeatureScale(STAGES, by), FeatureScale(STAGES, by)
    scale.mean, scale.std = on_device(scale.mean), on_device(scale.std)
    scale.fit(on_device(part) for part in features.split(5))
    expected.fit(features.split(5))
    assert torch.equal(scale(on_device(features)).cpu(), expected(features))


def test_another_scale_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^feature_scale must be 'none', 'stage', 'channel' or 'whiten', got 'image'"):
        FeatureScale(STAGES, "image")
