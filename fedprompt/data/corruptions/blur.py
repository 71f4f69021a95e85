"""Blur: out of focus, through glass, by motion, and by a zoom.

Shape suffixes: see `fedprompt.data.corruptions`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, zoom
from scipy.signal import fftconvolve

Pixels = NDArray[np.float64]
SIDE = 224
"""Side of the images for which the authors chose their lengths."""


def scaled(length: float, image: Pixels) -> float:
    """A length for images of 224 pixels, in pixels of this image."""
    return length * float(min(image.shape[:2])) / SIDE


def convolved(image: Pixels, kernel: Pixels) -> Pixels:
    """An image (H, W) or (H, W, 3) under a kernel of odd sides; edges are mirrored."""
    by, bx = (side // 2 for side in kernel.shape)
    more = ((by, by), (bx, bx)) + ((0, 0),) * (image.ndim - 2)
    wide = np.pad(image, more, mode="symmetric")
    found: Pixels = fftconvolve(
        wide, kernel.reshape(kernel.shape + (1,) * (image.ndim - 2)), mode="valid", axes=(0, 1)
    )
    return found


def defocus_blur(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """The mean over a disk with a soft edge; a pixel on the edge counts in part."""
    pixels, soft = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    radius = scaled(pixels, image_HW3)
    reach = math.ceil(radius) + 2
    y, x = np.mgrid[-reach : reach + 1, -reach : reach + 1]
    disk = gaussian_filter((radius + 0.5 - np.hypot(x, y)).clip(0, 1), soft)
    return convolved(image_HW3, disk / disk.sum())


def glass_blur(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Every pixel becomes a copy of a random one near it, several times; blurred before and after.

    The authors' code is meant to swap two pixels. Both are views of one array, so it only copies.
    """
    sigma, reach, times = (
        (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2),
    )[severity - 1]  # fmt: skip
    sigma, reach = scaled(sigma, image_HW3), max(1, round(scaled(reach, image_HW3)))
    found = gaussian_filter(image_HW3, (sigma, sigma, 0), mode="nearest")
    height, width = found.shape[:2]
    y, x = np.indices((height, width))
    inside = (reach < y) & (y <= height - reach) & (reach < x) & (x <= width - reach)
    for _ in range(times):
        dx, dy = draw.integers(-reach, reach, (2, height, width)) * inside
        from_N = ((y + dy) * width + x + dx).ravel()
        found = found.reshape(-1, 3)[copied_in_turn(from_N)].reshape(found.shape)
    return np.asarray(gaussian_filter(found, (sigma, sigma, 0), mode="nearest"))


def copied_in_turn(from_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where values come from if each pixel, from the last to the first, becomes a copy of another.

    A copy of a pixel that comes later in the image is a copy of a copy, so values travel farther
    than one step.

    Args:
        from_N: the pixel that each pixel becomes a copy of; its own number to stay.

    Returns:
        The pixel whose value each pixel has in the end.
    """
    at_N, source_N = np.arange(len(from_N)), from_N
    while (replaced_N := source_N > at_N).any():
        at_N = np.where(replaced_N, source_N, at_N)
        source_N = np.where(replaced_N, from_N[source_N], source_N)
    return source_N


def motion_kernel(radius: float, sigma: float, angle: float) -> Pixels:
    """Weights exp(-i^2 / (2 sigma^2)) at 2 radius + 1 points of a line that begins in the centre.

    Args:
        radius: half the length of the line, in pixels.
        sigma: standard deviation of the weights, in pixels.
        angle: direction of the line, in degrees.

    Returns:
        A kernel of odd sides, whose sum is 1.
    """
    steps = np.arange(max(2, round(2 * radius + 1)))
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    reach = len(steps)
    kernel = np.zeros((2 * reach + 1, 2 * reach + 1))
    y = reach + steps * math.sin(math.radians(angle))
    x = reach + steps * math.cos(math.radians(angle))
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    # A point between pixels counts for its four neighbours.
    for dy, part_y in ((0, 1 - (y - top)), (1, y - top)):
        for dx, part_x in ((0, 1 - (x - left)), (1, x - left)):
            np.add.at(kernel, (top + dy, left + dx), weights * part_y * part_x)
    return np.asarray(kernel / kernel.sum())


def motion_blur(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """A Gaussian trail in a random direction within 45 degrees of the horizontal."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    angle = draw.uniform(-45, 45)
    kernel = motion_kernel(scaled(radius, image_HW3), scaled(sigma, image_HW3), angle)
    return convolved(image_HW3, kernel)


def zoomed(image: Pixels, factor: float) -> Pixels:
    """The middle of an image (H, W) or (H, W, 3), enlarged to its size, linearly interpolated."""
    height, width = image.shape[:2]
    rows, columns = math.ceil(height / factor), math.ceil(width / factor)
    top, left = (height - rows) // 2, (width - columns) // 2
    middle = image[top : top + rows, left : left + columns]
    found: Pixels = zoom(middle, (factor, factor, 1)[: image.ndim], order=1)
    top, left = (found.shape[0] - height) // 2, (found.shape[1] - width) // 2
    return found[top : top + height, left : left + width]


def zoom_blur(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """The mean of the image and of its enlargements, from 1 up to a largest factor."""
    largest, step = (
        # The authors' `arange` ends at 1.10, but by a rounding error it has 1.11 as well.
        (1.11, 0.01), (1.15, 0.01), (1.20, 0.02), (1.24, 0.02), (1.30, 0.03),
    )[severity - 1]  # fmt: skip
    factors = 1 + step * np.arange(round((largest - 1) / step) + 1)
    total = image_HW3 + sum(zoomed(image_HW3, float(factor)) for factor in factors)
    return np.asarray(total / (len(factors) + 1))
