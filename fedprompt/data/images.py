"""Decodes and crops images, makes class names readable, and holds out a test split.

Data sources use it when they open a data set; the encoder uses `random_view` for the augmented
views of training images. Suffix: N images.
"""

from __future__ import annotations

import io
import re
import unicodedata
import warnings

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from fedprompt.data.dataset import TEST, TRAIN
from fedprompt.data.pixels import Pixels, is_tiff, nodata_of, read_bands, unread_tiff
from fedprompt.files import stand_in
from fedprompt.rng import generator

PLAIN = Pixels()
# The typographic quotation marks, single and double.
_QUOTES = str.maketrans("\u2018\u2019\u201b\u201c\u201d\u201f", "'''\"\"\"")


def decode_rgb(data: bytes, pixels: Pixels = PLAIN) -> Image.Image:
    """Decode the first frame of an image, turn it upright (EXIF) and convert it to RGB.

    Palettes are expanded, and an alpha channel is dropped, as in open_clip and torchvision. Without
    a range in `pixels`, 16-bit grey is divided by 257 (65535 becomes 255) instead of being
    stretched to the image's range, so that brightness stays comparable between images.

    Args:
        data: content of an image file.
        pixels: the range of values of more than 8 bits, and the bands to use.

    Returns:
        The image, fully loaded.

    Raises:
        ValueError: the bytes are not a readable image; the message is the reason on one line.
    """
    return decode(data, pixels)[0]


def decode(data: bytes, pixels: Pixels = PLAIN) -> tuple[Image.Image, bool]:
    """Like `decode_rgb`; also tells whether the stored values have more than 8 bits."""
    instead = stand_in(data[:512])
    if instead is not None:
        raise ValueError(instead)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on EXIF and palettes; errors are still raised
            if pixels.bands:
                return read_bands(data, pixels)
            with Image.open(io.BytesIO(data)) as image:
                deep = _is_deep(image)
                nodata = nodata_of(getattr(image, "tag_v2", {}))
                return _to_rgb(ImageOps.exif_transpose(image), data, deep, pixels, nodata)
    except Exception as error:  # Pillow's plugins raise anything from OSError to struct.error
        reason = " ".join(str(error).split()) or type(error).__name__
        # Pillow's message has the address of the buffer, which differs from run to run.
        reason = re.sub(r" <_io\.BytesIO object at 0x[0-9a-f]+>", "", reason)
        advice = unread_tiff(data) if isinstance(error, UnidentifiedImageError) else None
        raise ValueError(advice or reason) from error


def _is_deep(image: Image.Image) -> bool:
    """Whether the file stores more than 8 bits per value, before the image is loaded."""
    # Pillow reads 16-bit colour as 8 bits; only the decoder's arguments still tell.
    return image.mode[0] in "IF" or any(
        ";16" in str(tile[3]) for tile in getattr(image, "tile", ())
    )


def _to_rgb(
    image: Image.Image, data: bytes, deep: bool, pixels: Pixels, nodata: float | None
) -> tuple[Image.Image, bool]:
    # Pillow would clip these modes to 0..255 without a word, which turns most pixels white.
    if image.mode[0] in "IF":
        values = np.asarray(image)
        kept = values if image.mode == "F" else values.astype(np.int64)
        image = Image.fromarray(pixels.to_8_bits(kept, nodata))
    elif deep and pixels.stretches:
        if not is_tiff(data):
            raise ValueError(
                "16-bit colour of this format is read with 8 bits; save it as TIFF for "
                "data.stretch and data.percentiles"
            )
        return read_bands(data, pixels)
    # Pillow asks for RGBA first where entries of the palette are transparent.
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")
    return image.convert("RGB"), deep


def random_view(
    image: Image.Image, size: tuple[int, int], draw: np.random.Generator, min_scale: float
) -> Image.Image:
    """Crop a random part of an image, resize it, and mirror it with probability 1/2.

    This is the usual augmentation of prompt learning (CoOp), torchvision's `RandomResizedCrop`: the
    crop's share of the area is uniform in [min_scale, 1] and its aspect ratio log-uniform in
    [3/4, 4/3]. If ten draws do not fit into the image, the largest central crop with an allowed
    ratio is used.

    Args:
        image: an RGB image.
        size: width and height of the result in pixels.
        draw: generator of the random numbers. The caller keys it by image and view.
        min_scale: smallest share of the image's area, in (0, 1].

    Returns:
        The crop, resized with bicubic interpolation.
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
    # With `box`, the filter uses the pixels inside the crop only, as if it were cut out first.
    view = image.resize(size, Image.Resampling.BICUBIC, box=box)
    return view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else view


def readable_name(name: str) -> str:
    """Make a class name readable: 'DenseResidential' or 'dense_residential' -> 'dense residential'.

    Words are separated by spaces, underscores, hyphens or capitals; the result is in lower case.
    Accents are composed with their letters, since some file systems store them apart.
    """
    name = unicodedata.normalize("NFC", name)
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
    return " ".join(re.sub(r"[_\-\s]+", " ", spaced).split()).lower()


def name_key(name: str) -> str:
    """A key that all spellings of a name share.

    It is without case, spaces, underscores, hyphens and invisible characters. Accents, ligatures
    and wide letters have one form (NFKC), since some file systems store `é` as two characters.
    """
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())
    plain = folded.translate(_QUOTES)
    return re.sub(r"[_\-\s\u200b-\u200f\u2060\ufeff\u00ad]+", "", plain)


def hold_out_test(labels_N: NDArray[np.int64], fraction: float, seed: int) -> NDArray[np.int8]:
    """Hold out a share of every class for testing.

    Every class keeps at least one training image, and a class of two or more images gives at least
    one test image.

    Args:
        labels_N: the class of each image, or any other group to stratify by, such as the pair of
            class and domain.
        fraction: share of each class to hold out, in (0, 1).
        seed: seed of the experiment.

    Returns:
        `TRAIN` or `TEST` for each image.
    """
    split_N = np.full(len(labels_N), TRAIN, dtype=np.int8)
    rng = generator(seed, "test-split")
    for label in np.unique(labels_N):
        members = rng.permutation(np.flatnonzero(labels_N == label))
        # Halves are rounded up; Python's `round` would round 2.5 down and 3.5 up.
        wanted = max(1, int(np.floor(fraction * len(members) + 0.5)))
        split_N[members[: min(wanted, len(members) - 1)]] = TEST
    return split_N
