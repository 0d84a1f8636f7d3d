# SPDX-License-Identifier: Apache-2.0

"""Attention with a hole: a token is rebuilt from those around it, never from itself."""

import pytest
import torch

from anomalib_recon.models.adtr.torch_model import ADTRModel
from anomalib_recon.models.adtr.transformer import LoneAttention, MultiheadAttention


def build(**arguments) -> ADTRModel:
    torch.manual_seed(0)
    small = {"backbone": "resnet18", "pre_trained": False, "image_size": (64, 96), "feature_size": (8, 12)}
    sizes = {"embed_dim": 16, "depth": 2, "num_heads": 4, "mlp_dim": 16}
    return ADTRModel(**{**small, **sizes, **arguments}).eval()


def changed_tokens(model: ADTRModel, row: int, column: int) -> torch.Tensor:
    """Which tokens are rebuilt differently if the token at a place changes."""
    features = torch.randn(1, 1024, 8, 12)
    side = 8 // model.patch_grid[0]
    changed = features.clone()
    changed[:, :, row * side : (row + 1) * side, column * side : (column + 1) * side] += 1
    with torch.no_grad():
        difference = (model.reconstruct(features) - model.reconstruct(changed)).abs().amax(dim=1)
    return torch.nn.functional.max_pool2d(difference, side)[0] > 0


@pytest.mark.parametrize("patch_size", [1, 2])
@pytest.mark.parametrize("hole_size", [1, 3])
def test_a_token_is_rebuilt_from_all_but_its_hole(patch_size: int, hole_size: int) -> None:
    model = build(patch_size=patch_size, hole_size=hole_size)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in model.patch_grid), indexing="ij")
    reach = hole_size // 2
    for row, column in ((0, 0), (2, 3)):
        distance = (rows - row).abs().maximum((columns - column).abs())
        changed = changed_tokens(model, row, column)
        assert not changed[distance <= reach].any()
        assert changed[distance == reach + 1].all()


def test_without_a_hole_a_token_sees_itself() -> None:
    assert changed_tokens(build(), 2, 3).all()


def test_each_head_looks_to_another_side() -> None:
    model = build(hole_size=3, num_heads=4)
    weights = model.hole_bias[0].softmax(dim=-1)[:, 4 * 12 + 5].reshape(4, 8, 12)
    assert (weights[:, 3:6, 4:7] == 0).all()
    places = [divmod(int(index), 12) for index in weights.flatten(1).argmax(dim=1)]
    assert places == [(4, 7), (6, 5), (4, 3), (2, 5)]  # right, below, left, above


def test_a_checkpoint_holds_no_bias() -> None:
    assert set(build(hole_size=1).state_dict()) == set(build().state_dict())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"hole_size": 2}, "hole_size must be an odd number of tokens, or 0 for no hole, got 2"),
        ({"hole_size": -1}, "hole_size must be an odd number of tokens"),
        ({"hole_size": 13}, "hole_size must leave tokens to see of 8 x 12, got 13"),
        ({"hole_size": 1, "query": "encoder"}, "hole_size=1 needs query='learned' and attention='multihead'"),
        ({"hole_size": 1, "attention": "concat"}, "hole_size=1 needs query='learned' and attention='multihead'"),
        ({"patch_size": 3}, "patch_size must divide the feature map of 8 x 12 cells, got 3"),
        ({"patch_size": 0}, "patch_size must be at least 1, got 0"),
    ],
)
def test_wrong_holes_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build(**arguments)


def test_tokens_that_see_themselves_alone_need_no_attention() -> None:
    torch.manual_seed(0)
    alone, full = LoneAttention(16, 4), MultiheadAttention(16, 4)
    full.load_state_dict(alone.state_dict())
    query, key, value = torch.randn(3, 2, 12, 16)
    bias = torch.full((1, 4, 12, 12), -torch.inf)
    bias[:, :, range(12), range(12)] = 0
    torch.testing.assert_close(alone(query, key, value), full(query, key, value, bias))
