# SPDX-License-Identifier: Apache-2.0

"""Checks of the arguments of models."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence

from torch import Tensor


def check_whole(**arguments: int) -> None:
    """Refuse what is not a whole number of at least 1.

    Args:
        **arguments (int): Values by the names of the arguments.

    Raises:
        ValueError: If a value is not whole, or below 1.
    """
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int):
            msg = f"{name} must be a whole number, got {value!r}."
            raise ValueError(msg)
        if value < 1:
            msg = f"{name} must be at least 1, got {value}."
            raise ValueError(msg)


def check_finite(**arguments: float) -> None:
    """Refuse what is not a finite number.

    Args:
        **arguments (float): Values by the names of the arguments.

    Raises:
        ValueError: If a value is not a number, NaN or infinite.
    """
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            msg = f"{name} must be a finite number, got {value!r}."
            raise ValueError(msg)


def check_fraction(**arguments: float) -> None:
    """Refuse what is not a number in [0, 1].

    Args:
        **arguments (float): Values by the names of the arguments.

    Raises:
        ValueError: If a value is not a number, or out of its range.
    """
    _check_range(arguments, lambda value: 0 <= value <= 1, "be from 0 to 1")


def check_dropout(**arguments: float) -> None:
    """Refuse what is not a number in [0, 1).

    Args:
        **arguments (float): Values by the names of the arguments.

    Raises:
        ValueError: If a value is not a number, or out of its range.
    """
    _check_range(arguments, lambda value: 0 <= value < 1, "be at least 0 and below 1")


def check_positive(**arguments: float) -> None:
    """Refuse what is not a finite number above 0.

    Args:
        **arguments (float): Values by the names of the arguments.

    Raises:
        ValueError: If a value is not a number, NaN, infinite, or not above 0.
    """
    _check_range(arguments, lambda value: value > 0, "be positive")


def check_not_negative(**arguments: float) -> None:
    """Refuse what is not a finite number from 0.

    Args:
        **arguments (float): Values by the names of the arguments.

    Raises:
        ValueError: If a value is not a number, NaN, infinite, or negative.
    """
    _check_range(arguments, lambda value: value >= 0, "not be negative")


def check_share(**arguments: float) -> None:
    """Refuse what is not a number in (0, 1].

    Args:
        **arguments (float): Values by the names of the arguments.

    Raises:
        ValueError: If a value is not a number, or out of its range.
    """
    _check_range(arguments, lambda value: 0 < value <= 1, "be above 0 and at most 1")


def _check_range(arguments: Mapping[str, float], is_inside: Callable[[float], bool], words: str) -> None:
    """Refuse numbers that are not finite, or out of a range that the words describe."""
    check_finite(**arguments)
    for name, value in arguments.items():
        if not is_inside(value):
            msg = f"{name} must {words}, got {value}."
            raise ValueError(msg)


def check_choice(choices: Collection[object], **arguments: object) -> None:
    """Refuse what is none of some values.

    Args:
        choices (Collection[object]): The values, two or more.
        **arguments (object): Values by the names of the arguments.

    Raises:
        ValueError: If a value is none of them.
    """
    *first, last = map(repr, choices)
    for name, value in arguments.items():
        if value not in choices:
            msg = f"{name} must be {', '.join(first)} or {last}, got {value!r}."
            raise ValueError(msg)


def check_named_once(layers: Sequence[str]) -> None:
    """Refuse layers of which one is named twice.

    Args:
        layers (Sequence[str]): Names of layers of a backbone.

    Raises:
        ValueError: If a name is there twice.
    """
    if len(set(layers)) < len(layers):
        msg = f"layers must name each layer once, got {', '.join(layers)}."
        raise ValueError(msg)


def check_image_size(images: Tensor, image_size: tuple[int, int], num_channels: int = 3) -> None:
    """Refuse images of another size than that of the network.

    Args:
        images (Tensor): Images of shape ``(B, C, H, W)``.
        image_size (tuple[int, int]): Height and width that the network was built for, in pixels.
        num_channels (int): Channels C of its images.
            Defaults to ``3``.

    Raises:
        ValueError: If the images are of another size.
    """
    if images.shape[1:] != (num_channels, *image_size):
        msg = (
            f"images must have shape (B, {num_channels}, {image_size[0]}, {image_size[1]}), got "
            f"{tuple(images.shape)}; resize them or build the model for theirs."
        )
        raise ValueError(msg)
