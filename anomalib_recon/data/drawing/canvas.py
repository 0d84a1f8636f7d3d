# SPDX-License-Identifier: Apache-2.0

"""What the synthetic categories share: coordinates, noise, shapes, shading and the camera.

A surface is rendered at twice the size of the picture and photographed down, so that edges are antialiased. Lengths and
positions are in pixels of the finished picture, with the origin in its upper left corner.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy import fft, ndimage

SIZE = 256
SUPERSAMPLING = 2
SIDE = SIZE * SUPERSAMPLING

Field: TypeAlias = NDArray[np.floating]  # (SIDE, SIDE), or any shape that broadcasts to it
Surface: TypeAlias = NDArray[np.floating]  # (SIDE, SIDE, 3): reflected light in about [0, 1]
Picture: TypeAlias = NDArray[np.uint8]  # (SIZE, SIZE, 3)
Mask: TypeAlias = NDArray[np.bool_]  # (SIZE, SIZE)
Point: TypeAlias = tuple[float, float]  # x, y
Colour: TypeAlias = tuple[float, float, float]  # red, green, blue in [0, 1]

# The smallest change of light that the ground truth counts as a defect: about three times the camera's noise.
_VISIBLE = 0.04

TICKS: Field = (np.arange(SIDE, dtype=np.float32) + 0.5) / SUPERSAMPLING
X: Field = TICKS[None, :]
Y: Field = TICKS[:, None]


@dataclass(frozen=True)
class Flaw:
    """The defect of one picture.

    Args:
        kind: Name of the defect type, ``"good"`` for a normal picture.
        severity: From 0 (as small as this kind gets) to 1.
        rng: Where the defect's random numbers come from, apart from those of the scene, so that one scene can be drawn
            with and without its defect. It serves one drawing.
    """

    kind: str
    severity: float
    rng: np.random.Generator

    def between(self, mildest: float, worst: float) -> float:
        """Interpolate between two values by severity."""
        return mildest + (worst - mildest) * self.severity

    def place(self, margin: float = 60) -> Point:
        """Choose a point at least ``margin`` pixels from the border."""
        return self.rng.uniform(margin, SIZE - margin), self.rng.uniform(margin, SIZE - margin)


def smooth_noise(rng: np.random.Generator, scale_x: float, scale_y: float | None = None) -> Field:
    """Draw Gaussian noise, low-pass filtered, of mean 0 and standard deviation 1.

    Args:
        rng: Random numbers.
        scale_x: Standard deviation of the Gaussian filter along x, in pixels.
        scale_y: The same along y; that of x unless given.

    Returns:
        Field ``(SIDE, SIDE)``, periodic in both directions.
    """
    scale_y = scale_x if scale_y is None else scale_y
    spectrum = fft.rfft2(rng.standard_normal((SIDE, SIDE), dtype=np.float32))
    frequency_x = np.fft.rfftfreq(SIDE, 1 / SUPERSAMPLING)[None, :]
    frequency_y = np.fft.fftfreq(SIDE, 1 / SUPERSAMPLING)[:, None]
    spectrum *= np.exp(-2 * np.pi**2 * ((scale_x * frequency_x) ** 2 + (scale_y * frequency_y) ** 2))
    spectrum[0, 0] = 0
    noise = fft.irfft2(spectrum, (SIDE, SIDE))
    return (noise / noise.std()).astype(np.float32)


def cover(distance: Field) -> Field:
    """Turn a signed distance (negative inside) into the share of each sample that a shape covers."""
    return np.clip(0.5 - distance * SUPERSAMPLING, 0, 1)


def tint(brightness: Field, colour: Colour) -> Surface:
    """Give a colour to a brightness."""
    return brightness[..., None] * np.array(colour, dtype=np.float32)


def paint(surface: Surface, colour: Surface | Colour, alpha: Field) -> Surface:
    """Lay a colour over a surface with an opacity in [0, 1]."""
    return surface + alpha[..., None] * (np.asarray(colour, dtype=np.float32) - surface)


def shade(height: Field, softness: float = 0.5) -> Field:
    """Light a relief from the upper left.

    Args:
        height: Height in pixels.
        softness: How little the slope tells: larger is flatter light.

    Returns:
        Brightness, 1 where the relief is level.
    """
    slope_y, slope_x = np.gradient(height, 1 / SUPERSAMPLING)
    light = (slope_x + slope_y + softness * 2) / np.sqrt(slope_x**2 + slope_y**2 + 1) / (softness * 2)
    return np.clip(light, 0.15, 2.5).astype(np.float32)


def disc(centre: Point, radius: float) -> Field:
    """Return the signed distance to a disc."""
    return np.hypot(X - centre[0], Y - centre[1]) - radius


def blob(rng: np.random.Generator, centre: Point, radius: float) -> Field:
    """Return the approximate signed distance to an irregular round shape."""
    angle = np.arctan2(Y - centre[1], X - centre[0])
    outline = np.ones_like(angle)
    for lobes in range(2, 7):
        outline += rng.normal(0, 0.3 / lobes) * np.cos(lobes * angle + rng.uniform(0, 2 * np.pi))
    return np.hypot(X - centre[0], Y - centre[1]) - radius * np.clip(outline, 0.45, 1.6)


def wander(rng: np.random.Generator, middle: Point, length: float, curl: float) -> NDArray[np.float64]:
    """Draw a smooth random curve.

    Args:
        rng: Random numbers.
        middle: Mean of the curve's points.
        length: Its length in pixels.
        curl: How much it turns in all, in radians; 0 is a straight line.

    Returns:
        Points ``(20, 2)`` as x, y.
    """
    turns = ndimage.gaussian_filter1d(rng.standard_normal(20), 3, mode="nearest")
    heading = rng.uniform(0, 2 * np.pi) + curl * np.cumsum(turns) / np.abs(turns).sum()
    steps = np.stack([np.cos(heading), np.sin(heading)], axis=1) * length / 20
    points = np.cumsum(steps, axis=0)
    return points - points.mean(axis=0) + middle


def stroke(points: NDArray[np.float64]) -> tuple[Field, Field]:
    """Measure the way to a curve.

    Args:
        points: Points ``(n, 2)`` of the curve as x, y.

    Returns:
        Distance to the curve in pixels, and where along it (0 to 1) the nearest point lies, both ``(SIDE, SIDE)``.
    """
    nearest = np.full((SIDE, SIDE), np.inf, dtype=np.float32)
    progress = np.zeros((SIDE, SIDE), dtype=np.float32)
    pieces = len(points) - 1
    for piece, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        dx, dy = x1 - x0, y1 - y0
        along = np.clip(((X - x0) * dx + (Y - y0) * dy) / (dx**2 + dy**2), 0, 1).astype(np.float32)
        distance = np.hypot(X - x0 - along * dx, Y - y0 - along * dy)
        closer = distance < nearest
        nearest[closer] = distance[closer]
        progress[closer] = (piece + along[closer]) / pieces
    return nearest, progress


def photograph(surface: Surface, flawed: Surface, rng: np.random.Generator) -> tuple[Picture, Mask]:
    """Take a picture of a surface with a defect, and tell which of its pixels the defect changes.

    Brightness and direction of the light, focus, colour balance and sensor noise vary from picture to picture.

    Args:
        surface: The surface as it should be.
        flawed: The same surface with its defect, or ``surface`` itself.
        rng: Random numbers.

    Returns:
        The picture, and the ground truth: where the two surfaces, photographed without noise, differ visibly.
    """
    direction = rng.uniform(0, 2 * np.pi)
    ramp = np.cos(direction) * (X / SIZE - 0.5) + np.sin(direction) * (Y / SIZE - 0.5)
    vignette = 0.16 * ((X / SIZE - 0.5) ** 2 + (Y / SIZE - 0.5) ** 2)
    light = rng.uniform(0.95, 1.05) * (1 + rng.uniform(0, 0.24) * ramp - vignette)
    light = light[..., None] * rng.normal(1, 0.01, 3)
    blur = rng.uniform(0.9, 1.2)

    def develop(scene: Surface) -> NDArray[np.float32]:
        """Project a lit scene onto the sensor: ``(SIZE, SIZE, 3)``."""
        seen = ndimage.gaussian_filter((scene * light).astype(np.float32), (blur, blur, 0))
        return seen.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING, 3).mean(axis=(1, 3))

    picture = develop(flawed)
    changed = np.zeros((SIZE, SIZE), dtype=bool)
    if flawed is not surface:
        changed = np.abs(picture - develop(surface)).max(axis=-1) > _VISIBLE
        # A defect on a texture also covers the spots whose light it happens not to change.
        changed = ndimage.binary_dilation(ndimage.binary_closing(np.pad(changed, 8), iterations=3))[8:-8, 8:-8]
    noise = rng.standard_normal(picture.shape, dtype=np.float32) * (0.006 + 0.012 * np.sqrt(np.clip(picture, 0, 1)))
    return np.rint(np.clip(picture + noise, 0, 1) * 255).astype(np.uint8), changed
