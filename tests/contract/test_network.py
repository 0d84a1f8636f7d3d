# SPDX-License-Identifier: Apache-2.0

"""The protocol of the networks: embed, reconstruct and compare in a row are what a model scores with."""

import inspect
from pathlib import Path

import pytest
import torch
from anomalib.data import ImageBatch
from torch import Tensor

from tests.tiny_models import OWN_SIZE, Trained, demo_images


@pytest.fixture(scope="module")
def images(demo: Path) -> Tensor:
    return torch.from_numpy(demo_images(demo, OWN_SIZE))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def compared(trained: Trained, images: Tensor) -> tuple[Tensor, ...]:
    """What ``compare`` takes: target and reconstruction, or the target alone if the model compares it with a bank."""
    network = trained.model.model
    target = network.embed(images)
    both = (target, network.reconstruct(target))
    return both[: len(inspect.signature(network.compare).parameters)]


def test_the_three_in_a_row_are_forward_and_what_a_test_scores_with(trained: Trained, images: Tensor) -> None:
    network = trained.model.model
    in_a_row = network.compare(*compared(trained, images))
    expected = network(images)
    tested = trained.model.test_step(ImageBatch(image=images), 0)
    assert expected.pred_score.shape == (len(images),)
    assert expected.anomaly_map.shape == (len(images), 1, *OWN_SIZE)
    assert len(expected.pred_score.unique()) == len(images)
    for field in ("pred_score", "anomaly_map"):
        assert torch.equal(getattr(in_a_row, field), getattr(expected, field))
        assert torch.equal(getattr(tested, field).flatten(), getattr(expected, field).flatten())


def test_images_of_another_size_are_refused(trained: Trained, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 64, 64\), got \(14, 3, 64, 32\)"):
        trained.model.model(images[..., :32])


def test_a_score_depends_on_its_image_alone(trained: Trained, images: Tensor) -> None:
    network = trained.model.model
    together, alone = network(images[:3]), network(images[1:2])
    torch.testing.assert_close(alone.pred_score, together.pred_score[1:2], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(alone.anomaly_map, together.anomaly_map[1:2], rtol=1e-4, atol=1e-4)


def test_autocast_does_not_reach_the_comparison(trained: Trained, images: Tensor) -> None:
    network = trained.model.model
    arguments = compared(trained, images)
    expected = network.compare(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        in_half = network(images)
        result = network.compare(*arguments)
    for field in ("pred_score", "anomaly_map"):
        assert torch.equal(getattr(result, field), getattr(expected, field))
        assert getattr(in_half, field).dtype == torch.float32
        assert getattr(in_half, field).isfinite().all()
    # what is in half is still a score of the same image
    assert torch.corrcoef(torch.stack([in_half.pred_score, expected.pred_score]))[0, 1] > 0.9


def test_a_picture_is_an_image(trained: Trained, images: Tensor) -> None:
    network = trained.model.model
    if not hasattr(network, "picture"):
        pytest.skip("rebuilds features, which are no picture")
    picture = network.picture(network.reconstruct(network.embed(images)))
    assert picture.shape == images.shape
    assert picture.min() >= 0
    assert picture.max() <= 1
    assert torch.equal(trained.model.test_step(ImageBatch(image=images), 0).reconstruction, picture)
