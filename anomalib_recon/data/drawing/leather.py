# SPDX-License-Identifier: Apache-2.0

"""Grained leather: an irregular texture."""

import numpy as np
from scipy import ndimage

from .canvas import (
    SIDE,
    SUPERSAMPLING,
    Colour,
    Field,
    Flaw,
    Surface,
    X,
    Y,
    blob,
    cover,
    paint,
    shade,
    smooth_noise,
    stroke,
    tint,
    wander,
)

_BROWN: Colour = (0.50, 0.33, 0.22)


def render(rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Draw one piece of leather.

    Args:
        rng: The scene's random numbers.
        flaw: Its defect, of a kind named in ``CATEGORIES`` or ``"good"``.

    Returns:
        Surface ``(SIDE, SIDE, 3)``.
    """
    relief = _grain(rng)
    colour: Surface = tint(1 + 0.04 * smooth_noise(rng, 25) + 0.02 * smooth_noise(rng, 1), _BROWN) * rng.normal(
        1, 0.02, 3
    )
    match flaw.kind:
        case "cut":
            relief, colour = _cut(relief, colour, flaw)
        case "worn":
            relief, colour = _wear(relief, colour, flaw)
        case "fold":
            relief = _fold(relief, flaw)
        case "stain":
            colour = _stain(colour, flaw)
        case "glue":
            return _drip(colour * shade(relief)[..., None], flaw)
    return colour * shade(relief)[..., None]


def _grain(rng: np.random.Generator) -> Field:
    """Draw the relief of the hide, in pixels: pebbles between creases, and fine pores."""
    creases = sum(np.exp(-((smooth_noise(rng, 3.2, 4.0) / 0.28) ** 2)) for _ in range(2))
    return 0.55 * ndimage.gaussian_filter(1 - np.minimum(creases, 1), 1.2) + 0.05 * smooth_noise(rng, 1)


def _cut(relief: Field, colour: Surface, flaw: Flaw) -> tuple[Field, Surface]:
    """Slit the hide: a dark gap, pointed at its ends, between raised lips."""
    distance, progress = stroke(wander(flaw.rng, flaw.place(), flaw.between(22, 80), curl=0.6))
    half_width = flaw.between(1.3, 3.0) * np.sqrt(np.clip(4 * progress * (1 - progress), 0, 1))
    lips = 1.2 * np.exp(-((np.maximum(distance - half_width, 0) / 3) ** 2)) * (half_width > 0.3)
    return relief + lips, paint(colour, (0.07, 0.05, 0.04), cover(distance - half_width))


def _wear(relief: Field, colour: Surface, flaw: Flaw) -> tuple[Field, Surface]:
    """Rub the grain off."""
    shape = blob(flaw.rng, flaw.place(), flaw.between(11, 28)) + 1.5 * smooth_noise(flaw.rng, 3)
    worn = ndimage.gaussian_filter(cover(shape), 3)
    return relief * (1 - 0.92 * worn), colour * (1 + 0.12 * worn[..., None])


def _fold(relief: Field, flaw: Flaw) -> Field:
    """Push the hide together along a line: the grain beside it is displaced and a ridge stands up."""
    points = wander(flaw.rng, flaw.place(), flaw.between(50, 120), curl=0.4)
    distance, progress = stroke(points)
    direction_x, direction_y = (points[-1] - points[0]) / np.linalg.norm(points[-1] - points[0])
    middle_x, middle_y = points[len(points) // 2]
    side = (X - middle_x) * direction_y - (Y - middle_y) * direction_x
    nearness = np.exp(-((distance / flaw.between(7, 12)) ** 2)) * np.sin(np.pi * progress)
    push = flaw.between(5, 10) * SUPERSAMPLING * nearness * np.sign(side)
    rows, columns = np.indices((SIDE, SIDE), dtype=np.float32)
    displaced = ndimage.map_coordinates(
        relief, [rows - push * direction_x, columns + push * direction_y], order=1, mode="nearest"
    )
    ridge = np.exp(-((distance / 2.5) ** 2)) * np.sin(np.pi * progress)
    return displaced + flaw.between(1.0, 2.5) * ridge


def _stain(colour: Surface, flaw: Flaw) -> Surface:
    """Soak the hide with a dark liquid, darkest at its edge."""
    shape = blob(flaw.rng, flaw.place(), flaw.between(12, 30)) + 2 * smooth_noise(flaw.rng, 4)
    edge = np.exp(-((shape / 2.5) ** 2))
    depth = cover(shape / 3) * (flaw.between(0.16, 0.32) + 0.12 * edge + 0.03 * smooth_noise(flaw.rng, 3))
    return colour * (1 - tint(depth, (0.8, 1.0, 1.1)))


def _drip(surface: Surface, flaw: Flaw) -> Surface:
    """Leave a few clear, glossy drops of glue."""
    x, y = flaw.place()
    for _ in range(round(flaw.between(1, 4))):
        radius = flaw.between(5, 10) * flaw.rng.uniform(0.8, 1.2)
        shape = blob(flaw.rng, (x, y), radius)
        dome = radius * 0.6 * np.sqrt(np.clip(-shape / radius, 0, 1))
        gloss = np.exp(-((np.hypot(X - x + radius / 3, Y - y + radius / 3) / (radius / 4)) ** 2))
        body = ndimage.gaussian_filter(surface, (3, 3, 0)) * 1.1 * shade(dome, softness=1.5)[..., None]
        surface = paint(surface, body + 0.6 * gloss[..., None], 0.85 * cover(shape))
        x, y = x + flaw.rng.uniform(-26, 26), y + flaw.rng.uniform(-26, 26)
    return surface
