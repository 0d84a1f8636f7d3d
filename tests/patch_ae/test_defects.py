# SPDX-License-Identifier: Apache-2.0

import numpy as np
import pytest
import torch
from scipy import ndimage

from anomalib_recon.models.patch_ae.defects import KINDS, ArtificialDefects
from tests.tiny_models import build

CENTRED = {"probability": 1.0, "position_range": (0.5, 0.5)}


def paste(images: torch.Tensor, seed: int = 0, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    return ArtificialDefects(**arguments)(images, torch.Generator().manual_seed(seed))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(200, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_pixels_stay_as_they_are(images: torch.Tensor, kind: str) -> None:
    original = images.clone()
    defective, masks = paste(images, kinds=[kind])
    assert torch.equal(images, original)
    changed = (defective != images).any(dim=1)
    assert not (changed & ~masks).any()
    assert changed.sum() > 0.95 * masks.sum()
    assert defective.min() >= 0
    assert defective.max() <= 1


def test_probability(images: torch.Tensor) -> None:
    counts = {
        probability: int(paste(images, probability=probability)[1].flatten(1).any(dim=1).sum())
        for probability in (0, 0.3, 1)
    }
    assert counts[0] == 0
    assert 40 < counts[0.3] < 80  # 60 are expected, with a standard deviation of 6.5
    assert counts[1] == 200


@pytest.mark.parametrize("kind", KINDS)
def test_every_defect_covers_a_pixel(images: torch.Tensor, kind: str) -> None:
    _, masks = paste(images, kinds=[kind], probability=1, size_range=(1e-5, 1e-5))
    assert masks.flatten(1).any(dim=1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_size_is_the_area(kind: str) -> None:
    images = torch.rand(60, 3, 200, 200)
    limits = (0.01, 0.02)
    _, masks = paste(images, kinds=[kind], size_range=limits, **CENTRED)
    areas = masks.float().mean(dim=(1, 2)).numpy()
    assert areas.min() > 0.85 * limits[0]
    assert areas.max() < 1.15 * limits[1]
    assert np.ptp(areas) > 0.6 * (limits[1] - limits[0])


@pytest.mark.parametrize("kind", ["patch", "noise"])
def test_aspect_and_angle_are_those_of_the_mask(kind: str) -> None:
    images = torch.rand(50, 3, 300, 300)
    _, masks = paste(
        images, kinds=[kind], size_range=(0.02, 0.02), aspect_range=(2.5, 3), angle_range=(20, 40), **CENTRED
    )
    angles, aspects = [], []
    for mask in masks.numpy():
        rows, columns = np.nonzero(mask)
        variances, directions = np.linalg.eigh(np.cov(columns, rows))
        angles.append(np.rad2deg(np.arctan2(*directions[::-1, 1])) % 180)
        aspects.append(np.sqrt(variances[1] / variances[0]))
    assert min(angles) > 19
    assert max(angles) < 41
    assert np.ptp(angles) > 15
    assert min(aspects) > 2.4
    assert max(aspects) < 3.1


def test_scars_are_long_and_thin_whatever_the_aspect() -> None:
    _, masks = paste(
        torch.rand(50, 3, 300, 300), kinds=["scar"], size_range=(0.01, 0.01), aspect_range=(1, 1), **CENTRED
    )
    for mask in masks.numpy():
        variances = np.linalg.eigvalsh(np.cov(*np.nonzero(mask)))
        assert 4.5 < np.sqrt(variances[1] / variances[0]) < 21


def test_blobs_are_irregular_and_in_one_piece() -> None:
    _, masks = paste(
        torch.rand(20, 3, 300, 300), kinds=["blob"], size_range=(0.02, 0.02), aspect_range=(1, 1), **CENTRED
    )
    shares = []
    for mask in masks.numpy():
        assert ndimage.label(mask)[1] == 1
        rows, columns = np.nonzero(mask)
        radius = np.hypot(rows - 150, columns - 150).max()  # position 0.5 is pixel 150 of 0 to 299, by rounding to even
        shares.append(mask.sum() / (np.pi * radius**2))
    assert max(shares) < 0.95  # of a disk: 1
    assert np.std(shares) > 0.02


def test_position_is_that_of_the_centre() -> None:
    _, masks = paste(
        torch.rand(100, 3, 201, 101), probability=1, kinds=["noise"], size_range=(1e-3, 1e-3), position_range=(0.2, 0.4)
    )
    centres = np.array([ndimage.center_of_mass(mask) for mask in masks.numpy()]) / (200, 100)
    assert centres.min() > 0.19
    assert centres.max() < 0.41
    assert np.ptp(centres, axis=0).min() > 0.15


def test_a_pasted_patch_is_another_place_of_the_image() -> None:
    # a smooth image whose colours tell the place, up to the jitter of colours
    rows, columns = torch.meshgrid(torch.linspace(0.2, 0.8, 64), torch.linspace(0.2, 0.8, 64), indexing="ij")
    images = torch.stack([rows, columns, torch.full_like(rows, 0.5)])[None].expand(40, -1, -1, -1)
    defective, masks = paste(
        images, kinds=["patch"], size_range=(0.02, 0.02), angle_range=(0, 0), aspect_range=(1, 1), **CENTRED
    )
    for image, mask in zip(defective, masks, strict=True):
        ((tall, wide),) = ndimage.find_objects(mask.numpy().astype(int))
        patch = image[:, tall, wide]
        assert (patch[0].diff(dim=0) > 0).all()  # not rotated, not flipped
        assert (patch[1].diff(dim=1) > 0).all()
        # the first channel tells the row up to its gain, and so the ratio of two rows tells it exactly
        step = float(patch[0, 1, 0] / patch[0, 0, 0]) - 1
        row = round((0.6 / 63 / step - 0.2) * 63 / 0.6)
        height = patch.shape[1]
        gain = float(patch[0, 0, 0] / rows[row, 0])
        assert 0.9 <= gain <= 1.1
        torch.testing.assert_close(patch[0, :, 0], gain * rows[row : row + height, 0], rtol=1e-4, atol=1e-4)
        assert 0.45 <= float(patch[2, 0, 0]) <= 0.55
        assert float(patch[2].std()) < 1e-6


def test_contents_of_noise_and_blobs(images: torch.Tensor) -> None:
    noisy, masks = paste(images, kinds=["noise"], probability=1, size_range=(0.05, 0.05))
    pixels = noisy.permute(0, 2, 3, 1)[masks]
    assert abs(float(pixels.mean()) - 0.5) < 0.01
    assert abs(float(pixels.var()) - 1 / 12) < 0.005
    stained, masks = paste(images, kinds=["blob"], probability=1)
    assert all(len(image[:, mask].unique(dim=1).T) == 1 for image, mask in zip(stained, masks, strict=True))


def test_the_generator_decides(images: torch.Tensor) -> None:
    torch.manual_seed(0)
    first = paste(images, seed=1)[0]
    torch.manual_seed(1)
    again, other = paste(images, seed=1)[0], paste(images, seed=2)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ({"probability": 1.1}, "defect_probability must be from 0 to 1, got 1.1"),
        ({"kinds": ["hole"]}, "defect_kinds must be some of patch, scar, noise, blob, got hole"),
        ({"kinds": []}, "got none"),
        ({"size_range": (0.0, 0.1)}, "defect_size_range must be two positive numbers"),
        ({"size_range": (0.1, 1.1)}, "defect_size_range is in fractions of the image"),
        ({"aspect_range": (3, 1)}, "defect_aspect_range must be two positive numbers, the lower first"),
        ({"angle_range": (90, 0)}, "defect_angle_range must be two numbers, the lower first"),
        ({"position_range": (-0.1, 1)}, "defect_position_range must be two numbers in"),
    ],
)
def test_wrong_arguments_are_named(argument: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ArtificialDefects(**argument)


def test_patch_ae_hands_on_each_argument() -> None:
    given = {
        "probability": 0.7, "kinds": ("scar", "blob"), "size_range": (0.002, 0.01), "aspect_range": (0.5, 2.0),
        "angle_range": (10.0, 20.0), "position_range": (0.2, 0.8),
    }  # fmt: skip
    model = build("PatchAE", **{f"defect_{name}": value for name, value in given.items()})
    assert {name: getattr(model.defects, name) for name in given} == given
