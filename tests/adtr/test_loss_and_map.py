# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import Tensor, nn

from anomalib_recon.models.adtr.anomaly_map import AnomalyMapGenerator
from anomalib_recon.models.adtr.loss import ImageLoss, NormalLoss, PixelLoss, log_one_minus_exp, pseudo_huber

ALPHA = 0.003
TOP_K = 5
MASKED = {
    PixelLoss: lambda anomalous: torch.full((2, 4, 6), float(anomalous)),
    ImageLoss: lambda anomalous: torch.full((2,), float(anomalous)),
}


def phi(features: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Eq. 6, for arrays of shape (C, h, w)."""
    return np.sqrt(np.abs(features - reconstruction).mean(axis=0) ** 2 + 1) - 1


def push(value: float) -> float:
    """- log(1 - exp(-x)) of eqs. 7 and 9, by the functions that keep its digits."""
    return -np.log(-np.expm1(-value)) if value < 1 else -np.log1p(-np.exp(-value))


def pair(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Features and reconstructions of shape (B, C, h, w) in fp64, that differ by about ``scale``."""
    random = np.random.default_rng(0)
    features = random.normal(size=(3, 7, 4, 6))
    return features, features + random.normal(scale=scale, size=features.shape)


def apart(value: float) -> tuple[Tensor, Tensor]:
    """Features of shape (2, 7, 4, 6), and a reconstruction whose phi is ``value`` everywhere."""
    reconstruction = torch.full((2, 7, 4, 6), np.sqrt((value + 1) ** 2 - 1), dtype=torch.float32, requires_grad=True)
    return torch.zeros(2, 7, 4, 6), reconstruction


def loss_of(kind: type[PixelLoss] | type[ImageLoss]) -> nn.Module:
    return PixelLoss(ALPHA) if kind is PixelLoss else ImageLoss(ALPHA, TOP_K)


def tensors(*arrays: np.ndarray) -> list[Tensor]:
    return [torch.from_numpy(array).float() for array in arrays]


@pytest.mark.parametrize("scale", [1e-3, 0.3, 5, 100])
def test_normal_loss_is_equation_1(scale: float) -> None:
    features, reconstruction = pair(scale)
    expected = np.mean([np.linalg.norm(f - g) ** 2 / (4 * 6) for f, g in zip(features, reconstruction, strict=True)])
    assert float(NormalLoss()(*tensors(features, reconstruction))) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("scale", [1e-2, 0.3, 5, 100])
def test_pixel_loss_is_equation_7(scale: float) -> None:
    features, reconstruction = pair(scale)
    labels = np.zeros((3, 4, 6))
    labels[1, 1:3, 2:5] = labels[2, 0, 0] = 1
    expected = []
    for f, g, y in zip(features, reconstruction, labels, strict=True):
        pull = np.mean((1 - y) * phi(f, g))
        expected.append(pull + (ALPHA * push(np.mean(y * phi(f, g))) if y.any() else 0))
    result = PixelLoss(ALPHA)(*tensors(features, reconstruction), torch.from_numpy(labels))
    assert float(result) == pytest.approx(np.mean(expected), rel=1e-3)


def test_a_cell_is_anomalous_if_one_of_its_pixels_is() -> None:
    features, reconstruction = tensors(*pair(1))
    masks = torch.zeros(3, 40, 60)
    masks[0, 39, 0] = masks[1, 10, 59] = 1
    labels = torch.zeros(3, 4, 6)
    labels[0, 3, 0] = labels[1, 1, 5] = 1
    loss = PixelLoss(ALPHA)
    assert torch.equal(loss(features, reconstruction, masks), loss(features, reconstruction, labels))
    assert torch.equal(loss(features, reconstruction, masks.bool()), loss(features, reconstruction, labels))


@pytest.mark.parametrize("scale", [1e-2, 0.3, 5, 100])
def test_image_loss_is_equation_9(scale: float) -> None:
    features, reconstruction = pair(scale)
    labels = [0, 1, 1]
    expected = []
    for f, g, y in zip(features, reconstruction, labels, strict=True):
        q = np.sort(phi(f, g), axis=None)[-TOP_K:].mean()
        expected.append(ALPHA * push(q) if y else q)
    result = ImageLoss(ALPHA, TOP_K)(*tensors(features, reconstruction), torch.tensor(labels))
    assert float(result) == pytest.approx(np.mean(expected), rel=1e-3)


@pytest.mark.parametrize("value", [1e-8, 1e-4, 0.1, np.log(2), 1.0, 16.0, 50.0])
def test_logarithm_keeps_its_digits_in_fp32(value: float) -> None:
    values = torch.tensor(value, dtype=torch.float32, requires_grad=True)
    result = log_one_minus_exp(values)
    result.backward()
    assert result.item() == pytest.approx(-push(value), rel=1e-5)
    assert values.grad.item() == pytest.approx(1 / np.expm1(value), rel=1e-5)


@pytest.mark.parametrize("value", [1e-8, 1e-3, 1.0, 50.0])
def test_pseudo_huber_keeps_its_digits_in_fp32(value: float) -> None:
    result = pseudo_huber(*apart(value))
    torch.testing.assert_close(result, torch.full((2, 4, 6), value), rtol=1e-4, atol=0)


@pytest.mark.parametrize("value", [0, 1e-8, 50])
@pytest.mark.parametrize("anomalous", [False, True])
@pytest.mark.parametrize("kind", [PixelLoss, ImageLoss])
def test_losses_and_gradients_are_finite(
    kind: type[PixelLoss] | type[ImageLoss], anomalous: bool, value: float
) -> None:
    features, reconstruction = apart(value)
    loss = loss_of(kind)(features, reconstruction, MASKED[kind](anomalous))
    loss.backward()
    assert loss.isfinite()
    assert reconstruction.grad.isfinite().all()
    expected = ALPHA * push(max(value, 1e-12)) if anomalous else value
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-15)


