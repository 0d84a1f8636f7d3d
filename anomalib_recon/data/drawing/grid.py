# SPDX-License-Identifier: Apache-2.0

"""A woven wire mesh over a dark background: a regular texture."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .canvas import (
    SIDE,
    SIZE,
    SUPERSAMPLING,
    TICKS,
    Field,
    Flaw,
    Surface,
    blob,
    cover,
    paint,
    smooth_noise,
    stroke,
    tint,
    wander,
)

# Two wires, one over and one under, repeat every 64 pixels.
_PITCH = 32.0
_RADIUS = 6.4


@dataclass
class _Wire:
    """One wire of the mesh.

    Args:
        vertical: Whether it runs along y.
        number: Its place among the parallel wires; even and odd ones weave oppositely.
        centre: Where it lies across its direction, at each of the ``SIDE`` ticks along it.
        present: Whether there is wire at each tick.
        gloss: Its brightness.
    """

    vertical: bool
    number: int
    centre: Field
    present: NDArray[np.bool_]
    gloss: float


def render(rng: np.random.Generator, flaw: Flaw) -> Surface:
    """Draw one piece of mesh.

    Args:
        rng: The scene's random numbers.
        flaw: Its defect, of a kind named in ``CATEGORIES`` or ``"good"``.

    Returns:
        Surface ``(SIDE, SIDE, 3)``.
    """
    wires = _stretch(rng)
    match flaw.kind:
        case "broken_wire":
            _break(wires, flaw)
        case "bent_wire":
            _bend(wires, flaw)
    brightness, metal = _weave(wires)
    table = tint(0.12 + 0.012 * smooth_noise(rng, 12), (0.9, 1.0, 1.15))
    steel = tint(brightness, (1.0, 0.97, 0.92))
    surface = paint(table, steel, metal)
    match flaw.kind:
        case "cut":
            return paint(surface, table, _slit(flaw))
        case "fibre":
            return _lay_fibre(surface, flaw)
        case "clogged":
            return _clog(surface, metal, flaw)
    return surface


def _stretch(rng: np.random.Generator) -> list[_Wire]:
    """Lay out the straight, slightly uneven wires."""
    tilt = np.deg2rad(rng.normal(0, 0.15))
    wires = []
    for vertical in (True, False):
        offset = _PITCH / 2 + rng.uniform(-1.2, 1.2)
        slant = (tilt if vertical else -tilt) * (TICKS - SIZE / 2)
        for number in range(-1, int(SIZE / _PITCH) + 1):
            phase, amplitude = rng.uniform(0, 2 * np.pi), rng.normal(0, 0.25)
            sway = amplitude * np.sin(2 * np.pi * TICKS / 90 + phase)
            centre = offset + number * _PITCH + rng.normal(0, 0.3) + sway + slant
            wires.append(_Wire(vertical, number, centre, np.ones(SIDE, dtype=bool), rng.normal(1, 0.03)))
    return wires


def _weave(wires: list[_Wire]) -> tuple[Field, Field]:
    """Draw the wires, each over and under those it crosses.

    Returns:
        The brightness of the metal, and where there is metal (0 or 1), both ``(SIDE, SIDE)``.
    """
    height = np.full((SIDE, SIDE), -np.inf, dtype=np.float32)
    brightness = np.zeros((SIDE, SIDE), dtype=np.float32)
    for wire in wires:
        first = max(int((wire.centre.min() - _RADIUS) * SUPERSAMPLING), 0)
        last = max(int((wire.centre.max() + _RADIUS) * SUPERSAMPLING) + 2, 0)
        strip_height, strip_brightness = (
            (plane if wire.vertical else plane.T)[:, first:last] for plane in (height, brightness)
        )
        across = (TICKS[None, first:last] - wire.centre[:, None]) / _RADIUS  # (SIDE, strip)
        round_height = np.sqrt(np.clip(1 - across**2, 0, 1))
        wave = np.cos(np.pi * ((TICKS[:, None] - _PITCH / 2) / _PITCH + wire.number)) * (1 if wire.vertical else -1)
        top = wave + 0.6 * round_height
        # The light comes from the upper left, so both directions are lit on the side of the smaller coordinate.
        facing = np.clip(0.8 * round_height - 0.6 * across, 0, 1)
        lit = wire.gloss * (0.16 + 0.42 * facing + 0.22 * facing**12) * (0.86 + 0.14 * wave)
        seen = (np.abs(across) < 1) & wire.present[:, None] & (top > strip_height)
        strip_height[seen] = top[seen]
        strip_brightness[seen] = lit[seen]
    return brightness, np.isfinite(height).astype(np.float32)


def _pick(wires: list[_Wire], rng: np.random.Generator) -> _Wire:
    """Choose a wire away from the border."""
    inner = [wire for wire in wires if 2 <= wire.number <= SIZE / _PITCH - 3]
    return inner[rng.integers(len(inner))]


def _break(wires: list[_Wire], flaw: Flaw) -> None:
    """Take a piece out of one wire."""
    wire = _pick(wires, flaw.rng)
    wire.present &= np.abs(TICKS - flaw.rng.uniform(60, SIZE - 60)) > flaw.between(9, 26)


def _bend(wires: list[_Wire], flaw: Flaw) -> None:
    """Push one wire out of its place."""
    wire = _pick(wires, flaw.rng)
    push = flaw.between(2.5, 10) * flaw.rng.choice([-1, 1])
    width = flaw.between(16, 26)
    wire.centre = wire.centre + push * np.exp(-(((TICKS - flaw.rng.uniform(60, SIZE - 60)) / width) ** 2))


def _slit(flaw: Flaw) -> Field:
    """Cut across the wires, and return where."""
    x, y = flaw.place()
    on_a_wire = (x // _PITCH + 0.5) * _PITCH  # a short cut may else fall into a hole
    distance, _ = stroke(wander(flaw.rng, (on_a_wire, y), flaw.between(32, 110), curl=0.5))
    return cover(distance - flaw.between(1.9, 3.0))


def _lay_fibre(surface: Surface, flaw: Flaw) -> Surface:
    """Lay a coloured thread over the mesh."""
    distance, _ = stroke(wander(flaw.rng, flaw.place(), flaw.between(40, 150), curl=5))
    radius = flaw.between(1.4, 2.2)
    colours = [(0.62, 0.2, 0.16), (0.2, 0.3, 0.6), (0.75, 0.7, 0.55)]
    roundness = 0.6 + 0.4 * np.sqrt(np.clip(1 - (distance / radius) ** 2, 0, 1))
    return paint(surface, tint(roundness, colours[flaw.rng.integers(3)]), cover(distance - radius))


def _clog(surface: Surface, metal: Field, flaw: Flaw) -> Surface:
    """Fill holes of the mesh with dirt, which also soils the wires."""
    shape = blob(flaw.rng, flaw.place(), flaw.between(9, 26))
    shape += 1.5 * smooth_noise(flaw.rng, 2.5)
    dirt = tint(0.36 + 0.05 * smooth_noise(flaw.rng, 1.5), (1.15, 0.95, 0.7))
    return paint(surface, dirt, cover(shape) * (0.9 - 0.4 * metal))
