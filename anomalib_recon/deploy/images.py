# SPDX-License-Identifier: Apache-2.0

"""Read and resize images as in training, without torch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from .grey_levels import DEEP_MODES, GreyLevels

SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_images(folder: Path) -> list[Path]:
    """Find the images in a folder and the folders in it.

    Args:
        folder (Path): The folder.

    Returns:
        list[Path]: Files, in order of their names.

    Raises:
        ValueError: If there is none.
    """
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        msg = f"The folder {folder} holds no images ({', '.join(sorted(SUFFIXES))}); name the folder that does."
        raise ValueError(msg)
    return paths


def read_image(path: str | Path, levels: GreyLevels | None = None) -> NDArray[np.float32]:
    """Read an image as anomalib does, or one with more than 8 bits of grey; needs Pillow.

    Args:
        path (str | Path): The file.
        levels (GreyLevels | None): Values that become 0 and 1, of an image with more than 8 bits of grey.
            Defaults to ``None``, for an image of 8 bits per channel.

    Returns:
        NDArray[np.float32]: Red, green and blue, ``(3, H, W)``, values in [0, 1]; equal if ``levels`` is given.

    Raises:
        ValueError: If it holds more than 8 bits of grey and ``levels`` is not given, or the other way round.
    """
    from PIL import Image  # noqa: PLC0415  # arrays are scored without it

    if levels is not None:
        return np.repeat(levels.read(path)[None], 3, axis=0)
    with Image.open(path) as image:
        if image.mode in DEEP_MODES:
            msg = (
                f"The image {path} has pixels of mode {image.mode}, not of 8 bits per channel; pass the black_level "
                "and white_level of the training, in Python as levels=GreyLevels(...)."
            )
            raise ValueError(msg)
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1)) / np.float32(255)


def resize(images: NDArray[np.float32], size: Sequence[int]) -> NDArray[np.float32]:
    """Resize images as torchvision's antialiased bilinear ``Resize`` does.

    Args:
        images (NDArray[np.float32]): Images of shape ``(..., H, W)``.
        size (Sequence[int]): Height and width of the result in pixels.

    Returns:
        NDArray[np.float32]: Images of shape ``(..., *size)``; the same array if they have that size.
    """
    if images.shape[-2:] == tuple(size):
        return images
    rows, columns = (
        _triangle_weights(in_size, out_size) for in_size, out_size in zip(images.shape[-2:], size, strict=True)
    )
    return rows @ images @ columns.T


def _triangle_weights(in_size: int, out_size: int) -> NDArray[np.float32]:
    """Weights of every input pixel of an axis for every output pixel; see ``anomalib_recon.layers.resize``."""
    in_centres = (2 * np.arange(in_size) + 1) * out_size
    out_centres = (2 * np.arange(out_size) + 1) * in_size
    reach = 2 * max(in_size, out_size)
    distances = np.abs(in_centres - out_centres[:, None])
    weights = (reach - distances).clip(min=0).astype(np.float32) / np.float32(reach)
    return weights / weights.sum(axis=1, keepdims=True)
