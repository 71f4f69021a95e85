"""Pixels of more than 8 bits, and files of more than three bands: how they become RGB.

Satellite and medical images are often stored so. A 12-bit image in a 16-bit file is nearly black if
the whole range of the file's format is mapped to 0..255, so the range is an option. A fixed one
holds for all images of a data set, which keeps their brightness comparable. Percentiles are taken
from each image and band, as in torchgeo's `percentile_normalization`, without the pixels that the
file declares to hold no data, as rasterio reads them.

Shape suffixes: H, W height and width, S bands.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import PREFIXES, ImageFileDirectory_v2

_BITS, _BANDS, _PLANES, _FORMAT = 258, 277, 284, 339  # numbers of TIFF's tags
_FLOAT = 3  # a value of _FORMAT
_NODATA = 42113  # GDAL's tag: the value of pixels without data, as text


@dataclass(frozen=True)
class Pixels:
    """How stored values become the 8 bits of three channels.

    Attributes:
        stretch: the values that become black and white, or nothing: then the whole range of 16
            bits is used.
        percentiles: those of an image's values that become black and white, for each band alone;
            or nothing.
        bands: the bands of a TIFF file, counted from 1, that become red, green and blue, or nothing
            for files with one or three.
    """

    stretch: tuple[float, ...] = ()
    bands: tuple[int, ...] = ()
    percentiles: tuple[float, ...] = ()

    @property
    def stretches(self) -> bool:
        """Whether a range is chosen, fixed or by percentiles."""
        return bool(self.stretch or self.percentiles)

    @property
    def key(self) -> tuple[str, ...]:
        """What distinguishes the decoded images of these options; empty for the defaults."""
        stretch = [f"stretch {self.stretch}"] if self.stretch else []
        percentiles = [f"percentiles {self.percentiles}"] if self.percentiles else []
        bands = [f"bands {self.bands}"] if self.bands else []
        return (*stretch, *bands, *percentiles)

    def to_8_bits(self, values: NDArray[Any], nodata: float | None = None) -> NDArray[np.uint8]:
        """Map stored values to 0..255.

        Args:
            values: (H, W) or (H, W, S).
            nodata: the value of pixels that percentiles leave out; they become black.

        Raises:
            ValueError: `stretch` is not set, and the values have no range of 16 bits.
        """
        if self.stretch:
            low, high = self.stretch
            # The division comes last, so that whole numbers stay exact.
            scaled = (np.nan_to_num(values.astype(np.float64)) - low) * 255 / (high - low)
            return np.clip(np.floor(scaled), 0, 255).astype(np.uint8)
        if self.percentiles:
            return self._between_percentiles(values, nodata)
        if values.dtype == np.uint8:
            return values
        if values.dtype.kind == "f":
            raise ValueError(
                "floating-point pixels have no fixed range; set data.stretch=[low, high] or "
                "data.percentiles=[2, 98], or save it with 8 or 16 bits"
            )
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(
                "pixel values exceed 16 bits; set data.stretch=[low, high] or "
                "data.percentiles=[2, 98], or save it with 8 or 16 bits"
            )
        return (values.astype(np.int64) // 257).astype(np.uint8)

    def _between_percentiles(self, values: NDArray[Any], nodata: float | None) -> NDArray[np.uint8]:
        known = values.astype(np.float64)
        known[~np.isfinite(known)] = np.nan
        if nodata is not None:
            known[known == nodata] = np.nan
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)  # of bands without any data
            low, high = np.nanpercentile(known, self.percentiles, axis=(0, 1))
        # torchgeo's small number: a band of one value becomes black.
        scaled = np.clip((known - low) / (high - low + 1e-5), 0, 1)
        mapped: NDArray[np.uint8] = np.floor(np.nan_to_num(scaled) * 255).astype(np.uint8)
        return mapped


def nodata_of(tags: Mapping[int, Any]) -> float | None:
    """The value of pixels without data, of a TIFF file's tags; None if there is none."""
    try:
        return float(str(tags[_NODATA]).strip("\0 "))
    except (KeyError, ValueError):
        return None


def is_tiff(data: bytes) -> bool:
    """Whether encoded bytes are a TIFF file."""
    return data[:4] in PREFIXES


def unread_tiff(data: bytes) -> str | None:
    """Advice on a TIFF file that Pillow does not read; None for other files."""
    if not is_tiff(data):
        return None
    try:
        # The header of a BigTIFF file is twice as long.
        directory = ImageFileDirectory_v2(data[: 16 if data[2] == 43 else 8])
        stream = io.BytesIO(data)
        stream.seek(directory.next)
        directory.load(stream)
        bands, bits = int(directory.get(_BANDS, 1)), directory.get(_BITS, (8,))[0]
        is_float = directory.get(_FORMAT, (1,))[0] == _FLOAT
        planes = directory.get(_PLANES, 1)
    except Exception:  # a damaged header: Pillow's own message is the better one
        return None
    if bands not in (1, 3) or planes != 1:
        return (
            f"a TIFF file with {bands} bands of {bits} bits; choose three: data.bands=[3, 2, 1] "
            "makes the third band red, the second green and the first blue"
        )
    if bits <= 16 and not is_float:
        return None
    kind = "floating-point values" if is_float else "values"
    chosen = "[1, 2, 3]" if bands == 3 else "[1, 1, 1]"
    return (
        f"a TIFF file with {kind} of {bits} bits; data.bands={chosen} and "
        "data.stretch=[low, high] (or data.percentiles=[2, 98]) together make it readable"
    )


def read_bands(data: bytes, pixels: Pixels) -> tuple[Image.Image, bool]:
    """Read three bands of a TIFF file.

    Args:
        data: content of the file.
        pixels: the bands, or nothing for the first three; and the range of values.

    Returns:
        The RGB image, and whether the values have more than 8 bits.

    Raises:
        ValueError: the file is no TIFF file or has fewer bands, or `tifffile` is not installed.
    """
    if not is_tiff(data):
        raise ValueError("data.bands chooses bands of TIFF files, and this is another format")
    try:
        import tifffile
    except ImportError:
        raise ValueError(
            "its bands are read by tifffile, which is not installed: pip install 'fedprompt[tiff]'"
        ) from None
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        series = file.series[0]
        values, axes = series.asarray(), series.axes
        nodata = nodata_of({tag.code: tag.value for tag in file.pages.first.tags})
    # Bands are the last axis (S), the first one, or pages of the file.
    values = np.moveaxis(values, (axes.index("Y"), axes.index("X")), (0, 1))
    values_HWS = values.reshape(*values.shape[:2], -1)
    bands = pixels.bands or (1, 2, 3)
    if values_HWS.shape[2] < max(bands):
        raise ValueError(f"the file has {values_HWS.shape[2]} bands, no band {max(bands)}")
    chosen_HW3 = values_HWS[:, :, [band - 1 for band in bands]]
    rgb_HW3 = np.ascontiguousarray(pixels.to_8_bits(chosen_HW3, nodata))
    return Image.fromarray(rgb_HW3), values.dtype.itemsize > 1
