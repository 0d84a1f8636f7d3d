# SPDX-License-Identifier: Apache-2.0

"""InTra: the inpainting transformer, as a plain PyTorch module.

An image is cut into patches. For each patch, the network sees a square window of patches in which that one is covered,
and inpaints it from the others. Where the image differs from what a network trained on normal images inpaints, it is
anomalous.

Example:
    >>> import torch
    >>> from anomalib_recon.models.intra.torch_model import InTraModel
    >>> model = InTraModel(image_size=(64, 64), patch_size=8, embed_dim=32, depth=2, num_heads=4).eval()
    >>> patches = model.embed(torch.rand(2, 3, 64, 64))
    >>> patches.shape, model.reconstruct(patches).shape
    (torch.Size([2, 64, 192]), torch.Size([2, 64, 192]))

Paper:
    Inpainting Transformer for Anomaly Detection, https://arxiv.org/abs/2104.13897.
    Section and equation numbers in this package are those of version 1; version 3 is named where it differs.

See Also:
    :class:`anomalib_recon.models.intra.lightning_model.InTra`: training and evaluation with anomalib.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from anomalib.data import InferenceBatch
from torch import Tensor, nn

# torch has no other loop that its ONNX exporter knows
from torch._higher_order_ops import scan
from torch.nn import functional

from anomalib_recon.layers import Tiling, TopMean, check_choice, check_image_size, check_whole

from .anomaly_map import AnomalyMapGenerator
from .context_distance import ContextDistance
from .transformer import ATTENTION, TransformerBlock
from .windows import centred_windows

NUM_CHANNELS = 3


class InTraModel(Tiling, nn.Module):
    """Inpainting transformer.

    Args:
        image_size (tuple[int, int]): Height H and width W of the images, in pixels; multiples of ``patch_size``.
        patch_size (int): Side K of a patch, in pixels.
        window_size (int): Side L of a window, in patches.
        embed_dim (int): Latent dimension D.
        depth (int): Number of transformer blocks n.
        num_heads (int): Number of attention heads h.
        attention (Literal["mfsa", "msa"]): Feature self-attention (eq. 10) or regular self-attention (eq. 6).
        long_residuals (bool): Add the output of block i to the input of block n - 1 - i, for i < (n - 1) // 2 (counted
            from 0), as in a U-Net (section 4.3.1, figure 3).
        position (Literal["global", "local"]): Number the patches within the image (eq. 2) or the window (eq. 1).
        readout (Literal["mean", "token"]): Inpaint from the mean of the output sequence, or from the output at the
            covered patch, whose token then attends to the others without being seen by them.
        sigmoid (bool): End in a sigmoid (version 3) or in the affine map (version 1).
        windows_per_chunk (int): Windows that are inpainted at a time by :meth:`reconstruct`. Bounds its memory, changes
            nothing else. An exported model takes as many windows of each image of the batch.
        covered_per_window (int): Patches c that :meth:`reconstruct` covers in a window, far apart, and inpaints at a
            time: 1, as in the paper, or the square of a whole number up to L / 2, which takes fewer windows and needs
            ``readout="token"``.
        in_channels (int): Channels C of the images. With 1, images of three channels are taken, too, as the mean of
            their channels.
        distance (Literal["gms", "mahalanobis"]): Compare the gradients of images and reconstructions (section 3.5), or
            pixels and gradients, in units of what is normal in the context; see
            :class:`~anomalib_recon.models.intra.context_distance.ContextDistance`.
        top_fraction (float): Share of the map, from the highest value down, whose mean is the image's score; at 0 the
            score is the maximum (eq. 18).

    Raises:
        ValueError: If an argument is out of its range or does not fit another.
    """

    def __init__(
        self,
        image_size: tuple[int, int] = (256, 256),
        patch_size: int = 16,
        window_size: int = 7,
        embed_dim: int = 512,
        depth: int = 13,
        num_heads: int = 8,
        attention: Literal["mfsa", "msa"] = "mfsa",
        long_residuals: bool = True,
        position: Literal["global", "local"] = "global",
        readout: Literal["mean", "token"] = "mean",
        sigmoid: bool = True,
        windows_per_chunk: int = 32,
        covered_per_window: int = 1,
        in_channels: int = NUM_CHANNELS,
        distance: Literal["gms", "mahalanobis"] = "gms",
        top_fraction: float = 0.0,
    ) -> None:
        super().__init__()
        check_whole(in_channels=in_channels)
        check_sizes(image_size, patch_size, window_size)
        check_network(embed_dim, depth, num_heads, windows_per_chunk)
        check_covered(covered_per_window, window_size, readout)
        check_choice(tuple(ATTENTION), attention=attention)
        check_choice(("global", "local"), position=position)
        check_choice(("mean", "token"), readout=readout)
        check_choice(("gms", "mahalanobis"), distance=distance)
        self.image_size = image_size
        self.patch_size = patch_size
        self.window_size = window_size
        self.grid_size = (image_size[0] // patch_size, image_size[1] // patch_size)
        self.num_long_residuals = (depth - 1) // 2 if long_residuals else 0
        self.is_global = position == "global"
        self.readout = readout
        self.windows_per_chunk = windows_per_chunk
        self.in_channels = in_channels

        patch_dim = patch_size**2 * in_channels
        num_positions = self.grid_size[0] * self.grid_size[1] if self.is_global else window_size**2
        self.patch_embedding = nn.Linear(patch_dim, embed_dim, bias=False)
        self.position_embedding = nn.Parameter(nn.init.trunc_normal_(torch.empty(num_positions, embed_dim), std=0.02))
        self.inpaint_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(embed_dim), std=0.02))
        self.blocks: Sequence[TransformerBlock] = nn.ModuleList(  # type: ignore[assignment]
            TransformerBlock(embed_dim, ATTENTION[attention](embed_dim, num_heads)) for _ in range(depth)
        )
        self.head = nn.Linear(embed_dim, patch_dim)
        self.output = nn.Sigmoid() if sigmoid else nn.Identity()

        places, covered = centred_windows(self.grid_size, window_size, covered_per_window)
        inpainted = places.gather(1, covered).flatten()
        # where each patch of the grid is among the inpainted ones
        order = torch.empty(self.grid_size[0] * self.grid_size[1], dtype=torch.long)
        order[inpainted] = torch.arange(len(inpainted))
        self.register_buffer("places", places, persistent=False)
        self.register_buffer("covered", covered, persistent=False)
        self.register_buffer("order", order, persistent=False)
        self.places: Tensor
        self.covered: Tensor
        self.order: Tensor

        self.anomaly_map_generator = AnomalyMapGenerator(image_size)
        # mean of diff(z) over the normal training images z (eq. 17), zero until it is known
        self.register_buffer("normal_difference", torch.zeros(1, 1, *image_size))
        self.normal_difference: Tensor
        self.mahalanobis = ContextDistance(in_channels, image_size, patch_size) if distance == "mahalanobis" else None
        self.top_mean = TopMean(top_fraction)

    def forward(self, images: Tensor) -> InferenceBatch:
        """Score images as :meth:`embed` takes them (section 3.5); see :meth:`compare`."""
        patches = self.embed(self.tile(images))
        return self.untile(self.compare(patches, self.reconstruct(patches)))

    def embed(self, images: Tensor) -> Tensor:
        """Cut images into patches (section 3.1).

        Args:
            images (Tensor): Images of shape ``(B, C, H, W)`` with values in [0, 1]; with C = 1, of shape
                ``(B, 3, H, W)``, too.

        Returns:
            Tensor: Patches of shape ``(B, N * M, K * K * C)``, in row-major order.

        Raises:
            ValueError: If the images are not of the size that the network was built for.
        """
        if self.in_channels == 1 and images.shape[1:] == (NUM_CHANNELS, *self.image_size):
            images = images.mean(dim=1, keepdim=True)
        check_image_size(images, self.image_size, self.in_channels)
        rows, cols = self.grid_size
        patches = images.reshape(-1, self.in_channels, rows, self.patch_size, cols, self.patch_size)
        return patches.permute(0, 2, 4, 3, 5, 1).reshape(-1, rows * cols, self.patch_size**2 * self.in_channels)

    def reconstruct(self, patches: Tensor) -> Tensor:
        """Inpaint every patch of the images from the window around it.

        Args:
            patches (Tensor): Patches of shape ``(B, N * M, K * K * C)``.

        Returns:
            Tensor: Inpainted patches of the same shape; values in [0, 1] if the network ends in a sigmoid.
        """
        if torch.compiler.is_exporting():
            return self._reconstruct_in_graph(patches)
        chunks = list(
            zip(self.places.split(self.windows_per_chunk), self.covered.split(self.windows_per_chunk), strict=True)
        )
        images = [torch.cat([self.inpaint(image[chunk[0]], *chunk) for chunk in chunks]) for image in patches]
        return torch.stack(images).flatten(1, 2)[:, self.order]

    def _reconstruct_in_graph(self, patches: Tensor) -> Tensor:
        """As :meth:`reconstruct`, for all images at a time, by a loop in the exported graph, which so stays small."""
        size = min(self.windows_per_chunk, len(self.places))
        windows = torch.arange(-(-len(self.places) // size) * size, device=patches.device) % len(self.places)

        def step(carry: list[Tensor], chunk: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            # the patches are carried along because OpenVINO takes any other input of the loop for an initial value
            [patches], (places, covered) = carry, chunk
            windows = patches[:, places]  # (B, n, L * L, K * K * C)
            places, covered = (values.expand(windows.shape[0], -1, -1).flatten(0, 1) for values in chunk)
            inpainted = self.inpaint(windows.flatten(0, 1), places, covered)
            return [patches.clone()], [inpainted.reshape(patches.shape[0], -1, patches.shape[2])]

        _, [inpainted] = scan(
            step, [patches], [values[windows].unflatten(0, (-1, size)) for values in (self.places, self.covered)]
        )
        return inpainted.transpose(0, 1).flatten(1, 2)[:, self.order]

    def inpaint(self, windows: Tensor, places: Tensor, covered: Tensor) -> Tensor:
        """Inpaint the covered patches of windows (sections 3.1 to 3.3).

        Args:
            windows (Tensor): Patches of n windows, shape ``(n, L * L, K * K * C)``.
            places (Tensor): Their places as row-major indices in the grid, shape ``(n, L * L)``.
            covered (Tensor): The covered patches of each window as indices in the window, shape ``(n, c)``.

        Returns:
            Tensor: Inpainted patches of shape ``(n, c, K * K * C)``.
        """
        # eqs. 3-5; an embedding look-up, unlike indexing, has a deterministic gradient on every device
        position = functional.embedding(places, self.position_embedding) if self.is_global else self.position_embedding
        is_covered = (covered[:, :, None] == torch.arange(self.window_size**2, device=covered.device)).any(dim=1)
        sequence = torch.where(is_covered[:, :, None], self.inpaint_token, self.patch_embedding(windows)) + position
        mask = self._mask(is_covered) if self.readout == "token" else None

        early: list[Tensor] = []
        for index, block in enumerate(self.blocks):
            if index >= len(self.blocks) - self.num_long_residuals:
                sequence = sequence + early.pop()
            is_last = index == len(self.blocks) - 1
            sequence = block(sequence, mask, read=covered if is_last and self.readout == "token" else None)
            if index < self.num_long_residuals:
                early.append(sequence)
        if self.readout == "mean":
            sequence = sequence.mean(dim=1, keepdim=True)
        return self.output(self.head(sequence).float())  # a sigmoid in bfloat16 is coarser than 8-bit images

    @staticmethod
    def _mask(is_covered: Tensor) -> Tensor:
        """Which tokens attend to which, ``(n, T) -> (n, 1, T, T)``.

        A covered token is seen by itself alone, so that a patch does not depend on how many others are covered. With
        ``readout="mean"``, the one that is covered is seen by all, as in the paper.
        """
        is_self = torch.eye(is_covered.shape[1], dtype=torch.bool, device=is_covered.device)
        return is_self | ~is_covered[:, None, None]

    def compare(self, patches: Tensor, reconstruction: Tensor) -> InferenceBatch:
        """Compare images and reconstructions: their gradients (section 3.5), or pixels and gradients.

        Args:
            patches (Tensor): Patches of shape ``(B, N * M, K * K * C)``.
            reconstruction (Tensor): Inpainted patches of the same shape.

        Returns:
            InferenceBatch: ``anomaly_map`` of shape ``(B, 1, H, W)``, the root of eq. 17, and ``pred_score`` of shape
                ``(B,)``, its maximum (eq. 18) or the mean of its highest values, both in [0, 1); with
                ``distance="mahalanobis"`` about 1 where images are normal.
        """
        if self.mahalanobis is None:
            anomaly_map = self.anomaly_map_generator(self.difference(patches, reconstruction), self.normal_difference)
        else:
            distances = self.mahalanobis(self.unpatchify(patches), self.unpatchify(reconstruction))
            anomaly_map = functional.interpolate(distances, self.image_size, mode="bilinear", align_corners=False)
        return InferenceBatch(pred_score=self.top_mean(anomaly_map), anomaly_map=anomaly_map)

    def difference(self, patches: Tensor, reconstruction: Tensor) -> Tensor:
        """``diff`` of section 3.5, ``(B, N * M, K * K * C) -> (B, 1, H, W)``."""
        return self.anomaly_map_generator.difference(self.unpatchify(patches), self.unpatchify(reconstruction))

    @torch.no_grad()
    def attention_rollout(self, image: Tensor, row: int, col: int) -> Tensor:
        """Where the network looks to inpaint a patch: attention rolled out over all blocks (section 3.3 mentions it).

        Attention Rollout, https://arxiv.org/abs/2005.00928: tokens are followed from block to block, half of them
        by the residual connections. A long residual counts as much as what it is added to.

        Args:
            image (Tensor): Image of shape ``(C, H, W)``, as :meth:`embed` takes it.
            row (int): Row of the patch in the grid.
            col (int): Its column.

        Returns:
            Tensor: Share of each patch of the grid, shape ``(N, M)``; 0 outside the window, and 1 in sum, of which
            the covered patch has what goes back to the learned token in its place.

        Raises:
            ValueError: If there is no such patch.
        """
        rows, cols = self.grid_size
        if not (0 <= row < rows and 0 <= col < cols):
            msg = f"row and col must be in the grid of {rows} x {cols} patches, got {row} and {col}."
            raise ValueError(msg)
        index = int(self.order[row * cols + col]) // self.covered.shape[1]
        places = self.places[index : index + 1]
        covered = (places == row * cols + col).nonzero()[:, 1:]
        weights: list[Tensor] = []
        hooks = [
            block.attention.register_forward_hook(
                lambda attention, inputs, _: weights.append(attention.weights(*inputs)[0])
            )
            for block in self.blocks
        ]
        try:
            self.inpaint(self.embed(image[None])[0, places], places, covered)
        finally:
            for hook in hooks:
                hook.remove()

        seen, early = torch.eye(self.window_size**2, device=image.device), list[Tensor]()
        for number, attention in enumerate(weights):
            if number >= len(weights) - self.num_long_residuals:
                seen = (seen + early.pop()) / 2
            own = seen if len(attention) == len(seen) else seen[covered[0]]
            seen = (own + attention @ seen) / 2
            if number < self.num_long_residuals:
                early.append(seen)
        shares = torch.zeros(rows * cols, device=image.device)
        return shares.index_copy(0, places[0], seen.mean(dim=0)).reshape(rows, cols)

    def picture(self, reconstruction: Tensor) -> Tensor:
        """Show inpainted patches as images with values in [0, 1], ``(B, N * M, K * K * C) -> (B, C, H, W)``.

        A single channel is shown as three equal ones.
        """
        pictures = self.unpatchify(reconstruction).float().clamp(0, 1)
        return pictures.expand(-1, NUM_CHANNELS, -1, -1) if self.in_channels == 1 else pictures

    def pixels(self, patches: Tensor) -> Tensor:
        """Show patches as images, ``(..., K * K * C) -> (n, C, K, K)``."""
        return patches.reshape(-1, self.patch_size, self.patch_size, self.in_channels).permute(0, 3, 1, 2)

    def unpatchify(self, patches: Tensor) -> Tensor:
        """Put patches together again, ``(B, N * M, K * K * C) -> (B, C, H, W)``."""
        rows, cols = self.grid_size
        images = patches.reshape(-1, rows, cols, self.patch_size, self.patch_size, self.in_channels)
        return images.permute(0, 5, 1, 3, 2, 4).reshape(-1, self.in_channels, *self.image_size)


def check_sizes(image_size: tuple[int, int], patch_size: int, window_size: int) -> None:
    """Check that patches tile the image and that a window fits in their grid.

    Raises:
        ValueError: If they do not.
    """
    check_whole(patch_size=patch_size, window_size=window_size)
    if min(image_size) < 1:
        msg = f"image_size must be positive, got {image_size}."
        raise ValueError(msg)
    if any(size % patch_size for size in image_size):
        msg = (
            f"image_size must be a multiple of patch_size, got {image_size[0]} x {image_size[1]} and {patch_size}; "
            f"the nearest smaller one is {image_size[0] // patch_size * patch_size} x "
            f"{image_size[1] // patch_size * patch_size}."
        )
        raise ValueError(msg)
    grid_size = tuple(size // patch_size for size in image_size)
    if window_size > min(grid_size):
        msg = (
            f"window_size must not exceed the grid of {grid_size[0]} x {grid_size[1]} patches, got {window_size}; "
            "use a smaller window_size, a smaller patch_size or a larger image_size."
        )
        raise ValueError(msg)
    if window_size == 1:
        msg = "window_size must be at least 2, got 1: a window needs patches to inpaint the covered one from."
        raise ValueError(msg)


def check_network(embed_dim: int, depth: int, num_heads: int, windows_per_chunk: int) -> None:
    """Check the sizes of the network.

    Raises:
        ValueError: If one is not positive, or the heads do not divide half of ``embed_dim``.
    """
    check_whole(embed_dim=embed_dim, depth=depth, num_heads=num_heads, windows_per_chunk=windows_per_chunk)
    if embed_dim % (2 * num_heads):
        msg = f"embed_dim must be a multiple of twice num_heads, got {embed_dim} and {num_heads} heads."
        raise ValueError(msg)


def check_covered(covered_per_window: int, window_size: int, readout: str) -> None:
    """Check that so many patches of a window can be covered, far apart, and inpainted at a time.

    Raises:
        ValueError: If they cannot.
    """
    check_whole(covered_per_window=covered_per_window)
    side = math.isqrt(covered_per_window)
    if side**2 != covered_per_window or side > window_size // 2:
        squares = tuple(number**2 for number in range(1, window_size // 2 + 1))
        msg = f"covered_per_window must be one of {squares} for window_size={window_size}, got {covered_per_window}."
        raise ValueError(msg)
    check_readout("covered_per_window", covered_per_window, readout)


def check_readout(name: str, num_covered: int, readout: str) -> None:
    """Check that so many patches of a window can be inpainted from its output sequence.

    Args:
        name (str): Name of the argument that says how many are covered.
        num_covered (int): How many.
        readout (str): What they are inpainted from.

    Raises:
        ValueError: If they cannot.
    """
    if num_covered > 1 and readout != "token":
        msg = (
            f"{name}={num_covered} needs readout='token', got readout={readout!r}: the mean of a sequence inpaints one "
            f"patch only; train with readout='token' or leave {name} at 1."
        )
        raise ValueError(msg)
