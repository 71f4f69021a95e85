"""Image bytes to RGB, folder names to class names, and the seeded test hold-out.

Suffixes: N images, C classes.
"""

from __future__ import annotations

import io
import re
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fedprompt.data.dataset import TEST, TRAIN
from fedprompt.rng import generator


def decode_rgb(data: bytes) -> Image.Image:
    """The first frame of an encoded image, fully decoded, upright (EXIF) and in RGB.

    Palettes are expanded; an alpha channel is dropped, as open_clip and torchvision do. 16-bit
    grey is divided by 257 (65535 becomes 255), never stretched by its own range, so that
    brightness stays comparable between images.

    Raises:
        ValueError: the bytes are no readable image; the message is the reason, one line.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd EXIF and palette notes; errors still raise
            with Image.open(io.BytesIO(data)) as image:
                return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", reason)) from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F":
        raise ValueError("floating-point pixels have no fixed range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.asarray(image, dtype=np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise ValueError("32-bit grey pixels exceed 16 bits; save it with 8 or 16 bits")
        image = Image.fromarray((grey // 257).astype(np.uint8))
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB")


def random_view(
    image: Image.Image, size: tuple[int, int], draw: np.random.Generator, min_scale: float
) -> Image.Image:
    """A random part of an image, resized to `size` (width, height) and mirrored in half the cases.

    The usual augmentation of prompt learning (CoOp): a share of the area in [min_scale, 1] and an
    aspect ratio in [3/4, 4/3], log-uniform; where ten draws do not fit into the image, all of it
    that has an allowed ratio. Bicubic, with the area's own pixels only.
    """
    width, height = image.size
    for _ in range(10):
        area = width * height * draw.uniform(min_scale, 1.0)
        ratio = float(np.exp(draw.uniform(np.log(3 / 4), np.log(4 / 3))))
        w, h = round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)
        if 0 < w <= width and 0 < h <= height:
            left, top = int(draw.integers(width - w + 1)), int(draw.integers(height - h + 1))
            break
    else:
        w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
        left, top = (width - w) // 2, (height - h) // 2
    box = (left, top, left + w, top + h)
    view = image.resize(size, Image.Resampling.BICUBIC, box=box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else view


def readable_name(name: str) -> str:
    """A class name to read: 'DenseResidential' and 'dense_residential' -> 'dense residential'."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.sub(r"[_\-\s]+", " ", spaced).split()).lower()


def name_key(name: str) -> str:
    """What two spellings of one class share: no case, spaces, underscores or hyphens."""
    return re.sub(r"[_\-\s]+", "", name).casefold()


def hold_out_test(labels_N: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int8]:
    """`TRAIN` or `TEST` per image: a seeded, per-class hold-out of `fraction`.

    Every class keeps a training image; a class of two or more images gives a test image.
    """
    split_N = np.full(len(labels_N), TRAIN, dtype=np.int8)
    rng = generator(seed, "test-split")
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        wanted = max(1, int(np.floor(fraction * len(members) + 0.5)))
        split_N[members[: min(wanted, len(members) - 1)]] = TEST
    return split_N
