# SPDX-License-Identifier: Apache-2.0

import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from anomalib_recon.models.patch_ae.normal_bank import NormalBank, select_coreset


def brute_force(features: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """All differences in float64, (B, D, h, w) -> (B, 1, h, w)."""
    queries = features.double().movedim(1, -1)[..., None, :]
    return (queries - vectors.double()).square().sum(dim=-1).sqrt().amin(dim=-1)[:, None]


def filled(vectors: torch.Tensor, vectors_per_chunk: int) -> NormalBank:
    bank = NormalBank(vectors_per_chunk)
    bank.fill(vectors)
    return bank


@pytest.fixture
def vectors() -> torch.Tensor:
    """Vectors far from the origin, where a distance from norms and products alone would lose its digits."""
    return 10 + torch.randn(500, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def features(vectors: torch.Tensor) -> torch.Tensor:
    """Some of the vectors themselves, some close to one, some in between."""
    generator = torch.Generator().manual_seed(1)
    cells = vectors[torch.randint(500, (2, 5, 4), generator=generator)]
    noise = torch.randn(cells.shape, generator=generator)
    noise[:, 0], noise[:, 1] = 0, 1e-3 * noise[:, 1]
    return (cells + noise).movedim(-1, 1)


@pytest.mark.parametrize("vectors_per_chunk", [1, 7, 100, 500, 10_000])
def test_distances_are_those_of_brute_force(
    features: torch.Tensor, vectors: torch.Tensor, vectors_per_chunk: int
) -> None:
    expected = brute_force(features, vectors)
    result = filled(vectors, vectors_per_chunk)(features)
    assert float(expected[:, :, 0].max()) == 0
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=1e-7)


def test_coreset_of_ratio_one_is_all(vectors: torch.Tensor) -> None:
    assert torch.equal(select_coreset(vectors, 1.0), vectors)


def test_coreset_spreads_over_the_vectors(vectors: torch.Tensor) -> None:
    coreset = select_coreset(vectors, 0.1)
    assert coreset.shape == (50, 24)
    assert (coreset[:, None] == vectors).all(dim=2).any(dim=1).all()
    # greedily, no vector is as far from the coreset as the coreset's own are from each other
    clusters = torch.eye(24)[:10].repeat_interleave(30, dim=0) + 1e-3 * torch.randn(300, 24)
    assert select_coreset(clusters, 1 / 30).argmax(dim=1).unique().numel() == 10


def test_coreset_is_the_same_for_all_seeds_and_starts_in_the_middle(vectors: torch.Tensor) -> None:
    moved = vectors + 3
    coresets = [select_coreset(moved, 0.1) for _ in range(2)]
    assert torch.equal(*coresets)
    distances = (moved.double() - moved.double().mean(dim=0)).norm(dim=1)
    assert torch.equal(coresets[0][0], moved[distances.argmin()])


def test_coreset_takes_the_farthest_vector_each_time(vectors: torch.Tensor) -> None:
    coreset = select_coreset(vectors, 0.1)
    distances = torch.cdist(vectors.double(), vectors.double())
    expected = [int((vectors == coreset[0]).all(dim=1).nonzero())]
    while len(expected) < len(coreset):
        expected.append(int(distances[:, expected].amin(dim=1).argmax()))
    assert torch.equal(coreset, vectors[expected])


def test_coreset_takes_no_vector_twice() -> None:
    assert select_coreset(torch.eye(100), 0.99).unique(dim=0).shape == (99, 100)


def test_bank_comes_with_its_shape_from_a_state_dict(vectors: torch.Tensor, features: torch.Tensor) -> None:
    bank, loaded = filled(vectors, 100), NormalBank(100)
    loaded.load_state_dict(bank.state_dict())
    assert torch.equal(loaded(features), bank(features))


def test_an_empty_bank_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"no normal features to compare images with.*train it, or load"):
        NormalBank(10)(torch.rand(1, 4, 2, 2))


def test_chunk_must_be_positive() -> None:
    with pytest.raises(ValueError, match="vectors_per_chunk must be at least 1, got 0"):
        NormalBank(0)


def test_peak_memory_of_the_search_is_bounded_by_the_chunk(tmp_path: Path) -> None:
    """Torch's own count of what it allocates: what the process holds depends on what it has freed before."""
    vectors, features = torch.rand(30_000, 16), torch.rand(4, 16, 32, 32)
    peak = {}
    for vectors_per_chunk in (1000, 30_000):
        bank, trace = filled(vectors, vectors_per_chunk), tmp_path / f"{vectors_per_chunk}.json"
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            bank(features)
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
        allocated = [event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]"]
        peak[vectors_per_chunk] = (max(allocated) - min(allocated)) / 2**20
    # in MiB: 1024 x 1000 distances are 4, of which a few copies may exist; 1024 x 30 000 are 117
    assert peak[1000] < 10
    assert peak[30_000] > 100
