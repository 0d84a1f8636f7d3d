# SPDX-License-Identifier: Apache-2.0

"""Find image files that cannot be used, before a long training rather than in the middle of it."""

from collections.abc import Iterable
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
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(_check_image_file, paths):
            pass


def _check_image_file(path: str | Path) -> None:
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError) as error:  # Pillow's word for broken chunks is SyntaxError
        msg = f"The image {path} cannot be read ({error}); replace or remove it."
        raise ValueError(msg) from error
    if image.mode in CLIPPED_MODES:
        msg = (
            f"The image {path} has pixels of mode {image.mode}, which anomalib would clip to 255; convert it to 8 bits "
            "per channel."
        )
        raise ValueError(msg)