@pytest.mark.parametrize("kind", [PixelLoss, ImageLoss])
def test_anomalies_are_pushed_and_normal_images_pulled(kind: type[PixelLoss] | type[ImageLoss]) -> None:
    for anomalous, sign in ((False, 1), (True, -1)):
        features, reconstruction = apart(0.5)
        loss_of(kind)(features, reconstruction, MASKED[kind](anomalous)).backward()
        assert (reconstruction.grad * sign >= 0).all()
        assert (reconstruction.grad * sign > 0).any()


@pytest.mark.parametrize(
    ("loss", "count"),
    [(lambda *pair: PixelLoss(ALPHA)(*pair, torch.zeros(3, 64, 96)), 4 * 6),
     (lambda *pair: ImageLoss(ALPHA, 4 * 6)(*pair, torch.zeros(3)), 4 * 6),
     (lambda *pair: ImageLoss(ALPHA, TOP_K)(*pair, torch.zeros(3)), TOP_K)],
)  # fmt: skip
def test_without_anomalies_the_losses_pull_as_the_normal_one_does(
    loss: Callable[[Tensor, Tensor], Tensor], count: int
) -> None:
    features, reconstruction = pair(1)
    expected = [np.sort(phi(f, g), axis=None)[-count:].mean() for f, g in zip(features, reconstruction, strict=True)]
    features, reconstruction = tensors(features, reconstruction)
    result, normal = loss(features, reconstruction.requires_grad_()), NormalLoss()(features, reconstruction)
    assert result.item() == pytest.approx(np.mean(expected), rel=1e-5)

    [gradient], [pull] = (torch.autograd.grad(value, reconstruction) for value in (result, normal))
    chosen = gradient.abs().amax(dim=1) > 0
    assert chosen.sum() == 3 * count
    directions = torch.where(chosen[:, None], pull, 0.0).sign()
    assert torch.equal(gradient.sign(), directions)
    for value in (loss, NormalLoss()):
        [gradient] = torch.autograd.grad(value(features, reconstruction - reconstruction + features), reconstruction)
        assert not gradient.any()
        assert value(features, features) == 0


def test_map_is_the_norm_of_the_difference_at_the_size_of_the_images() -> None:
    features, reconstruction = pair(2)
    places = [(np.arange(size) + 0.5) * cells / size - 0.5 for size, cells in ((20, 4), (42, 6))]
    grid = np.meshgrid(*places, indexing="ij")
    norms = np.linalg.norm(features - reconstruction, axis=1)
    expected = [ndimage.map_coordinates(norm, grid, order=1, mode="nearest") for norm in norms]
    result = AnomalyMapGenerator((20, 42), 3)(*tensors(features, reconstruction))
    assert result.shape == (3, 1, 20, 42)
    np.testing.assert_allclose(result[:, 0], expected, rtol=1e-4)


@pytest.mark.parametrize("pool_size", [1, 4, 16])
def test_score_is_the_maximum_of_the_averaged_map(pool_size: int) -> None:
    maps = np.random.default_rng(0).random((3, 16, 24))
    windows = np.lib.stride_tricks.sliding_window_view(maps, (pool_size, pool_size), axis=(1, 2))
    scores = AnomalyMapGenerator((16, 24), pool_size).score(torch.from_numpy(maps)[:, None])
    np.testing.assert_allclose(scores, windows.mean(axis=(3, 4)).max(axis=(1, 2)))


@pytest.mark.parametrize(("pool_size", "count"), [(1, 19), (4, 14)])
def test_score_is_the_mean_of_the_highest_of_the_averaged_map(pool_size: int, count: int) -> None:
    maps = np.random.default_rng(0).random((3, 16, 24))
    windows = np.lib.stride_tricks.sliding_window_view(maps, (pool_size, pool_size), axis=(1, 2)).mean(axis=(3, 4))
    highest = np.sort(windows.reshape(3, -1))[:, -count:]  # 5 % of 384 or of 273
    scores = AnomalyMapGenerator((16, 24), pool_size, top_fraction=0.05).score(torch.from_numpy(maps)[:, None])
    np.testing.assert_allclose(scores, highest.mean(axis=1))
