# SPDX-License-Identifier: Apache-2.0

"""A machined plate with a bore, screws, pins, slots and a printed label on a cloth: an object in a fixed pose."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from .canvas import (
    SIZE,
    Field,
    Flaw,
    Point,
    Surface,
    X,
    Y,
    blob,
    cover,
    disc,
    paint,
    shade,
    smooth_noise,
    stroke,
    tint,
    wander,
)

# Sizes in pixels, places in pixels from the plate's centre; the plate is symmetric but for slots and label.
_HALF_WIDTH, _HALF_HEIGHT, _CORNER = 106.0, 88.0, 12.0
_BORE = 31.0
_SCREW_X, _SCREW_Y, _SCREW_RADIUS = 84.0, 66.0, 10.5
_PIN_X, _PIN_RADIUS = 66.0, 5.5
_SLOT_PITCH, _SLOT_Y = 20.0, 64.0
_LABEL_Y = -64.0
_BAR_EDGES = np.cumsum([3, 2, 1, 1, 2, 1, 1, 3, 2, 1, 3, 2, 1, 2, 1, 1, 3, 1, 2, 2, 1, 1])


@dataclass
class _Parts:
    """What is mounted on one plate.

    Args:
        screw_angles: How far each of the four screws is turned, in radians; left to right, the upper two first.
        screws: Whether each of the four screws is there.
        pins: Whether the left and the right pin are there.
        label_shift: How far the label lies from its place.
        label_angle: How far it is turned, in radians.
    """

    screw_angles: NDArray[np.float64]
    screws: NDArray[np.bool_]
    pins: NDArray[np.bool_]
    label_shift: Point
    label_angle: float


def render(rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Draw one plate.

    Args:
        rng: The scene's random numbers.
        flaw: Its defect, of a kind named in ``CATEGORIES`` or ``"good"``.

    Returns:
        Surface ``(SIDE, SIDE, 3)``.
    """
    x, y = _turn(X - SIZE / 2 - rng.normal(0, 0.6), Y - SIZE / 2 - rng.normal(0, 0.6), np.deg2rad(rng.normal(0, 0.25)))
    parts = _Parts(
        screw_angles=rng.uniform(0, np.pi / 2, 4),
        screws=np.ones(4, dtype=bool),
        pins=np.ones(2, dtype=bool),
        label_shift=(rng.normal(0, 0.4), rng.normal(0, 0.4)),
        label_angle=np.deg2rad(rng.normal(0, 0.5)),
    )
    outline = _rounded_box(x, y, _HALF_WIDTH, _HALF_HEIGHT, _CORNER)
    match flaw.kind:
        case "missing_part":
            _lose(parts, flaw)
        case "misplaced_label":
            _misplace(parts, flaw)
        case "chipped_edge":
            outline = np.maximum(outline, -_chip(flaw))
    surface, metal = _machine(rng, x, y, outline)
    if flaw.kind == "scratch":
        surface = _scratch(surface, metal, flaw)
    surface = _mount(surface, x, y, parts)
    return _scatter(surface, flaw) if flaw.kind == "swarf" else surface


def _turn(x: Field, y: Field, angle: float | NDArray[np.float64]) -> tuple[Field, Field]:
    """Turn coordinates about their origin."""
    cosine, sine = np.cos(angle, dtype=np.float32), np.sin(angle, dtype=np.float32)
    return cosine * x + sine * y, cosine * y - sine * x


def _rounded_box(x: Field, y: Field, half_width: float, half_height: float, corner: float) -> Field:
    """Return the signed distance to a rounded rectangle about the origin."""
    right, below = np.abs(x) - half_width + corner, np.abs(y) - half_height + corner
    outside = np.hypot(np.maximum(right, 0), np.maximum(below, 0))
    return outside + np.minimum(np.maximum(right, below), 0) - corner


def _machine(rng: np.random.Generator, x: Field, y: Field, outline: Field) -> tuple[Surface, Field]:
    """Draw the bare plate on its cloth: brushed, chamfered, with bore, groove, slots and counterbores.

    Returns:
        The surface, and the share of each sample that is metal.
    """
    cloth = 0.17 + 0.02 * smooth_noise(rng, 0.9) + 0.01 * smooth_noise(rng, 20)
    shadow = np.roll(1 / (1 + np.exp(outline / 3)), (8, 8), (0, 1))
    shadowed = tint(cloth * (1 - 0.75 * shadow), (0.9, 1.0, 1.25))

    bore = np.hypot(x, y) - _BORE
    nearest_slot = _SLOT_PITCH * np.clip(np.rint(x / _SLOT_PITCH), -2, 2)
    slots = _rounded_box(x - nearest_slot, y - _SLOT_Y, 4.5, 11, 4.5)
    holes = np.hypot(np.abs(x) - _PIN_X, y) - _PIN_RADIUS - 1
    seats = np.hypot(np.abs(x) - _SCREW_X, np.abs(y) - _SCREW_Y) - _SCREW_RADIUS - 2
    cut_through = np.minimum(bore, np.minimum(slots, holes))

    # The chamfers round every opening and the plate itself, a turned groove and the counterbores catch the light.
    height = 1.6 * np.clip(-outline / 2.5, 0, 1) + 1.2 * np.clip(cut_through / 2, 0, 1) + 1.5 * np.clip(seats, 0, 1)
    height -= 1.2 * np.exp(-(((bore - 13) / 1.2) ** 2))
    brushed = 0.56 * (1 + 0.035 * smooth_noise(rng, 30, 0.4) + 0.03 * smooth_noise(rng, 60, 12))
    metal = tint(brushed * shade(ndimage.gaussian_filter(height, 0.8), softness=1.2), (0.98, 1.0, 1.02))
    surface = paint(shadowed, metal, cover(outline))
    depth = tint(np.clip(0.05 + 0.0012 * (x + y), 0.02, 0.2), (1.0, 1.0, 1.1))
    return paint(surface, depth, cover(cut_through)), cover(np.maximum(outline, -cut_through))


