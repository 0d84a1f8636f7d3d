# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from scipy import ndimage, signal

from anomalib_recon.models.intra.anomaly_map import AnomalyMapGenerator, scaled_kernel_size
from anomalib_recon.models.intra.loss import InTraLoss, gradient_magnitude_similarity


def gms(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """GMS of two channels (H, W) after Xue et al., with SciPy's Prewitt filters."""

    def magnitude(channel: np.ndarray) -> np.ndarray:
        return np.hypot(*(ndimage.prewitt(channel, axis, mode="nearest") / 3 for axis in (0, 1)))

    first, second, constant = magnitude(image), magnitude(other), 170 / 255**2
    return (2 * first * second + constant) / (first**2 + second**2 + constant)


def ssim(image: np.ndarray, other: np.ndarray) -> np.ndarray:
    """SSIM of two channels (H, W) after Wang et al.: an 11 x 11 Gaussian window with sigma 1.5."""
    line = np.exp(-(np.arange(-5, 6) ** 2) / (2 * 1.5**2))
    window = np.outer(line, line) / np.outer(line, line).sum()

    def mean(channel: np.ndarray) -> np.ndarray:
        return signal.convolve2d(np.pad(channel, 5, mode="reflect"), window, mode="valid")

    mu, nu = mean(image), mean(other)
    variance, covariance = mean(image**2) - mu**2 + mean(other**2) - nu**2, mean(image * other) - mu * nu
    c1, c2 = 0.01**2, 0.03**2
    return (2 * mu * nu + c1) * (2 * covariance + c2) / ((mu**2 + nu**2 + c1) * (variance + c2))


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    images = ndimage.gaussian_filter(random.random((2, 4, 3, 16, 16)), (0, 0, 0, 1, 1))
    return images[0], images[1]


def test_gms_equals_an_independent_computation(pair: tuple[np.ndarray, np.ndarray]) -> None:
    result = gradient_magnitude_similarity(*(torch.from_numpy(images) for images in pair))
    expected = [[gms(*channels) for channels in zip(*images, strict=True)] for images in zip(*pair, strict=True)]
    np.testing.assert_allclose(result, expected, rtol=1e-9)


def test_loss_equals_equation_12(pair: tuple[np.ndarray, np.ndarray]) -> None:
    inpainted, patches = pair
    result = InTraLoss(gms_weight=0.3, ssim_weight=0.7)(*(torch.from_numpy(images) for images in pair))
    channels = list(zip(inpainted.reshape(-1, 16, 16), patches.reshape(-1, 16, 16), strict=True))
    expected = (
        np.mean((inpainted - patches) ** 2)
        + 0.3 * np.mean([1 - gms(*channel) for channel in channels])
        + 0.7 * np.mean([1 - ssim(*channel) for channel in channels])
    )
    assert float(result) == pytest.approx(expected, abs=1e-5)


def test_loss_without_a_term_is_that_of_the_others(pair: tuple[np.ndarray, np.ndarray]) -> None:
    images = [torch.from_numpy(values) for values in pair]
    whole, neither = InTraLoss(0.3, 0.7)(*images), InTraLoss(0, 0)(*images)
    without_gms, without_ssim = InTraLoss(0, 0.7)(*images), InTraLoss(0.3, 0)(*images)
    assert float(neither) == pytest.approx(np.mean((pair[0] - pair[1]) ** 2))
    assert float(without_gms + without_ssim - neither) == pytest.approx(float(whole))
    assert neither < min(without_gms, without_ssim)


def test_loss_is_zero_for_a_perfect_patch_and_finite_on_flat_ones() -> None:
    loss = InTraLoss()
    patches = torch.rand(4, 3, 16, 16)
    assert float(loss(patches, patches)) == pytest.approx(0, abs=1e-6)
    for level in (0.0, 0.5, 1.0):
        flat = torch.full((2, 3, 16, 16), level, requires_grad=True)
        loss(flat, torch.full_like(flat, 0.2)).backward()
        assert flat.grad is not None
        assert bool(flat.grad.isfinite().all())


@pytest.mark.parametrize("name", ["gms_weight", "ssim_weight"])
def test_negative_weights_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must not be negative, got -1"):
        InTraLoss(**{name: -1})


def test_kernels_are_those_of_the_paper_scaled_and_odd() -> None:
    assert [scaled_kernel_size(21, size) for size in (512, 320, 256)] == [21, 13, 11]
    assert [scaled_kernel_size(11, size) for size in (512, 320, 256)] == [11, 7, 5]
    assert all(scaled_kernel_size(kernel, size) % 2 == 1 for kernel in (11, 21) for size in range(16, 1025, 8))


@pytest.mark.parametrize(("height", "width"), [(128, 128), (256, 320)])
def test_difference_equals_an_independent_computation(height: int, width: int) -> None:
    random = np.random.default_rng(1)
    images, others = random.random((2, 3, height, width))

    def shrink(channel: np.ndarray, factor: int) -> np.ndarray:
        """Bilinear: the mean of the four pixels around the centre of each block."""
        start = factor // 2 - 1
        return sum(channel[start + i :: factor, start + j :: factor] for i in (0, 1) for j in (0, 1)) / 4

    def smooth(values: np.ndarray, kernel: tuple[int, int]) -> np.ndarray:
        values = ndimage.uniform_filter(values, kernel, mode="mirror")
        for axis, size in enumerate(kernel):
            line = np.exp(-(np.arange(-(size // 2), size // 2 + 1) ** 2) / (2 * 2.0**2))
            values = ndimage.convolve1d(values, line / line.sum(), axis=axis, mode="mirror")
        return values

    def enlarge(values: np.ndarray, factor: int) -> np.ndarray:
        places = [(np.arange(size) + 0.5) / factor - 0.5 for size in (height, width)]
        return ndimage.map_coordinates(values, np.meshgrid(*places, indexing="ij"), order=1, mode="nearest")

    maps = []
    for factor, kernel in ((2, 21), (4, 11)):
        sizes = tuple(2 * int(kernel * size / 512 / 2) + 1 for size in (height, width))
        similarity = np.mean(
            [gms(shrink(x, factor), shrink(y, factor)) for x, y in zip(images, others, strict=True)], 0
        )
        maps.append(enlarge(smooth(1 - similarity, sizes), factor))
    result = AnomalyMapGenerator((height, width)).difference(
        torch.from_numpy(images).float()[None], torch.from_numpy(others).float()[None]
    )
    np.testing.assert_allclose(result[0, 0], np.mean(maps, axis=0), atol=1e-5)


def test_map_is_the_deviation_from_normal() -> None:
    result = AnomalyMapGenerator((64, 64))(torch.tensor([[[[0.5, 0.1]]]]), torch.tensor([[[[0.2, 0.2]]]]))
    torch.testing.assert_close(result, torch.tensor([[[[0.3, 0.1]]]]))
