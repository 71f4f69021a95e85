"""Noise: of a sensor in low light, of few photons, and of bits.

Shape suffixes: see `fedprompt.data.corruptions`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float64]


def gaussian_noise(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """x + N(0, sigma^2)."""
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return image_HW3 + sigma * draw.standard_normal(image_HW3.shape)


def shot_noise(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Poisson(photons x) / photons."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return draw.poisson(image_HW3 * photons) / photons


def impulse_noise(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """A share of all values becomes 0 or 1, with equal chances (salt and pepper)."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    chance_HW3 = draw.random(image_HW3.shape)
    salt_HW3 = draw.random(image_HW3.shape) < 0.5
    return np.where(chance_HW3 < share, salt_HW3.astype(np.float64), image_HW3)
