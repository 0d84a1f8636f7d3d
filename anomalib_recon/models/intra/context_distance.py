# SPDX-License-Identifier: Apache-2.0

"""Distance of an image from its reconstruction, in units of what is normal in a context.

A network inpaints a smooth background almost without an error, and edges and textures with a large one. Where parts lie
in any pose, statistics by location do not tell them apart; statistics by context, which is what is inpainted, do.

Example:
    >>> import torch
    >>> from anomalib_recon.models.intra.context_distance import ContextDistance
    >>> distance = ContextDistance(in_channels=3, image_size=(32, 48), patch_size=8)
    >>> images, inpainted = torch.rand(2, 20, 3, 32, 48)
    >>> distance.fit([(images, inpainted)])
    >>> distance(images, inpainted).shape
    torch.Size([20, 1, 4, 6])
"""

from collections.abc import Iterable
from itertools import chain

import torch
from sklearn.cluster import MiniBatchKMeans
from torch import Tensor, nn
from torch.nn import functional

from anomalib_recon.layers.residual_distance import to_unit_covariance

from .loss import gradient_difference

# sides of a cell in pixels, of which the first that divides the patches is taken
CELL_SIZES = (8, 4)
# clusters of contexts, each with statistics of its own
NUM_CONTEXTS = 256
# images, or tiles, whose contexts are clustered
MAX_EXAMPLES = 500
# cells that the covariance of all contexts counts for in that of one
PRIOR_CELLS = 100
# values of a context: 6 x 6 means and 2 coordinates
CONTEXT_DIM = 38
# centre of a cluster that no context belongs to
NOWHERE = 1e3
BATCH_SIZE = 4096
SEED = 0


