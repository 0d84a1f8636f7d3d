# SPDX-License-Identifier: Apache-2.0

"""Images with more than 8 bits of grey: which of their values are black and white."""

import argparse
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# anomalib reads images with ``convert("RGB")``, which clips these to 255 without a word
DEEP_MODES = ("I", "I;16", "I;16B", "I;16L", "F")


@dataclass(frozen=True)
class GreyLevels:
    """The range of the values in image files that is looked at.

    Values between the two levels are scaled linearly to [0, 1] and keep their digits. Values outside are clipped: what
    is darker than ``black_level`` becomes 0, what is brighter than ``white_level`` becomes 1.

    Attributes:
        black_level (float): Value in a file that becomes 0. Defaults to ``0``.
        white_level (float): Value in a file that becomes 1. Defaults to ``65535``.

    Raises:
        ValueError: If one is NaN or infinite, or the white level is not above the black level.
    """

    black_level: float = 0
    white_level: float = 65535

    def __post_init__(self) -> None:
        """Compare the levels."""
        if not -math.inf < self.black_level < self.white_level < math.inf:
            msg = (
                f"white_level must be above black_level, and both finite, got {self.white_level} and "
                f"{self.black_level}; pass the values in the files that become 1 and 0."
            )
            raise ValueError(msg)

    def read(self, path: str | Path) -> NDArray[np.float32]:
        """Read an image; needs Pillow.

        Args:
            path (str | Path): The file.

        Returns:
            NDArray[np.float32]: Its pixels, ``(H, W)``, values in [0, 1].

        Raises:
            ValueError: If it does not hold more than 8 bits of grey, or a value is NaN.
        """
        from PIL import Image  # noqa: PLC0415  # arrays are scored without it

        with Image.open(path) as image:
            values = np.asarray(image).astype(np.float64)
            check_deep_grey(path, image.mode, has_nan=bool(np.isnan(values).any()))
        scaled = (values - self.black_level) / (self.white_level - self.black_level)
        return scaled.clip(0, 1).astype(np.float32)

    def to_metadata(self) -> dict[str, str]:
        """Text for an exported file, exact to the last digit."""
        return {name: repr(float(value)) for name, value in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> "GreyLevels | None":
        """Read what :meth:`to_metadata` wrote.

        Args:
            metadata (Mapping[str, str]): Text by its key.

        Returns:
            GreyLevels | None: The levels; ``None`` if the file names none.
        """
        given = {field.name: float(metadata[field.name]) for field in fields(cls) if field.name in metadata}
        return cls(**given) if given else None


def check_deep_grey(path: str | Path, mode: str, has_nan: bool = False) -> None:
    """Refuse an image that does not hold more than 8 bits of grey.

    Args:
        path (str | Path): Its file.
        mode (str): Pillow's mode of it.
        has_nan (bool): Whether a value is NaN. Defaults to ``False``.

    Raises:
        ValueError: If it does not, or a value is NaN.
    """
    if mode not in DEEP_MODES:
        msg = (
            f"The image {path} has pixels of mode {mode}, not of more than 8 bits of grey; save it with 16 bits, or "
            "read all images as anomalib does, without black_level and white_level."
        )
        raise ValueError(msg)
    if has_nan:
        msg = f"The image {path} has values that are NaN; replace them by numbers, such as that of the background."
        raise ValueError(msg)


def is_deep(path: str | Path) -> bool:
    """Whether an image holds more than 8 bits of grey; reads its header, and needs Pillow.

    Args:
        path (str | Path): The file.

    Returns:
        bool: Whether it does.
    """
    from PIL import Image  # noqa: PLC0415  # arrays are scored without it

    with Image.open(path) as image:
        return image.mode in DEEP_MODES


def add_level_arguments(parser: argparse.ArgumentParser) -> None:
    """Let a command read images with more than 8 bits of grey.

    Args:
        parser (argparse.ArgumentParser): Its parser.
    """
    for name, result, default in (
        ("black_level", 0, GreyLevels.black_level),
        ("white_level", 1, GreyLevels.white_level),
    ):
        parser.add_argument(
            f"--{name}",
            type=float,
            help=f"of images with more than 8 bits of grey: value that becomes {result} (default: the model's, or "
            f"{default} if one of the two is given)",
        )


def levels_from(options: argparse.Namespace) -> GreyLevels | None:
    """Levels that were passed to a command.

    Args:
        options (argparse.Namespace): What its parser has read.

    Returns:
        GreyLevels | None: The levels; ``None`` if neither was passed.
    """
    names = (field.name for field in fields(GreyLevels))
    given = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return GreyLevels(**given) if given else None
