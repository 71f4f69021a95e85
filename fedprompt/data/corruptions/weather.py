"""Weather: snow, frost, fog and the light of the day.

Shape suffixes: see `fedprompt.data.corruptions`.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from .blur import convolved, motion_kernel, scaled, zoomed

Pixels = NDArray[np.float64]
ICE, ICE_DEPTH = (0.57, 0.65, 0.70), 0.095
"""Mean colour and standard deviation of ice, those of the authors' photographs on average."""
LUMA = (0.299, 0.587, 0.114)


def plasma(height: int, width: int, decay: float, draw: np.random.Generator) -> Pixels:
    """A cloudy texture (H, W) from 0 to 1, by the diamond-square algorithm.

    Every level halves the distance of the points and divides the square root of the height of
    their bumps by `decay`, so a larger decay is smoother.
    """
    side = 2 ** max(1, math.ceil(math.log2(max(height, width))))
    found = np.zeros((side, side))
    step, bumps = side, 100.0

    def with_bumps(sum_of_four: Pixels) -> Pixels:
        return sum_of_four / 4 + bumps**2 * draw.uniform(-1, 1, sum_of_four.shape)

    while step >= 2:
        half = step // 2
        corners = found[::step, ::step]
        # The texture repeats at its edges, as `roll` does.
        pairs = corners + np.roll(corners, -1, 0)
        found[half::step, half::step] = with_bumps(pairs + np.roll(pairs, -1, 1))
        middles = found[half::step, half::step]
        above = middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1)
        found[::step, half::step] = with_bumps(above)
        beside = middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0)
        found[half::step, ::step] = with_bumps(beside)
        step, bumps = half, bumps / decay
    found -= found.min()
    return np.asarray(found / found.max())[:height, :width]


def snow(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """Flakes that fall, over an image that is whitened."""
    mean, std, factor, least, radius, sigma, kept = (
        (0.10, 0.3, 3.0, 0.50, 10, 4, 0.80), (0.20, 0.3, 2.0, 0.50, 12, 4, 0.70),
        (0.55, 0.3, 4.0, 0.90, 12, 8, 0.70), (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]  # fmt: skip
    flakes_HW = zoomed(mean + std * draw.standard_normal(image_HW3.shape[:2]), factor)
    flakes_HW = np.where(flakes_HW < least, 0, flakes_HW).clip(0, 1)
    angle = draw.uniform(-135, -45)
    kernel = motion_kernel(scaled(radius, image_HW3), scaled(sigma, image_HW3), angle)
    flakes_HW1 = convolved(flakes_HW, kernel)[:, :, None]
    grey_HW1 = (image_HW3 @ np.array(LUMA))[:, :, None]
    whitened = kept * image_HW3 + (1 - kept) * np.maximum(image_HW3, 1.5 * grey_HW1 + 0.5)
    return np.asarray(whitened + flakes_HW1 + flakes_HW1[::-1, ::-1])


def frost(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """The image, weakened, behind ice: bright ridges of a cloudy texture."""
    kept, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    clouds_HW = plasma(image_HW3.shape[0], image_HW3.shape[1], 1.4, draw)
    ridges_HW = (1 - np.abs(2 * clouds_HW - 1)) ** 2
    depth_HW1 = ICE_DEPTH * ((ridges_HW - ridges_HW.mean()) / ridges_HW.std())[:, :, None]
    return np.asarray(kept * image_HW3 + ice * (np.array(ICE) + depth_HW1))


def fog(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """A cloudy texture is added, and the sum brought back to the range of the image."""
    weight, decay = ((1.5, 2), (2.0, 2), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    brightest = image_HW3.max()
    clouds_HW1 = plasma(image_HW3.shape[0], image_HW3.shape[1], decay, draw)[:, :, None]
    return np.asarray((image_HW3 + weight * clouds_HW1) * brightest / (brightest + weight))


def brightness(image_HW3: Pixels, severity: int, draw: np.random.Generator) -> Pixels:
    """The value of HSV is raised; hue and saturation stay."""
    more = (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1]
    value_HW1 = image_HW3.max(-1, keepdims=True)
    raised_HW1 = np.minimum(value_HW1 + more, 1)
    # Equal hue and saturation mean that all channels grow by one factor; black becomes grey.
    ratio_HW3 = np.divide(image_HW3, value_HW1, out=np.ones_like(image_HW3), where=value_HW1 > 0)
    return np.asarray(ratio_HW3 * raised_HW1)
