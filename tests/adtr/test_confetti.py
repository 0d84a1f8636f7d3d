# SPDX-License-Identifier: Apache-2.0

import pytest
import torch
from scipy import ndimage

from anomalib_recon.models.adtr.confetti import ConfettiNoise


def paste(images, seed=0, **arguments):
    return ConfettiNoise(**arguments)(images, torch.Generator().manual_seed(seed))


@pytest.fixture
def images():
    """Random images, and some that are black, white and grey."""
    images = torch.rand(64, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    for index, grey in enumerate((0.0, 0.5, 1.0)):
        images[index::8] = grey
    return images


def test_masks_are_the_changed_pixels_and_the_other_images_are_untouched(images):
    original = images.clone()
    noisy, masks = paste(images)
    assert torch.equal(images, original)
    assert masks.dtype == torch.bool
    assert torch.equal(masks, (noisy != images).any(dim=1))
    disturbed = masks.flatten(1).any(dim=1)
    assert torch.equal(noisy[~disturbed], images[~disturbed])
    assert noisy.min() >= 0
    assert noisy.max() <= 1
    assert 20 < disturbed.sum() < 44  # 32 are expected, with a standard deviation of 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_chosen_image_changes_and_no_other(images, dtype):
    images = images.to(dtype)
    noisy, masks = paste(images, probability=1, size_range=(0.001, 0.001))
    assert noisy.dtype == dtype
    assert masks.flatten(1).any(dim=1).all()
    noisy, masks = paste(images, probability=0)
    assert torch.equal(noisy, images)
    assert not masks.any()


def test_a_single_rectangle_has_one_colour_and_a_size_in_the_range():
    images = torch.full((200, 3, 40, 60), 0.5)
    noisy, masks = paste(images, probability=1, max_rectangles=1, size_range=(0.1, 0.3))
    heights, widths = [], []
    for image, mask in zip(noisy, masks, strict=True):
        (rows, columns), *others = ndimage.find_objects(mask.long().numpy())
        assert others == []
        assert mask[rows, columns].all()
        assert len(image[:, mask].unique(dim=1).T) == 1
        heights.append(rows.stop - rows.start)
        widths.append(columns.stop - columns.start)
    assert {min(heights), max(heights)} == {4, 12}
    assert {min(widths), max(widths)} == {6, 18}
    covered = masks.any(dim=0)
    assert covered.any(dim=1).all()
    assert covered.any(dim=0).all()


def test_up_to_the_given_number_of_rectangles():
    images = torch.full((50, 3, 64, 64), 0.5)
    noisy, _ = paste(images, probability=1, max_rectangles=4, size_range=(0.01, 0.01))
    counts = [len(image.flatten(1).unique(dim=1).T) - 1 for image in noisy]
    assert set(counts) == {1, 2, 3, 4}


def test_the_generator_decides(images):
    torch.manual_seed(0)
    first = paste(images, seed=1)[0]
    torch.manual_seed(1)
    again, other = paste(images, seed=1)[0], paste(images, seed=2)[0]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "argument",
    [
        {"probability": -0.1},
        {"probability": 1.1},
        {"max_rectangles": 0},
        {"size_range": (0.0, 0.1)},
        {"size_range": (0.3, 0.2)},
        {"size_range": (0.1, 1.1)},
    ],
)
def test_arguments_out_of_range_are_refused(argument):
    [name] = argument
    with pytest.raises(ValueError, match=f"^{name}="):
        ConfettiNoise(**argument)
