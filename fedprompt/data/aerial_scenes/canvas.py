"""A 64x64 picture drawn in scene units with analytic, antialiased edges.

Shapes are signed distances (negative inside). A pixel's coverage follows from the distance to the
edge, so nothing is supersampled. All arithmetic is NumPy float64 and ends in one rounding, so the
same call gives the same bytes on any machine.

Suffixes: `_HW` one value per pixel, `_HW3` RGB per pixel in [0, 1].
"""

from __future__ import annotations

from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Colour: TypeAlias = tuple[float, float, float] | Array
Window: TypeAlias = tuple[slice, slice]

SIZE = 64
_FULL: Window = (slice(0, SIZE), slice(0, SIZE))


def mix(a: Colour, b: Colour, share: float) -> Array:
    """Colour between `a` (share 0) and `b` (share 1)."""
    return np.asarray(a) * (1.0 - share) + np.asarray(b) * share


@cache
def _interpolation(cells: int) -> Array:
    """Matrix (SIZE, cells + 1) that interpolates a grid of `cells` cells smoothly to all pixels."""
    t = (np.arange(SIZE) + 0.5) / SIZE * cells
    left = np.minimum(t.astype(np.int64), cells - 1)
    part = t - left
    part = part * part * (3.0 - 2.0 * part)
    weights = np.zeros((SIZE, cells + 1))
    weights[np.arange(SIZE), left] = 1.0 - part
    weights[np.arange(SIZE), left + 1] = part
    return weights


