# SPDX-License-Identifier: Apache-2.0

"""Find image files that cannot be used, before a long training rather than in the middle of it."""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

# anomalib reads images with ``convert("RGB")``, which clips these to 255 without a word
CLIPPED_MODES = ("I", "I;16", "I;16B", "I;16L", "F")


def check_image_files(paths: Iterable[str | Path]) -> None:
    """Decode image files and refuse those that anomalib could not read, or would read wrongly.

    Args:
        paths (Iterable[str | Path]): Image files.

    Raises:
        ValueError: If a file is not a whole image, or holds more than 8 bits of grey.
    """
    for path, mode in _decode(paths):
        if mode in CLIPPED_MODES:
            msg = (
                f"The image {path} has pixels of mode {mode}, which anomalib would clip to 255; convert it to 8 bits "
                "per channel."
            )
            raise ValueError(msg)


def check_mask_files(paths: Iterable[str | Path]) -> None:
    """Decode files of masks, of which anomalib takes each pixel above 0, and refuse those it could not read.

    Args:
        paths (Iterable[str | Path]): Files of masks.

    Raises:
        ValueError: If a file is not a whole image.
    """
    for _ in _decode(paths):
        pass


def _decode(paths: Iterable[str | Path]) -> Iterator[tuple[str | Path, str]]:
    """Decode files and find their Pillow modes."""
    with ThreadPoolExecutor() as pool:
        yield from pool.map(_find_mode, paths)


def _find_mode(path: str | Path) -> tuple[str | Path, str]:
    try:
        with Image.open(path) as image:
            image.load()
            return path, image.mode
    except Exception as error:  # Pillow's decoders fail in many ways, and tell none of them from another
        msg = f"The image {path} cannot be read ({error}); replace or remove it."
        raise ValueError(msg) from error
