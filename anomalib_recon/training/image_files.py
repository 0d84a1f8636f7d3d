# SPDX-License-Identifier: Apache-2.0

"""Find image files that cannot be used, before a long training rather than in the middle of it."""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from PIL import Image

from anomalib_recon.deploy.images import CLIPPED_MODES


def check_image_files(paths: Iterable[str | Path]) -> None:
    """Decode image files and refuse those that anomalib could not read, or would read wrongly.

    Args:
        paths (Iterable[str | Path]): Image files.

    Raises:
        ValueError: If a file is not a whole image, or holds more than 8 bits of grey.
    """
    _check_modes(paths, decode=True)


def check_image_modes(paths: Iterable[str | Path]) -> None:
    """Read the headers of image files; otherwise as :func:`check_image_files`.

    Args:
        paths (Iterable[str | Path]): Image files.

    Raises:
        ValueError: If a file is no image, or holds more than 8 bits of grey.
    """
    _check_modes(paths, decode=False)


def check_mask_files(paths: Iterable[str | Path]) -> None:
    """Decode files of masks, of which anomalib takes each pixel above 0, and refuse those it could not read.

    Args:
        paths (Iterable[str | Path]): Files of masks.

    Raises:
        ValueError: If a file is not a whole image.
    """
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(partial(_find_mode, decode=True), paths):
            pass


def _check_modes(paths: Iterable[str | Path], decode: bool) -> None:
    paths = list(paths)
    with ThreadPoolExecutor() as pool:
        for path, mode in zip(paths, pool.map(partial(_find_mode, decode=decode), paths), strict=True):
            if mode in CLIPPED_MODES:
                msg = (
                    f"The image {path} has pixels of mode {mode}, which anomalib would clip to 255; convert it to 8 "
                    "bits per channel."
                )
                raise ValueError(msg)


def _find_mode(path: str | Path, decode: bool) -> str:
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return image.mode
    except Exception as error:  # Pillow's decoders fail in many ways, and tell none of them from another
        msg = f"The image {path} cannot be read ({error}); replace or remove it."
        raise ValueError(msg) from error
