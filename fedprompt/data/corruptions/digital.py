"""Faults of processing: weak contrast, warped, coarse pixels, and JPEG.

Shape suffixes: see `fedprompt.data.corruptions`.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from .blur import scaled

Pixels = NDArray[np.float64]
LENGTH = 244
"""The authors' code has shares of 244 for images of 224 pixels."""


def contrast(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Every channel comes closer to its mean."""
    kept = (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1]
    mean_3 = image_HW3.mean((0, 1))
    return np.asarray((image_HW3 - mean_3) * kept + mean_3)


def elastic_transform(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """A random affine map, then displacements that are smooth noise."""
    height, smooth, corner = (
        (2, 0.7, 0.1), (2, 0.08, 0.2), (0.05, 0.01, 0.02), (0.07, 0.01, 0.02), (0.12, 0.01, 0.02),
    )[severity - 1]  # fmt: skip
    unit = scaled(LENGTH, image_HW3)
    rows, columns = image_HW3.shape[:2]
    third, centre = min(rows, columns) // 3, np.array([rows // 2, columns // 2])
    points_32 = centre + third * np.array([[1, 1], [-1, 1], [-1, -1]])
    moved_32 = points_32 + corner * unit * draw.uniform(-1, 1, (3, 2))
    # The affine map that takes the moved points back: where a pixel of the result comes from.
    back_32 = np.linalg.solve(np.hstack([moved_32, np.ones((3, 1))]), points_32)
    noise_2HW = draw.uniform(-1, 1, (2, rows, columns))
    sigma = smooth * unit
    shift_2HW = np.stack(
        [gaussian_filter(one, sigma, mode="reflect", truncate=3) for one in noise_2HW]
    )
    y, x = np.indices((rows, columns)) + height * unit * shift_2HW
    from_2HW = np.tensordot(back_32.T, np.stack([y, x, np.ones_like(y)]), 1)
    channels = [
        map_coordinates(image_HW3[:, :, c], from_2HW, order=1, mode="reflect") for c in range(3)
    ]
    return np.stack(channels, -1)


def _as_image(image_HW3: Pixels) -> Image.Image:
    return Image.fromarray((image_HW3 * 255 + 0.5).astype(np.uint8))


def pixelate(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Made smaller, and larger again, by boxes."""
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[severity - 1]
    image = _as_image(image_HW3)
    small = [max(1, int(side * share)) for side in image.size]
    coarse = image.resize((small[0], small[1]), Image.Resampling.BOX)
    return np.asarray(coarse.resize(image.size, Image.Resampling.BOX)) / 255


def jpeg_compression(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Stored as a JPEG file of low quality."""
    quality = (25, 18, 15, 10, 7)[severity - 1]
    file = io.BytesIO()
    _as_image(image_HW3).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file).convert("RGB")) / 255