class ContextDistance(nn.Module):
    """Mahalanobis distance of images from reconstructions, by mean and covariance of normal differences in a context.

    Both are compared in cells of 8 x 8 pixels, or 4 x 4: by their colours at half resolution, and by their gradients at
    half and at quarter resolution. The context of a cell is what is inpainted in the 3 x 3 cells around it, as grey
    means of half cells, and the place of the cell, as shares of the image's sides. Contexts are sorted into 256
    clusters (k-means), of which each has a mean and a covariance.

    Args:
        in_channels (int): Channels C of the images.
        image_size (tuple[int, int]): Height H and width W of the images, in pixels.
        patch_size (int): Side of a patch, in pixels.

    Raises:
        ValueError: If ``patch_size`` is not a multiple of 4.
    """

    origin: Tensor
    centres: Tensor
    mean: Tensor
    whitening: Tensor
    place: Tensor

    def __init__(self, in_channels: int, image_size: tuple[int, int], patch_size: int) -> None:
        super().__init__()
        cell_size = next((size for size in CELL_SIZES if patch_size % size == 0), None)
        if cell_size is None:
            msg = (
                f"patch_size must be a multiple of 4 for distance='mahalanobis', got {patch_size}; take distance='gms'."
            )
            raise ValueError(msg)
        self.cell_size = cell_size
        rows, columns = (side // cell_size for side in image_size)
        vertical, horizontal = torch.meshgrid(torch.arange(rows) / rows, torch.arange(columns) / columns, indexing="ij")
        self.register_buffer("place", torch.stack([vertical, horizontal])[None], persistent=False)
        num_differences = (in_channels + 1) * (cell_size // 2) ** 2 + (cell_size // 4) ** 2
        # mean of the contexts, from which centres are counted: near 0, few digits tell them apart
        self.register_buffer("origin", torch.zeros(CONTEXT_DIM))
        self.register_buffer("centres", torch.full((NUM_CONTEXTS, CONTEXT_DIM), NOWHERE))
        self.register_buffer("mean", torch.zeros(NUM_CONTEXTS, num_differences))
        # for each context the map of a difference to unit covariance
        self.register_buffer("whitening", torch.eye(num_differences).repeat(NUM_CONTEXTS, 1, 1))

    def differences(self, images: Tensor, inpainted: Tensor) -> Tensor:
        """Compare images with reconstructions.

        Args:
            images (Tensor): Images of shape ``(B, C, H, W)`` with values in [0, 1].
            inpainted (Tensor): Reconstructions of the same shape.

        Returns:
            Tensor: Differences D of each of the h x w cells, shape ``(B, D, h, w)``.
        """
        images, inpainted = (functional.avg_pool2d(part.float(), 2) for part in (images, inpainted))
        halves = [images - inpainted, gradient_difference(images, inpainted)]
        images, inpainted = (functional.avg_pool2d(part, 2) for part in (images, inpainted))
        quarters = gradient_difference(images, inpainted)
        in_cells = [functional.pixel_unshuffle(part, self.cell_size // 2) for part in halves]
        return torch.cat([*in_cells, functional.pixel_unshuffle(quarters, self.cell_size // 4)], dim=1)

    def contexts(self, inpainted: Tensor) -> Tensor:
        """What is inpainted around each cell, and where it is.

        Args:
            inpainted (Tensor): Reconstructions of shape ``(B, C, H, W)`` with values in [0, 1].

        Returns:
            Tensor: Contexts of shape ``(B, 38, h, w)``; beyond the border the outermost cells go on.
        """
        means = functional.avg_pool2d(inpainted.float().mean(dim=1, keepdim=True), self.cell_size // 2)
        padded = functional.pad(functional.pixel_unshuffle(means, 2), (1, 1, 1, 1), mode="replicate")
        rows, columns = self.place.shape[2:]
        around = [padded[..., i : i + rows, j : j + columns] for i in range(3) for j in range(3)]
        return torch.cat([*around, self.place.expand(inpainted.shape[0], -1, -1, -1)], dim=1)

    @torch.no_grad()
    def fit(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Find the contexts, and set their means and covariances, in one pass.

        The first 500 images, or tiles of images, are kept in memory until their contexts have been clustered.

        Args:
            pairs (Iterable[tuple[Tensor, Tensor]]): Normal images and their reconstructions in batches of shape
                ``(b, C, H, W)``. The first 500 should be drawn from all.
        """
        batches = (
            (_cells(self.differences(*pair)).flatten(0, 2), _cells(self.contexts(pair[1])).flatten(0, 2))
            for pair in pairs
        )
        cells_of_image = self.place[0, 0].numel()
        examples: list[tuple[Tensor, Tensor]] = []
        for differences, contexts in batches:
            examples.append((differences.cpu(), contexts.cpu()))
            if sum(len(contexts) for _, contexts in examples) >= MAX_EXAMPLES * cells_of_image:
                break
        contexts = torch.cat([contexts for _, contexts in examples])
        origin = contexts.mean(dim=0)
        self.origin.copy_(origin)
        self.centres.copy_(_cluster(contexts - origin))

        self.mean.zero_()
        products, counts = torch.zeros_like(self.whitening), torch.zeros(NUM_CONTEXTS, device=self.mean.device)
        for batch in chain((examples.pop() for _ in range(len(examples))), batches):
            differences, contexts = (part.to(self.mean) for part in batch)
            nearest = self._nearest(contexts)
            sizes = nearest.bincount(minlength=NUM_CONTEXTS)
            for index, part in enumerate(differences[nearest.argsort()].split(sizes.tolist())):
                if len(part):
                    _add(part, self.mean[index], products[index], counts[index])
        common = products.sum(dim=0) / counts.sum()
        covariances = (products + PRIOR_CELLS * common) / (counts + PRIOR_CELLS)[:, None, None]
        self.whitening.copy_(to_unit_covariance(covariances))

    def forward(self, images: Tensor, inpainted: Tensor) -> Tensor:
        """Compute the distance of each cell, over the root of the number of differences.

        Args:
            images (Tensor): Images of shape ``(B, C, H, W)`` with values in [0, 1].
            inpainted (Tensor): Reconstructions of the same shape.

        Returns:
            Tensor: Distances of shape ``(B, 1, h, w)``, about 1 where images are normal.
        """
        with torch.autocast(images.device.type, enabled=False):
            differences, contexts = self.differences(images, inpainted), self.contexts(inpainted)
            if torch.compiler.is_exporting():
                return self._distances(differences, contexts)
            # a map for each cell is much memory for a batch
            parts = zip(differences.split(1), contexts.split(1), strict=True)
            return torch.cat([self._distances(*part) for part in parts])

    def _distances(self, differences: Tensor, contexts: Tensor) -> Tensor:
        # products have four axes or more: the export takes them for no layer with weights, but for the comparison
        nearest = self._nearest(_cells(contexts))
        centred = _cells(differences) - self.mean[nearest]
        whitened = (self.whitening[nearest] @ centred[..., None])[..., 0]
        return whitened.square().mean(dim=-1).sqrt()[:, None]

    def _nearest(self, contexts: Tensor) -> Tensor:
        """Index of the nearest centre, ``(..., 38) -> (...)``."""
        products = (contexts - self.origin) @ self.centres.T
        return (self.centres.square().sum(dim=1) - 2 * products).argmin(dim=-1)


def _add(vectors: Tensor, mean: Tensor, products: Tensor, count: Tensor) -> None:
    """Add vectors ``(n, D)`` to a mean ``(D,)``, to products of deviations from it ``(D, D)``, and to their number.

    In place. Squares of nearly equal differences would lose their digits if the mean were subtracted at the end.
    """
    own_mean = vectors.mean(dim=0)
    deviations, shift = vectors - own_mean, own_mean - mean
    share = len(vectors) / (count + len(vectors))
    products += deviations.T @ deviations + count * share * shift.outer(shift)
    mean += share * shift
    count += len(vectors)


def _cells(maps: Tensor) -> Tensor:
    """``(B, D, h, w) -> (B, h, w, D)``."""
    return maps.movedim(1, -1)


def _cluster(contexts: Tensor) -> Tensor:
    """Centres of 256 clusters, or of fewer if there are fewer contexts, ``(n, 38) -> (256, 38)``."""
    num_clusters = min(NUM_CONTEXTS, len(contexts))
    kmeans = MiniBatchKMeans(num_clusters, batch_size=BATCH_SIZE, n_init=3, random_state=SEED, compute_labels=False)
    centres = torch.full((NUM_CONTEXTS, contexts.shape[1]), NOWHERE)
    centres[:num_clusters] = torch.from_numpy(kmeans.fit(contexts.numpy()).cluster_centers_)
    return centres
