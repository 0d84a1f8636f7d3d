# SPDX-License-Identifier: Apache-2.0

"""Find image files that cannot be used, before a long training rather than in the middle of it."""

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from anomalib_recon.deploy.grey_levels import DEEP_MODES, GreyLevels, check_deep_grey


class _Look(NamedTuple):
    """What a file holds: Pillow's mode, and whether a value is NaN, if it was decoded."""

    mode: str
    has_nan: bool


def check_image_files(paths: Iterable[str | Path], deep_grey: bool = False) -> None:
    """Decode image files and refuse those that the dataset could not read, or would read wrongly.

    Args:
        paths (Iterable[str | Path]): Image files.
        deep_grey (bool): Whether the dataset reads images with more than 8 bits of grey, and those alone; anomalib's
            datasets do not.
            Defaults to ``False``.

    Raises:
        ValueError: If a file is not a whole image, or not one for this dataset.
    """
    _check_images(paths, deep_grey, decode=True)


def check_image_modes(paths: Iterable[str | Path], deep_grey: bool = False) -> None:
    """Read the headers of image files; otherwise as :func:`check_image_files`.

    Args:
        paths (Iterable[str | Path]): Image files.
        deep_grey (bool): See :func:`check_image_files`.
            Defaults to ``False``.

    Raises:
        ValueError: If a file is no image, or not one for this dataset.
    """
    _check_images(paths, deep_grey, decode=False)


def levels_of(dataset: object) -> GreyLevels | None:
    """Levels by which a dataset reads images with more than 8 bits of grey: those of this package have ``levels``."""
    levels = getattr(dataset, "levels", None)
    return levels if isinstance(levels, GreyLevels) else None


def mask_files(mask_path: str | Sequence[str]) -> Sequence[str]:
    """Files with the masks of an image: one in most data sets, several in MVTec LOCO."""
    return [mask_path] if isinstance(mask_path, str) else mask_path


def check_mask_files(paths: Iterable[str | Path]) -> None:
    """Decode files of masks, of which anomalib takes each pixel above 0, and refuse those it could not read.

    Args:
        paths (Iterable[str | Path]): Files of masks.

    Raises:
        ValueError: If a file is not a whole image.
    """
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(partial(_look_at, decode=True), paths):
            pass


def _check_images(paths: Iterable[str | Path], deep_grey: bool, decode: bool) -> None:
    paths = list(paths)
    with ThreadPoolExecutor() as pool:
        for path, (mode, has_nan) in zip(paths, pool.map(partial(_look_at, decode=decode), paths), strict=True):
            if deep_grey:
                check_deep_grey(path, mode, has_nan)
            elif mode in DEEP_MODES:
                msg = (
                    f"The image {path} has pixels of mode {mode}, which anomalib would clip to 255; read it by "
                    "DeepGreyFolder, or DeepGreyPredictDataset, or convert it to 8 bits per channel."
                )
                raise ValueError(msg)


def _look_at(path: str | Path, decode: bool) -> _Look:
    try:
        with Image.open(path) as image:
            if decode:
                image.load()
            return _Look(image.mode, decode and image.mode == "F" and bool(np.isnan(np.asarray(image)).any()))
    except Exception as error:  # Pillow's decoders fail in many ways, and tell none of them from another
        msg = f"The image {path} cannot be read ({error}); replace or remove it."
        raise ValueError(msg) from error
