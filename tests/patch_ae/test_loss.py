# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch

from anomalib_recon.models.patch_ae.loss import FLAT_VARIANCE, HybridLoss


def expected_terms(images: np.ndarray, reconstruction: np.ndarray, size: int) -> tuple[float, float]:
    """The two terms in float64, patch by patch."""
    squares = []
    for row in range(0, images.shape[2], size):
        for column in range(0, images.shape[3], size):
            for pair in zip(images, reconstruction, strict=True):
                patches = [image[:, row : row + size, column : column + size].astype(np.float64) for image in pair]
                first, second = ((patch - patch.mean()) / np.sqrt(patch.var() + FLAT_VARIANCE) for patch in patches)
                squares.append(np.square(first - second).mean())
    return float(np.square(reconstruction.astype(np.float64) - images).mean()), float(np.mean(squares))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_is_the_balance_of_its_terms(alpha: float) -> None:
    images, reconstruction = torch.rand(2, 2, 3, 12, 8, generator=torch.Generator().manual_seed(0))
    pixels, normalized = expected_terms(images.numpy(), reconstruction.numpy(), 4)
    result = HybridLoss(alpha, patch_size=4)(images, reconstruction)
    assert float(result) == pytest.approx((1 - alpha) * pixels + alpha * normalized, rel=1e-5)


def test_the_normalised_term_ignores_brightness_and_contrast() -> None:
    images = torch.rand(1, 3, 8, 8)
    changed = 0.4 * images + 0.3
    assert float(HybridLoss(1.0, patch_size=8)(images, changed)) < 1e-3
    assert float(HybridLoss(0.0, patch_size=8)(images, changed)) > 1e-2


@pytest.mark.parametrize("grey", [0.0, 0.5, 1.0])
def test_flat_patches_have_finite_losses_and_gradients(grey: float) -> None:
    images = torch.full((1, 3, 8, 8), grey)
    for offset in (0.0, 1e-8, 0.1):
        reconstruction = (images + offset).requires_grad_()
        loss = HybridLoss(0.5, patch_size=4)(images, reconstruction)
        (gradient,) = torch.autograd.grad(loss, reconstruction)
        assert bool(loss.isfinite())
        assert bool(gradient.isfinite().all())
    assert float(HybridLoss(1.0, patch_size=4)(images, images)) == 0


def test_noise_of_a_flat_patch_is_not_blown_up() -> None:
    noise = torch.full((1, 3, 8, 8), 0.5) + 0.5 / 255 * torch.randn(1, 3, 8, 8)
    assert float(HybridLoss(1.0, patch_size=8)(noise, torch.full_like(noise, 0.5))) < 0.1


@pytest.mark.parametrize("alpha", [-0.1, 1.1])
def test_alpha_out_of_range_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match="alpha must be from 0 to 1"):
        HybridLoss(alpha, patch_size=4)
