# SPDX-License-Identifier: Apache-2.0

"""The size of the images of a model, from its arguments."""

from collections.abc import Iterator, Sequence

import torch
from anomalib.pre_processing import PreProcessor
from anomalib.utils.config import to_tuple
from torchvision.transforms.v2 import Compose, Normalize, Transform

from .arguments import check_whole

NUM_CHANNELS = 3


def resolve_image_size(
    image_size: int | Sequence[int] | None, pre_processor: PreProcessor | bool, default: tuple[int, int]
) -> tuple[int, int]:
    """Find the size that images have when they come to the model.

    Args:
        image_size (int | Sequence[int] | None): Size as given by the user; an int means a square.
        pre_processor (PreProcessor | bool): Pre-processor as given by the user.
        default (tuple[int, int]): Size if neither says one.

    Returns:
        tuple[int, int]: Height and width.

    Raises:
        ValueError: If the two sizes disagree, or the size is not positive.
    """
    transform = getattr(pre_processor, "transform", None)
    # a transform that resizes makes even a single pixel that large
    resized = tuple(transform(torch.zeros(1, NUM_CHANNELS, 1, 1)).shape[-2:]) if transform else (1, 1)
    if image_size is None:
        return default if resized == (1, 1) else resized
    try:
        size = to_tuple(image_size)  # type: ignore[arg-type]
        check_whole(height=size[0], width=size[1])
    except (TypeError, ValueError) as error:
        msg = f"image_size must be positive, got {image_size}; pass a whole number of pixels, or two."
        raise ValueError(msg) from error
    if resized not in {(1, 1), size}:
        msg = f"image_size must be the size that pre_processor resizes to, got {size} and {resized}; leave one out."
        raise ValueError(msg)
    return size


def refuse_normalize(pre_processor: PreProcessor | bool) -> None:
    """Refuse a pre-processor that normalises images, for a model that does so itself.

    Args:
        pre_processor (PreProcessor | bool): Pre-processor as given by the user.

    Raises:
        ValueError: If it holds a ``Normalize``.
    """
    if any(
        isinstance(transform, Normalize) for transform in flatten_transform(getattr(pre_processor, "transform", None))
    ):
        msg = "pre_processor must leave images in [0, 1], got one with Normalize; the model normalises itself."
        raise ValueError(msg)


def flatten_transform(transform: Transform | None) -> Iterator[Transform]:
    """List the transforms of a composition.

    Args:
        transform (Transform | None): Transform, a nested composition, or none.

    Yields:
        Transform: The parts, in order.
    """
    if isinstance(transform, Compose):
        for part in transform.transforms:
            yield from flatten_transform(part)
    elif transform is not None:
        yield transform