@cache
def _blur(sigma: float) -> Array:
    """Matrix (SIZE, SIZE) of a one-dimensional Gaussian blur; rows sum to one."""
    i = np.arange(SIZE)
    weights = np.exp(-0.5 * ((i[:, None] - i[None, :]) / sigma) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def smooth(image: Array, sigma: float) -> Array:
    """`image` (H, W) or (H, W, 3) blurred with a Gaussian of `sigma` pixels."""
    kernel = _blur(sigma)
    if image.ndim == 2:
        return np.asarray(kernel @ image @ kernel.T)
    planes = np.moveaxis(image, 2, 0)
    return np.moveaxis(kernel @ planes @ kernel.T, 0, 2)


class Canvas:
    """A picture, the scene coordinates of its pixels and the primitives that paint on it.

    The view is `64 * step` scene units wide, rotated by `angle` and centred on `centre`. `sun` is
    the unit vector, in scene coordinates, in which shadows fall.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        step: float,
        angle: float = 0.0,
        centre: tuple[float, float] = (0.0, 0.0),
        sun: float = 0.8,
    ) -> None:
        self.rng = rng
        self.step = step
        self.cos, self.sin = float(np.cos(angle)), float(np.sin(angle))
        self.centre = centre
        ticks = (np.arange(SIZE) + 0.5 - SIZE / 2) * step
        across, down = ticks[None, :], ticks[:, None]
        self.x_HW: Array = across * self.cos + down * self.sin + centre[0]
        self.y_HW: Array = down * self.cos - across * self.sin + centre[1]
        self.sun = (float(np.cos(sun - angle)), float(np.sin(sun - angle)))
        self.rgb_HW3: Array = np.zeros((SIZE, SIZE, 3))

    # Painting

    def cover(self, distance: Array) -> Array:
        """Share of each pixel that lies inside a shape, from its signed distance."""
        return np.clip(0.5 - distance / self.step, 0.0, 1.0)

    def paint(self, colour: Colour, alpha: Array, window: Window = _FULL) -> None:
        """Lay `colour` (one, or one per pixel) over the picture with opacity `alpha`."""
        target = self.rgb_HW3[window]
        target += alpha[..., None] * (np.asarray(colour) - target)

    def fill(self, colour: Colour, distance: Array, texture: float = 0.0) -> None:
        """Paint the inside of a shape given over the whole picture, mottled by `texture`."""
        tint = np.asarray(colour)
        if texture:
            tint = tint * (1.0 + texture * self.fbm(8, 3))[..., None]
        self.paint(tint, self.cover(distance))

    def darken(self, amount: float, distance: Array, window: Window = _FULL) -> None:
        """Shade the inside of a shape, as a shadow does."""
        self.rgb_HW3[window] *= (1.0 - amount * self.cover(distance))[..., None]

    # Noise

    def noise(self, cells: int) -> Array:
        """Smooth noise, about [-1, 1], with `cells` bumps across the picture."""
        weights = _interpolation(cells)
        grid = self.rng.uniform(-1.0, 1.0, (cells + 1, cells + 1))
        return np.asarray(weights @ grid @ weights.T)

    def fbm(self, cells: int, octaves: int) -> Array:
        """Sum of `octaves` noises, each twice as fine and half as strong."""
        total = self.noise(cells)
        for octave in range(1, octaves):
            total += self.noise(min(SIZE, cells << octave)) * 0.6**octave
        return total

    # Places

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Column and row of a scene point, in pixels."""
        dx, dy = x - self.centre[0], y - self.centre[1]
        column = (dx * self.cos - dy * self.sin) / self.step + SIZE / 2
        row = (dx * self.sin + dy * self.cos) / self.step + SIZE / 2
        return column, row

    def window(self, x: float, y: float, radius: float) -> Window | None:
        """The pixels within `radius` of a scene point; None when all are outside the picture."""
        column, row = self.pixel(x, y)
        reach = radius / self.step + 1.0
        top, bottom = max(0, int(row - reach)), min(SIZE, int(row + reach) + 2)
        left, right = max(0, int(column - reach)), min(SIZE, int(column + reach) + 2)
        if top >= bottom or left >= right or row + reach < 0 or column + reach < 0:
            return None
        return slice(top, bottom), slice(left, right)

    # Signed distances over the whole picture

    def disc(self, x: float, y: float, radius: float) -> Array:
        """Disc around (x, y)."""
        return np.hypot(self.x_HW - x, self.y_HW - y) - radius

    def box(self, x: float, y: float, half_x: float, half_y: float, angle: float = 0.0) -> Array:
        """Rectangle around (x, y) with the given half sides, turned by `angle`."""
        return box(self.x_HW - x, self.y_HW - y, half_x, half_y, angle)

    def band(self, offset_HW: Array | float, width: float, along_x: bool = True) -> Array:
        """Strip of `width` around the curve y = offset (or x = offset)."""
        across = self.y_HW if along_x else self.x_HW
        return np.abs(across - offset_HW) - width / 2

    def wave(self, along_HW: Array, reach: float, length: float) -> Array:
        """A lazy random curve: two sines with random phases, about +-`reach`."""
        phase = self.rng.uniform(0.0, 2.0 * np.pi, 2)
        first = np.sin(along_HW * (2.0 * np.pi / length) + phase[0])
        second = np.sin(along_HW * (4.6 * np.pi / length) + phase[1])
        return np.asarray(reach * (0.8 * first + 0.3 * second))

    def blob(self, x: float, y: float, radius: float, ragged: float = 0.25) -> Array:
        """A disc with an irregular outline."""
        dx, dy = self.x_HW - x, self.y_HW - y
        theta = np.arctan2(dy, dx)
        outline = np.zeros_like(theta)
        for k in (2, 3, 5):
            phase = self.rng.uniform(0.0, 2.0 * np.pi)
            outline += self.rng.uniform(0.3, 1.0) / k * np.cos(k * theta + phase)
        return np.hypot(dx, dy) - radius * (1.0 + ragged * outline)


def box(dx: Array, dy: Array, half_x: float, half_y: float, angle: float = 0.0) -> Array:
    """Signed distance to a rectangle from offsets to its centre."""
    if angle:
        cos, sin = np.cos(angle), np.sin(angle)
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    return np.maximum(np.abs(dx) - half_x, np.abs(dy) - half_y)
