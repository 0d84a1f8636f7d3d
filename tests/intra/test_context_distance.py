# SPDX-License-Identifier: Apache-2.0

"""Reconstructions compared in units of what is normal in a context."""

import pytest
import torch
from torch import Tensor

from anomalib_recon.models.intra import context_distance
from anomalib_recon.models.intra.context_distance import ContextDistance
from anomalib_recon.models.intra.loss import gradient_magnitude_similarity


def halves(images: Tensor) -> Tensor:
    """Means of 2 x 2 pixels."""
    return images.reshape(*images.shape[:2], images.shape[2] // 2, 2, -1, 2).mean(dim=(3, 5))


@pytest.fixture
def pair() -> tuple[Tensor, Tensor]:
    """Reconstructions of squares of 8 pixels, and images that differ the more, the brighter the square is."""
    generator = torch.Generator().manual_seed(0)
    squares = torch.rand(60, 1, 4, 5, generator=generator)
    inpainted = squares.repeat_interleave(8, 2).repeat_interleave(8, 3).expand(-1, 3, -1, -1)
    images = inpainted + 0.1 * inpainted * torch.randn(inpainted.shape, generator=generator)
    return images, inpainted


@pytest.fixture
def distance(pair: tuple[Tensor, Tensor]) -> ContextDistance:
    distance = ContextDistance(3, (32, 40), patch_size=8)
    distance.fit(zip(*(part.split(7) for part in pair), strict=True))
    return distance


def test_differences_are_those_of_half_and_quarter_resolution(pair: tuple[Tensor, Tensor]) -> None:
    differences = ContextDistance(3, (32, 40), patch_size=16).differences(*pair)
    assert differences.shape == (60, 48 + 16 + 4, 4, 5)
    images, inpainted = map(halves, pair)
    of_cell = (images - inpainted)[7, :, 8:12, 12:16]  # row 2, column 3
    torch.testing.assert_close(differences[7, :48, 2, 3], of_cell.flatten())
    gradients = 1 - gradient_magnitude_similarity(images, inpainted).mean(dim=1)
    torch.testing.assert_close(differences[7, 48:64, 2, 3], gradients[7, 8:12, 12:16].flatten())
    gradients = 1 - gradient_magnitude_similarity(halves(images), halves(inpainted)).mean(dim=1)
    torch.testing.assert_close(differences[7, 64:, 2, 3], gradients[7, 4:6, 6:8].flatten())


def test_context_is_what_is_inpainted_around_and_the_place(pair: tuple[Tensor, Tensor]) -> None:
    _, inpainted = pair
    contexts = ContextDistance(3, (32, 40), patch_size=8).contexts(inpainted)
    assert contexts.shape == (60, 38, 4, 5)
    squares = inpainted[7, 0, ::8, ::8]
    around = squares[1:4, 2:5]  # of row 2, column 3
    torch.testing.assert_close(contexts[7, :36, 2, 3].sort().values, around.flatten().repeat(4).sort().values)
    torch.testing.assert_close(contexts[7, 36:, 2, 3], torch.tensor([2 / 4, 3 / 5]))
    corner = torch.stack([squares[row, column] for row in (0, 0, 1) for column in (0, 0, 1)])
    torch.testing.assert_close(contexts[7, :36, 0, 0].sort().values, corner.repeat(4).sort().values)


def test_distances_are_those_of_an_independent_computation(
    distance: ContextDistance, pair: tuple[Tensor, Tensor]
) -> None:
    differences, contexts = (
        part.movedim(1, -1).flatten(0, 2).double() for part in (distance.differences(*pair), distance.contexts(pair[1]))
    )
    nearest = torch.cdist(contexts - distance.origin, distance.centres.double()).argmin(dim=1)
    counts = nearest.bincount()
    assert len(counts) == 256
    deviations, means = torch.zeros_like(differences), {}
    for index in nearest.unique().tolist():
        means[index] = differences[nearest == index].mean(dim=0)
        deviations[nearest == index] = differences[nearest == index] - means[index]
    common = deviations.T @ deviations / len(deviations)
    index = int(counts.argmax())
    own = deviations[nearest == index]
    covariance = (own.T @ own + 100 * common) / (len(own) + 100)
    covariance += 0.01 * covariance.diagonal().mean() * torch.eye(own.shape[1])
    expected = torch.einsum("nd,de,ne->n", own, covariance.inverse(), own).div(own.shape[1]).sqrt()
    torch.testing.assert_close(distance(*pair).flatten()[nearest == index].double(), expected, rtol=1e-3, atol=1e-4)


def test_the_same_difference_counts_more_where_reconstructions_are_better() -> None:
    is_bright = torch.arange(1000) % 2 == 1
    inpainted = torch.where(is_bright, 0.9, 0.1)[:, None, None, None].expand(-1, 3, 16, 16)
    images = inpainted + 0.1 * inpainted * torch.randn(inpainted.shape, generator=torch.Generator().manual_seed(0))
    distance = ContextDistance(3, (16, 16), patch_size=8)
    distance.fit([(images, inpainted)])
    normal, changed = distance(images, inpainted), distance(inpainted + 0.1, inpainted)
    assert normal[is_bright].mean() > normal[~is_bright].mean()  # partly by the covariance of all contexts
    assert changed[~is_bright].mean() > 2 * changed[is_bright].mean()


def test_images_after_the_clustered_ones_count(pair: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    batches = list(zip(*(part.split(10) for part in pair), strict=True))
    monkeypatch.setattr(context_distance, "MAX_EXAMPLES", 20)
    distance, of_examples = (ContextDistance(3, (32, 40), patch_size=8) for _ in range(2))
    distance.fit(iter(batches))
    of_examples.fit(iter(batches[:2]))
    torch.testing.assert_close(distance.centres, of_examples.centres)
    assert not torch.allclose(distance.mean, of_examples.mean)


def test_few_cells_have_fewer_contexts() -> None:
    distance = ContextDistance(1, (8, 12), patch_size=4)
    images, inpainted = torch.rand(2, 3, 1, 8, 12)
    distance.fit([(images, inpainted)])
    assert distance(images, inpainted).isfinite().all()
    assert int((distance.centres[:, 0] < 1).sum()) == 18


def test_contexts_are_told_apart_in_bfloat16() -> None:
    """Few digits suffice for a place and a faint edge on a bright background."""
    generator = torch.Generator().manual_seed(0)
    inpainted = (0.8 + 0.02 * torch.randn(300, 1, 8, 8, generator=generator)).repeat_interleave(4, 2)
    inpainted = inpainted.repeat_interleave(4, 3).expand(-1, 3, -1, -1)
    distance = ContextDistance(3, (32, 32), patch_size=8)
    distance.fit([(inpainted, inpainted)])
    contexts = distance.contexts(inpainted).movedim(1, -1)
    distances = torch.cdist((contexts - distance.origin).flatten(0, 2), distance.centres)
    low = distance.to(torch.bfloat16)._nearest(contexts.bfloat16()).flatten()
    # the one that is taken is nearly as near as the nearest
    assert (distances.gather(1, low[:, None])[:, 0] - distances.min(dim=1).values).max() < 0.05