def _mount(surface: Surface, x: Field, y: Field, parts: _Parts) -> Surface:
    """Draw screws, pins and label on the bare plate."""
    left_or_right = (x > 0).astype(np.intp)
    corner = left_or_right + 2 * (y > 0)
    u, v = x - np.copysign(_SCREW_X, x), y - np.copysign(_SCREW_Y, y)
    radius = np.hypot(u, v)
    thread = (0.10 + 0.04 * np.sin(2.2 * radius))[..., None]
    surface = paint(surface, thread, cover(radius - 0.6 * _SCREW_RADIUS))
    u, v = (np.abs(turned) for turned in _turn(u, v, parts.screw_angles[corner]))
    cross = _rounded_box(np.maximum(u, v), np.minimum(u, v), 6, 1.6, 0.5)
    dome = np.sqrt(np.clip(1.3 - (radius / _SCREW_RADIUS) ** 2, 0, None)) * 3
    head = tint(0.66 * shade(dome, softness=0.9), (1.0, 0.96, 0.86))
    head = paint(head, (0.1, 0.1, 0.1), cover(cross))
    surface = paint(surface, head, cover(radius - _SCREW_RADIUS) * parts.screws[corner])

    u = x - np.copysign(_PIN_X, x)
    pin = (0.45 + 0.45 * np.exp(-(np.hypot(u + 1.5, y + 1.5) ** 2) / 6))[..., None]
    surface = paint(surface, pin, cover(np.hypot(u, y) - _PIN_RADIUS) * parts.pins[left_or_right])
    return _stick_label(surface, x, y, parts)


def _stick_label(surface: Surface, x: Field, y: Field, parts: _Parts) -> Surface:
    """Draw the label with its bar code and a line of print."""
    u, v = _turn(x - parts.label_shift[0], y - _LABEL_Y - parts.label_shift[1], parts.label_angle)
    paper = paint(surface, (0.86, 0.85, 0.80), cover(_rounded_box(u, v, 42, 14, 2)))
    bars = np.searchsorted(_BAR_EDGES, (u + 33) / 1.8) % 2 * cover(_rounded_box(u, v + 3, 33, 7, 0.1))
    line = cover(_rounded_box(u + 8, v - 9, 25, 1.3, 0.5))
    return paint(paper, (0.12, 0.12, 0.14), np.maximum(bars, line))


def _lose(parts: _Parts, flaw: Flaw) -> None:
    """Take out a pin, or in severe cases a screw."""
    if flaw.severity < 0.5:
        parts.pins[flaw.rng.integers(2)] = False
    else:
        parts.screws[flaw.rng.integers(4)] = False


def _misplace(parts: _Parts, flaw: Flaw) -> None:
    """Shift and turn the label."""
    shift_x, shift_y = flaw.between(1.5, 6) * flaw.rng.choice([-1, 1], 2)
    parts.label_shift = (shift_x, shift_y)
    parts.label_angle = np.deg2rad(flaw.between(1, 8) * flaw.rng.choice([-1, 1]))


def _chip(flaw: Flaw) -> Field:
    """Return the signed distance to material broken off the plate's edge."""
    side = flaw.rng.choice([-1, 1])
    if flaw.rng.random() < 0.5:
        x, y = side * _HALF_WIDTH, flaw.rng.uniform(-60, 60)
    else:
        x, y = flaw.rng.uniform(-80, 80), side * _HALF_HEIGHT
    return blob(flaw.rng, (SIZE / 2 + x, SIZE / 2 + y), flaw.between(5, 14)) + 0.5 * smooth_noise(flaw.rng, 3)


def _on_plate(rng: np.random.Generator) -> Point:
    """Choose a point of the plate, away from its bore and its edge."""
    x = rng.choice([-1, 1]) * rng.uniform(40, 76)
    return SIZE / 2 + x, SIZE / 2 + rng.uniform(-44, 44)


def _scratch(surface: Surface, metal: Field, flaw: Flaw) -> Surface:
    """Scratch the metal: a bright groove with a dark side."""
    distance, progress = stroke(wander(flaw.rng, _on_plate(flaw.rng), flaw.between(24, 90), curl=0.5))
    half_width = flaw.between(0.5, 1.2) * np.sqrt(np.clip(4 * progress * (1 - progress), 0, 1))
    surface = paint(surface, (0.28, 0.28, 0.29), 0.8 * metal * cover(distance - 1 - half_width))
    return paint(surface, (0.92, 0.92, 0.93), 0.9 * metal * cover(distance - half_width))


def _scatter(surface: Surface, flaw: Flaw) -> Surface:
    """Leave curled metal chips and grains."""
    for _ in range(round(flaw.between(1, 3))):
        distance, progress = stroke(wander(flaw.rng, _on_plate(flaw.rng), flaw.between(16, 50), curl=5))
        shine = 0.35 + 0.5 * np.cos(9 * progress) ** 2
        surface = paint(surface, (0.15, 0.15, 0.16), 0.5 * cover(distance - 2.0))
        surface = paint(surface, tint(shine, (1.0, 0.9, 0.7)), cover(distance - 1.1))
    for _ in range(round(flaw.between(1, 5))):
        surface = paint(surface, (0.2, 0.19, 0.17), cover(disc(_on_plate(flaw.rng), flaw.between(1.2, 2.2))))
    return surface
