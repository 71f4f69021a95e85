"""A 64x64 picture that is drawn in scene units with analytic, antialiased edges.

Shapes are signed distances in scene units (negative inside). The coverage of a pixel follows from
its distance to the edge, so nothing is supersampled. All arithmetic is NumPy float64 and ends in
one rounding, so the same call gives the same bytes on any machine.

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
NOTHING = -1
"""The kind of what carries no label."""
_FULL: Window = (slice(0, SIZE), slice(0, SIZE))


def mix(a: Colour, b: Colour, share: float) -> Array:
    """Interpolate linearly between colours: `a` at share 0, `b` at share 1."""
    return np.asarray(a) * (1.0 - share) + np.asarray(b) * share


@cache
def _interpolation(cells: int) -> Array:
    """Return a matrix (SIZE, cells + 1) that interpolates grid points smoothly to all pixels."""
    t = (np.arange(SIZE) + 0.5) / SIZE * cells
    left = np.minimum(t.astype(np.int64), cells - 1)
    part = t - left
    # Smoothstep: its slope is zero at grid points, so no creases appear between cells.
    part = part * part * (3.0 - 2.0 * part)
    weights = np.zeros((SIZE, cells + 1))
    weights[np.arange(SIZE), left] = 1.0 - part
    weights[np.arange(SIZE), left + 1] = part
    return weights


@cache
def _blur(sigma: float) -> Array:
    """Return the matrix (SIZE, SIZE) of a one-dimensional Gaussian blur; rows sum to one."""
    i = np.arange(SIZE)
    weights = np.exp(-0.5 * ((i[:, None] - i[None, :]) / sigma) ** 2)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def smooth(image: Array, sigma: float) -> Array:
    """Blur an image (H, W) or (H, W, 3) with a Gaussian of `sigma` pixels."""
    # A Gaussian is separable, so two small matrix products blur the rows and the columns.
    kernel = _blur(sigma)
    if image.ndim == 2:
        return np.asarray(kernel @ image @ kernel.T)
    planes = np.moveaxis(image, 2, 0)
    return np.moveaxis(kernel @ planes @ kernel.T, 0, 2)


class Canvas:
    """A picture, the scene coordinates of its pixels and the primitives that paint on it.

    The view is `64 * step` scene units wide. Methods take coordinates and lengths in scene units.

    Args:
        rng: the image's generator; noise and random curves are drawn from it.
        step: scene units per pixel.
        angle: rotation of the view, in radians.
        centre: scene coordinates of the middle of the picture.
        sun: direction of shadows in the picture, in radians.

    Attributes:
        x_HW: scene coordinate x of each pixel's centre.
        y_HW: scene coordinate y of each pixel's centre.
        sun: unit vector, in scene coordinates, in which shadows fall.
        rgb_HW3: the picture.
        kind: the kind of what is painted from now on: the index of a label, or `NOTHING`.
        kind_HW: the kind of what is seen at each pixel.
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
        # Given relative to the picture, so that the view's rotation does not turn the shadows.
        self.sun = (float(np.cos(sun - angle)), float(np.sin(sun - angle)))
        self.rgb_HW3: Array = np.zeros((SIZE, SIZE, 3))
        self.kind = NOTHING
        self.kind_HW = np.full((SIZE, SIZE), NOTHING, dtype=np.int8)

    # Painting

    def cover(self, distance: Array) -> Array:
        """Return the share of each pixel that lies inside a shape, from its signed distance."""
        # The edge crosses one pixel, whose width is `step` in scene units.
        return np.clip(0.5 - distance / self.step, 0.0, 1.0)

    def paint(self, colour: Colour, alpha: Array, window: Window = _FULL) -> None:
        """Blend a colour over the picture.

        Args:
            colour: one colour, or one per pixel of the window.
            alpha: opacity of each pixel of the window, 0 to 1.
            window: the part of the picture to paint.
        """
        target = self.rgb_HW3[window]
        target += alpha[..., None] * (np.asarray(colour) - target)
        # What covers most of a pixel is what is seen there.
        self.kind_HW[window][alpha > 0.5] = self.kind

    def cover_all(self, rgb_HW3: Array) -> None:
        """Replace the whole picture."""
        self.rgb_HW3[:] = rgb_HW3
        self.kind_HW[:] = self.kind

    def fill(self, colour: Colour, distance: Array, texture: float = 0.0) -> None:
        """Paint the inside of a shape.

        Args:
            colour: one colour, or one per pixel.
            distance: signed distance to the shape, over the whole picture.
            texture: strength of the noise that mottles the colour; 0 for none.
        """
        tint = np.asarray(colour)
        if texture:
            tint = tint * (1.0 + texture * self.fbm(8, 3))[..., None]
        self.paint(tint, self.cover(distance))

    def darken(self, amount: float, distance: Array, window: Window = _FULL) -> None:
        """Darken the inside of a shape, as a shadow does.

        Args:
            amount: how much light is removed, 0 to 1.
            distance: signed distance to the shape, over the window.
            window: the part of the picture to darken.
        """
        self.rgb_HW3[window] *= (1.0 - amount * self.cover(distance))[..., None]

    # Noise

    def noise(self, cells: int) -> Array:
        """Draw smooth noise, about [-1, 1], with `cells` bumps across the picture."""
        weights = _interpolation(cells)
        grid = self.rng.uniform(-1.0, 1.0, (cells + 1, cells + 1))
        return np.asarray(weights @ grid @ weights.T)

    def fbm(self, cells: int, octaves: int) -> Array:
        """Draw fractal noise: a sum of `octaves` noises, each twice as fine and 0.6 as strong."""
        total = self.noise(cells)
        for octave in range(1, octaves):
            total += self.noise(min(SIZE, cells << octave)) * 0.6**octave
        return total

    # Places

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Return the column and the row of a scene point, in pixels."""
        dx, dy = x - self.centre[0], y - self.centre[1]
        column = (dx * self.cos - dy * self.sin) / self.step + SIZE / 2
        row = (dx * self.sin + dy * self.cos) / self.step + SIZE / 2
        return column, row

    def window(self, x: float, y: float, radius: float) -> Window | None:
        """Return the pixels around a scene point, so that small objects cost little to draw.

        Args:
            x: scene coordinate of the point.
            y: scene coordinate of the point.
            radius: reach in scene units.

        Returns:
            Slices of rows and columns that contain all pixels within `radius`, or None if they are
            all outside the picture.
        """
        column, row = self.pixel(x, y)
        # One more pixel, because an antialiased edge extends beyond the shape.
        reach = radius / self.step + 1.0
        top, bottom = max(0, int(row - reach)), min(SIZE, int(row + reach) + 2)
        left, right = max(0, int(column - reach)), min(SIZE, int(column + reach) + 2)
        if top >= bottom or left >= right or row + reach < 0 or column + reach < 0:
            return None
        return slice(top, bottom), slice(left, right)

    # Signed distances over the whole picture

    def disc(self, x: float, y: float, radius: float) -> Array:
        """Return the signed distance to the disc around (x, y)."""
        return np.hypot(self.x_HW - x, self.y_HW - y) - radius

    def box(self, x: float, y: float, half_x: float, half_y: float, angle: float = 0.0) -> Array:
        """Return the signed distance to a rectangle.

        Args:
            x: its centre.
            y: its centre.
            half_x: half of its side along x before the rotation.
            half_y: half of its side along y before the rotation.
            angle: rotation in radians.
        """
        return box(self.x_HW - x, self.y_HW - y, half_x, half_y, angle)

    def band(self, offset_HW: Array | float, width: float, along_x: bool = True) -> Array:
        """Return the signed distance to a strip along a curve.

        Args:
            offset_HW: y of the curve at each pixel, or one number for a straight strip.
            width: width of the strip, measured along y.
            along_x: False exchanges x and y.
        """
        across = self.y_HW if along_x else self.x_HW
        return np.abs(across - offset_HW) - width / 2

    def wave(self, along_HW: Array, reach: float, length: float) -> Array:
        """Draw a gently winding curve: the sum of two sines with random phases.

        Args:
            along_HW: coordinate along the curve at each pixel.
            reach: largest deflection, about.
            length: wavelength of the longer sine.

        Returns:
            The deflection (H, W).
        """
        phase = self.rng.uniform(0.0, 2.0 * np.pi, 2)
        first = np.sin(along_HW * (2.0 * np.pi / length) + phase[0])
        second = np.sin(along_HW * (4.6 * np.pi / length) + phase[1])
        return np.asarray(reach * (0.8 * first + 0.3 * second))

    def blob(self, x: float, y: float, radius: float, ragged: float = 0.25) -> Array:
        """Return the approximate signed distance to a disc with an irregular random outline.

        Args:
            x: its centre.
            y: its centre.
            radius: mean radius.
            ragged: strength of the irregularity; 0 gives a disc.
        """
        dx, dy = self.x_HW - x, self.y_HW - y
        theta = np.arctan2(dy, dx)
        outline = np.zeros_like(theta)
        for k in (2, 3, 5):
            phase = self.rng.uniform(0.0, 2.0 * np.pi)
            outline += self.rng.uniform(0.3, 1.0) / k * np.cos(k * theta + phase)
        return np.hypot(dx, dy) - radius * (1.0 + ragged * outline)


def box(dx: Array, dy: Array, half_x: float, half_y: float, angle: float = 0.0) -> Array:
    """Return the signed distance to a rectangle.

    Beyond a corner it is the larger of the distances to the two sides, not the Euclidean distance.

    Args:
        dx: offset of each pixel from the centre along x.
        dy: offset of each pixel from the centre along y.
        half_x: half of the side along x before the rotation.
        half_y: half of the side along y before the rotation.
        angle: rotation in radians.
    """
    if angle:
        cos, sin = np.cos(angle), np.sin(angle)
        dx, dy = dx * cos + dy * sin, dy * cos - dx * sin
    return np.maximum(np.abs(dx) - half_x, np.abs(dy) - half_y)
