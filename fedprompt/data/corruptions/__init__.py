"""The 15 corruptions of ImageNet-C at five severities, computed from pixels.

Source: Benchmarking Neural Network Robustness to Common Corruptions and Perturbations (Hendrycks
and Dietterich, ICLR 2019, arXiv 1903.12261). The constants are those of the authors' code for
images of 224 pixels (hendrycks/robustness, `make_imagenet_c.py`), and all of them were compared;
lengths grow with the side of the image. At 224 pixels, JPEG and pixelate give the authors' bytes,
contrast, brightness, defocus, glass and zoom blur their values up to the rounding of 8 bits and a
slightly different edge of the disk and of the image, and noise, motion blur, snow, fog and elastic
transforms the same distances from the clean image within the spread of the random draws.

How we differ: the code is our own, in NumPy, SciPy and Pillow; frost is drawn, with the mean colour
and contrast of the photographs that the authors overlay; values are rounded to 8 bits, where theirs
are cut off; and images are not stored as JPEG files after the corruption.

An image's random draws are the same at all severities, so that a higher severity is never the
luckier draw.

Shape suffixes: H, W pixels, 3 channels; all images are float64 from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from .blur import defocus_blur, glass_blur, motion_blur, zoom_blur
from .digital import contrast, elastic_transform, jpeg_compression, pixelate
from .noise import gaussian_noise, impulse_noise, shot_noise
from .weather import brightness, fog, frost, snow

Corruption = Callable[[NDArray[np.float64], int, np.random.Generator], NDArray[np.float64]]
"""From an image (H, W, 3), a severity from 1 to 5 and a generator to the corrupted image, whose
values may lie outside 0..1."""

CORRUPTIONS: MappingProxyType[str, Corruption] = MappingProxyType(
    {
        of.__name__: of
        for of in (
            gaussian_noise, shot_noise, impulse_noise,
            defocus_blur, glass_blur, motion_blur, zoom_blur,
            snow, frost, fog, brightness,
            contrast, elastic_transform, pixelate, jpeg_compression,
        )
    }
)  # fmt: skip
"""By name, in the order of the paper."""
SEVERITIES = (1, 2, 3, 4, 5)


def corrupted(
    image_HW3: NDArray[np.uint8], name: str, severity: int, draw: np.random.Generator
) -> NDArray[np.uint8]:
    """Corrupt an image of 8 bits.

    Args:
        image_HW3: the image, as the backbone sees it.
        name: one of `CORRUPTIONS`.
        severity: one of `SEVERITIES`.
        draw: the image's generator for this corruption.
    """
    found_HW3 = CORRUPTIONS[name](image_HW3 / 255, severity, draw)
    return np.asarray(np.clip(found_HW3, 0, 1) * 255 + 0.5).astype(np.uint8)
