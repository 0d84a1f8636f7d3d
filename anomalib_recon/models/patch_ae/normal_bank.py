# SPDX-License-Identifier: Apache-2.0

"""The bank of normal features, and the search for the nearest of them.

Example:
    >>> import torch
    >>> from anomalib_recon.models.patch_ae.normal_bank import NormalBank
    >>> bank = NormalBank(vectors_per_chunk=1000)
    >>> bank.fill(torch.rand(5000, 32))
    >>> bank(torch.rand(2, 32, 8, 8)).shape
    torch.Size([2, 1, 8, 8])
"""

from collections.abc import Iterable

import torch
from anomalib.models.components import DynamicBufferMixin
from torch import Tensor

# torch has no other loop that its ONNX exporter knows
from torch._higher_order_ops import scan
from torch.nn import functional
from tqdm.auto import tqdm

from anomalib_recon.layers import check_whole


class NormalBank(DynamicBufferMixin):
    """Features of normal images, each a vector of D numbers.

    The nearest vector is found by matrix products, and its distance is computed from the difference, which keeps all
    digits of small distances.

    Args:
        vectors_per_chunk (int): Vectors of the bank that are compared with those of an image at a time. Bounds memory
            to as many distances for each cell of an image, changes no result. An exported model takes as many for each
            image of the batch.

    Raises:
        ValueError: If it is not positive.
    """

    vectors: Tensor

    def __init__(self, vectors_per_chunk: int) -> None:
        super().__init__()
        check_whole(vectors_per_chunk=vectors_per_chunk)
        self.vectors_per_chunk = vectors_per_chunk
        self.register_buffer("vectors", torch.empty(0, 0))

    def fill(self, vectors: Tensor) -> None:
        """Replace the vectors.

        Args:
            vectors (Tensor): Vectors of shape ``(M, D)``; none empties the bank.
        """
        self.vectors = vectors.float()

    def forward(self, features: Tensor) -> Tensor:
        """Compute the distance of each vector to the nearest one of the bank.

        Args:
            features (Tensor): Features of shape ``(B, D, h, w)``.

        Returns:
            Tensor: Euclidean distances of shape ``(B, 1, h, w)``, without gradient.

        Raises:
            RuntimeError: If the bank is empty.
        """
        if len(self.vectors) == 0:
            msg = (
                "The model has no normal features to compare images with, as its training has not ended; train it, or "
                "load the checkpoint of a finished training."
            )
            raise RuntimeError(msg)
        # in one piece, as strided ones take longer than PatchCore's to compare with a small bank
        queries = features.detach().float().flatten(2).transpose(1, 2).contiguous()  # (B, hw, D)
        if torch.compiler.is_exporting():  # the number of images is symbolic
            distances = self._search_in_graph(queries.flatten(0, 1)).unflatten(0, (-1, queries.shape[1]))
        else:
            distances = torch.stack([self._search(image) for image in queries])
        return distances.unflatten(1, features.shape[-2:]).unsqueeze(1)

    def _search(self, queries: Tensor) -> Tensor:
        """Distances of queries (N, D) to their nearest vectors, ``(N,)``."""
        found = _none_found(queries)
        for start in range(0, len(self.vectors), self.vectors_per_chunk):
            chunk = self.vectors[start : start + self.vectors_per_chunk]
            found = _compare(queries, *found, chunk, torch.tensor(start, device=queries.device))
        return _distances(queries, self.vectors, found[1])

    def _search_in_graph(self, queries: Tensor) -> Tensor:
        """As :meth:`_search`, by a loop in the exported graph.

        A loop that is unrolled bounds no memory: runtimes compute many chunks before they compare any.
        """
        size = min(self.vectors_per_chunk, len(self.vectors))
        num_chunks = -(-len(self.vectors) // size)
        padding = self.vectors[:1].expand(num_chunks * size - len(self.vectors), -1)
        padded = torch.cat([self.vectors, padding])
        starts = size * torch.arange(num_chunks, device=queries.device)

        def step(carry: list[Tensor], chunk: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
            # the queries are carried along because OpenVINO takes any other input of the loop for an initial value
            queries, *found = carry
            return [queries.clone(), *_compare(queries, *found, *chunk)], []

        (_, _, index), _ = scan(
            step, [queries, *_none_found(queries)], [padded.unflatten(0, (num_chunks, size)), starts]
        )
        return _distances(queries, padded, index)


def draw_vectors(vectors: Tensor, number: int | None) -> Tensor:
    """Draw so many vectors of each image at random.

    Args:
        vectors (Tensor): Vectors of shape ``(B, m, D)``.
        number (int | None): How many of the m to draw; ``None``, or more than there are, takes all.

    Returns:
        Tensor: Vectors of shape ``(B, number, D)``.
    """
    if number is None or number >= vectors.shape[1]:
        return vectors
    drawn = torch.rand(vectors.shape[:2]).argsort(dim=1)[:, :number].to(vectors.device)
    return vectors.take_along_dim(drawn[..., None], dim=1)


def stack_parts(parts: Iterable[Tensor], total: int) -> Tensor:
    """Concatenate parts as they come, so that they are not in memory beside the result.

    Args:
        parts (Iterable[Tensor]): Parts of shape ``(b, ...)``.
        total (int): Sum of all b.

    Returns:
        Tensor: Tensor of shape ``(total, ...)``.
    """
    stacked, start = torch.empty(0), 0
    for part in parts:
        if start == 0:
            stacked = part.new_empty(total, *part.shape[1:])
        stacked[start : start + len(part)] = part
        start += len(part)
    return stacked


def select_coreset(vectors: Tensor, ratio: float) -> Tensor:
    """Select vectors such that none of the others is far from all of them: greedy k-centres.

    The first vector is the one nearest to the mean of all, so that a seed has no influence. Each further one is that
    with the greatest distance to its nearest selected one.
    Each step takes one product of all vectors with the last selected one; anomalib's ``KCenterGreedy`` writes all
    differences to it, which takes several times as long on a CPU.

    Args:
        vectors (Tensor): Vectors of shape ``(M, D)``.
        ratio (float): Share of the vectors to select, in (0, 1]; at 1 all are returned as they are.

    Returns:
        Tensor: Vectors of shape ``(int(ratio * M), D)``, in the order of their selection.
    """
    if ratio == 1:
        return vectors
    selected = torch.empty(int(ratio * len(vectors)), dtype=torch.long, device=vectors.device)
    squares = vectors.square().sum(dim=1)  # (M,)
    index = torch.addmv(squares, vectors, vectors.mean(dim=0), alpha=-2).argmin()
    closest = torch.full_like(squares, torch.inf)  # squared distance to the nearest selected vector
    # in place: new tensors of each step, with small ones kept between them, would take gigabytes
    distances = torch.empty_like(squares)
    for step in tqdm(range(len(selected)), "Coreset", delay=10, leave=False):
        selected[step] = index
        torch.addmv(squares, vectors, vectors[index], alpha=-2, out=distances).add_(squares[index])
        torch.minimum(closest, distances, out=closest)
        closest[index] = -torch.inf  # never again
        torch.argmax(closest, out=index)
    return vectors[selected]


def _none_found(queries: Tensor) -> tuple[Tensor, Tensor]:
    """What :func:`_compare` starts from."""
    worst = torch.full_like(queries[:, 0], -torch.inf)
    return worst, torch.zeros_like(worst, dtype=torch.long)


def _compare(queries: Tensor, closest: Tensor, index: Tensor, chunk: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Update the nearest vectors with a chunk of the bank.

    Args:
        queries (Tensor): Vectors of shape ``(N, D)``.
        closest (Tensor): Closeness of the nearest vector so far, shape ``(N,)``: half the squared distance of the query
            to the origin less half that to the vector.
        index (Tensor): Its place in the bank, shape ``(N,)``.
        chunk (Tensor): Vectors of the bank, shape ``(m, D)``.
        start (Tensor): Place of the first of them in the bank, shape ``()``.

    Returns:
        tuple[Tensor, Tensor]: ``closest`` and ``index``, updated.
    """
    # the sum is done within the matrix product, without another pass over its N x m numbers
    found, place = functional.linear(queries, chunk, chunk.square().sum(dim=1) / -2).max(dim=1)
    closer = found > closest
    return torch.where(closer, found, closest), torch.where(closer, place + start, index)


def _distances(queries: Tensor, vectors: Tensor, index: Tensor) -> Tensor:
    return torch.linalg.vector_norm(queries - vectors[index], dim=1)
