# SPDX-License-Identifier: Apache-2.0

import itertools
import math

import pytest
import torch

from anomalib_recon.models.intra.loss import InTraLoss
from anomalib_recon.models.intra.torch_model import InTraModel
from anomalib_recon.models.intra.transformer import MultiheadFeatureSelfAttention, MultiheadSelfAttention, TokenLinear
from anomalib_recon.models.intra.windows import draw_windows

SMALL = {"image_size": (48, 40), "patch_size": 8, "window_size": 3, "embed_dim": 16, "depth": 3, "num_heads": 2}


def small_model(**kwargs) -> InTraModel:
    torch.manual_seed(0)
    return InTraModel(**{**SMALL, **kwargs}).eval()


def windows_by_the_paper(rows: int, cols: int, side: int) -> dict[tuple[int, int], tuple[int, int]]:
    """Eqs. (13)-(15) of version 1, (4)-(5) of version 3, as printed: counted from 1."""

    def g(c: int) -> int:
        return max(1, c - side // 2)

    return {
        (t, u): (g(t) - max(0, g(t) + side - rows - 1), g(u) - max(0, g(u) + side - cols - 1))
        for t in range(1, rows + 1)
        for u in range(1, cols + 1)
    }


def test_default_network_has_the_size_of_the_paper() -> None:
    parameters = sum(parameter.numel() for parameter in InTraModel().parameters())
    assert parameters == 55_551_232  # 55.55 M


@pytest.mark.parametrize(("rows", "cols", "side"), [(8, 8, 7), (9, 9, 7), (7, 7, 7), (6, 9, 4), (5, 8, 5), (10, 6, 3)])
def test_windows_are_placed_by_the_equations(rows: int, cols: int, side: int) -> None:
    model = small_model(image_size=(rows * 8, cols * 8), window_size=side)
    for (t, u), (r, s) in windows_by_the_paper(rows, cols, side).items():
        index = (t - 1) * cols + (u - 1)
        expected = [(r - 1 + i) * cols + (s - 1 + j) for i in range(side) for j in range(side)]
        assert model.places[index].tolist() == expected
        assert model.places[index, model.covered[index]] == index


@pytest.mark.parametrize("attention", ["mfsa", "msa"])
@pytest.mark.parametrize("position", ["global", "local"])
@pytest.mark.parametrize("readout", ["mean", "token"])
def test_a_patch_is_inpainted_from_the_rest_of_its_window_alone(attention: str, position: str, readout: str) -> None:
    model = small_model(attention=attention, position=position, readout=readout, sigmoid=False)
    patches = torch.rand(30, 192)
    others = patches.repeat(30, 1, 1)  # in each, another patch is changed
    others[range(30), range(30)] = torch.rand(30, 192)
    inpainted, reconstruction = model.reconstruct(others), model.reconstruct(patches.expand_as(others))
    for covered, places in enumerate(model.places.tolist()):
        for changed in range(30):
            same = torch.equal(inpainted[changed, covered], reconstruction[changed, covered])
            assert same == (changed == covered or changed not in places)


def attend(attention: MultiheadSelfAttention, tokens: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Eqs. 6-10 for sequences ``(B, T, D)`` by plain einsums; ``mask`` says which tokens ``(T, T)`` see which."""
    query, key, value = (
        project(tokens).unflatten(-1, (attention.num_heads, -1))
        for project in (attention.query, attention.key, attention.value)
    )
    weights = torch.einsum("bthd,bshd->bhts", query, key) / math.sqrt(query.shape[-1])
    if mask is not None:
        weights = weights.masked_fill(~mask, -math.inf)
    mixed = torch.einsum("bhts,bshd->bthd", weights.softmax(dim=-1), value)
    return mixed.flatten(2) @ attention.unify.weight.T + attention.unify.bias


def inpaint_by_the_paper(
    model: InTraModel, image: torch.Tensor, corner: tuple[int, int], covered: list[tuple[int, int]], residuals: bool
) -> torch.Tensor:
    """Section 3 for one window, counted from 1, each block as a whole: the covered patches, ``(c, K * K * 3)``."""
    (r, s), side, depth = corner, model.window_size, len(model.blocks)
    window = [(i, j) for i in range(r, r + side) for j in range(s, s + side)]
    sequence = []
    for i, j in window:
        patch = image[:, (i - 1) * 8 : i * 8, (j - 1) * 8 : j * 8].permute(1, 2, 0).flatten()
        token = model.inpaint_token if (i, j) in covered else model.patch_embedding.weight @ patch
        number = (i - 1) * model.grid_size[1] + j if model.is_global else (i - r) * side + j - s + 1
        sequence.append(token + model.position_embedding[number - 1])
    places = [window.index(place) for place in covered]
    # read at its token, a covered patch is seen by itself alone
    mask = torch.ones(side**2, side**2, dtype=torch.bool)
    if model.readout == "token":
        mask[:, places] = False
        mask.fill_diagonal_(fill_value=True)
    tokens, outputs = torch.stack(sequence)[None], []
    for index, block in enumerate(model.blocks):
        partner = depth - 1 - index
        if residuals and partner < index - 1:  # what an earlier block has put out, not the one just before
            tokens = tokens + outputs[partner]
        tokens = tokens + attend(block.attention, block.attention_norm(tokens), mask)
        tokens = tokens + block.mlp(block.mlp_norm(tokens))
        outputs.append(tokens)
    return torch.sigmoid(model.head(tokens.mean(dim=1) if model.readout == "mean" else tokens[0, places]))


def reconstruct_by_the_paper(model: InTraModel, images: torch.Tensor, residuals: bool = True) -> torch.Tensor:
    """One window at a time for each patch, ``(B, N * M, K * K * 3)``."""
    windows = windows_by_the_paper(*model.grid_size, model.window_size)
    inpainted = [
        [inpaint_by_the_paper(model, image, windows[at], [at], residuals) for at in windows] for image in images
    ]
    return torch.stack([torch.cat(patches) for patches in inpainted])


@pytest.mark.parametrize(
    ("depth", "long_residuals", "position", "readout"),
    [
        *[(depth, True, "global", "mean") for depth in (1, 2, 3, 5, 6, 13)],
        *itertools.product([4], [True, False], ["global", "local"], ["mean", "token"]),
    ],
)
@torch.no_grad()
def test_reconstruction_equals_one_forward_for_each_patch(
    depth: int, long_residuals: bool, position: str, readout: str
) -> None:
    model = small_model(depth=depth, long_residuals=long_residuals, position=position, readout=readout, window_size=5)
    for parameter in model.parameters():  # far enough from zero that everything matters
        torch.nn.init.normal_(parameter, std=0.3)
    images = torch.rand(2, 3, 48, 40)
    expected = reconstruct_by_the_paper(model, images, long_residuals)
    torch.testing.assert_close(model.reconstruct(model.embed(images)), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", [1, 4])
@torch.no_grad()
def test_last_block_computes_the_covered_tokens_as_it_would_all(count: int) -> None:
    model = small_model(window_size=5, readout="token", covered_per_window=count)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    block, (places, covered) = model.blocks[-1], (model.places, model.covered)
    calls = []
    hook = block.register_forward_hook(lambda _, args, output: calls.append((*args, output)))
    inpainted = model.inpaint(torch.rand(30, 192)[places], places, covered)
    hook.remove()
    [(sequence, mask, output)] = calls
    assert output.shape == (len(places), count, 16)
    whole = block(sequence, mask)
    assert whole.shape == (len(places), 25, 16)
    torch.testing.assert_close(output, whole.gather(1, covered[:, :, None].expand_as(output)))
    expected = torch.sigmoid(model.head(whole)).gather(1, covered[:, :, None].expand_as(inpainted))
    torch.testing.assert_close(inpainted, expected)


@pytest.mark.parametrize("count", [1, 4])
@pytest.mark.parametrize("chunk", [1, 7, 1000])
@torch.no_grad()
def test_reconstruction_is_that_of_each_window_alone(count: int, chunk: int) -> None:
    model = small_model(window_size=5, readout="token", covered_per_window=count, windows_per_chunk=chunk)
    patches = torch.rand(2, 30, 192)
    reconstruction = model.reconstruct(patches)
    for places, covered in zip(model.places, model.covered, strict=True):
        inpainted = model.inpaint(patches[:, places], places.expand(2, -1), covered.expand(2, -1))
        torch.testing.assert_close(inpainted, reconstruction[:, places[covered]], atol=1e-6, rtol=1e-5)


GRIDS = [(16, 16, 7), (8, 8, 7), (7, 7, 7), (9, 11, 7), (13, 6, 6), (5, 8, 5), (7, 6, 4)]


def covered_together(model: InTraModel) -> list[set[int]]:
    """Patches of the grid that each window covers."""
    return [set(places[covered].tolist()) for places, covered in zip(model.places, model.covered, strict=True)]


@pytest.mark.parametrize(
    ("rows", "cols", "side", "count"),
    [(*grid, count) for grid in GRIDS for count in (1, 4, 9) if 4 * count <= grid[2] ** 2],
)
def test_every_patch_is_covered_once_and_apart(rows: int, cols: int, side: int, count: int) -> None:
    model = small_model(image_size=(rows * 8, cols * 8), window_size=side, readout="token", covered_per_window=count)
    groups = covered_together(model)
    assert sorted(patch for group in groups for patch in group) == list(range(rows * cols))
    assert max(map(len, groups)) <= count
    apart = side // math.isqrt(count)
    for group, places in zip(groups, model.places.tolist(), strict=True):
        assert places == [places[0] + i * cols + j for i in range(side) for j in range(side)]
        assert places[0] % cols + side <= cols
        for one, other in itertools.combinations(group, 2):
            assert max(abs(one // cols - other // cols), abs(one % cols - other % cols)) >= apart


def test_covering_more_takes_fewer_windows() -> None:
    sizes = {"image_size": (128, 128), "window_size": 7, "readout": "token"}
    assert [len(small_model(**sizes, covered_per_window=count).places) for count in (1, 4, 9)] == [256, 81, 36]


@pytest.mark.parametrize(("count", "image_size"), [(4, (48, 40)), (4, (56, 72)), (9, (56, 72))])
@pytest.mark.parametrize("position", ["global", "local"])
@torch.no_grad()
def test_covered_patches_are_inpainted_as_by_one_forward_for_each_window(
    count: int, image_size: tuple[int, int], position: str
) -> None:
    sizes = {"image_size": image_size, "window_size": 7 if count == 9 else 5, "windows_per_chunk": 5}
    model = small_model(**sizes, readout="token", position=position, covered_per_window=count)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    images, cols = torch.rand(2, 3, *image_size), model.grid_size[1]
    reconstruction = model.reconstruct(model.embed(images))
    for window, group in zip(model.places, covered_together(model), strict=True):
        corner = divmod(int(window[0]), cols)
        places = [(patch // cols + 1, patch % cols + 1) for patch in sorted(group)]
        for image, result in zip(images, reconstruction, strict=True):
            expected = inpaint_by_the_paper(model, image, (corner[0] + 1, corner[1] + 1), places, residuals=True)
            torch.testing.assert_close(result[sorted(group)], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_an_inpainted_patch_does_not_see_those_covered_with_it() -> None:
    model = small_model(window_size=5, readout="token", sigmoid=False, covered_per_window=4)
    patches = torch.rand(1, 30, 192)
    reconstruction = model.reconstruct(patches)
    for changed in range(30):
        others = patches.clone()
        others[:, changed] = torch.rand(192)
        inpainted = model.reconstruct(others)
        for group, window in zip(covered_together(model), model.places.tolist(), strict=True):
            for patch in group:
                same = torch.equal(inpainted[:, patch], reconstruction[:, patch])
                assert same == (changed in group or changed not in window)


@pytest.mark.parametrize(
    ("attention_class", "width"), [(MultiheadFeatureSelfAttention, 12), (MultiheadSelfAttention, 24)]
)
def test_attention_equals_plain_einsums(attention_class: type[MultiheadSelfAttention], width: int) -> None:
    torch.manual_seed(0)
    attention = attention_class(embed_dim=24, num_heads=3)
    tokens = torch.randn(2, 5, 24)
    assert attention.query(tokens).shape == attention.key(tokens).shape == (2, 5, width)
    expected = attend(attention, tokens)
    torch.testing.assert_close(attention(tokens, tokens), expected)
    torch.testing.assert_close(attention(tokens[:, 1:3], tokens), expected[:, 1:3])


def test_token_linear_is_linear() -> None:
    torch.manual_seed(0)
    layer = TokenLinear(24, 40)
    plain = torch.nn.Linear(24, 40)
    plain.load_state_dict(layer.state_dict())
    tokens, same = (torch.ones(3, 7, 24).cumsum(2).div(24).requires_grad_() for _ in range(2))
    result, expected = layer(tokens), plain(same)
    torch.testing.assert_close(result, expected)
    for output in (result, expected):
        output.square().sum().backward()
    torch.testing.assert_close(tokens.grad, same.grad)
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad)


def test_feature_self_attention_has_the_hidden_width_of_the_paper() -> None:
    attention = MultiheadFeatureSelfAttention(embed_dim=24, num_heads=3)
    assert [tuple(layer.weight.shape) for layer in attention.query if hasattr(layer, "weight")] == [(48, 24), (12, 48)]


def test_patches_are_row_major_and_reversible() -> None:
    model = small_model()
    images = torch.rand(2, 3, 48, 40)
    patches = model.embed(images)
    assert patches.shape == (2, 30, 192)
    torch.testing.assert_close(model.pixels(patches[1, 7:8])[0], images[1, :, 8:16, 16:24])
    torch.testing.assert_close(model.unpatchify(patches), images)


def test_windows_are_drawn_everywhere_and_repeatably() -> None:
    model = small_model()
    places, covered = draw_windows(model.grid_size, model.window_size, 4000, torch.Generator().manual_seed(0))
    assert places.shape == (4000, 9)
    assert covered.shape == (4000, 1)
    assert set(covered.flatten().tolist()) == set(range(9))
    assert set(places[:, 0].tolist()) == {row * 5 + col for row in range(4) for col in range(3)}
    assert bool((places.diff(dim=1) > 0).all())
    again, _ = draw_windows(model.grid_size, model.window_size, 4000, torch.Generator().manual_seed(0))
    assert torch.equal(places, again)


@pytest.mark.parametrize("count", [2, 5, 8])
def test_several_patches_are_covered_at_random_places(count: int) -> None:
    model = small_model(readout="token")
    _, covered = draw_windows(model.grid_size, model.window_size, 6000, torch.Generator().manual_seed(0), count)
    assert covered.shape == (6000, count)
    hits = torch.nn.functional.one_hot(covered, 9).sum(dim=1)
    assert int(hits.max()) == 1  # no patch twice
    together = hits.T @ hits / 6000
    torch.testing.assert_close(together.diagonal(), torch.full((9,), count / 9), atol=0.03, rtol=0)
    pairs = count * (count - 1) / (9 * 8)
    torch.testing.assert_close(together[~torch.eye(9).bool()], torch.full((72,), pairs), atol=0.03, rtol=0)


@pytest.mark.parametrize("readout", ["mean", "token"])
@pytest.mark.parametrize("depth", [1, 2, 4])
@torch.no_grad()
def test_rollout_follows_tokens_from_block_to_block(readout: str, depth: int) -> None:
    """By whole matrices: half of each block's output is its input, and a long residual half of an input."""
    model = small_model(readout=readout, depth=depth, window_size=5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    image, (row, col) = torch.rand(3, 48, 40), (1, 4)
    patches, places = model.embed(image[None])[0], model.places[9:10]
    covered = model.covered[9:10]
    is_seen = torch.ones(25, 25, dtype=torch.bool)
    if readout == "token":  # the covered token by itself alone
        is_seen[:, covered[0]] = False
        is_seen.fill_diagonal_(fill_value=True)
    matrices, inputs = [], []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.inpaint(patches[places], places, covered)
    for block, sequence in zip(model.blocks, inputs, strict=True):
        normed = block.attention_norm(sequence)
        query, key = (
            project(normed)[0].unflatten(-1, (2, -1)) for project in (block.attention.query, block.attention.key)
        )
        logits = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(query.shape[-1])
        matrices.append((logits.masked_fill(~is_seen, -math.inf).softmax(-1).mean(0) + torch.eye(25)) / 2)
    outputs = [matrices[0]]
    for matrix in matrices[1:3]:
        outputs.append(matrix @ outputs[-1])
    if depth == 4:
        outputs.append(matrices[3] @ (outputs[2] + outputs[0]) / 2)
    expected = torch.zeros(30)
    expected[places[0]] = outputs[-1].mean(0) if readout == "mean" else outputs[-1][covered[0, 0]]
    shares = model.attention_rollout(image, row, col)
    assert float(shares.sum()) == pytest.approx(1)
    torch.testing.assert_close(shares, expected.reshape(6, 5))
    assert not any(block.attention._forward_hooks for block in model.blocks)


def test_rollout_refuses_a_patch_outside_the_grid() -> None:
    with pytest.raises(ValueError, match="row and col must be in the grid of 6 x 5 patches, got 1 and 5"):
        small_model().attention_rollout(torch.rand(3, 48, 40), 1, 5)


@pytest.mark.parametrize("readout", ["mean", "token"])
@torch.no_grad()
def test_one_channel_is_the_mean_of_three(readout: str) -> None:
    model = small_model(in_channels=1, readout=readout)
    grey, colours = torch.rand(2, 1, 48, 40), torch.rand(2, 3, 48, 40)
    patches = model.embed(grey)
    assert patches.shape == (2, 30, 64)
    torch.testing.assert_close(model.unpatchify(patches), grey, rtol=0, atol=0)
    torch.testing.assert_close(model.embed(grey.expand(-1, 3, -1, -1)), patches)
    torch.testing.assert_close(model.embed(colours), model.embed(colours.sum(dim=1, keepdim=True) / 3))
    for name, value in model(grey)._asdict().items():
        if value is not None:
            torch.testing.assert_close(value, getattr(model(grey.expand(-1, 3, -1, -1)), name))
    three = grey[0].expand(3, -1, -1)
    torch.testing.assert_close(model.attention_rollout(grey[0], 1, 2), model.attention_rollout(three, 1, 2))


@torch.no_grad()
def test_one_channel_is_compared_and_shown_as_three_equal_ones() -> None:
    model = small_model(in_channels=1, sigmoid=False)
    grey = torch.rand(2, 1, 48, 40)
    reconstruction = model.reconstruct(model.embed(grey))
    inpainted = model.unpatchify(reconstruction)
    expected = model.anomaly_map_generator.difference(*(image.expand(-1, 3, -1, -1) for image in (grey, inpainted)))
    torch.testing.assert_close(model.difference(model.embed(grey), reconstruction), expected)
    picture = model.picture(reconstruction)
    assert picture.shape == (2, 3, 48, 40)
    for channel in range(3):
        assert torch.equal(picture[:, channel], inpainted[:, 0].clamp(0, 1))
    pixels, others = model.pixels(model.embed(grey)), model.pixels(reconstruction)
    assert pixels.shape == (60, 1, 8, 8)
    three = (values.expand(-1, 3, -1, -1) for values in (pixels, others))
    torch.testing.assert_close(InTraLoss(0.1, 0.1)(pixels, others), InTraLoss(0.1, 0.1)(*three))


@torch.no_grad()
def test_any_number_of_channels_is_painted() -> None:
    model = small_model(in_channels=5)
    images = torch.rand(1, 5, 48, 40)
    assert torch.equal(model.unpatchify(model.embed(images)), images)
    assert model.picture(model.reconstruct(model.embed(images))).shape == (1, 5, 48, 40)
    assert model(images).anomaly_map.shape == (1, 1, 48, 40)
    with pytest.raises(ValueError, match=r"images must have shape \(B, 5, 48, 40\), got \(1, 3, 48, 40\)"):
        model(torch.rand(1, 3, 48, 40))


def test_scores_follow_from_the_reconstruction() -> None:
    model = small_model()
    model.normal_difference.fill_(0.1)
    images = torch.rand(2, 3, 48, 40)
    predictions = model(images)
    reconstruction = model.unpatchify(model.reconstruct(model.embed(images)))
    difference = model.anomaly_map_generator.difference(images, reconstruction)
    torch.testing.assert_close(predictions.anomaly_map, (difference - 0.1).abs())
    torch.testing.assert_close(predictions.pred_score, predictions.anomaly_map.flatten(1).max(dim=1).values)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"image_size": (50, 40)}, "image_size must be a multiple of patch_size, got 50 x 40"),
        ({"window_size": 6}, "window_size must not exceed the grid of 6 x 5 patches, got 6"),
        ({"window_size": 1}, "window_size must be at least 2"),
        ({"patch_size": 0}, "patch_size"),
        ({"embed_dim": 18}, "embed_dim must be a multiple of twice num_heads, got 18"),
        ({"depth": 0}, "depth must be at least 1, got 0"),
        ({"in_channels": 0}, "in_channels must be at least 1, got 0"),
        ({"windows_per_chunk": 0}, "windows_per_chunk must be at least 1, got 0"),
        ({"attention": "linear"}, "attention must be '.* or '.*', got 'linear'"),
        ({"position": "none"}, "position must be 'global' or 'local', got 'none'"),
        ({"readout": "max"}, "readout must be 'mean' or 'token', got 'max'"),
        ({"distance": "mahalanobis", "patch_size": 2}, "patch_size must be a multiple of 4 .* got 2"),
        ({"distance": "l2"}, "distance must be 'gms' or 'mahalanobis', got 'l2'"),
        ({"window_size": 5, "covered_per_window": 4}, "covered_per_window=4 needs readout='token', got readout='mean'"),
        ({"window_size": 5, "covered_per_window": 3}, r"covered_per_window must be one of \(1, 4\) for window_size=5"),
        ({"window_size": 5, "covered_per_window": 9}, "covered_per_window must be one of .* got 9"),
        ({"covered_per_window": 0}, "covered_per_window must be at least 1, got 0"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_model(**arguments)


@pytest.mark.parametrize("shape", [(1, 3, 40, 48), (1, 1, 48, 40), (3, 48, 40)])
def test_images_of_another_size_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must have shape \(B, 3, 48, 40\), got"):
        small_model()(torch.rand(shape))
